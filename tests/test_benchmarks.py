"""The eight benchmarks in their makers' layouts, tiny: what is read, what is checked, and that the
truth scores 100 %.

Each pixel of a photo has a colour made from the name of its class, and the `Oracle` is a model that
reads names from colours. So a wrong value, class, name or position anywhere between the files and
the score lowers the score.
"""
import json
import zlib
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from machinery.contract import METHODS, PRETRAINED, Method, Protocol
from machinery.images import IGNORE, decode_runs
from machinery.names import CLASSES, normalise_name, read_classes
from machinery.scoring.benchmarks import BENCHMARKS, ILLEGAL, THRESHOLD, open_benchmark
from machinery.scoring.pictures import palette
from machinery.settings import setting

# (height, width) of the photos; their short side is the protocol's
SIZES = [(16, 21), (23, 16), (16, 16)]

# Written by hand: values that a mask may hold and the classes that they stand for; None is not
# scored
VOC = {0: "background", 1: "aeroplane", 15: "person", 20: "tvmonitor", 255: None}
CONTEXT = {0: "background", 1: "aeroplane", 19: "computer", 35: "mountain", 59: "wood"}
CONTEXT_IDS = {0: "background", 2: "aeroplane", 9: "bag", 85: "computer", 259: "mountain",
               458: "wood"}
STUFF = {0: "person", 10: "fire hydrant", 12: "stop sign", 89: "toothbrush", 91: "banner",
         181: "wood", 255: None}
STUFF_TRAIN = {0: "person", 10: "fire hydrant", 11: "stop sign", 79: "toothbrush", 80: "banner",
               170: "wood", 255: None}
OBJECT = {**STUFF, 91: "background", 181: "background", 255: "background"}
OBJECT_TRAIN = {0: "background", 1: "person", 11: "fire hydrant", 12: "stop sign",
                80: "toothbrush"}
CITY = {0: None, 3: None, 7: "road", 8: "sidewalk", 17: "pole", 26: "car", 29: None, 31: "train",
        33: "bicycle"}
CITY_TRAIN = {0: "road", 1: "sidewalk", 5: "pole", 13: "car", 16: "train", 18: "bicycle", 255: None}
ADE = {0: None, 1: "wall", 2: "building", 75: "computer", 149: "clock", 150: "flag"}

VOC_PLACES = ("VOCdevkit/VOC2012/JPEGImages/{}.jpg", "VOCdevkit/VOC2012/SegmentationClass/{}.png",
              "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt")
CONTEXT_PLACES = ("VOCdevkit/VOC2010/JPEGImages/{}.jpg",
                  "VOCdevkit/VOC2010/SegmentationClassContext/{}.png",
                  "VOCdevkit/VOC2010/ImageSets/SegmentationContext/val.txt")
MERGED = (CONTEXT_PLACES[0], "VOCdevkit/VOC2010/trainval_merged.json", None)
STUFF_PLACES = ("coco_stuff164k/images/val2017/{}.jpg",
                "coco_stuff164k/annotations/val2017/{}.png", None)
STUFF_CONVERTED = (STUFF_PLACES[0],
                   "coco_stuff164k/annotations/val2017/{}_labelTrainIds.png", None)
OBJECT_CONVERTED = (STUFF_PLACES[0],
                    "coco_stuff164k/annotations/val2017/{}_instanceTrainIds.png", None)
COCO_PLACES = ("coco/val2017/{}.jpg", "coco/stuffthingmaps/val2017/{}.png", None)
CITY_PLACES = ("cityscapes/leftImg8bit/val/ulm/ulm_{}_leftImg8bit.png",
               "cityscapes/gtFine/val/ulm/ulm_{}_gtFine_labelIds.png", None)
CITY_CONVERTED = (CITY_PLACES[0],
                  "cityscapes/gtFine/val/ulm/ulm_{}_gtFine_labelTrainIds.png", None)
ADE_PLACES = ("ADEChallengeData2016/images/validation/{}.jpg",
              "ADEChallengeData2016/annotations/validation/{}.png", None)


