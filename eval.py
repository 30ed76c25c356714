"""Score a trained model: mean intersection over union on masks that it never saw.

    python eval.py --dataset voc                        # one of the eight benchmarks, under data/
    python eval.py --dataset all                        # the whole table
    python eval.py --dataset FOLDER                     # your own: images/, masks/, classes.txt
    torchrun --nproc_per_node 8 eval.py --dataset all   # the same numbers, bit for bit

prints the IoU of each class and their mean, and writes them with the whole protocol as JSON beside the checkpoint.
Pixels are counted over the whole dataset in one confusion matrix, rows = truth, columns = prediction. Masks are read as
their makers distribute them and checked before anything is scored. In this file: the measures, the datasets, the check,
a model on a dataset, pictures and tables, the command line.
"""
import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from concepts import CLASSES, check_classes, read_classes
from data import IMAGE_SUFFIXES, ToyScenes, load_image, to_pixels
from segment import (SLIDING, add_model_args, embed, grid, newest_model, open_model, overlay, parse_background,
                     pick_device, put_background, segment_image)

IGNORE, ILLEGAL = -1, -2                            # of a mask that was read: not scored, and what may not be


# ---------------------------------------------------------------------------------------------------------------------
# The measures

def confusion_matrix(prediction, target, num_classes, ignore_index=255):
    """Count pixels by (truth, prediction). Both: integer tensors or arrays of one shape. Returns (C, C) int64.

    Pixels whose truth is ignore_index cost nothing. Raises ValueError for any other value outside 0..C-1, which would
    otherwise be a wrongly converted mask that scores low in silence.
    """
    prediction, target = torch.as_tensor(prediction).flatten().long(), torch.as_tensor(target).flatten().long()
    if prediction.shape != target.shape:
        raise ValueError(f"prediction has {len(prediction)} pixels, truth {len(target)}; expected as many")
    kept = target != ignore_index
    prediction, target = prediction[kept], target[kept]
    for name, values in (("truth", target), ("prediction", prediction)):
        if len(values) and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise ValueError(f"the {name} has values {int(values.min())}..{int(values.max())}; expected "
                             f"0..{num_classes - 1}, or {ignore_index} to ignore")
    return torch.bincount(target * num_classes + prediction, minlength=num_classes ** 2).view(num_classes, num_classes)


def scores(matrix):
    """IoU per class, mIoU, mAcc and aAcc, in 0..1, of a confusion matrix with truth in rows.

    IoU_k = right / (truth + predicted - right). A class neither there nor predicted is nan and does not count in the
    mean; one predicted but not there counts as 0 in mIoU and not at all in mAcc.
    """
    matrix = torch.as_tensor(matrix).double()
    right, truth, predicted = matrix.diag(), matrix.sum(1), matrix.sum(0)
    iou = right / (truth + predicted - right)
    return {"IoU": iou.tolist(), "mIoU": iou.nanmean().item(), "mAcc": (right / truth).nanmean().item(),
            "aAcc": (right.sum() / truth.sum()).item()}


# ---------------------------------------------------------------------------------------------------------------------
# The eight benchmarks, as their makers distribute them

class Masks(NamedTuple):
    """One form in which a benchmark's masks are found."""
    what: str                                       # in words
    folder: str                                     # under the data folder; or a file, Pascal Context's JSON
    suffix: str                                     # in place of the image's
    classes: dict                                   # value in the file -> class, or IGNORE; no other value may occur
    usual: range | tuple = ()                       # values of which at least half the masks hold one


class Benchmark(NamedTuple):
    images: list                                    # folders, of which one holds the images
    suffix: str
    split: str | None                               # file that lists the images; None = all that are there
    masks: tuple                                    # of Masks, in order of preference
    count: int                                      # images
    background: str                                 # our choice, see `parse_background`; none = it is not scored
    source: str
    mistakes: dict = {}                             # what else such files have been seen to hold -> values


def numbered(wanted, first=0, ignored=()):
    """Masks.classes: wanted values are the classes first, first + 1, ...; ignored ones are not scored."""
    return {**{value: i for i, value in enumerate(wanted, first)}, **dict.fromkeys(ignored, IGNORE)}


COCO = [v for v in range(182) if v not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]    # ids - 1: 80 things, 91 stuff
CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]     # labelIds of the 19 classes
CONTEXT = [0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158,
           159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368,
           397, 415, 416, 420, 424, 427, 440, 445, 454, 458]        # 0 and the ids of the 59 classes among all 459

THRESHOLD = "threshold:0.2"                         # nobody's published value for this method: sweep it on training images
GREY = {0, 15, 19, 34, 38, 52, 53, 57, 72, 75, 76, 90, 94, 109, 113, 128, 133, 147, 151, 220}      # of VOC's colours
UNLABELLED = "masks whose zero label was taken away (0 became 255, the rest one less); take the original files"

_voc = {"images": ["VOCdevkit/VOC2012/JPEGImages"], "suffix": ".jpg", "count": 1449,
        "split": "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
        "source": "VOCtrainval_11-May-2012.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2012",
        "mistakes": {UNLABELLED: {*range(20), 255}, "the grey levels of the palette's colours; read the PNG's indices, "
                     "without convert('L')": GREY}}
_context = {"images": ["VOCdevkit/VOC2010/JPEGImages"], "suffix": ".jpg", "count": 5104,
            "split": "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt", "mistakes": {UNLABELLED: {*range(59), 255}},
            "source": "VOCtrainval_03-May-2010.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2010 and "
                      "trainval_merged.json of https://sites.google.com/view/pasd"}
