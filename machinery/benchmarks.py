"""The eight benchmarks, as their makers distribute them, and their check."""
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from machinery.classes import CLASSES, check_classes, read_classes, read_labels
from machinery.images import IMAGE_SUFFIXES, load_image, read_mask
from machinery.toy import ToyScenes

IGNORE, ILLEGAL = -1, -2                            # of a mask that was read: not scored, and what may not be



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
