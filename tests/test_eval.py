"""eval.py: the measures by hand, segmentation folders, backgrounds, processes, classification, and
the command."""
import hashlib
import json
import math
import os
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from conftest import PROTOCOL, ROOT, tiny
from eval import confusion_matrix, evaluate, scores
from machinery.scoring import check as check_file
from machinery.scoring import results
from machinery.scoring.benchmarks import IGNORE, THRESHOLD, open_folder
from machinery.scoring.check import check
from machinery.networks.checkpoint import save_model
from machinery.scoring.classify import LabelledImages, classify
from machinery.images import load_image, to_pixels
from machinery.scoring.pictures import NOT_SCORED, palette
from machinery.scoring.results import made_with, write_result
from processes import Processes

PHOTOS = ROOT.parent / "shared" / "data" / "photos"
needs_photos = pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photographs in {PHOTOS}")


# --------------------------------------------------------------------------------------------------
# The measures

def test_confusion_matrix_by_hand():
    """Pixels are counted by (truth, prediction); ignored pixels count nowhere, whatever is
    predicted there."""
    truth = torch.tensor([[0, 0, 1], [1, 255, 255]])
    prediction = torch.tensor([[0, 2, 1], [1, 1, 7]])
    matrix = confusion_matrix(prediction, truth, 3)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 0, 1], [0, 2, 0], [0, 0, 0]]
    arrays = (values.numpy().astype(np.uint8) for values in (prediction, truth))
    assert confusion_matrix(*arrays, 3).equal(matrix)