_coco = {"images": ["coco_stuff164k/images/val2017", "coco/val2017"], "suffix": ".jpg", "count": 5000, "split": None,
         "source": "val2017.zip of https://cocodataset.org and stuffthingmaps_trainval2017.zip of "
                   "https://github.com/nightrome/cocostuff",
         "mistakes": {"COCO-Object's masks; name them _instanceTrainIds.png": set(range(81)),
                      "COCO-Stuff's train ids; name them _labelTrainIds.png": {*range(171), 255},
                      "the raw stuffthingmaps; name them .png alone": {*COCO, 255}}}
_maps = ["coco_stuff164k/annotations/val2017", "coco/stuffthingmaps/val2017"]
_merged, _png = "VOCdevkit/VOC2010/trainval_merged.json", "VOCdevkit/VOC2010/SegmentationClassContext"

BENCHMARKS = {
    "voc": Benchmark(**_voc, background=THRESHOLD, masks=(
        Masks("VOC masks", "VOCdevkit/VOC2012/SegmentationClass", ".png", numbered(range(21), ignored=[255]), [0]),)),
    "voc20": Benchmark(**_voc, background="none", masks=(
        Masks("VOC masks", "VOCdevkit/VOC2012/SegmentationClass", ".png", numbered(range(1, 21), ignored=[0, 255]), [0]),)),
    "context": Benchmark(**_context, background=THRESHOLD, masks=(
        Masks("ids of trainval_merged.json", _merged, "", numbered(CONTEXT), [0]),
        Masks("converted masks of 60 classes", _png, ".png", numbered(range(60)), [0]))),
    "context59": Benchmark(**_context, background="none", masks=(
        Masks("ids of trainval_merged.json", _merged, "", numbered(CONTEXT[1:], ignored=[0]), [0]),
        Masks("converted masks of 60 classes", _png, ".png", numbered(range(1, 60), ignored=[0]), [0]))),
    "coco-object": Benchmark(**_coco, background=THRESHOLD, masks=(        # unlabelled pixels are background here
        *(Masks("raw stuffthingmaps", folder, ".png", {**dict.fromkeys([*COCO[80:], 255], 0), **numbered(COCO[:80], 1)},
                range(91, 182)) for folder in _maps),
        Masks("COCO-Object's masks", _maps[0], "_instanceTrainIds.png", numbered(range(81)), [0]))),
    "coco-stuff": Benchmark(**_coco, background="none", masks=(
        *(Masks("raw stuffthingmaps", folder, ".png", numbered(COCO, ignored=[255]), range(91, 182)) for folder in _maps),
        Masks("COCO-Stuff's train ids", _maps[0], "_labelTrainIds.png", numbered(range(171), ignored=[255]),
              range(80, 171)))),
    "cityscapes": Benchmark(
        ["cityscapes/leftImg8bit/val"], "_leftImg8bit.png", None, count=500, background="none", masks=(
            Masks("Cityscapes labelIds", "cityscapes/gtFine/val", "_gtFine_labelIds.png",
                  {**dict.fromkeys(range(34), IGNORE), **numbered(CITYSCAPES)}, range(19, 34)),
            Masks("Cityscapes trainIds", "cityscapes/gtFine/val", "_gtFine_labelTrainIds.png",
                  numbered(range(19), ignored=[255]), [0])),
        source="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of https://www.cityscapes-dataset.com",
        mistakes={"Cityscapes trainIds; name them _labelTrainIds.png": {*range(19), 255},
                  "Cityscapes labelIds; name them _labelIds.png": set(range(34))}),
    "ade20k": Benchmark(
        [f"{at}ADEChallengeData2016/images/validation" for at in ("ade/", "")], ".jpg", None, count=2000, background="none",
        masks=tuple(Masks("ADE20K masks", f"{at}ADEChallengeData2016/annotations/validation", ".png",
                          numbered(range(1, 151), ignored=[0])) for at in ("ade/", "")),
        source="ADEChallengeData2016.zip of http://sceneparsing.csail.mit.edu", mistakes={UNLABELLED: {*range(150), 255}}),
}


def decode_runs(size, counts):
    """Compressed run-length code of COCO's kind -> bool mask of size (H, W).

    Runs of 0 and 1 take turns, column by column. A run is written five bits a character, the lowest first, with 32 for
    "goes on"; from the fourth on it is the difference from the run two before.
    """
    runs, number, shift = [], 0, 0
    for character in counts.encode():
        bits = character - 48
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            number -= (1 << shift) * (bits >> 4 & 1)                    # the last character's highest bit is the sign
            runs.append(number + (runs[-2] if len(runs) > 2 else 0))
            number = shift = 0
    flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    if flat.size != size[0] * size[1]:
        raise ValueError(f"a run-length code covers {flat.size} pixels, expected {size[0]} x {size[1]}")
    return flat.reshape(size[1], size[0]).T


def read_mask(mask):
    """Values of a mask, (H, W) int32, of a file or of (size, [(value, run-length code)]). Palette indices are kept.

    Raises FileNotFoundError or ValueError.
    """
    if isinstance(mask, tuple):
        size, parts = mask
        pixels = np.zeros(size, np.int32)
        for value, counts in parts:                 # in the order of the file, later ones on top
            pixels[decode_runs(size, counts)] = value
        return pixels
    if not mask.is_file():
        raise FileNotFoundError(f"no mask {mask}")
    try:
        with Image.open(mask) as file:
            pixels = np.array(file).astype(np.int32)            # not converted, so palette indices stay
    except Exception as error:                      # Pillow raises almost anything on a broken file
        raise ValueError(f"{mask} is no readable mask ({error})") from None
    if pixels.ndim != 2:
        raise ValueError(f"{mask} has {pixels.shape[-1]} channels, expected one value per pixel: it holds colours, as of a "
                         "palette that was expanded, in place of classes")
    return pixels


