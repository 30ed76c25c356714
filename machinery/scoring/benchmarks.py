"""Datasets to score on: the eight benchmarks as their makers distribute them, your own folders, the
toy world."""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from machinery.images import (IGNORE, ScoredImages, is_hidden, list_images, load_image, read_mask,
                              say)
from machinery.names import CLASSES, check_classes, normalise_name, read_classes, read_labels
from machinery.toy import ToyScenes

ILLEGAL = -2                                        # in a mask that was read: this may not occur


# --------------------------------------------------------------------------------------------------
# The eight benchmarks

class Masks(NamedTuple):
    """One form in which a benchmark's masks are found."""
    what: str                                       # in words
    folder: str                                     # under the data folder; or Context's JSON file
    suffix: str                                     # in place of the image's
    classes: dict                                   # every legal value -> class, or IGNORE
    usual: range = range(0)                         # values of which most masks hold one


class Benchmark(NamedTuple):
    images: list                                    # folders, one of which holds the images
    suffix: str                                     # of the images
    masks: list                                     # of Masks, in order of preference
    count: int                                      # images
    source: str
    background: str = "none"                        # see segment.parse_background
    split: str | None = None                        # file that lists the images; None = all images


def class_numbers(values, first=0, ignored=()):
    """`Masks.classes` for values that stand for the classes first, first + 1, ..., in order.
    ignored: values that are not scored."""
    return {value: i for i, value in enumerate(values, first)} | dict.fromkeys(ignored, IGNORE)