def test_confusion_matrix_equals_a_loop():
    """The matrix is what counting pixel by pixel gives, with any value to ignore."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 6, (9, 11))
    prediction = rng.integers(0, 5, (9, 11))
    expected = [[0] * 5 for _ in range(5)]
    for t, p in zip(truth.flatten(), prediction.flatten()):
        if t != 5:
            expected[t][p] += 1
    assert confusion_matrix(prediction, truth, 5, ignore_index=5).tolist() == expected


@pytest.mark.parametrize("prediction, truth, words", [
    ([0, 1], [0, 3], "truth has values 0..3; expected 0..2, or 255"),
    ([0, 1], [-1, 2], "truth has values -1..2"),
    ([0, 3], [0, 1], "prediction has values 0..3; expected 0..2"),
    ([0, 255], [0, 1], "prediction has values 0..255"),
    ([0, 1, 2], [0, 1], "prediction has 3 pixels, truth 2")])
def test_values_that_cannot_be_are_refused(prediction, truth, words):
    """A value that is no class, in truth or prediction, and masks of different size are refused,
    not miscounted."""
    with pytest.raises(ValueError, match=words):
        confusion_matrix(torch.tensor(prediction), torch.tensor(truth), 3)


def test_scores_by_hand():
    """IoU is right / (truth + predicted - right); a class that is nowhere does not count, one only
    predicted counts as 0 in mIoU and not in mAcc."""
    found = scores([[3, 1, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert found["IoU"][:3] == pytest.approx([3 / 5, 2 / 3, 0]) and math.isnan(found["IoU"][3])
    assert found["mIoU"] == pytest.approx((3 / 5 + 2 / 3 + 0) / 3)
    assert found["mAcc"] == pytest.approx((3 / 5 + 2 / 2) / 2)
    assert found["aAcc"] == pytest.approx(5 / 7)


def test_a_perfect_prediction_scores_one():
    """A prediction that equals the truth scores 1 in every class and every mean, although ignored
    pixels differ."""
    truth = torch.tensor([0, 1, 1, 3, 255])
    found = scores(confusion_matrix(torch.tensor([0, 1, 1, 3, 2]), truth, 5))
    assert found["mIoU"] == found["mAcc"] == found["aAcc"] == 1
    assert [iou == 1 for iou in found["IoU"]] == [True, True, False, True, False]


# --------------------------------------------------------------------------------------------------
# Segmentation folders

MASK = np.array([[0, 1, 2, 255], [2, 2, 1, 0]], np.uint8)


@pytest.fixture
def scored(tmp_path):
    """A segmentation folder: a photo of 4 x 2 pixels and its mask."""
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "classes.txt").write_text("background\ndog, puppy\ncat\n")
    Image.fromarray(noise(2, 4)).save(tmp_path / "images" / "a.PNG")
    Image.fromarray(MASK).save(tmp_path / "masks" / "a.png")
    return tmp_path


def noise(*size):
    return np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)


def test_folder(scored):
    """Masks come with the photo's name and pixels; values are lines of classes.txt, 255 is ignored;
    files that are no images are left out."""
    (scored / "images" / "notes.txt").touch()
    dataset = open_folder(scored)
    ((name, image, mask),) = dataset
    assert name == "a" and len(dataset) == 1
    assert dataset.classes == [["background"], ["dog", "puppy"], ["cat"]]
    assert (np.array(image) == noise(2, 4)).all()
    assert mask.tolist() == [[0, 1, 2, IGNORE], [2, 2, 1, 0]]


@pytest.mark.parametrize("without, classes, expected", [
    (["background"], [["dog", "puppy"], ["cat"]], [[-1, 0, 1, -1], [1, 1, 0, -1]]),
    (["dog"], [["background"], ["cat"]], [[0, -1, 1, -1], [1, 1, -1, 0]]),
    (["cat", "background"], [["dog", "puppy"]], [[-1, 0, -1, -1], [-1, -1, 0, -1]])])
def test_folder_without_classes(scored, without, classes, expected):
    """Classes left out become ignored, and the others are numbered anew; 255 stays ignored."""
    dataset = open_folder(scored, without=without)
    assert dataset.classes == classes and dataset[0][2].tolist() == expected and IGNORE == -1


def test_folder_with_other_names(scored):
    """Names from another file prompt for the same classes: masks stay, classes are left out by
    their own names, and the background is still the background."""
    (scored / "names.txt").write_text("something else\nhound\nkitten, tomcat\n")
    dataset = open_folder(scored, scored / "names.txt", ["background"])
    assert dataset.classes == [["hound"], ["kitten", "tomcat"]] and dataset.background == "none"
    assert dataset[0][2].tolist() == [[-1, 0, 1, -1], [1, 1, 0, -1]]
    dataset = open_folder(scored, scored / "names.txt")
    assert dataset.background_class == 0 and dataset.background == "prompt:something else"


@pytest.mark.parametrize("classes, ignore, values", [
    ("0: background\n1: dog\n2: cat\n", [255], MASK),
    ("7: road\n300: sky, clouds\n65535: sea\n", [0, 9],
     [[7, 300, 65535, 9], [65535, 65535, 300, 7]]),
    ("255:road\n0:sky\n9:sea\n", [], [[255, 0, 9, 9], [9, 9, 0, 255]])])
def test_folder_with_any_values(scored, classes, ignore, values):
    """Masks may hold any values up to 65535, written before the names, and any may be ignored, or
    none; 255 may be a class, too."""
    (scored / "classes.txt").write_text(classes)
    values = np.array(values)
    Image.fromarray(values.astype(np.uint16)).save(scored / "masks" / "a.png")
    dataset = open_folder(scored, ignore=ignore)
    expected = np.where(np.isin(values, ignore), IGNORE, [[0, 1, 2, 2], [2, 2, 1, 0]])
    assert dataset[0][2].tolist() == expected.tolist() and check(dataset)[0] == []


def test_folder_with_many_classes(scored):
    """If the value 255 is not ignored, masks of 16 bit hold more than 255 classes."""
    (scored / "classes.txt").write_text("".join(f"thing number {i}\n" for i in range(400)))
    values = np.array([[255, 256, 399, 0]] * 2)
    Image.fromarray(values.astype(np.uint16)).save(scored / "masks" / "a.png")
    assert (open_folder(scored, ignore=[])[0][2] == values).all()
    message = "the value 255 is a class and ignored; name other values with --ignore"
    with pytest.raises(ValueError, match=message):
        open_folder(scored)


def test_palette_mask(scored):
    """A palette mask's values are its indices, not its colours."""
    mask = Image.fromarray(MASK)
    mask.putpalette([255 - i // 3 for i in range(768)])
    mask.save(scored / "masks" / "a.png")
    assert Image.open(scored / "masks" / "a.png").mode == "P"
    expected = np.where(MASK == 255, IGNORE, MASK.astype(int))
    assert (open_folder(scored, ignore=[255])[0][2] == expected).all()


def test_one_bit_mask(scored):
    """A mask of one bit per pixel, as two classes allow, has the values 0 and 1."""
    Image.fromarray(MASK == 1).save(scored / "masks" / "a.png")
    assert Image.open(scored / "masks" / "a.png").mode == "1"
    assert (open_folder(scored)[0][2] == (MASK == 1)).all()


@pytest.mark.parametrize("mask, message", [
    (MASK[:, :3], r"the mask of .*a\.PNG has 2 x 3 pixels \(height x width\), the image 2 x 4"),
    (MASK.T, r"the mask of .*a\.PNG has 4 x 2 pixels"),
    (np.stack([MASK] * 3, 2), r"a\.png has 3 channels, expected one value per pixel"),
    (MASK + (MASK == 1).astype(np.uint8) * 2,
     r"the mask of .*a\.PNG holds values that are no class; run eval\.py --check")])
def test_wrong_mask(scored, mask, message):
    """A mask of another size, in colour, or with values that are no class is refused also where it
    is read."""
    Image.fromarray(np.ascontiguousarray(mask)).save(scored / "masks" / "a.png")
    with pytest.raises(ValueError, match=message):
        open_folder(scored)[0]


@pytest.mark.parametrize("part", ["images", "masks"])
@pytest.mark.parametrize("kept", [2000, 10])
def test_cut_short(scored, part, kept):
    """An image or mask that is cut short, or is none at all, is refused by name."""
    mask = Image.fromarray(noise(64, 64)[..., 0] % 3)
    Image.fromarray(noise(64, 64)).save(scored / "images" / "a.PNG")
    mask.save(scored / "masks" / "a.png", compress_level=0)
    (path,) = (scored / part).iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=rf"{part}/{path.name}"):
        open_folder(scored)[0]


def without(part):
    return lambda folder: (folder / part).rename(folder / "elsewhere")


def classes(text):
    return lambda folder: (folder / "classes.txt").write_bytes(text.encode("latin-1"))


@pytest.mark.parametrize("spoil, message", [
    (without("images"),
     r"no folder .*images; a segmentation folder holds images/, masks/ \(PNG, value = class\)"),
    (without("masks"), r"no folder .*masks; a segmentation folder holds"),
    (without("images/a.PNG"), r"no images in .*images"),
    (without("classes.txt"), r"classes\.txt: expected a text file with one class name per line"),
    (classes("a\nb\na"), r"classes\.txt: duplicate class name 'a'"),
    (classes("1: a\n2: b\n3: a"), r"classes\.txt: duplicate class name 'a'"),
    (classes("1: a\n1: b"), r"classes\.txt: the label '1' is there twice"),
    (classes("1: a\nb"),
     r'classes\.txt: 1 lines have a colon, as in "label: name", and 1 have none; '
     r"expected one in every line or in none, look at 'b'"),
    (classes("1: a\n2: b\nc"), r"classes\.txt: 2 lines have a colon.*look at 'c'"),
    (classes("a\nb\nc: d"), r"classes\.txt: 1 lines have a colon.*2 have none.*look at 'c: d'"),
    (classes("road: a\nsky: b"),
     r"classes\.txt: what stands before a colon must be a mask value, 0 to 65535"),
    (classes("65536: a"), r"classes\.txt: what stands before a colon must be a mask value"),
    (classes("caf\xe9"), r"classes\.txt is no UTF-8 text")])
def test_folders_that_are_none(scored, spoil, message):
    """What is missing from a segmentation folder, or wrong in its classes.txt, is named."""
    spoil(scored)
    with pytest.raises((ValueError, OSError), match=message):
        open_folder(scored)


@needs_photos
def test_real_masks():
    """Real photographs and their masks fit together, and without background only the 20 classes are
    left."""
    whole = open_folder(PHOTOS / "test")
    dataset = open_folder(PHOTOS / "test", without=["background"])
    assert len(dataset.classes) == 20
    for i in range(5):
        _, image, mask = dataset[i]
        _, _, full = whole[i]
        assert mask.shape == image.size[::-1]
        assert (mask == np.where(full > 0, full - 1, IGNORE)).all()


# --------------------------------------------------------------------------------------------------
# Background, with another method's model

class Painted:
    """Another method: a class scores a pixel by its red, green or blue / 250, any other word by 0.3
    everywhere. It has no backbone, no checkpoint and no configuration."""

    def embed_classes(self, classes, templates):
        index = {"red": 0, "green": 1, "blue": 2}
        return torch.tensor([[[index.get(name, 3)] for name in names[:1]] for names in classes])

    def patch_scores(self, pixels, embeddings):
        word = torch.full_like(pixels[:, :1], 0.3, dtype=torch.float32)
        scores = torch.cat([pixels / 250, word], dim=1)
        return scores[:, embeddings.flatten()], pixels.shape[-2:]


class Scenes(list):
    """[(name, image, mask)] as a dataset; place: which of the classes is the background, None =
    there is none."""

    def __init__(self, items, place=0):
        super().__init__(items)
        self.name = "scenes"
        self.background_class = place
        self.background = "none" if place is None else "threshold:0.2"
        self.classes = [["red"], ["green"], ["blue"]]
        if place is not None:
            self.classes.insert(place, ["background"])


WHOLE = {"templates": "plain", "short_side": 1, "window": 4000, "stride": 4000}     # one window
COLOURS = [(50, 0, 0), (51, 0, 0), (0, 60, 0), (10, 20, 30), (100, 100, 0), (75, 0, 0), (0, 80, 80),
           (0, 0, 49)]
TRUTH = {"background": [0, 3], "red": [1, 5], "green": [2, 4, 7], "blue": []}   # 6 is not scored


def row(place):
    """One row of pixels; their truth, in classes with the background at a place."""
    names = [names[0] for names in Scenes([], place).classes]
    truth = np.full((1, len(COLOURS)), IGNORE)
    for name, pixels in TRUTH.items():
        truth[0, pixels] = names.index(name)
    return Scenes([("row", Image.fromarray(np.array([COLOURS], np.uint8)), truth)], place)


# threshold 0.2: 0.2 is a tie, so pixels 0, 3 and 7 are background; 4 is a tie that red wins, being
# first. words, at 0.3: they win 0, 1, 2, 3 and 7; pixel 5 is a tie, which the first of the two wins
@pytest.mark.parametrize("place, background, expected", [
    *((place, "threshold:0.2", {"background": 2 / 3, "red": 2 / 3, "green": 1 / 3, "blue": None})
      for place in (0, 1, 3)),
    (0, "threshold:0.1999", {"background": 1 / 3, "red": 2 / 4, "green": 1 / 3, "blue": None}),
    (0, "prompt:dusk, haze", {"background": 2 / 6, "red": 0, "green": 0, "blue": None}),
    (3, "prompt:dusk", {"background": 2 / 5, "red": 1 / 3, "green": 0, "blue": None})])
def test_backgrounds_by_hand(place, background, expected):
    """Pixels whose best score is at most the threshold are background; with words, what these win
    is. The background's place among the classes does not matter, its value is in the result, and a
    model needs two methods only."""
    result, _ = evaluate(Painted(), row(place), {**WHOLE, "background": background})
    found = {name: None if math.isnan(iou) else iou
             for name, iou in zip(result["classes"], result["IoU"])}
    assert found == pytest.approx(expected)
    mean = np.mean([iou for iou in expected.values() if iou is not None])
    assert result["mIoU"] == pytest.approx(mean)
    assert result["protocol"]["background"] == background
    assert result["backbone"] is None and "checkpoint" not in result
    json.dumps(result)


def test_measures_of_a_whole_run_by_hand():
    """mIoU, mAcc and aAcc of the row above: two classes of background and red right, one of three
    green, one ignored."""
    result, _ = evaluate(Painted(), row(0), WHOLE)
    assert result["protocol"]["background"] == "threshold:0.2"          # the dataset's own
    assert result["mIoU"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert result["mAcc"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert result["aAcc"] == pytest.approx(5 / 7)
    (_, image, truth), = row(0)
    truth[0, 6] = 0                 # now green is predicted there, which was not scored before
    result, _ = evaluate(Painted(), Scenes([("row", image, truth)]), WHOLE)
    assert result["IoU"][:3] == pytest.approx([2 / 4, 2 / 3, 1 / 4])


def test_a_class_predicted_but_absent_counts_as_zero():
    """A class that is nowhere in the truth counts as 0 as soon as it is predicted for a scored
    pixel."""
    truth = np.array([[0, 1, 1]])
    image = Image.fromarray(np.array([[(0, 0, 0), (250, 0, 0), (0, 0, 250)]], np.uint8))
    result, _ = evaluate(Painted(), Scenes([("row", image, truth)]), WHOLE)
    assert result["IoU"][:2] == [1, 0.5] and math.isnan(result["IoU"][2]) and result["IoU"][3] == 0
    assert result["mIoU"] == 0.5 and result["mAcc"] == 0.75


@pytest.mark.parametrize("place, settings, thresholds, words", [
    (None, {"background": "threshold:0.2"}, None,
     '--background threshold:0.2: scenes has no class "background"'),
    (None, {"background": "prompt:sky"}, None, "--background prompt:sky: scenes has no class"),
    (0, {"background": "none"}, None,
     '--background none: scenes scores the class "background"; choose threshold'),
    (0, {"background": "dark"}, None, "background 'dark': expected none, threshold:T"),
    (None, {}, torch.tensor([0.1]), "--sweep-background: scenes has no class"),
    (0, {"background": "prompt:sky"}, torch.tensor([0.1]),
     "--sweep-background is for threshold:T, found prompt:sky")])
def test_backgrounds_that_make_no_sense(place, settings, thresholds, words):
    """A background where none is scored, none where one is, and a sweep of either are refused."""
    image = Image.new("RGB", (2, 1))
    dataset = Scenes([("row", image, np.zeros((1, 2), int))], place)
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate(Painted(), dataset, {**WHOLE, **settings}, thresholds=thresholds)


def random_scenes(place, count=3):
    """Scenes of values that often lie on a threshold, with pixels that are not scored."""
    rng = np.random.default_rng(0)
    return Scenes([(str(i), Image.fromarray((5 * rng.integers(0, 40, (9, 14, 3))).astype(np.uint8)),
                    rng.integers(IGNORE, 4, (9, 14))) for i in range(count)], place)


@pytest.mark.parametrize("place", [0, 2])
def test_a_sweep_equals_scoring_each_threshold(place):
    """One pass gives for every threshold, to the last bit, the mIoU of scoring with it, ties
    included; and the score of the protocol's own threshold is what it is without a sweep."""
    dataset = random_scenes(place)
    protocol = {**WHOLE, "short_side": 9}
    result, _ = evaluate(Painted(), dataset, protocol, thresholds=torch.arange(-100, 101) / 100)
    assert [t for t, _ in result["sweep"]] == [t / 100 for t in range(-100, 101)]
    for i in (0, 90, 98, 99, *range(100, 183, 2), 200):
        threshold, miou = result["sweep"][i]
        background = {"background": f"threshold:{threshold}"}
        single, _ = evaluate(Painted(), dataset, {**protocol, **background})
        assert single["mIoU"] == miou, threshold
    assert len({miou for _, miou in result["sweep"]}) > 30
    assert result["mIoU"] == dict(map(tuple, result["sweep"]))[0.2]


def test_a_sweep_on_the_command_line(checkpoint, folder, tmp_path, capsys):
    """--sweep-background prints the thresholds around the best; the result file holds all."""
    result = run(checkpoint, folder, tmp_path / "new" / "sweep.json", "--sweep-background")
    best, miou = max(result["sweep"], key=lambda point: point[1])
    assert f"best at {best:.2f}: {miou:.2%}" in capsys.readouterr().out
    assert result["protocol"]["background"] == THRESHOLD


def test_a_sweep_is_plotted(checkpoint, folder, tmp_path, monkeypatch, capsys):
    """--sweep-background also draws the curve; where matplotlib is missing, a line says so and
    nothing else changes."""
    pytest.importorskip("matplotlib")
    run(checkpoint, folder, tmp_path / "sweep.json", "--sweep-background")
    plot = np.array(Image.open(tmp_path / "sweep.png").convert("RGB")).astype(int)
    blue = np.abs(plot - (31, 119, 180)).max(-1) < 40                   # matplotlib's first colour
    assert plot.shape == (480, 768, 3) and blue.sum() > 200             # the curve
    assert "plotted in" in capsys.readouterr().out
    (tmp_path / "sweep.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = run(checkpoint, folder, tmp_path / "sweep.json", "--sweep-background")
    printed = capsys.readouterr()
    assert len(result["sweep"]) == 201 and not (tmp_path / "sweep.png").exists()
    assert "pip install matplotlib" in printed.err and "plotted in" not in printed.out


# --------------------------------------------------------------------------------------------------
# The command

def run(checkpoint, dataset, output, *more):
    """eval.py's result, read as strict JSON (NaN is none)."""
    eval.main(["--dataset", str(dataset), "--checkpoint", str(checkpoint), "--output", str(output),
               "--device", "cpu", *more])
    return json.loads(output.read_text(),
                      parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_folder_is_scored(checkpoint, folder, tmp_path, capsys):
    """The result file holds scores, protocol, backbone and the dataset; the table and the mIoU are
    printed."""
    result = run(checkpoint, folder, tmp_path / "result.json")
    printed = capsys.readouterr().out
    assert f"mIoU {result['mIoU']:.2%}" in printed
    assert all(name in printed for name in result["classes"])
    assert result["classes"] == ["background", "cow", "grass", "sky", "submarine"]
    assert result["images"] == 3
    assert result["IoU"][4] in (0, None)            # nowhere in the truth: 0 if it was predicted
    mean = np.mean([iou for iou in result["IoU"] if iou is not None])
    assert result["mIoU"] == pytest.approx(mean)
    assert result["protocol"] == {**PROTOCOL, "background": "prompt:background", "names": None,
                                  "without": [], "masks": f"masks by {folder}/classes.txt"}
    assert result["dataset"] == str(folder) and not result["partial"]
    assert result["method"] == "simzss" and result["backbone"]["name"] == "toy"
    assert result["checkpoint"] == str(checkpoint)
    assert result["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert {"torch", "timm", "numpy", "python"} <= set(result["versions"])
    assert torch.__version__.startswith(result["versions"]["torch"])
    commit = result["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}( and changes)?", commit)
    assert result["seconds"] >= 0 and result["images_per_second"] > 0 and result["processes"] == 1


def test_without_a_class(checkpoint, folder, tmp_path):
    """A class left out is neither predicted nor scored: the others score as if its pixels had been
    ignored and its name had never been there."""
    result = run(checkpoint, folder, tmp_path / "without.json", "--without", "background")
    (folder / "classes.txt").write_text("cow, cattle\ngrass\nsky\nsubmarine\n")
    for path in (folder / "masks").iterdir():
        mask = np.array(Image.open(path))
        mask = np.where((mask == 0) | (mask == 255), 255, mask - 1)
        Image.fromarray(mask.astype(np.uint8)).save(path)
    expected = run(checkpoint, folder, tmp_path / "expected.json")
    assert result["classes"] == ["cow", "grass", "sky", "submarine"]
    for key in ("IoU", "mIoU", "aAcc"):
        assert result[key] == expected[key]


def test_classes_can_be_put_in_other_words(checkpoint, folder, tmp_path):
    """With --names classes are prompted with other words, line by line, and scored as if the folder
    had those; classes are left out by the folder's own names."""
    names = tmp_path / "names.txt"
    names.write_text("backdrop\nbull, ox\nlawn\nheaven\nu-boat\n")
    result = run(checkpoint, folder, tmp_path / "names.json", "--names", str(names),
                 "--without", "sky")
    (folder / "classes.txt").write_text(names.read_text())
    expected = run(checkpoint, folder, tmp_path / "expected.json", "--without", "heaven")
    assert result["IoU"] == expected["IoU"] and result["mIoU"] == expected["mIoU"]
    assert result["classes"] == ["backdrop", "bull", "lawn", "u-boat"]


def test_the_protocol_can_be_changed(checkpoint, folder, tmp_path):
    """Templates, window and stride of the command line take the place of the checkpoint's and are
    recorded."""
    result = run(checkpoint, folder, tmp_path / "result.json", "--templates", "simple7",
                 "--stride", "16", "--window", "48")
    expected = {**PROTOCOL, "templates": "simple7", "stride": 16, "window": 48}
    assert {key: result["protocol"][key] for key in expected} == expected


def test_a_class_that_is_nowhere_is_null(tmp_path):
    """In the result file a class without any pixel has null for its IoU."""
    write_result(tmp_path / "result.json", scores([[4, 0, 0], [1, 3, 0], [0, 0, 0]]))
    assert json.loads((tmp_path / "result.json").read_text())["IoU"] == [0.8, 0.75, None]


def test_the_result_lies_beside_the_checkpoint(checkpoint, folder, tmp_path):
    """Without --output the result is written beside the checkpoint, named after the dataset and the
    classes left out, so that neither result overwrites the other."""
    model = tmp_path / "model.safetensors"
    model.write_bytes(checkpoint.read_bytes())
    eval.main(["--dataset", str(folder), "--checkpoint", str(model)])
    eval.main(["--dataset", str(folder), "--checkpoint", str(model),
               "--without", "sky", "background"])
    for name, classes in (("eval_folder.json", 5),
                          ("eval_folder_without_background_without_sky.json", 3)):
        result = json.loads((tmp_path / name).read_text())
        assert result["images"] == 3 and len(result["classes"]) == classes


def test_without_git_there_is_no_commit(monkeypatch):
    """Where the code is no checkout, or there is no git, the result says null."""
    def none(*args, **kwargs):
        raise FileNotFoundError("git")

    monkeypatch.setattr(results.subprocess, "run", none)
    assert made_with()["commit"] is None


def test_pictures_of_the_first_images(checkpoint, folder, tmp_path):
    """--save-images N writes photo, truth, prediction and overlay of the first N side by side, with
    titles, below the result."""
    run(checkpoint, folder, tmp_path / "result.json", "--save-images", "2")
    pictures = sorted((tmp_path / "result_images").iterdir())
    assert [path.name for path in pictures] == ["0000.png", "0001.png"]
    photo = load_image(folder / "images" / "photo0.png")
    picture = np.array(Image.open(pictures[0]))[24:]                    # 24: the titles
    panel = photo.width + 4                         # and a gap
    assert (picture[:photo.height, :photo.width] == np.array(photo)).all()
    assert picture.shape[1] > 4 * photo.width
    mask = np.array(Image.open(folder / "masks" / "photo0.png"))
    truth = picture[:photo.height, panel:panel + photo.width]
    assert (truth[mask == 2] == palette(5)[2]).all() and (truth[mask == 255] == NOT_SCORED).all()


def test_results_go_where_they_are_sent(checkpoint, folder, tmp_path, monkeypatch, fails):
    """--output names a file, whose folder is made, or a folder; a place where nothing can be
    written is refused before anything is scored; a dataset may be named with a slash at its end."""
    run(checkpoint, folder, tmp_path / "deep" / "er" / "result.json")
    arguments = ["--checkpoint", str(checkpoint), "--dataset"]
    eval.main([*arguments, f"{folder}/", "--output", str(tmp_path)])
    assert json.loads((tmp_path / "eval_folder.json").read_text())["images"] == 3
    monkeypatch.setattr(eval, "evaluate", lambda *args: pytest.fail("scored in vain"))
    (tmp_path / "file").touch()
    fails(eval.main, [*arguments, folder, "--output", tmp_path / "file" / "r.json"], "file")
    monkeypatch.setattr(eval.os, "access", lambda path, mode: path != checkpoint.parent)
    fails(eval.main, [*arguments, folder], checkpoint.parent, "--output")


def test_the_result_of_other_data_is_not_overwritten(checkpoint, folder, tmp_path, monkeypatch,
                                                     fails):
    """A file with the result of another dataset is refused before anything is scored, and stays as
    it is; that of the same dataset, named in another way too, is replaced."""
    output = tmp_path / "result.json"
    run(checkpoint, folder, output)
    monkeypatch.chdir(tmp_path)
    run(checkpoint, "./folder", output, "--limit", "1")
    before = output.read_bytes()
    assert json.loads(before)["images"] == 1
    folder.rename(tmp_path / "other")
    monkeypatch.setattr(eval, "evaluate", lambda *args: pytest.fail("scored in vain"))
    fails(eval.main, ["--dataset", tmp_path / "other", "--checkpoint", checkpoint,
                      "--output", output], output, folder, tmp_path / "other", "--output")
    assert output.read_bytes() == before


def test_limit_marks_the_result(checkpoint, folder, tmp_path, capsys):
    """--limit scores the first images only, checks the masks of these alone, and says so."""
    (folder / "masks" / "photo2.png").unlink()
    result = run(checkpoint, folder, tmp_path / "result.json", "--limit", "2")
    assert result["partial"] and result["images"] == 2
    assert "(only 2 images" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Several processes

def score_and_keep(folder, *arguments):
    """eval.py, with the confusion matrix of each process in a file of its own."""
    counted = eval.scores

    def keep(matrix):
        torch.save(matrix, folder / f"matrix{os.environ['RANK']}.pt")
        return counted(matrix)
    eval.scores = keep
    eval.main([str(argument) for argument in arguments])


def test_two_processes_count_what_one_counts(checkpoint, folder, tmp_path, monkeypatch):
    """Two processes give for three images, each of them, the confusion matrix of one process, bit
    for bit, the same result file and the same pictures."""
    both = Processes(tmp_path, 2, score_and_keep, tmp_path, "--dataset", folder, "--checkpoint",
                     checkpoint, "--output", tmp_path / "two.json", "--save-images", "3",
                     "--workers", "0")
    assert both.wait() == [0, 0], both.output()
    one = []
    counted = eval.scores
    monkeypatch.setattr(eval, "scores",
                        lambda matrix: one.append(matrix.clone()) or counted(matrix))
    alone = run(checkpoint, folder, tmp_path / "one.json", "--save-images", "3")
    for rank in range(2):
        assert torch.load(tmp_path / f"matrix{rank}.pt").equal(one[0])
    together = json.loads((tmp_path / "two.json").read_text())
    same = set(alone) - {"seconds", "images_per_second", "processes", "date"}
    assert {key: together[key] for key in same} == {key: alone[key] for key in same}
    assert together["processes"] == 2
    assert both.output().count("mIoU") == 1
    for i in range(3):
        two, one = (tmp_path / f"{name}_images" / f"000{i}.png" for name in ("two", "one"))
        assert two.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("problems", [0, 2])
def test_the_first_process_checks_for_all(folder, monkeypatch, fails, capsys, problems):
    """Another process looks at no mask: it goes on without output where the first found nothing,
    and ends with it otherwise."""
    monkeypatch.setattr(check_file, "rank", lambda: 1)
    monkeypatch.setattr(check_file, "sum_counts", lambda counts: counts + problems)
    monkeypatch.setattr(check_file, "check", lambda *args: pytest.fail("checked twice"))
    arguments = ["--check", "--dataset", str(folder)]
    if problems:
        fails(eval.main, arguments, "failed its check: the first process says why")
    else:
        eval.main(arguments)
    assert capsys.readouterr().out == ""


# --------------------------------------------------------------------------------------------------
# Zero-shot classification

class Named:
    """Another method: a class scores an image by how near its mean red value is to the number in
    the class's name."""

    def image_scores(self, pixels, embeddings):
        red = pixels[:, 0].float().mean((1, 2))                                         # (B,)
        return -(red[:, None] - embeddings[:, 0, 0]).abs()                              # (B, C)


def numbers(dataset):
    """Class names that are numbers -> embeddings (C, 1, 1)."""
    return torch.tensor([[[float(name)] for name in names] for names in dataset.classes])


@pytest.fixture
def labelled(tmp_path):
    """An image folder of seven classes: b has two images, c three, the others none."""
    for name in "abcdefg":
        (tmp_path / "val" / name).mkdir(parents=True)
    (tmp_path / "val" / "README.txt").touch()
    for name, red in (("b/1.png", 22), ("b/2.png", 31), ("c/1.JPG", 29), ("c/2.png", 68),
                      ("c/3.png", 14)):
        Image.new("RGB", (40, 30), (red, 0, 0)).save(tmp_path / "val" / name, format="PNG")
    return tmp_path / "val"


def test_classification_by_hand(labelled, tmp_path):
    """Top-1 counts images whose own class is nearest, top-5 those where it is among the five
    nearest; names are lines in the order of the folders, or lines with the folder's name."""
    names = tmp_path / "names.txt"
    labels = tmp_path / "labels.txt"
    names.write_text("10\n20\n30\n40\n50\n60\n70\n")
    labels.write_text("g: 70\nf: 60\ne: 50\nd: 40\nc: 30\nb: 20\na: 10\nz: 0\ny: -9\nx: -8\n")

    def classified(dataset, **settings):
        result = classify(Named(), dataset, numbers(dataset), **settings)
        return result["top1"], result["top5"], result["images"], result["partial"]

    # b is 20, c is 30: 22 and 29 are right; 31 and 14 have their class second and second; of 68 c
    # is the fifth nearest
    assert classified(LabelledImages(labelled, names, 16), batch=2) == (2 / 5, 1, 5, False)
    dataset = LabelledImages(labelled, labels, 16)
    assert classified(dataset)[:2] == (2 / 5, 1)
    assert len(classify(Named(), dataset, numbers(dataset))["classes"]) == 10
    assert dataset[0][0].shape == (3, 16, 16) and dataset.size == 16
    names.write_text("10\n20\n95\n40\n50\n60\n70\n")    # c is now far from all of its images
    dataset = LabelledImages(labelled, names, 16)
    assert classified(dataset, limit=3) == (1 / 3, 1 / 3, 3, True)      # 22, 29 and 14


def test_the_middle_of_an_image_is_classified(tmp_path):
    """The short side is resized to the size asked for and the middle is cut out, of wide and of
    high images."""
    (tmp_path / "a").mkdir()
    pixels = np.zeros((30, 90, 3), np.uint8)
    pixels[:, 30:60] = 200
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    Image.fromarray(pixels.transpose(1, 0, 2).copy()).save(tmp_path / "a" / "2.png")
    for pixels, _ in (LabelledImages(tmp_path, size=15)[i] for i in (0, 1)):
        assert pixels.shape == (3, 15, 15) and (pixels[:, 2:-2, 2:-2] == 200).all()
    whole = torch.full((3, 30, 30), 200, dtype=torch.uint8)
    assert LabelledImages(tmp_path, size=30)[0][0].equal(whole)


def test_classification_on_the_command_line(labelled, tmp_path, model, capsys):
    """A real model classifies an image folder by the names of its folders: top-1 is the share of
    images whose class token is nearest to its own folder's embedded name."""
    rng = np.random.default_rng(0)
    for path in labelled.glob("*/*.*"):
        noise = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format="PNG")
    (labelled / "c").rename(labelled / "ice_cream")
    save_model(tmp_path / "model.safetensors", model, {"protocol": PROTOCOL, "image_size": 32})
    eval.main(["--task", "classification", "--dataset", str(labelled),
               "--checkpoint", str(tmp_path), "--device", "cpu"])
    result = json.loads((tmp_path / "eval_val.json").read_text())
    names = ["a", "b", "d", "e", "f", "g", "ice cream"]
    words = model.embed_classes(names)[:, 0]
    right = []
    for path in sorted(labelled.glob("*/*.*")):
        name = path.parent.name.replace("_", " ")
        image = load_image(path).resize((32, 43), Image.BICUBIC).crop((0, 5, 32, 37))
        token = model.backbone(model.backbone.normalise(to_pixels(image)[None]))[0][0]
        nearest = (words @ token).argsort(descending=True).tolist()
        right.append([names.index(name) in nearest[:k] for k in (1, 5)])
    assert [result["top1"], result["top5"]] == np.mean(right, axis=0).tolist()
    assert result["classes"] == names and result["protocol"]["size"] == 32
    printed = f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   (5 images, 7 classes"
    assert printed in capsys.readouterr().out
    assert result["backbone"]["name"] == "toy" and result["checkpoint"] and result["versions"]
    assert result["names"] is None


def test_imagenet_has_names_of_its_own(labelled, tmp_path, checkpoint):
    """--dataset imagenet is data/imagenet/val with the thousand names of classes/imagenet.txt, by
    the folders' names, of which any number may be there."""
    (tmp_path / "imagenet").mkdir()
    for name in "adefg":
        (labelled / name).rmdir()
    (labelled / "b").rename(labelled / "n01440764")                     # tench, the first
    (labelled / "c").rename(labelled / "n15075141")                     # toilet paper, the last
    labelled.rename(tmp_path / "imagenet" / "val")
    dataset = LabelledImages(tmp_path / "imagenet" / "val", eval.CLASSES / "imagenet.txt", 8)
    assert [known for _, known in dataset] == [0, 0, 999, 999, 999]
    assert len(dataset.classes) == 1000
    assert (dataset.classes[0], dataset.classes[999]) == (["tench"], ["toilet paper"])
    output = tmp_path / "result.json"
    eval.main(["--task", "classification", "--dataset", "imagenet", "--data", str(tmp_path),
               "--checkpoint", str(checkpoint), "--output", str(output), "--limit", "1",
               "--templates", "plain", "--workers", "0"])
    result = json.loads(output.read_text())
    assert result["dataset"] == "imagenet" and result["partial"] and len(result["classes"]) == 1000


@pytest.mark.parametrize("change, words", [
    ({"--dataset": "{tmp}/none"}, ["no class folders in", "none/CLASS/*.jpg"]),
    ({"--dataset": "imagenet"}, ["no class folders in", "imagenet/val", "image-net.org"]),
    ({"--dataset": "{tmp}/val/c"}, ["no class folders in"]),
    ({"--names": "{tmp}/two.txt"},
     ["two.txt has 2 classes; expected those of the 7 folders", "such as a"]),
    ({"--names": "{tmp}/labels.txt"}, ["labels.txt has 2 classes", "such as c"]),
    ({"--names": "{tmp}/none.txt"}, ["no class file", "none.txt"])])
def test_wrong_image_folders_are_named(labelled, tmp_path, checkpoint, fails, change, words):
    """Folders and names that do not belong together are named."""
    (tmp_path / "two.txt").write_text("cat\ndog\n")
    (tmp_path / "labels.txt").write_text("a: cat\nb: dog\n")
    arguments = {"--dataset": labelled, "--task": "classification", "--checkpoint": checkpoint,
                 "--data": tmp_path}
    arguments |= {key: value.replace("{tmp}", str(tmp_path)) for key, value in change.items()}
    fails(eval.main, [x for pair in arguments.items() for x in pair], *words)


def test_what_masks_alone_have_is_refused_for_classification(labelled, capsys):
    """Options that mean nothing without masks are refused, not ignored."""
    for option in (["--check"], ["--background", "none"], ["--sweep-background"],
                   ["--without", "a"], ["--save-images", "1"]):
        with pytest.raises(SystemExit) as stopped:
            eval.main(["--task", "classification", "--dataset", str(labelled), *option])
        assert stopped.value.code == 2 and option[0] in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Mistakes

def test_unknown_datasets_are_named(checkpoint, fails):
    """A dataset that is neither known nor a folder is named, with what would do."""
    fails(eval.main, ["--dataset", "void", "--checkpoint", checkpoint],
          "unknown dataset 'void'", "toy, voc", "images/")


def test_a_folder_may_be_called_like_a_benchmark(checkpoint, folder, tmp_path, monkeypatch):
    """./voc is one's own folder; voc is the benchmark."""
    folder.rename(tmp_path / "voc")
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, "./voc", tmp_path / "result.json")["images"] == 3


def test_classes_to_leave_out_must_be_there(checkpoint, folder, fails):
    """A class to leave out that the dataset lacks is named, and one class must remain."""
    arguments = ["--dataset", folder, "--checkpoint", checkpoint, "--without"]
    fails(eval.main, [*arguments, "background", "unicorn"], "no class 'unicorn'")
    fails(eval.main, [*arguments, "background", "cow", "grass", "sky", "submarine"],
          folder, "every class is left out")


def test_the_toy_world_takes_no_other_names(checkpoint, folder, fails):
    """Classes to leave out and other names, which the toy world does not have, are refused there,
    not ignored."""
    arguments = ["--dataset", "toy", "--checkpoint", checkpoint]
    fails(eval.main, [*arguments, "--without", "sky"], "--without", "toy")
    fails(eval.main, [*arguments, "--names", folder / "classes.txt"], "--names", "toy")


def test_other_names_must_be_as_many(checkpoint, folder, tmp_path, fails):
    """A file of other names with more or fewer classes than the dataset is refused with both
    numbers."""
    (tmp_path / "names.txt").write_text("cow\ngrass\n")
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint,
                      "--names", tmp_path / "names.txt"],
          "names.txt has 2 classes", "expected the 5")


def test_masks_that_cannot_be_right_stop_the_scoring(checkpoint, folder, fails):
    """A mask of wrong values, of another size or cut short stops the scoring with the file's
    name."""
    path = folder / "masks" / "photo1.png"
    arguments = ["--dataset", folder, "--checkpoint", checkpoint]
    Image.fromarray(np.full((128, 128), 9, np.uint8)).save(path)
    fails(eval.main, arguments, "value 9 (in photo1)", "expected 0, 1, 2, 3, 4, 255")
    Image.fromarray(np.zeros((128, 127), np.uint8)).save(path)
    fails(eval.main, arguments, "photo1", "128 x 127")
    path.write_bytes(path.read_bytes()[:60])
    fails(eval.main, arguments, path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_photo_is_one_line(checkpoint, folder, tmp_path, monkeypatch, fails, workers):
    """A photo that is cut short ends the check with its name, and the scoring of what was not
    checked in one line, also when a data worker reads it."""
    path = folder / "images" / "photo1.png"
    arguments = ["--dataset", folder, "--checkpoint", checkpoint, "--workers", workers,
                 "--output", tmp_path / "r.json"]
    image = Image.open(path).convert("RGB")
    path.write_bytes(path.read_bytes()[:-2000])
    fails(eval.main, arguments, "failed its check", path)
    path.unlink()
    path = path.with_suffix(".jpg")
    image.save(path)
    path.write_bytes(path.read_bytes()[:-2000])
    fails(eval.main, arguments, "failed its check", path)
    monkeypatch.setattr(check_file, "check", lambda dataset, indices: ([], np.ones(9)))
    assert fails(eval.main, arguments).startswith(f"error: {path} is no readable image")


def test_a_full_memory_is_one_line(checkpoint, folder, tmp_path, monkeypatch, fails):
    """Where not even one window fits into the GPU's memory, the script ends with a line, not with a
    traceback."""
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(type(tiny()), "patch_scores", full)
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint,
                      "--output", tmp_path / "r.json"], "out of memory")


def test_nothing_to_score_is_said(checkpoint, folder, tmp_path, fails):
    """A dataset of which every pixel is ignored has no mIoU, and that is said."""
    for path in (folder / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.full_like(mask, 255)).save(path)
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint,
                      "--output", tmp_path / "r.json"], folder, "ignored")