def unscored(values, *classes):
    return {value: None if name in classes else name for value, name in values.items()}


LAYOUTS = {                                         # benchmark, values, (photos, masks, split)
    "voc": ("voc", VOC, VOC_PLACES),
    "voc20": ("voc20", unscored(VOC, "background"), VOC_PLACES),
    "context, JSON": ("context", CONTEXT_IDS, MERGED),
    "context, PNG": ("context", CONTEXT, CONTEXT_PLACES),
    "context59, JSON": ("context59", unscored(CONTEXT_IDS, "background"), MERGED),
    "context59, PNG": ("context59", unscored(CONTEXT, "background"), CONTEXT_PLACES),
    "coco-stuff, raw": ("coco-stuff", STUFF, STUFF_PLACES),
    "coco-stuff, raw, coco/": ("coco-stuff", STUFF, COCO_PLACES),
    "coco-stuff, train ids": ("coco-stuff", STUFF_TRAIN, STUFF_CONVERTED),
    "coco-object, raw": ("coco-object", OBJECT, STUFF_PLACES),
    "coco-object, raw, coco/": ("coco-object", OBJECT, COCO_PLACES),
    "coco-object, converted": ("coco-object", OBJECT_TRAIN, OBJECT_CONVERTED),
    "cityscapes, labelIds": ("cityscapes", CITY, CITY_PLACES),
    "cityscapes, trainIds": ("cityscapes", CITY_TRAIN, CITY_CONVERTED),
    "ade20k": ("ade20k", ADE, ADE_PLACES),
    "ade20k, ade/": ("ade20k", ADE, tuple(place and "ade/" + place for place in ADE_PLACES)),
}


def code(name):
    """24 bits for a class's name, 0 for the background."""
    return 0 if name == "background" else zlib.crc32(name.encode()) % 2 ** 24


@dataclass
class OracleSettings:
    """An Oracle has nothing to set."""


@dataclass
class OracleProtocol(Protocol):
    templates: str = setting("plain", "")
    short_side: int = setting(16, "")
    window: int = setting(16, "")
    stride: int = setting(8, "")


class Oracle(Method):
    """A method that gives the truth back as its prediction. It needs no checkpoint: it is there as
    --checkpoint oracle."""
    name = "oracle"
    Settings = OracleSettings
    Protocol = OracleProtocol
    looked = 0                                      # windows seen

    def embed_classes(self, classes, templates=("{}",)):
        codes = [[[code(names[0])]] for names in classes]
        return torch.tensor(codes, dtype=torch.float64)                             # (C, 1, 1)

    def patch_scores(self, pixels, embeddings):
        Oracle.looked += len(pixels)
        r, g, b = pixels.long().unbind(1)                                           # (B, H, W)
        return ((r << 16 | g << 8 | b)[:, None] == embeddings).float(), pixels.shape[-2:]


METHODS["oracle"] = "test_benchmarks.Oracle"
PRETRAINED["oracle"] = ("oracle", "")


def encode_runs(mask):
    """bool (H, W) -> COCO's compressed run-length code, by its definition."""
    flat = mask.T.flatten().astype(int)
    ends = [*np.flatnonzero(np.diff(flat)) + 1, len(flat)]
    runs = np.diff([0, *ends]).tolist()
    runs = [0, *runs] if flat[0] else runs
    text = ""
    for i, run in enumerate(runs):
        rest = run - runs[i - 2] if i > 2 else run
        while True:
            bits = rest & 31
            rest >>= 5
            last = rest == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if last else 32))
            if last:
                break
    return text


def painted(values, mask):
    """The photo of a mask: every class in its name's colour, what is not scored in noise."""
    noise = np.random.default_rng(1).integers(0, 2 ** 24, mask.shape)
    codes = np.select([mask == value for value in values],
                      [noise if name is None else np.full(mask.shape, code(name))
                       for name in values.values()])
    pixels = np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def save(image, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, format="PNG")                  # also under .jpg, so that colours are exact