# Raw values of COCO's stuffthingmaps (ids - 1): 80 things, then 91 kinds of stuff.
COCO = [v for v in range(182) if v not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
# labelIds of Cityscapes' 19 classes.
CITYSCAPES = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
# 0 and the ids of Context's 59 classes among all 459.
CONTEXT = [0, 2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104,
           105, 113, 115, 144, 158, 159, 162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296,
           308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397, 415, 416, 420, 424, 427, 440, 445,
           454, 458]
THRESHOLD = "threshold:0.2"                         # our start; nobody published one: sweep it


def without_background(benchmark):
    """The same benchmark without its class 0."""
    masks = [form._replace(classes={value: c - 1 if c > 0 else IGNORE
                                    for value, c in form.classes.items()})
             for form in benchmark.masks]
    return benchmark._replace(masks=masks, background="none")


_VOC = Benchmark(
    images=["VOCdevkit/VOC2012/JPEGImages"], suffix=".jpg", count=1449, background=THRESHOLD,
    split="VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
    masks=[Masks("VOC masks", "VOCdevkit/VOC2012/SegmentationClass", ".png",
                 class_numbers(range(21), ignored=[255]), range(1))],
    source="VOCtrainval_11-May-2012.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2012")
_CONTEXT = Benchmark(
    images=["VOCdevkit/VOC2010/JPEGImages"], suffix=".jpg", count=5104, background=THRESHOLD,
    split="VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
    masks=[Masks("ids of trainval_merged.json", "VOCdevkit/VOC2010/trainval_merged.json", "",
                 class_numbers(CONTEXT), range(1)),
           Masks("converted masks of 60 classes", "VOCdevkit/VOC2010/SegmentationClassContext",
                 ".png", class_numbers(range(60)), range(1))],
    source="VOCtrainval_03-May-2010.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2010 and "
           "trainval_merged.json of https://sites.google.com/view/pasd")
_COCO_MASKS = ["coco_stuff164k/annotations/val2017", "coco/stuffthingmaps/val2017"]
_COCO = Benchmark(
    images=["coco_stuff164k/images/val2017", "coco/val2017"], suffix=".jpg", count=5000,
    masks=[*(Masks("raw stuffthingmaps", folder, ".png", class_numbers(COCO, ignored=[255]),
                   range(91, 182)) for folder in _COCO_MASKS),
           Masks("COCO-Stuff's train ids", _COCO_MASKS[0], "_labelTrainIds.png",
                 class_numbers(range(171), ignored=[255]), range(80, 171))],
    source="val2017.zip of https://cocodataset.org and stuffthingmaps_trainval2017.zip of "
           "https://github.com/nightrome/cocostuff")
# COCO-Object: unlabelled pixels and stuff are background.
_OBJECTS = {**dict.fromkeys([*COCO[80:], 255], 0), **class_numbers(COCO[:80], 1)}

BENCHMARKS = {
    "voc": _VOC,
    "voc20": without_background(_VOC),
    "context": _CONTEXT,
    "context59": without_background(_CONTEXT),
    "coco-object": _COCO._replace(
        background=THRESHOLD,
        masks=[*(form._replace(classes=_OBJECTS) for form in _COCO.masks[:2]),
               Masks("COCO-Object's masks", _COCO_MASKS[0], "_instanceTrainIds.png",
                     class_numbers(range(81)), range(1))]),
    "coco-stuff": _COCO,
    "cityscapes": Benchmark(
        images=["cityscapes/leftImg8bit/val"], suffix="_leftImg8bit.png", count=500,
        masks=[Masks("Cityscapes labelIds", "cityscapes/gtFine/val", "_gtFine_labelIds.png",
                     dict.fromkeys(range(34), IGNORE) | class_numbers(CITYSCAPES), range(19, 34)),
               Masks("Cityscapes trainIds", "cityscapes/gtFine/val", "_gtFine_labelTrainIds.png",
                     class_numbers(range(19), ignored=[255]), range(1))],
        source="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
               "https://www.cityscapes-dataset.com"),
    "ade20k": Benchmark(
        images=[f"{at}ADEChallengeData2016/images/validation" for at in ("", "ade/")],
        suffix=".jpg", count=2000,
        masks=[Masks("ADE20K masks", f"{at}ADEChallengeData2016/annotations/validation", ".png",
                     class_numbers(range(1, 151), ignored=[0])) for at in ("", "ade/")],
        source="ADEChallengeData2016.zip of http://sceneparsing.csail.mit.edu"),
}


# --------------------------------------------------------------------------------------------------
# Datasets

class MaskedImages(ScoredImages):
    """Images with masks from files.

    classes: C lists of names.
    files: [(name, image path, mask for `read_mask`)].
    masks: `Masks`, what the masks' values mean.
    without: classes that are neither scored nor predicted; their pixels are ignored.
    names: class file with other words and synonyms for the classes, line by line.
    benchmark: of BENCHMARKS, None = a folder of one's own.
    """

    def __init__(self, name, classes, files, masks, without=(), names=None, benchmark=None):
        known = [normalise_name(synonyms[0]) for synonyms in classes]
        without = [normalise_name(left_out) for left_out in without]
        if names:
            _, classes = read_labels(names)
        if len(classes) != len(known):
            raise ValueError(f"{names} has {len(classes)} classes; expected the {len(known)} of "
                             f"{name}")
        unknown = sorted(set(without) - set(known))
        if unknown:
            raise ValueError(f"{name} has no class {unknown[0]!r} to leave out; it has "
                             f"{', '.join(known)}")
        kept = [i for i, first in enumerate(known) if first not in without]
        self.name = name
        self.files = files
        self.masks = masks
        self.forms = benchmark.masks if benchmark else ()
        self.count = benchmark.count if benchmark else None
        self.classes = [classes[i] for i in kept]
        self.choices = {"masks": masks.what, "names": names and str(names), "without": without}
        if "background" in known and "background" not in without:
            self.background_class = kept.index(known.index("background"))
            own_words = ", ".join(self.classes[self.background_class])
            self.background = benchmark.background if benchmark else f"prompt:{own_words}"
        self.table = np.full(2 ** 16, ILLEGAL, np.int32)            # value in the file -> class
        for value, number in masks.classes.items():
            self.table[value] = kept.index(number) if number in kept else IGNORE

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        name, path, mask = self.files[i]
        image = load_image(path)
        mask = self.table[read_mask(mask)]
        if mask.shape != image.size[::-1] or (mask == ILLEGAL).any():
            raise ValueError(f"the mask of {path} has another size, or values that are no class; "
                             "run eval.py --check")
        return name, image, mask


def open_benchmark(name, root, names=None, without=()):
    """One of the eight benchmarks under root. Raises FileNotFoundError with the expected tree and
    its source; ValueError for a broken file."""
    benchmark = BENCHMARKS[name]
    root = Path(root)
    images = next((root / folder for folder in benchmark.images if (root / folder).is_dir()), None)
    files = []
    if images and (root / benchmark.masks[0].folder).is_file():
        masks = benchmark.masks[0]                  # the original, not what was converted from it
        files = read_context(root / masks.folder, images)
    elif images:
        stems = image_stems(benchmark, root, images)

        def mask_paths(form):
            return [root / form.folder / (stem + form.suffix) for stem in stems]

        found = [sum(path.is_file() for path in mask_paths(form)) for form in benchmark.masks]
        masks = benchmark.masks[int(np.argmax(found))]      # the form in which most are there
        if max(found):
            photos = [images / (stem + benchmark.suffix) for stem in stems]
            files = [*zip(stems, photos, mask_paths(masks))]
    if not files:
        forms = [str(root / form.folder) + f"/*{form.suffix}" * bool(form.suffix)
                 for form in benchmark.masks]
        split = f", {root / benchmark.split}" if benchmark.split else ""
        raise FileNotFoundError(
            f"no {name} under {root}: expected {root / benchmark.images[0]}/*{benchmark.suffix}, "
            f"{' or '.join(forms)}{split}; from {benchmark.source}")
    classes = read_classes(CLASSES / f"{name}.txt")
    return MaskedImages(name, classes, files, masks, without, names, benchmark)


def image_stems(benchmark, root, images):
    """Names of a benchmark's images without suffix, folders below `images` included."""
    if not benchmark.split:
        paths = [path.relative_to(images) for path in images.rglob(f"*{benchmark.suffix}")]
        return sorted(str(path)[:-len(benchmark.suffix)] for path in paths if not is_hidden(path))
    split = root / benchmark.split
    return split.read_text().split() if split.is_file() else []


def read_context(path, images):
    """[(name, image path, mask)] of the val images in Pascal Context's trainval_merged.json."""
    try:
        content = json.loads(path.read_text())
        shown = {image["image_id"]: image for image in content["images"]
                 if image["phase"] == "val"}
        codes = {image: [] for image in shown}
        for a in content["annos_segmentation"]:
            if a["image_id"] in codes:
                codes[a["image_id"]].append((a["category_id"], a["segmentation"]["counts"]))
        files = []
        for i, image in shown.items():
            stem = Path(image["file_name"]).stem
            mask = ((image["height"], image["width"]), codes[i])
            files.append((stem, images / f"{stem}.jpg", mask))
        return sorted(files)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is cut short, or is no trainval_merged.json "
                         f"({error!r})") from None