def test_a_model_of_the_toy_world_scores_toy_scenes_only(folder, labelled, tmp_path, model, fails):
    """A model that was trained on drawn scenes is refused on photographs, by both tasks; on drawn
    scenes it is scored."""
    save_model(tmp_path / "model.safetensors", model, {"train_data": "toy", "protocol": PROTOCOL})
    assert run(tmp_path, folder, tmp_path / "result.json")["images"] == 3
    path = folder / "images" / "photo0.png"
    Image.open(path).convert("RGB").save(path)      # no longer a file of `save_scene`
    arguments = ["--checkpoint", tmp_path, "--dataset"]
    fails(eval.main, [*arguments, folder], path, "toy world", "--checkpoint")
    fails(eval.main, [*arguments, labelled, "--task", "classification"],
          labelled / "b" / "1.png", "toy world", "--checkpoint")


# --------------------------------------------------------------------------------------------------
# Comparing runs

def write_run(path, **result):
    """A result file; result: what differs from a run on the toy world."""
    result = {"dataset": "toy", "images": 3, "mIoU": 0.5, "protocol": {}, "training": {}, **result}
    path.write_text(json.dumps(result))
    return str(path)


def test_compare_runs(tmp_path, capsys):
    """Runs are grouped by the settings in which they differ, seeds apart: mean, spread and each;
    one number that differs also gives a curve. Old results call lambda's setting "weight"."""
    runs = [("local_weight", 0.05, 0, 0.5), ("weight", 0.05, 1, 0.54), ("local_weight", 1, 0, 0.3)]
    files = [write_run(tmp_path / f"{i}.json", mIoU=miou, protocol={"templates": "plain"},
                       training={key: weight, "seed": seed, "output": f"runs/{i}", "batch": 8})
             for i, (key, weight, seed, miou) in enumerate(runs)]
    eval.main(["--compare", *files, "--output", str(tmp_path / "curve.png")])
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[0] == "lambda" and rows[0] == ["0.05", "52.00", "2.83", "50.0,", "54.0"]
    assert rows[1] == ["1", "30.00", "-", "30.0"]
    eval.main(["--compare", *files[:2], "--output", str(tmp_path / "none.png")])
    assert "all" in capsys.readouterr().out and not (tmp_path / "none.png").exists()
    pytest.importorskip("matplotlib")
    assert Image.open(tmp_path / "curve.png").size == (768, 480)