def write_merged(path, masks):
    """Pascal Context's JSON: later annotations on top of earlier ones, crowds too, and images of
    training."""
    images = []
    annotations = []
    for i, mask in enumerate([*masks, np.full((5, 5), 458)]):
        stem = f"2008_{i:06d}"
        images.append({"image_id": 900 - i, "file_name": f"{stem}.jpg", "height": mask.shape[0],
                       "width": mask.shape[1], "phase": "val" if i < len(masks) else "train",
                       "date_captured": "31-Jan-2008"})
        bottom, *rest = [value for value in np.unique(mask).tolist() if value]
        parts = [(bottom, mask > 0, 1), *((value, mask == value, 0) for value in rest)]
        for value, part, crowd in parts:
            runs = {"size": list(mask.shape), "counts": encode_runs(part)}
            annotations.append({"image_id": 900 - i, "category_id": value, "iscrowd": crowd,
                                "id": len(annotations), "segmentation": runs})
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"images": images, "annos_segmentation": annotations, "categories": []}
    path.write_text(json.dumps(content))


def plant(root, layout, change=lambda mask: mask):
    """Write a layout's files with three photos; change: what went wrong with the masks. Returns its
    benchmark."""
    benchmark, values, (photo, mask_place, split) = LAYOUTS[layout]
    rng = np.random.default_rng(0)
    masks = []
    stems = [f"2008_{i:06d}" for i in range(len(SIZES))]
    for stem, (H, W) in zip(stems, SIZES):
        mask = rng.choice(list(values), (H, W))
        mask.flat[:len(values)] = list(values)      # each value is in each mask
        save(painted(values, mask), root / photo.format(stem))
        masks.append(mask)
        if "{}" in mask_place:
            wrong = change(mask.astype(np.uint8))
            wrong = wrong if isinstance(wrong, Image.Image) else Image.fromarray(wrong)
            save(wrong, root / mask_place.format(stem))
    if "{}" not in mask_place:
        write_merged(root / mask_place, masks)
    if split:
        (root / split).parent.mkdir(parents=True)
        (root / split).write_bytes("\r\n".join(stems).encode())         # as written on Windows
        save(Image.new("RGB", (9, 9)), root / photo.format("2008_training"))
    return benchmark


@pytest.fixture
def oracle(monkeypatch):
    """The Oracle; three images are all of a benchmark."""
    Oracle.looked = 0
    for name, benchmark in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, benchmark._replace(count=3))
    return Oracle


def arguments(root, dataset, *more):
    return ["--dataset", dataset, "--data", str(root), "--checkpoint", "oracle",
            "--output", str(root / "out" / "r.json"), "--workers", "0", "--device", "cpu",
            *map(str, more)]


def result_of(root, dataset, *more):
    eval.main(arguments(root, dataset, *more))
    return json.loads((root / "out" / "r.json").read_text())


def known_ious(result):
    """{class: its IoU} of the classes that are somewhere."""
    return {name: iou for name, iou in zip(result["classes"], result["IoU"]) if iou is not None}


# --------------------------------------------------------------------------------------------------
# What is right

@pytest.mark.parametrize("layout", LAYOUTS)
def test_truth_scores_100(layout, tmp_path, oracle, capsys):
    """In each layout, raw or converted, the truth given back as prediction scores 100 % in every
    class that is there, by name; what is not scored has no influence; classes that are nowhere are
    null; the result is not partial."""
    benchmark = plant(tmp_path, layout)
    result = result_of(tmp_path, benchmark)
    there = {name for name in LAYOUTS[layout][1].values() if name}
    assert known_ious(result) == dict.fromkeys(there, 1)
    assert result["mIoU"] == result["mAcc"] == result["aAcc"] == 1
    assert not result["partial"] and result["images"] == 3
    assert "mIoU 100.00%" in capsys.readouterr().out
    background = THRESHOLD if "background" in there else "none"
    assert result["protocol"]["background"] == background


PLANT = {"potted plant": "pottedplant"}


