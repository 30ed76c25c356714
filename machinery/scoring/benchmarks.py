"""Datasets to score on: the eight benchmarks as their makers distribute them, your own folders, the
toy world."""
import json
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from machinery.images import IGNORE, IMAGE_SUFFIXES, ScoredImages, load_image, read_mask
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
    usual: range | tuple = ()                       # values of which most masks hold one


class Benchmark(NamedTuple):
    images: list                                    # folders, one of which holds the images
    suffix: str
    split: str | None                               # file that lists the images; None = all images
    masks: tuple                                    # of Masks, in order of preference
    count: int                                      # images
    background: str                                 # see segment.parse_background
    source: str


def numbered(values, first=0, ignored=()):
    """Masks.classes: the values are the classes first, first + 1, ...; ignored ones not scored."""
    return {**{value: i for i, value in enumerate(values, first)},
            **dict.fromkeys(ignored, IGNORE)}


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

_VOC = {"images": ["VOCdevkit/VOC2012/JPEGImages"], "suffix": ".jpg", "count": 1449,
        "split": "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
        "source": "VOCtrainval_11-May-2012.tar of http://host.robots.ox.ac.uk/pascal/VOC/voc2012"}
_VOC_MASKS = ("VOC masks", "VOCdevkit/VOC2012/SegmentationClass", ".png")
_CONTEXT = {"images": ["VOCdevkit/VOC2010/JPEGImages"], "suffix": ".jpg", "count": 5104,
            "split": "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt",
            "source": "VOCtrainval_03-May-2010.tar of "
                      "http://host.robots.ox.ac.uk/pascal/VOC/voc2010 and trainval_merged.json of "
                      "https://sites.google.com/view/pasd"}
_CONTEXT_JSON = ("ids of trainval_merged.json", "VOCdevkit/VOC2010/trainval_merged.json", "")
_CONTEXT_PNG = ("converted masks of 60 classes", "VOCdevkit/VOC2010/SegmentationClassContext",
                ".png")
_COCO = {"images": ["coco_stuff164k/images/val2017", "coco/val2017"], "suffix": ".jpg",
         "count": 5000, "split": None,
         "source": "val2017.zip of https://cocodataset.org and stuffthingmaps_trainval2017.zip of "
                   "https://github.com/nightrome/cocostuff"}
_COCO_FOLDERS = ["coco_stuff164k/annotations/val2017", "coco/stuffthingmaps/val2017"]
# COCO-Object: unlabelled pixels and stuff are background.
_OBJECTS = {**dict.fromkeys([*COCO[80:], 255], 0), **numbered(COCO[:80], 1)}