@pytest.mark.parametrize("results, heads, rows, plotted", [
    ([{"images": 5}, {"images": 20}], ["scored"], [["5"], ["20"]], True),
    ([{"protocol": {"window": 64, "stride": 32}}, {"protocol": {"window": 96, "stride": 48}}],
     ["window", "stride"], [["64", "32"], ["96", "48"]], True),
    ([{"protocol": {"window": 64, "stride": 32}}, {"protocol": {"window": 64, "stride": 64}},
      {"protocol": {"window": 96, "stride": 64}}],
     ["window", "stride"], [["64", "32"], ["64", "64"], ["96", "64"]], False),
    ([{"protocol": {"names": "a.txt"}}, {"protocol": {"names": None}}],
     ["names"], [["a.txt"], ["null"]], False),
    ([{"training": {"cache_features": "a", "images": "x"}},
      {"training": {"cache_features": "b", "images": None}}], ["runs"], [["all"]], False)])
def test_what_tells_runs_apart(tmp_path, capsys, results, heads, rows, plotted):
    """What differs and matters has a column; numbers that tell every two rows apart are drawn, over
    the first."""
    files = [write_run(tmp_path / f"{i}.json", **{"training": {"local_weight": 1}, **result})
             for i, result in enumerate(results)]
    eval.main(["--compare", *files, "--output", str(tmp_path / "curve.png")])
    head, *lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[:len(heads)] == heads and head[len(heads)] == "mIoU"
    assert [line[:len(heads)] for line in lines[:len(rows)]] == rows
    if plotted:
        pytest.importorskip("matplotlib")
    assert (tmp_path / "curve.png").exists() == plotted