@pytest.mark.parametrize("benchmark, authors, changes", [
    ("voc", "ovsegmentor", {"dining table": "table", "potted plant": "plant",
                            "tvmonitor": "monitor"}),
    ("context", "ovsegmentor", {"aeroplane": "airplane", "potted plant": "plant",
                                "tvmonitor": "monitor"}),
    ("voc20", "pixelclip", {**PLANT, "dining table": "diningtable"}),
    ("context59", "pixelclip", {**PLANT, "table": "diningtable"}),
    ("coco-stuff", "pixelclip", {"wall other": "wall-other", "desk stuff": "desk-stuff"})])
def test_names_that_other_authors_use(benchmark, authors, changes):
    """A file for --names has the benchmark's classes in their order, and its authors' words."""
    ours = read_classes(CLASSES / f"{benchmark}.txt")
    theirs = read_classes(CLASSES / "names" / f"{authors}-{benchmark}.txt")
    assert len(theirs) == len(ours)
    found = {a: b for [a], [b] in zip(ours, theirs) if a != b}
    assert changes.items() <= found.items()
    assert all(normalise_name(b) == a for a, b in found.items() if a not in changes)


@pytest.mark.parametrize("layout, classes", [
    ("voc", {0: 0, 1: 1, 20: 20, 255: IGNORE}),
    ("voc20", {0: IGNORE, 1: 0, 20: 19, 255: IGNORE}),
    ("context, JSON", {0: 0, 2: 1, 9: 2, 18: 3, 259: 35, 260: 36, 454: 58, 458: 59}),
    ("context59, JSON", {0: IGNORE, 2: 0, 458: 58}),
    ("coco-stuff, raw", {0: 0, 10: 10, 11: ILLEGAL, 12: 11, 89: 79, 91: 80, 181: 170}),
    ("coco-object, raw", {0: 1, 10: 11, 12: 12, 82: ILLEGAL, 89: 80, 91: 0, 181: 0, 255: 0}),
    ("cityscapes, labelIds", {0: IGNORE, 7: 0, 8: 1, 11: 2, 28: 15, 30: IGNORE, 31: 16, 33: 18}),
    ("ade20k", {0: IGNORE, 1: 0, 150: 149})])
def test_label_maps(layout, classes, tmp_path):
    """Values of the files become the classes of the field's conversions; every class has exactly
    one value, in order, except COCO-Object's background, which is all stuff and what has no
    label."""
    benchmark = plant(tmp_path, layout)
    dataset = open_benchmark(benchmark, tmp_path)
    assert {value: dataset.table[value] for value in classes} == classes
    first = benchmark == "coco-object"
    assert dataset.table[dataset.table >= first].tolist() == [*range(first, len(dataset.classes))]
    assert not first or (dataset.table == 0).sum() == 91 + 1


@pytest.mark.parametrize("width", [1, 3, 700])
def test_run_length_codes(width):
    """A decoded mask is the encoded one: runs of one to thousands of pixels, growing and shrinking,
    beginning with either value."""
    rng = np.random.default_rng(width)
    for share in (0, 0.02, 0.5, 0.98, 1):
        mask = rng.random((40, width)) < share
        assert np.array_equal(decode_runs((40, width), encode_runs(mask)), mask)
    # 1, 3, 2: column by column
    assert decode_runs((2, 3), "132").tolist() == [[False, True, False], [True, True, False]]
    assert decode_runs((2, 3), [1, 3, 2]).tolist() == decode_runs((2, 3), "132").tolist()


@pytest.mark.parametrize("size, counts", [
    ((3, 3), "132"), ((3, 3), [1, 3, 2]), ((0, 0), ""), ((2 ** 40, 2 ** 40), ""), ((-2, -3), "132"),
    ((10 ** 6, 10 ** 6), [10 ** 12]), (("2", 3), "132"), ((2.0, 3.0), "132"), ((True, 6), "132"),
    ((2, 3), [-1, 7]), ((2, 3), [1.0, 5.0]), ((2, 3), ["1", 5]), ((2, 3), "0" * 10 ** 7),
    ((2000, 3000), "o" * 10 ** 6)])