BENCHMARKS = {
    "voc": Benchmark(
        **_VOC, background=THRESHOLD,
        masks=(Masks(*_VOC_MASKS, numbered(range(21), ignored=[255]), [0]),)),
    "voc20": Benchmark(
        **_VOC, background="none",
        masks=(Masks(*_VOC_MASKS, numbered(range(1, 21), ignored=[0, 255]), [0]),)),
    "context": Benchmark(
        **_CONTEXT, background=THRESHOLD,
        masks=(Masks(*_CONTEXT_JSON, numbered(CONTEXT), [0]),
               Masks(*_CONTEXT_PNG, numbered(range(60)), [0]))),
    "context59": Benchmark(
        **_CONTEXT, background="none",
        masks=(Masks(*_CONTEXT_JSON, numbered(CONTEXT[1:], ignored=[0]), [0]),
               Masks(*_CONTEXT_PNG, numbered(range(1, 60), ignored=[0]), [0]))),
    "coco-object": Benchmark(
        **_COCO, background=THRESHOLD,
        masks=(*(Masks("raw stuffthingmaps", folder, ".png", _OBJECTS, range(91, 182))
                 for folder in _COCO_FOLDERS),
               Masks("COCO-Object's masks", _COCO_FOLDERS[0], "_instanceTrainIds.png",
                     numbered(range(81)), [0]))),
    "coco-stuff": Benchmark(
        **_COCO, background="none",
        masks=(*(Masks("raw stuffthingmaps", folder, ".png", numbered(COCO, ignored=[255]),
                       range(91, 182)) for folder in _COCO_FOLDERS),
               Masks("COCO-Stuff's train ids", _COCO_FOLDERS[0], "_labelTrainIds.png",
                     numbered(range(171), ignored=[255]), range(80, 171)))),
    "cityscapes": Benchmark(
        ["cityscapes/leftImg8bit/val"], "_leftImg8bit.png", None, count=500, background="none",
        masks=(Masks("Cityscapes labelIds", "cityscapes/gtFine/val", "_gtFine_labelIds.png",
                     {**dict.fromkeys(range(34), IGNORE), **numbered(CITYSCAPES)}, range(19, 34)),
               Masks("Cityscapes trainIds", "cityscapes/gtFine/val", "_gtFine_labelTrainIds.png",
                     numbered(range(19), ignored=[255]), [0])),
        source="leftImg8bit_trainvaltest.zip and gtFine_trainvaltest.zip of "
               "https://www.cityscapes-dataset.com"),
    "ade20k": Benchmark(
        [f"{at}ADEChallengeData2016/images/validation" for at in ("ade/", "")], ".jpg", None,
        count=2000, background="none",
        masks=tuple(Masks("ADE20K masks", f"{at}ADEChallengeData2016/annotations/validation",
                          ".png", numbered(range(1, 151), ignored=[0])) for at in ("ade/", "")),
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
        if not kept:
            raise ValueError(f"{name}: every class is left out, expected at least one to score")
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
        problem = self.size_problem(i, mask.shape, image.size[::-1])
        if problem:
            raise ValueError(problem)
        if (mask == ILLEGAL).any():
            raise ValueError(f"the mask of {path} holds values that are no class; run eval.py "
                             "--check")
        return name, image, mask

    def size_problem(self, i, mask_size, image_size):
        """What is wrong with the sizes (H, W) of image i and its mask, in words, or None."""
        if mask_size != image_size:
            return (f"the mask of {self.files[i][1]} has {mask_size[0]} x {mask_size[1]} pixels "
                    f"(height x width), the image {image_size[0]} x {image_size[1]}; expected the "
                    "same size")


def open_benchmark(name, root, names=None, without=()):
    """One of the eight benchmarks under root. Raises FileNotFoundError with the expected tree and
    its source; ValueError for a broken file."""
    benchmark = BENCHMARKS[name]
    root = Path(root)
    images = next((root / folder for folder in benchmark.images if (root / folder).is_dir()), None)
    has_json = any((root / masks.folder).is_file() for masks in benchmark.masks)
    has_folder = any((root / masks.folder).is_dir() for masks in benchmark.masks)
    if images is None or not (has_json or has_folder):
        raise FileNotFoundError(expected_tree(name, benchmark, root))
    if has_json:                                    # the original, rather than what was made of it
        masks = benchmark.masks[0]
        files = read_context(root / masks.folder, images)
    else:
        stems = image_stems(benchmark, root, images)
        if stems is None:
            raise FileNotFoundError(expected_tree(name, benchmark, root))
        found = [sum((root / masks.folder / (stem + masks.suffix)).is_file() for stem in stems)
                 for masks in benchmark.masks]
        masks = benchmark.masks[int(np.argmax(found))]      # the form in which most are there
        files = [(stem, images / (stem + benchmark.suffix),
                  root / masks.folder / (stem + masks.suffix)) for stem in stems]
    if not files:
        raise FileNotFoundError(expected_tree(name, benchmark, root))
    classes = read_classes(CLASSES / f"{name}.txt")
    return MaskedImages(name, classes, files, masks, without, names, benchmark)


def expected_tree(name, benchmark, root):
    masks = [str(root / m.folder) + (f"/*{m.suffix}" if m.suffix else "") for m in benchmark.masks]
    split = f", {root / benchmark.split}" if benchmark.split else ""
    return (f"no {name} under {root}: expected {root / benchmark.images[0]}/*{benchmark.suffix}, "
            f"{' or '.join(masks)}{split}; from {benchmark.source}")


def image_stems(benchmark, root, images):
    """Names of the images without suffix, folders below `images` included; None = no list."""
    if not benchmark.split:
        paths = images.rglob(f"*{benchmark.suffix}")
        return sorted(str(path.relative_to(images))[:-len(benchmark.suffix)] for path in paths)
    split = root / benchmark.split
    return split.read_text().split() if split.is_file() else None


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
    if classes[0][0].startswith("#"):
        raise ValueError(f"{folder}/classes.txt begins with {classes[0][0]!r}; comments would "
                         "count as classes, take them out")
    try:
        values = range(len(classes)) if labels is None else [int(label) for label in labels]
        if not all(0 <= value < 2 ** 16 for value in values):
            raise ValueError
    except ValueError:
        raise ValueError(f"{folder}/classes.txt: what stands before a colon must be a mask value, "
                         "0 to 65535") from None
    both = set(values) & set(ignore)
    if both:
        raise ValueError(f"{folder}: the value {min(both)} is a class and ignored; name other "
                         "values with --ignore")
    files = folder_files(folder)
    masks = Masks(f"masks by {folder}/classes.txt", "", "", numbered(values, ignored=ignore))
    return MaskedImages(str(folder), classes, files, masks, without, names)


def folder_files(folder):
    """[(name, image path, mask path)] of a segmentation folder. Raises ValueError for names that
    do not go together."""
    paths = sorted(p for p in (folder / "images").iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
    below = [p for p in (folder / "images").rglob("*")
             if p.suffix.lower() in IMAGE_SUFFIXES and p.parent != folder / "images"]
    if not paths:
        raise FileNotFoundError(f"no images in {folder / 'images'}"
                                + f"; {len(below)} lie in sub-folders, move them up" * bool(below))
    if below:
        raise ValueError(f"{len(below)} images lie in sub-folders of {folder / 'images'}, such as "
                         f"{below[0]}; move them up, sub-folders are not searched")
    twice = [stem for stem, times in Counter(path.stem for path in paths).items() if times > 1]
    if twice:
        raise ValueError(f"{folder / 'images'} has two images called {twice[0]}, and one mask "
                         "would serve both; rename one")
    files = []
    for path in paths:
        mask = folder / "masks" / f"{path.stem}.png"
        if not mask.is_file():
            other = sorted((folder / "masks").glob(f"{path.stem}*"))
            if other:
                raise FileNotFoundError(f"no mask {mask}, but {other[0].name} is there; expected "
                                        "PNGs with the images' names")
        files.append((path.stem, path, mask))
    return files


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