class MaskedImages:
    """Images with masks to score on. Items: (name, RGB image, mask (H, W) int32 of classes or IGNORE).

    classes: C lists of names. files: [(name, image path, mask for `read_mask`)]. masks: `Masks`. count: how many images
    there should be, None = any. background: what stands for the class "background", see `parse_background`. without:
    classes that are neither scored nor predicted; their pixels are ignored. names: class file with other words and
    synonyms for the classes, line by line.
    """

    def __init__(self, name, classes, files, masks, count=None, background=None, mistakes=None, without=(), names=None):
        first = [names[0] for names in classes]
        classes = read_labels(names)[1] if names else classes
        if len(classes) != len(first):
            raise ValueError(f"{names} has {len(classes)} classes; expected the {len(first)} of {name}")
        unknown = set(without) - set(first)
        if unknown:
            raise ValueError(f"{name} has no class {sorted(unknown)[0]!r} to leave out")
        kept = [i for i, known in enumerate(first) if known not in without]
        if not kept:
            raise ValueError(f"{name}: every class is left out, expected at least one to score")
        self.name, self.files, self.masks, self.count, self.mistakes = name, files, masks, count, mistakes or {}
        self.classes = [classes[i] for i in kept]
        self.background_class = next((i for i, k in enumerate(kept) if first[k] == "background"), None)
        self.choices = {"masks": masks.what, "names": names and str(names), "without": list(without)}     # for the result
        self.background = "none" if self.background_class is None else background or "prompt:" + ", ".join(
            self.classes[self.background_class])
        self.table = np.full(2 ** 16, ILLEGAL, np.int32)                                # value in the file -> class
        for value, known in masks.classes.items():
            self.table[value] = kept.index(known) if known in kept else IGNORE

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        name, path, mask = self.files[i]
        image, mask = load_image(path), self.table[read_mask(mask)]
        problem = self.problem(i, mask.shape, image.size[::-1])
        if problem or (mask == ILLEGAL).any():
            raise ValueError(problem or f"the mask of {path} holds values that are no class; run eval.py --check")
        return name, image, mask

    def problem(self, i, mask_size, image_size):
        """What is wrong with the sizes (H, W) of image i and its mask, in words, or None."""
        if mask_size != image_size:
            return (f"the mask of {self.files[i][1]} has {mask_size[0]} x {mask_size[1]} pixels (height x width), the image "
                    f"{image_size[0]} x {image_size[1]}; expected the same size")


def read_labels(path):
    """A class file whose lines may begin with "label: ". Returns (labels or None, classes)."""
    lines = Path(path).read_text("utf-8-sig", "surrogateescape").splitlines() if Path(path).is_file() else []
    lines = [line for line in lines if line.strip()]
    if not any(":" in line for line in lines):
        return None, read_classes(path)
    bare = [line for line in lines if ":" not in line]
    labels = [line.partition(":")[0].strip() for line in lines]
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if bare or twice:
        raise ValueError(f"{path}: " + (f"the label {twice[0]!r} is there twice" if not bare else f"{bare[0]!r} has no "
                         'label before its name; expected "label: name" in every line or in none'))
    return labels, [[name.strip() for name in line.partition(":")[2].split(",")] for line in lines]


def open_benchmark(name, root, names=None, without=()):
    """One of the eight benchmarks under root. Raises FileNotFoundError with the expected tree and its source."""
    benchmark, root = BENCHMARKS[name], Path(root)
    missing = (f"no {name} under {root}: expected {root / benchmark.images[0]}/*{benchmark.suffix}, "
               + " or ".join(str(root / m.folder) + (f"/*{m.suffix}" if m.suffix else "") for m in benchmark.masks)
               + (f", {root / benchmark.split}" if benchmark.split else "") + f"; from {benchmark.source}")
    images = next((root / folder for folder in benchmark.images if (root / folder).is_dir()), None)
    merged = {m.folder for m in benchmark.masks if not m.suffix and (root / m.folder).is_file()}
    if images is None or not merged and not any((root / m.folder).is_dir() for m in benchmark.masks if m.suffix):
        raise FileNotFoundError(missing)
    if merged:                                      # the original annotations rather than what was made of them
        masks = benchmark.masks[0]
        try:
            content = json.loads((root / masks.folder).read_text())
            shown = {image["image_id"]: image for image in content["images"] if image["phase"] == "val"}
            parts = {image: [] for image in shown}
            for a in content["annos_segmentation"]:
                if a["image_id"] in parts:
                    parts[a["image_id"]].append((a["category_id"], a["segmentation"]["counts"]))
            files = sorted((stem, images / f"{stem}.jpg", ((image["height"], image["width"]), parts[i]))
                           for i, image in shown.items() for stem in [Path(image["file_name"]).stem])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{root / masks.folder} is cut short, or is no trainval_merged.json ({error!r})") from None
    else:
        if benchmark.split:
            if not (root / benchmark.split).is_file():
                raise FileNotFoundError(missing)
            stems = (root / benchmark.split).read_text().split()
        else:
            stems = sorted(str(p.relative_to(images))[:-len(benchmark.suffix)] for p in images.rglob(f"*{benchmark.suffix}"))
        found = [sum((root / m.folder / (stem + m.suffix)).is_file() for stem in stems) for m in benchmark.masks]
        masks = benchmark.masks[int(np.argmax(found))]          # the form in which most are there
        files = [(stem, images / (stem + benchmark.suffix), root / masks.folder / (stem + masks.suffix)) for stem in stems]
    if not files:
        raise FileNotFoundError(missing)
    return MaskedImages(name, read_classes(CLASSES / f"{name}.txt"), files, masks, benchmark.count, benchmark.background,
                        benchmark.mistakes, without, names)