def test_run_length_codes_that_are_refused(size, counts):
    """A size that is none or beyond bounds, a code that is longer than it can be, and runs that do
    not cover the mask are refused at once."""
    with pytest.raises(ValueError, match="expected|length|beyond"):
        decode_runs(size, counts)


def test_original_annotations_come_first(tmp_path):
    """Where Pascal Context's JSON is there beside converted masks, it is what is scored; of
    COCO-Stuff's forms the one of which more masks are there."""
    plant(tmp_path, "context, PNG")
    plant(tmp_path, "context, JSON")
    assert open_benchmark("context", tmp_path).masks.what == "ids of trainval_merged.json"
    plant(tmp_path, "coco-stuff, raw")
    plant(tmp_path, "coco-stuff, train ids")
    assert open_benchmark("coco-stuff", tmp_path).masks.what == "raw stuffthingmaps"
    (tmp_path / STUFF_PLACES[1].format("2008_000001")).unlink()
    assert open_benchmark("coco-stuff", tmp_path).masks.what == "COCO-Stuff's train ids"


def test_masks_may_be_palettes_and_photos_turned(tmp_path, oracle):
    """Palette indices are classes whatever the colours, and a photo that its EXIF data turns counts
    with its upright size, in the check and in the score."""
    plant(tmp_path, "voc", lambda mask: coloured(mask))
    path = tmp_path / VOC_PLACES[0].format("2008_000000")
    turned = Image.Exif()
    turned[274] = 6                                 # "turn me clockwise"
    Image.open(path).transpose(Image.ROTATE_90).save(path, format="PNG", exif=turned)
    assert result_of(tmp_path, "voc")["mIoU"] == 1


# --------------------------------------------------------------------------------------------------
# What is wrong, and named before anything is scored

def coloured(mask):
    """As VOC's makers distribute their masks: indices with a palette of their own."""
    image = Image.fromarray(mask)
    image.putpalette([0, 0, 0, *palette(255).flatten().tolist()])
    return image


def lookup(before, after):
    """The mask's values of one layout written as those of another."""
    names = {name: value for value, name in LAYOUTS[after][1].items()}
    table = {value: names.get(name, 255) for value, name in LAYOUTS[before][1].items()}
    return np.vectorize(table.get, otypes=[np.uint8])


def zero_label_taken_away(mask):
    mask = np.where(mask == 1, mask.max(), mask)    # the first class is not in every photo
    return np.where((mask == 0) | (mask == 255), 255, mask - 1).astype(np.uint8)


@pytest.mark.parametrize("layout, change, words", [
    ("voc", lambda m: m + np.uint8(1), ["value 21", "VOC masks; expected 0, 1, 2"]),
    ("voc", lambda m: coloured(m).convert("RGB"), ["3 channels", "palette"]),
    ("context, PNG", lambda m: m + np.uint8(1), ["value 60"]),
    ("coco-stuff, raw", lambda m: m + np.uint8(1), ["value 11,"]),
    ("coco-stuff, raw", lookup("coco-stuff, raw", "coco-stuff, train ids"),
     ["value 11", "are those of COCO-Stuff's train ids (*_labelTrainIds.png)"]),
    ("coco-stuff, train ids", lookup("coco-stuff, train ids", "coco-stuff, raw"),
     ["value 181", "are those of raw stuffthingmaps (*.png)"]),
    ("cityscapes, labelIds", lookup("cityscapes, labelIds", "cityscapes, trainIds"),
     ["value 255", "are those of Cityscapes trainIds (*_gtFine_labelTrainIds.png)"]),
    ("cityscapes, trainIds", lambda m: np.where(m == 255, 3, m + 15).astype(np.uint8),
     ["value 20", "are those of Cityscapes labelIds (*_gtFine_labelIds.png)"]),
    ("ade20k", lambda m: m - np.uint8(1), ["value 255"]),
    ("voc", zero_label_taken_away, ["only 0 of 3 masks hold a value of 0..0", "makers' files"]),
    ("voc20", zero_label_taken_away, ["only 0 of 3 masks"]),
    ("coco-stuff, train ids", lambda m: np.where(m > 78, 0, m + 1).astype(np.uint8),
     ["only 0 of 3 masks hold a value of 80..170"]),
    ("ade20k", lambda m: m.astype(np.uint16) * 256, ["value 256, 512, 19200",
                                                     "expected 1, 2, 3"])])