def open_folder(folder, names=None, without=(), ignore=(255,)):
    """Your own data: images/, masks/ (PNG of the same stem), classes.txt (a name per line).

    A mask's value is the line of classes.txt, from 0, or what stands before the names: "7: road,
    street". ignore: values that are not scored. Raises FileNotFoundError or ValueError.
    """
    folder = Path(folder)
    for part in ("images", "masks"):
        if not (folder / part).is_dir():
            raise FileNotFoundError(f"no folder {folder / part}; a segmentation folder holds "
                                    "images/, masks/ (PNG, value = class) and classes.txt (one "
                                    "name per line)")
    labels, classes = read_labels(folder / "classes.txt")
    check_classes(classes, folder / "classes.txt")
    if labels and not all(label.isdecimal() and int(label) < 2 ** 16 for label in labels):
        raise ValueError(f"{folder}/classes.txt: what stands before a colon must be a mask value, "
                         "0 to 65535")
    values = [int(label) for label in labels] if labels else range(len(classes))
    both = set(values) & set(ignore)
    if both:
        raise ValueError(f"{folder}: the value {min(both)} is a class and ignored; name other "
                         "values with --ignore")
    paths = list_images(folder / "images")
    if not paths:
        raise FileNotFoundError(f"no images in {folder / 'images'}")
    alone = sorted({path.name for path in (folder / "masks").glob("*.png")
                    if not is_hidden(path.name)} - {f"{path.stem}.png" for path in paths})
    if alone:
        say(f"{len(alone)} masks in {folder / 'masks'} have no image and are left out, for example "
            f"{alone[0]}")
    files = [(path.stem, path, folder / "masks" / f"{path.stem}.png") for path in paths]
    masks = Masks(f"masks by {folder}/classes.txt", "", "", class_numbers(values, ignored=ignore))
    return MaskedImages(str(folder), classes, files, masks, without, names)


def open_dataset(name, without=(), names=None, root="data", ignore=(255,)):
    """The dataset called "toy", a benchmark, or a segmentation folder.

    without, names: see `MaskedImages`. root: folder of the benchmarks. ignore: see `open_folder`.
    Raises FileNotFoundError or ValueError.
    """
    if name == "toy":
        if without or names:
            raise ValueError("--without and --names are for photographs; the toy world has its own "
                             "classes")
        return ToyScenes()
    if name in BENCHMARKS:
        return open_benchmark(name, root, names, without)
    if not Path(name).is_dir():
        raise FileNotFoundError(f"unknown dataset {name!r}; expected toy, {', '.join(BENCHMARKS)}, "
                                "or a folder with images/, masks/ and classes.txt")
    return open_folder(name, names, without, ignore)