def open_folder(folder, names=None, without=(), ignore=(255,)):
    """Your own data: images/, masks/ (PNG of the same stem), classes.txt (a name per line, synonyms after commas).

    A mask's value is the line of classes.txt, from 0, or what stands before the names: "7: road, street". ignore: values
    that are not scored.
    """
    folder = Path(folder)
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"no folder {folder / part}; a segmentation folder holds images/, masks/ "
                                    "(PNG, value = class) and classes.txt (one name per line)")
    labels, classes = read_labels(folder / "classes.txt")
    check_classes(classes, folder / "classes.txt")
    try:
        values = range(len(classes)) if labels is None else [int(label) for label in labels]
        if not all(0 <= value < 2 ** 16 for value in values):
            raise ValueError
    except ValueError:
        raise ValueError(f"{folder}/classes.txt: what stands before a colon must be a mask value, 0 to 65535") from None
    both = set(values) & set(ignore)
    if both:
        raise ValueError(f"{folder}: the value {min(both)} is a class and ignored; name other values with --ignore")
    paths = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise FileNotFoundError(f"no images in {folder / 'images'}")
    files = [(path.stem, path, folder / "masks" / f"{path.stem}.png") for path in paths]
    masks = Masks(f"masks by {folder}/classes.txt", "", "", numbered(values, ignored=ignore))
    return MaskedImages(str(folder), classes, files, masks, without=without, names=names)


def open_dataset(name, without=(), names=None, root="data", ignore=(255,)):
    """The dataset called "toy", a benchmark, or a segmentation folder. Raises FileNotFoundError when it is none.

    without, names: see `MaskedImages`. root: folder of the benchmarks. ignore: see `open_folder`.
    """
    if name == "toy":
        if without or names:
            raise ValueError("--without and --names are for photographs; the toy world has its own classes")
        return ToyScenes()
    if name in BENCHMARKS:
        return open_benchmark(name, root, names, without)
    if not Path(name).is_dir():
        raise FileNotFoundError(f"unknown dataset {name!r}; expected toy, {', '.join(BENCHMARKS)}, or a folder with "
                                "images/, masks/ and classes.txt")
    return open_folder(name, names, without, ignore)


# ---------------------------------------------------------------------------------------------------------------------
# The check before scoring

def check(dataset, indices=None, workers=8):
    """Look at every mask. Returns (problems, a list of str; pixels of each class, then ignored ones, (C + 1,) int64).

    indices: of the images to look at, None = all. Image count, mask sizes and values are verified.
    """
    def inspect(i):
        _, path, mask = dataset.files[i]
        try:
            raw = read_mask(mask)
            if not path.is_file():
                raise FileNotFoundError(f"no image {path}")
            with Image.open(path) as image:
                image.load()                        # the whole file is there
                size = image.size[::-1 if image.getexif().get(274, 1) < 5 else 1]       # 274: how the camera was held
            return dataset.problem(i, raw.shape, size), np.bincount(raw.ravel(), minlength=2 ** 16)
        except Exception as error:                  # Pillow raises almost anything on a broken file
            return f"{path}: {error}", np.zeros(2 ** 16, int)

    indices = range(len(dataset)) if indices is None else indices
    problems, pixels, usual, usual_values = [], np.zeros(2 ** 16, int), 0, list(dataset.masks.usual)
    strange = {}                                    # value that may not occur -> a mask that has it
    with ThreadPoolExecutor(workers) as pool:
        for i, (problem, count) in zip(indices, tqdm(pool.map(inspect, indices), total=len(indices), desc="checking",
                                                     unit=" masks", disable=None)):
            problems += [problem] if problem else []
            pixels += count
            usual += bool(count[usual_values].any())
            illegal = np.flatnonzero((count > 0) & (dataset.table == ILLEGAL)).tolist()
            strange.update(dict.fromkeys(illegal, dataset.files[i][0]))
    bad = len(problems)
    problems[5:] = [f"... and {bad - 5} more like these"] if bad > 5 else []
    what, found = dataset.masks.what, set(np.flatnonzero(pixels).tolist())
    if strange:
        some = ", ".join(map(str, sorted(strange)[:5])) + ", ..." * (len(strange) > 5)
        problems.append(f"value {some} (in {strange[min(strange)]}) cannot occur in {what}; "
                        + likely_mistake(dataset, found))
    elif usual_values and len(indices) == len(dataset) and 2 * usual < len(indices) - bad:
        problems.append(f"only {usual} of {len(indices)} masks hold a value of {min(usual_values)}..{max(usual_values)}, as "
                        f"{what} do; " + likely_mistake(dataset, found))
    if dataset.count not in (None, len(dataset)):
        problems.append(f"{len(dataset)} images, expected {dataset.count}; complete the data, or score what is there with "
                        "--allow-partial, which marks the result")
    classes = dataset.table[:len(pixels)]
    counted = [pixels[classes == i].sum() for i in range(len(dataset.classes))]
    return problems, np.array([*counted, pixels[classes == IGNORE].sum()])


def likely_mistake(dataset, found):
    """In words, what masks with the set of values found may be."""
    right = dataset.masks.classes
    likely = [f"they look like {what}" for what, known in dataset.mistakes.items() if found <= known and known != set(right)]
    for shift in (1, -1):
        kept = all(value - shift in right or right.get(value) == IGNORE for value in found)
        if kept or all((value - shift) % 256 in right for value in found if value < 256) and max(found) < 256:
            likely.append(f"the labels look shifted by {shift:+d}")
    return ", or ".join(likely) or "expected " + ", ".join(map(str, [*right][:12])) + ", ..." * (len(right) > 12)