def test_wrong_masks_are_named(layout, change, words, tmp_path, oracle, fails):
    """Masks of the wrong kind, shifted or of another form are refused: with the value, a file, what
    is expected, and the other form of the benchmark's masks that has these values; by --check and
    before scoring. Nothing is scored."""
    benchmark = plant(tmp_path, layout, change)
    message = fails(eval.main, arguments(tmp_path, benchmark, "--check"),
                    f"{benchmark} failed its check", *words)
    assert fails(eval.main, arguments(tmp_path, benchmark)) == message
    assert not oracle.looked and not (tmp_path / "out" / "r.json").exists()


@pytest.mark.parametrize("part, image, words", [
    (1, None, ["no mask"]), (0, None, ["no image"]),
    (1, Image.new("L", (16, 21)),
     ["the mask of", "21 x 16 pixels (height x width), the image 16 x 21"])])
def test_missing_files_and_wrong_sizes_are_named(part, image, words, tmp_path, oracle, fails):
    """A missing image or mask, and a mask that is turned by 90 degrees, are refused with the file's
    name."""
    plant(tmp_path, "voc")
    path = tmp_path / VOC_PLACES[part].format("2008_000000")
    path.unlink()
    if image:
        save(image, path)
    for more in ([], ["--check"], ["--limit", 1]):
        fails(eval.main, arguments(tmp_path, "voc", *more), "2008_000000", *words)
    assert not oracle.looked


def test_many_problems_stay_one_line(tmp_path, oracle, fails):
    """Five problems of a kind are named, the others counted."""
    plant(tmp_path, "ade20k", lambda mask: mask[1:])
    for i in range(20):
        save(Image.new("RGB", (8, 8)), tmp_path / ADE_PLACES[0].format(f"more{i}"))
    message = fails(eval.main, arguments(tmp_path, "ade20k", "--allow-partial"),
                    "18 more like these")
    assert message.count("no mask") + message.count("the mask of") == 5


def test_images_that_are_not_there_make_the_result_partial(tmp_path, oracle, fails, monkeypatch,
                                                           capsys):
    """A benchmark with fewer or more images than there should be is refused; --allow-partial scores
    it and marks the result, and --limit marks it, too."""
    plant(tmp_path, "ade20k")
    assert result_of(tmp_path, "ade20k", "--limit", 2)["partial"]
    assert "only 2 images" in capsys.readouterr().out
    monkeypatch.setitem(BENCHMARKS, "ade20k", BENCHMARKS["ade20k"]._replace(count=2000))
    for more in ([], ["--check"]):
        fails(eval.main, arguments(tmp_path, "ade20k", *more),
              "3 images, expected 2000", "--allow-partial")
    result = result_of(tmp_path, "ade20k", "--allow-partial")
    assert result["partial"] and result["images"] == 3 and result["mIoU"] == 1
    plant(tmp_path, "ade20k", lambda mask: mask + np.uint8(1))
    fails(eval.main, arguments(tmp_path, "ade20k", "--allow-partial"), "value 151")


@pytest.mark.parametrize("layout", ["voc", "context, JSON"])
def test_listed_images_that_are_missing_can_be_left_out(layout, tmp_path, oracle, fails):
    """Where a file lists the images, a missing one is refused, and left out by --allow-partial."""
    benchmark = plant(tmp_path, layout)
    [photo] = tmp_path.rglob("2008_000000.jpg")
    photo.unlink()
    fails(eval.main, arguments(tmp_path, benchmark), "no image", "2008_000000")
    result = result_of(tmp_path, benchmark, "--allow-partial")
    assert result["partial"] and result["images"] == 2 and result["mIoU"] == 1