def test_methods_side_by_side(tmp_path, capsys):
    """Methods have a row each with their mean cost; a setting counts where runs of one method
    differ in it, data where any do."""
    cost = {"seconds": 60, "trained_parameters": 2_000_000, "peak_gib": 1.5}
    other = {**cost, "seconds": 80}
    runs = [({"method": "simzss", "batch": 8}, cost), ({"method": "simzss", "batch": 8}, other),
            ({"method": "sseg", "batch": 4, "clusters": 2}, cost),
            ({"method": "sseg", "batch": 4, "clusters": 8}, None)]
    files = [write_run(tmp_path / f"{i}.json", training={**settings, "seed": i}, cost=cost)
             for i, (settings, cost) in enumerate(runs)]
    eval.main(["--compare", *files])
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert head[:2] == ["method", "clusters"]
    assert rows == [["simzss", "null", "50.00", "0.00", "70", "2.0", "1.5", "50.0,", "50.0"],
                    ["sseg", "2", "50.00", "-", "60", "2.0", "1.5", "50.0"],
                    ["sseg", "8", "50.00", "-", "not", "known", "50.0"]]
    eval.main(["--compare", files[0], write_run(tmp_path / "voc.json", dataset="voc",
                                                training={"method": "sseg", "seed": 9})])
    assert capsys.readouterr().out.split()[:2] == ["dataset", "method"]


def test_compare_takes_results_only(tmp_path, fails):
    """A file that is no result is named."""
    (tmp_path / "a.json").write_text('{"mIoU": 0.5}')
    fails(eval.main, ["--compare", tmp_path / "a.json"], tmp_path / "a.json",
          "no segmentation result")


def test_a_background_word_that_is_a_class_is_refused(checkpoint, folder, fails):
    """A word of the background that is a class as well would take its pixels, and is refused."""
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint,
                      "--background", "prompt:wall, grass"], "'grass'")