# ---------------------------------------------------------------------------------------------------------------------
# A model on a dataset

def share_of(total):
    """Indices of this process: every world-th, none twice, none made up to fill."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return range(rank, total, world)


def first_process():
    return not dist.is_initialized() or dist.get_rank() == 0


def sum_counts(counts):
    """int64 counts added up over processes."""
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


def evaluate(model, dataset, protocol, batch=8, pictures=0, limit=None, workers=0, thresholds=None, alone=False):
    """Score a model. Returns (result, pictures).

    model: anything with `embed_classes` and `patch_scores`, like SimZSS. dataset: `MaskedImages` or alike. protocol:
    templates, class_embedding, short_side, window, stride and background (default: the dataset's). batch: windows at a
    time. pictures: of how many images to return [photo, truth, prediction, overlay]. limit: score the first images only.
    thresholds: rising (K,) tensor; adds "sweep", the mIoU with each as background threshold, from the same pass.
    With several processes each takes its share of the images, and all return the same numbers; alone: this one takes
    all, whatever others do.
    """
    C, place, names = len(dataset.classes), getattr(dataset, "background_class", None), [c[0] for c in dataset.classes]
    swept = thresholds is not None
    if swept and place is None:
        raise ValueError(f'--sweep-background: {dataset.name} has no class "background"')
    protocol = {"background": THRESHOLD if swept else getattr(dataset, "background", "none"), **protocol,
                **getattr(dataset, "choices", {})}
    kind, value = parse_background(protocol["background"])
    if swept and kind == "prompt":
        raise ValueError(f"--sweep-background is for threshold:T, found {protocol['background']}")
    if (kind == "none") != (place is None):
        raise ValueError(f"--background {protocol['background']}: {dataset.name} " + (
            'scores the class "background"; choose threshold:T or prompt:"word, word"' if kind == "none" else
            'has no class "background" to score; only none makes sense'))
    classes = check_classes([value if kind == "prompt" and i == place else c for i, c in enumerate(dataset.classes)
                             if i != place or kind == "prompt"], f"{dataset.name} with background {protocol['background']}")
    if swept:
        hits = torch.zeros(C, C - 1, len(thresholds) + 1, dtype=torch.int64)    # truth, best of the others, its score
    embeddings = embed(model, classes, protocol)                                        # (C or C - 1, S, D)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    mine, sums = (range(total), lambda counts: counts) if alone else (share_of(total), sum_counts)
    matrix, shown, start = torch.zeros(C, C, dtype=torch.int64), [], time.time()
    loader = DataLoader(Subset(dataset, mine), batch_size=None, num_workers=workers)
    bar = tqdm(loader, desc="scoring", unit=" images", disable=True if mine.start else None)
    for i, (_, image, truth) in zip(mine, bar):
        mask, score = segment_image(model, image, embeddings, batch=batch, **{key: protocol[key] for key in SLIDING})
        truth = torch.as_tensor(truth)
        if swept:
            kept = truth != IGNORE
            cell = torch.bucketize(score[kept], thresholds)                             # background from this one on
            cell += len(hits[0, 0]) * (mask[kept].long() + (C - 1) * truth[kept].long())
            hits += torch.bincount(cell, minlength=hits.numel()).view_as(hits)
        if len(classes) < C:
            mask = put_background(mask, score, value, place)
        matrix += confusion_matrix(mask, truth, C, IGNORE)
        if i < pictures:
            shown.append([image, overlay(image, truth, names, 1), overlay(image, mask, names, 1), overlay(image, mask, names)])
    sums(matrix)
    if not matrix.any():
        raise ValueError(f"{dataset.name} has no pixel to score: all are ignored")
    seconds = time.time() - start
    result = {**scores(matrix), "classes": names, "images": total,
              "partial": total != (getattr(dataset, "count", None) or len(dataset)), "protocol": protocol,
              **getattr(model, "checkpoint", {}), "backbone": getattr(getattr(model, "backbone", None), "config", None),
              "seconds": round(seconds, 1), "images_per_second": round(total / seconds, 2), "processes": mine.step,
              **made_with()}
    if swept:
        sums(hits)
        result["sweep"], others = [], [c for c in range(C) if c != place]
        for i, threshold in enumerate(thresholds.tolist()):
            matrix[:, others] = hits[..., i + 1:].sum(-1)
            matrix[:, place] = hits[..., :i + 1].sum((1, 2))
            result["sweep"].append([round(threshold, 6), scores(matrix)["mIoU"]])
    return result, shown


def made_with():
    """The commit of this code and the versions of what it runs on."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        commit += " and changes" * bool(subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        commit = None                               # not a checkout
    versions = {name: distribution.version for distribution in distributions()
                if (name := distribution.metadata["Name"]) in ("torch", "timm", "open_clip_torch", "numpy", "pillow")}
    return {"commit": commit, "date": datetime.date.today().isoformat(),
            "versions": {"python": platform.python_version(), **versions}}


# ---------------------------------------------------------------------------------------------------------------------
# Zero-shot classification: whole images against class names

class LabelledImages:
    """An image folder: one sub-folder per class. Items: (pixels uint8 (3, size, size), class).

    names: class file, lines in the order of the sorted sub-folders or beginning with "sub-folder: "; None = the
    sub-folders' own names. The short side is resized to size, bicubic, and the middle cut out.
    """

    def __init__(self, folder, names=None, size=224):
        self.name, self.size = str(folder), size
        folders = sorted(p.name for p in Path(folder).iterdir() if p.is_dir()) if Path(folder).is_dir() else []
        if not folders:
            raise FileNotFoundError(f"no class folders in {folder}; expected {folder}/CLASS/*.jpg, one folder per class"
                                    " (ImageNet's validation images, sorted into folders: https://image-net.org)")
        labels, classes = read_labels(names) if names else (None, [[f.replace("_", " ")] for f in folders])
        labels = labels or folders
        if len(labels) != len(classes) or not set(folders) <= set(labels):
            raise ValueError(f"{names} has {len(classes)} classes; expected those of the {len(folders)} folders of {folder}, "
                             f"such as {sorted(set(folders) - set(labels) or folders)[0]}")
        self.classes = classes
        self.files = [(path, i) for i, label in enumerate(labels) if label in set(folders)
                      for path in sorted((Path(folder) / label).iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]
        if not self.files:
            raise FileNotFoundError(f"no images in the class folders of {folder}")

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        path, known = self.files[i]
        image = load_image(path)
        scale = self.size / min(image.size)
        w, h = (max(self.size, round(side * scale)) for side in image.size)
        left, top = (w - self.size) // 2, (h - self.size) // 2
        image = image.resize((w, h), Image.BICUBIC).crop((left, top, left + self.size, top + self.size))
        return to_pixels(image), known


@torch.no_grad()
def classify(model, dataset, protocol, limit=None, workers=0, batch=64):
    """Top-1 and top-5 of the class token against the embedded class names. Returns a result."""
    embeddings = embed(model, dataset.classes, protocol)                                # (C, S, D)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    some = np.linspace(0, len(dataset) - 1, total).astype(int)          # of all classes: images lie class by class
    right, start, mine = torch.zeros(2, dtype=torch.int64), time.time(), share_of(total)
    loader = DataLoader(Subset(dataset, some[mine]), batch_size=batch, num_workers=workers)
    for pixels, known in tqdm(loader, desc="classifying", unit=" batches", disable=True if mine.start else None):
        similarity = model.image_scores(pixels.to(embeddings.device), embeddings)       # (B, C)
        best = similarity.topk(min(5, len(embeddings)), dim=1).indices.cpu() == known[:, None]
        right += torch.stack([best[:, 0].sum(), best.sum()])
    seconds, (top1, top5) = time.time() - start, sum_counts(right).tolist()
    return {"top1": top1 / total, "top5": top5 / total, "images": total, "partial": total != len(dataset),
            "classes": [names[0] for names in dataset.classes],
            "protocol": {**{key: protocol[key] for key in ("templates", "class_embedding")}, "size": dataset.size},
            **getattr(model, "checkpoint", {}), "backbone": getattr(getattr(model, "backbone", None), "config", None),
            "seconds": round(seconds, 1), "images_per_second": round(total / seconds, 2), "processes": mine.step,
            **made_with()}


# ---------------------------------------------------------------------------------------------------------------------
# Tables and pictures

def print_result(result, most=10):
    """The table on the terminal, best class first, and the line that counts last."""
    iou = np.array(result["IoU"])
    order = np.argsort(-np.nan_to_num(iou, nan=-1), kind="stable").tolist()
    there = [i for i in order if not np.isnan(iou[i])]
    shown = order if len(order) <= 3 * most else [*there[:most], None, *there[-most:]]
    for i in shown:
        value = "" if i is None else "   absent" if np.isnan(iou[i]) else f"{iou[i]:9.2%}"
        print(f"  {'...' if i is None else result['classes'][i]:<24}{value}")
    print(f"mIoU {result['mIoU']:.2%}   mAcc {result['mAcc']:.2%}   aAcc {result['aAcc']:.2%}   "
          f"({'only ' * result['partial']}{result['images']} images, {result['images_per_second']} images/s)")


def write_result(path, result):
    """As JSON, whole or not at all; a class that is nowhere has null for its IoU."""
    if "IoU" in result:
        result = {**result, "IoU": [None if np.isnan(v) else v for v in result["IoU"]]}
    partial = Path(f"{path}.partial")
    partial.write_text(json.dumps(result, indent=1))
    os.replace(partial, path)


def plot(path, curves, across, up, size=(640, 400)):
    """Draw curves, {name: [(x, y)]}, with axes called across and up, into a PNG; x that spans a lot by its logarithm."""
    points = np.array([p for curve in curves.values() for p in curve], float)
    log = points[:, 0].min() > 0 and points[:, 0].max() > 15 * points[:, 0].min()
    points[:, 0] = np.log10(points[:, 0]) if log else points[:, 0]
    low, high = points.min(0), points.max(0)
    span = np.where(high > low, high - low, 1)
    left, right, top, bottom = 70, size[0] - 20, 20 + 18 * len(curves), size[1] - 50
    canvas, font = Image.new("RGB", size, "white"), ImageFont.load_default(size=13)
    draw = ImageDraw.Draw(canvas)

    def place(point):
        x, y = ((np.log10(point[0]) if log else point[0], point[1]) - low) / span
        return left + x * (right - left), bottom - y * (bottom - top)

    for tick in np.linspace(0, 1, 5):
        value = low + tick * span
        value[0] = 10 ** value[0] if log else value[0]
        x, y = place(value)
        draw.line((x, top, x, bottom), fill="#dddddd")
        draw.line((left, y, right, y), fill="#dddddd")
        number = f"{value[0]:.3g}" if value[0] < 1000 else f"{value[0]:,.0f}"
        draw.text((x, bottom + 14), number, fill="black", font=font, anchor="mm")
        draw.text((left - 6, y), f"{value[1]:.3g}", fill="black", font=font, anchor="rm")
    draw.text(((left + right) / 2, size[1] - 14), across, fill="black", font=font, anchor="mm")
    draw.text((6, 10), up, fill="black", font=font, anchor="lm")
    for i, (name, curve) in enumerate(curves.items()):
        colour = ("#1f5fa8", "#c4401c", "#2b8a3e", "#8a4fb0", "#b8860b", "#444444")[i % 6]
        spots = [place(point) for point in curve]
        draw.line(spots, fill=colour, width=2)
        for x, y in spots if len(spots) <= 20 else ():
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
        draw.text((right, 12 + 18 * i), name, fill=colour, font=font, anchor="rm")
    canvas.save(path)


# What does not tell one variant from another: it follows from the rest, or changes no result but by chance.
ASIDE = {"seed", "output", "resume", "device", "workers", "protocol", "step", "pass_pairs", "micro_batch", "images",
         "cache_features", "save_minutes", "timeout_minutes", "max_bad", "eval_data", "eval_names", "eval_without"}


def compare(paths, picture):
    """Print mean and spread over seeds of the mIoU of runs, a row for each set of the settings in which they differ.

    paths: result files of train.py or eval.py. Draws a curve into picture if they differ in one number, or in several
    that tell every two rows apart, as window and stride do; it is drawn over the first of these.
    """
    variants = []
    for path in paths:
        try:
            result = json.loads(Path(path).read_text())
            variants.append(({"dataset": result["dataset"], "scored": result["images"],
                              **(result.get("training") or {"checkpoint": result["checkpoint_sha256"]}),
                              **result["protocol"]}, 100 * result["mIoU"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no segmentation result of train.py or eval.py ({error!r})") from None
    keys = [key for key in {key: 0 for settings, _ in variants for key in settings} if key not in ASIDE
            and len({json.dumps(settings.get(key)) for settings, _ in variants}) > 1]
    rows = {}
    for settings, miou in variants:
        rows.setdefault(tuple(settings.get(key) if np.isscalar(settings.get(key)) else json.dumps(settings.get(key))
                              for key in keys), []).append(miou)
    numeric = all(isinstance(value, (int, float)) for row in rows for value in row)
    heads = ["lambda" if key == "weight" else key for key in keys] or ["runs"]
    print("  ".join(f"{head:>16}" for head in heads) + "      mIoU    +-   runs")
    for row in sorted(rows, key=None if numeric else str):
        values = np.array(rows[row])
        spread = f"{values.std(ddof=1):5.2f}" if len(values) > 1 else "    -"
        print("  ".join(f"{value!s:>16}" for value in row or ["all"]),
              f" {values.mean():8.2f} {spread}   {', '.join(f'{value:.1f}' for value in values)}")
    if keys and numeric and all(len(set(column)) == len(rows) for column in zip(*rows)):
        plot(picture, {"mean": [(row[0], np.mean(rows[row])) for row in sorted(rows)],
                       "lowest": [(row[0], min(rows[row])) for row in sorted(rows)],
                       "highest": [(row[0], max(rows[row])) for row in sorted(rows)]}, heads[0], "mIoU, %")
        print(f"plotted in {picture}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Score a trained model on a dataset with masks, or on an image folder.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", help=f"{', '.join(BENCHMARKS)}, all of these, toy, or a folder with images/, masks/ and "
                      "classes.txt; with --task classification imagenet or a folder of class folders")
    what.add_argument("--compare", nargs="+", metavar="JSON", help="results of runs to tabulate: mean and spread over seeds")
    parser.add_argument("--task", choices=["segmentation", "classification"], default="segmentation",
                        help="(default: %(default)s)")
    parser.add_argument("--data", default="data", help="folder that holds the benchmarks (default: %(default)s)")
    parser.add_argument("--background", help='threshold:T = pixels whose cosine similarity to every class is at most T, '
                        'prompt:"word, word" = what these words win, none = not scored (default: see README)')
    parser.add_argument("--sweep-background", action="store_true",
                        help="mIoU over the background threshold, as table and plot")
    parser.add_argument("--without", nargs="*", default=[], help="classes neither scored nor predicted, such as background")
    parser.add_argument("--names", help="class file with your own wording and synonyms of the dataset's classes, in order")
    parser.add_argument("--ignore", type=int, nargs="*", default=[255], help="values of a folder's masks that are not "
                        "scored (default: 255)")
    parser.add_argument("--check", action="store_true", help="only look at the data; scoring always does so first")
    parser.add_argument("--allow-partial", action="store_true", help="score a benchmark of which images are missing")
    parser.add_argument("--limit", type=int, help="score the first N images only; the result is marked as partial")
    parser.add_argument("--save-images", type=int, default=0, metavar="N", help="of the first N images, save photo, truth, "
                        "prediction and overlay side by side")
    parser.add_argument("--output", help="JSON file to write, or folder for eval_DATASET.json (default: beside the "
                        "checkpoint)")
    parser.add_argument("--workers", type=int, default=min(4, os.cpu_count() - 1),
                        help="processes that load images (default: %(default)s)")
    add_model_args(parser)
    args = parser.parse_args(argv)
    for name in ("limit", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    if args.task == "classification" and (args.check or args.background or args.sweep_background or args.without
                                          or args.save_images):
        parser.error("--check, --background, --sweep-background, --without and --save-images are for segmentation")
    return args


def output_path(args, name):
    """Where the result goes. Raises OSError, before hours of scoring, for a place where nothing can be written."""
    path = Path(args.output or args.checkpoint)
    path = path if args.output or path.is_dir() else path.parent
    if path.suffix != ".json" or args.dataset == "all":
        path = path / f"eval_{Path(name).resolve().name}{f'_first{args.limit}' if args.limit else ''}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"nothing can be written to {path.parent}; name another place with --output")
    return path


def verified(args):
    """The datasets asked for. Returns ({name: dataset} of those that pass their check, what keeps the others away).

    The first process checks for all.
    """
    datasets, failed = {}, []
    for name in BENCHMARKS if args.dataset == "all" else [args.dataset]:
        try:
            datasets[name] = dataset = open_dataset(name, args.without, args.names, args.data, args.ignore)
        except (ValueError, OSError) as error:
            failed.append(str(error))
            continue
        if name == "toy":                           # drawn, not read
            continue
        problems = []
        if first_process():
            problems, pixels = check(dataset, range(min(args.limit or len(dataset), len(dataset))))
            problems = [p for p in problems if not (args.allow_partial and "--allow-partial" in p)]
        if sum_counts(torch.tensor([len(problems)])):
            failed.append(f"{name} failed its check: " + ("; ".join(problems) or "the first process says why"))
            del datasets[name]
        elif args.check and first_process():
            print(f"{name}: {len(dataset)} images with masks, {dataset.masks.what}, {pixels[-1] / pixels.sum():.2%} of the "
                  "pixels are not scored")
            for names, count in zip(dataset.classes, pixels):
                print(f"  {names[0]:<24}{count / pixels.sum():9.3%}" + ("   absent" if not count else ""))
    if len(failed) > 1:
        failed.insert(0, f"{len(failed)} of {len(BENCHMARKS)} benchmarks cannot be scored")
    return datasets, failed


def segmentation(args, model, protocol):
    """Score the datasets asked for, and print the table of all. Raises ValueError, at the end, when some could not be."""
    datasets, failed = verified(args)
    results = {name: score_dataset(args, name, dataset, model, protocol) for name, dataset in datasets.items()}
    if args.dataset == "all" and first_process():
        for name, result in results.items():
            print(f"{name:<14}{result['mIoU']:8.2%}   {'only ' * result['partial']}{result['images']} images, background "
                  f"{result['protocol']['background'][:40]}")
        if not failed:
            print(f"{'mean':<14}{np.mean([result['mIoU'] for result in results.values()]):8.2%}")
    if failed:
        raise ValueError("; ".join(failed))


def score_dataset(args, name, dataset, model, protocol):
    """Score one dataset and write what was asked for. Returns the result."""
    path, thresholds = output_path(args, name), None
    if args.dataset != "all" or dataset.background_class is not None:       # of all eight, some have no background
        protocol = {**protocol, **({"background": args.background} if args.background else {})}
        thresholds = torch.arange(-100, 101) / 100 if args.sweep_background else None
    result, shown = evaluate(model, dataset, protocol, args.batch, args.save_images, args.limit, args.workers, thresholds)
    if shown:
        folder = path.with_name(f"{path.stem}_images")
        folder.mkdir(exist_ok=True)
        for i, row in zip(share_of(args.save_images), shown):
            grid([row]).save(folder / f"{i:04d}.png")
    if first_process():
        print_result(result)
        write_result(path, {"dataset": name, "training": getattr(model, "config", {}).get("training", {}), **result})
        print(f"written to {path}" + (f", pictures in {folder}" if shown else ""))
        if thresholds is not None:
            show_sweep(result["sweep"], name, path.with_suffix(".png"))
    return result


def show_sweep(curve, name, picture):
    """Print mIoU around the best background threshold and draw it over all that change it. curve: [(threshold, mIoU)]."""
    best = max(curve, key=lambda point: point[1])
    near = [f"{t:.2f} {miou:.2%}" for t, miou in curve if abs(t - best[0]) < 0.055]
    print(f"background threshold, mIoU: {', '.join(near)}\nbest at {best[0]:.2f}: {best[1]:.2%}. Choose it on training "
          "images, not on those that you report")
    moving = [p for p in curve if any(q[1] != p[1] for q in curve if abs(q[0] - p[0]) < 0.015)]
    plot(picture, {name: [(t, 100 * miou) for t, miou in moving or curve]}, "background threshold (cosine similarity)",
         "mIoU, %")
    print(f"plotted in {picture}")


def classification(args, model, protocol):
    """Score on an image folder and write the result."""
    imagenet, path = args.dataset == "imagenet", output_path(args, args.dataset)
    dataset = LabelledImages(Path(args.data) / "imagenet" / "val" if imagenet else args.dataset,
                             args.names or (CLASSES / "imagenet.txt" if imagenet else None),
                             model.config["training"].get("image_size", 224))
    result = classify(model, dataset, protocol, args.limit, args.workers)
    if first_process():
        print(f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   ({'only ' * result['partial']}{result['images']} "
              f"images, {len(dataset.classes)} classes, {result['images_per_second']} images/s)")
        write_result(path, {"dataset": args.dataset, "names": args.names, **result})
        print(f"written to {path}")


def main(argv=None):
    args = parse_args(argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            dist.init_process_group("gloo")         # only counts travel
        if args.compare:
            return compare(args.compare, Path(args.output or "comparison.png"))
        if args.check:
            failed = verified(args)[1]
            if failed:
                raise ValueError("; ".join(failed))
            return
        if pick_device(args.device) == "cuda":      # one GPU per process
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        args.checkpoint = args.checkpoint or newest_model()
        (classification if args.task == "classification" else segmentation)(args, *open_model(args))
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        message = str(error).strip()
        if "Original Traceback" in message:         # from a data worker: its own line is the last
            message = message.splitlines()[-1].partition(": ")[2]
        sys.exit(f"error: {message}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