def test_check_tells_the_share_of_each_class(tmp_path, oracle, capsys):
    """--check of correct data prints each class's share of the pixels, scores nothing and ends with
    status zero."""
    plant(tmp_path, "cityscapes, trainIds")
    eval.main(arguments(tmp_path, "cityscapes", "--check"))
    printed = capsys.readouterr().out
    paths = (tmp_path / CITY_CONVERTED[1]).parent.iterdir()
    values = np.concatenate([np.array(Image.open(path)).flatten() for path in paths])
    assert "3 images with masks, Cityscapes trainIds" in printed and not oracle.looked
    assert f"{(values == 255).mean():.2%} of the pixels are not scored" in printed
    lines = {line[2:26].strip(): line[26:].split() for line in printed.splitlines()[1:]}
    assert lines["car"] == [f"{(values == 13).mean():.3%}"]
    assert lines["motorcycle"] == ["0.000%", "absent"] and len(lines) == 19


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_what_is_not_there_is_described(benchmark, tmp_path, oracle, fails):
    """Where a benchmark is not there, the line names the folders that are expected and where to get
    them."""
    _, _, (photo, _, split) = next(layout for layout in LAYOUTS.values() if layout[0] == benchmark)
    message = fails(eval.main, arguments(tmp_path, benchmark), "no " + benchmark, "from ")
    assert str(tmp_path / photo).partition("{")[0].removesuffix("ulm/ulm_") in message
    assert not split or str(tmp_path / split) in message


def test_a_broken_json_is_named(tmp_path, oracle, fails):
    """A trainval_merged.json that is cut short or holds something else is named."""
    plant(tmp_path, "context, JSON")
    path = tmp_path / MERGED[1]
    text = path.read_text()
    for broken in (text[:500], "[]", '{"images": [{}]}'):
        path.write_text(broken)
        fails(eval.main, arguments(tmp_path, "context"), path, "cut short")
    content = json.loads(text)
    content["annos_segmentation"][0]["segmentation"]["counts"] = "132"
    path.write_text(json.dumps(content))
    fails(eval.main, arguments(tmp_path, "context"), "does not cover the pixels, expected 16 x 21")


# --------------------------------------------------------------------------------------------------
# All eight

# their files are those of all eight
ALL = ["voc", "context, JSON", "coco-stuff, raw", "cityscapes, labelIds", "ade20k"]


def test_all_makes_the_table(tmp_path, oracle, capsys):
    """--dataset all scores the eight, writes a result for each and ends with their table and its
    mean; background options are used for those that have a background."""
    for layout in ALL:
        plant(tmp_path, layout)
    eval.main(arguments(tmp_path, "all", "--background", "threshold:0.5",
                        "--output", tmp_path / "all"))
    table = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[-9:]]
    assert table == [[name, "100.00%"] for name in [*BENCHMARKS, "mean"]]
    for name in BENCHMARKS:
        result = json.loads((tmp_path / "all" / f"eval_{name}.json").read_text())
        has = name in ("voc", "context", "coco-object")
        assert result["dataset"] == name
        assert result["protocol"]["background"] == ("threshold:0.5" if has else "none")


def test_all_scores_those_that_are_there(tmp_path, oracle, fails, capsys):
    """With some benchmarks missing or wrong the others are scored first; then those are named and
    the status is not zero, and no mean is printed, also by --check."""
    plant(tmp_path, "voc")
    plant(tmp_path, "ade20k", lambda mask: mask + np.uint8(1))
    words = [f"not under {tmp_path}: context, context59, coco-object, coco-stuff, cityscapes; ",
             "python eval.py --dataset context says", "ade20k failed its check", "value 151"]
    fails(eval.main, arguments(tmp_path, "all", "--output", tmp_path / "all"), *words)
    printed = capsys.readouterr().out
    assert [line.split()[0] for line in printed.splitlines()[-2:]] == ["voc", "voc20"]
    assert "mean" not in printed
    fails(eval.main, arguments(tmp_path, "all", "--check"), *words)
