"""eval.py: the measures by hand, backgrounds, processes, classification, and the command."""
import dataclasses
import hashlib
import importlib.metadata
import json
import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from eval import confusion_matrix, evaluate, scores
from machinery.contract import METHODS, PRETRAINED, Method, Protocol
from machinery.errors import one_line_errors
from machinery.images import IGNORE, ScoredImages, load_image, to_pixels
from machinery.networks.checkpoint import load_model, save_model
from machinery.scoring.benchmarks import THRESHOLD, open_folder
from machinery.scoring.classify import LabelledImages, classify
from machinery.scoring.pictures import NOT_SCORED, class_colours
from machinery.settings import as_mapping
from conftest import tiny
from processes import Processes

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
    assert confusion_matrix(prediction, truth % 255, 8, ignore_index=0).sum() == 2
    arrays = (values.numpy().astype(np.uint8) for values in (prediction, truth))
    assert confusion_matrix(*arrays, 3).equal(matrix)


@pytest.mark.parametrize("prediction, truth, words", [
    ([0, 1], [0, 3], "truth has values 0..3; expected 0..2, or 255"),
    ([0, 3], [0, 1], "prediction has values 0..3; expected 0..2"),
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


# --------------------------------------------------------------------------------------------------
# Background, with another method's model

@dataclass
class PaintedSettings:
    """A Painted has nothing to set."""


class Painted(Method):
    """Another method: a class scores a pixel by its red, green or blue / 250, any other word by 0.3
    everywhere. It needs no checkpoint: it is there as --checkpoint painted."""
    name = "painted"
    Settings = PaintedSettings
    looked = 0                                      # windows seen

    def embed_classes(self, classes, templates=("{}",)):
        index = {"red": 0, "green": 1, "blue": 2}
        return torch.tensor([[[index.get(name, 3)] for name in names[:1]] for names in classes])

    def patch_scores(self, pixels, embeddings):
        Painted.looked += len(pixels)
        word = torch.full_like(pixels[:, :1], 0.3, dtype=torch.float32)
        scores = torch.cat([pixels / 250, word], dim=1)
        return scores[:, embeddings.flatten()], pixels.shape[-2:]


class Full(Painted):
    """A method whose windows do not fit into the GPU's memory."""
    name = "full"

    def patch_scores(self, pixels, embeddings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


for method in (Painted, Full):
    METHODS[method.name] = f"test_eval.{method.__name__}"
    PRETRAINED[method.name] = (method.name, "")


def painted():
    return Painted(PaintedSettings())


class Scenes(ScoredImages):
    """[(name, image, mask)] as a dataset; place: which of the classes is the background, None =
    there is none."""
    name = "scenes"

    def __init__(self, items, place=0):
        self.items = items
        self.background_class = place
        self.background = "none" if place is None else "threshold:0.2"
        self.classes = [["red"], ["green"], ["blue"]]
        if place is not None:
            self.classes.insert(place, ["background"])

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


WHOLE = Protocol(templates="plain", short_side=1, window=4000, stride=4000)         # one window
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
    method needs to embed classes and score patches only."""
    protocol = dataclasses.replace(WHOLE, background=background)
    result, _ = evaluate(painted(), row(place), protocol)
    found = {name: None if math.isnan(iou) else iou
             for name, iou in zip(result["classes"], result["IoU"])}
    assert found == pytest.approx(expected)
    mean = np.mean([iou for iou in expected.values() if iou is not None])
    assert result["mIoU"] == pytest.approx(mean)
    assert result["protocol"]["background"] == background
    assert result["method"] == "painted" and "checkpoint" not in result
    json.dumps(result)


def test_measures_of_a_whole_run_by_hand():
    """mIoU, mAcc and aAcc of the row above: two classes of background and red right, one of three
    green, one ignored."""
    result, _ = evaluate(painted(), row(0), WHOLE)
    assert result["protocol"]["background"] == "threshold:0.2"          # the dataset's own
    assert result["mIoU"] == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert result["mAcc"] == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert result["aAcc"] == pytest.approx(5 / 7)


@pytest.mark.parametrize("place, background, words", [
    (None, "threshold:0.2", '--background threshold:0.2: scenes has no class "background"'),
    (None, "prompt:sky", "--background prompt:sky: scenes has no class"),
    (0, "none", '--background none: scenes scores the class "background"; choose threshold')])
def test_backgrounds_that_make_no_sense(place, background, words):
    """A background where none is scored, and none where one is, are refused."""
    dataset = Scenes([("row", Image.new("RGB", (2, 1)), np.zeros((1, 2), int))], place)
    with pytest.raises(ValueError, match=re.escape(words)):
        evaluate(painted(), dataset, dataclasses.replace(WHOLE, background=background))


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
    protocol = dataclasses.replace(WHOLE, short_side=9)
    result, _ = evaluate(painted(), dataset, protocol)
    assert [t for t, _ in result["sweep"]] == [t / 100 for t in range(-100, 101)]
    for i in (0, 99, *range(100, 140, 4), 182, 200):
        threshold, miou = result["sweep"][i]
        single = dataclasses.replace(protocol, background=f"threshold:{threshold}")
        single, _ = evaluate(painted(), dataset, single)
        assert single["mIoU"] == miou, threshold
    assert len({miou for _, miou in result["sweep"]}) > 30
    assert result["mIoU"] == dict(map(tuple, result["sweep"]))[0.2]


def test_a_sweep_on_the_command_line(checkpoint, folder, tmp_path, capsys, fails):
    """--sweep-background prints the thresholds around the best; the result file holds all. It is
    refused without a class "background", or with words for it."""
    result = run(checkpoint, folder, tmp_path / "new" / "sweep.json", "--sweep-background")
    best, miou = max(result["sweep"], key=lambda point: point[1])
    assert f"best at {best:.2f}: {miou:.2%}" in capsys.readouterr().out
    assert result["protocol"]["background"] == THRESHOLD
    assert "sweep" not in run(checkpoint, folder, tmp_path / "r.json", "--background", THRESHOLD)
    arguments = ["--dataset", folder, "--checkpoint", checkpoint, "--sweep-background", "--output",
                 tmp_path / "none.json"]
    fails(eval.main, [*arguments, "--without", "background"],
          f'--background threshold:0.2: {folder} has no class "background"')
    fails(eval.main, [*arguments, "--background", "prompt:sky"],
          "--sweep-background is for threshold:T, found prompt:sky")


# --------------------------------------------------------------------------------------------------
# The command

def run(checkpoint, dataset, output, *more):
    """eval.py's result, read as strict JSON (NaN is none)."""
    eval.main(["--dataset", str(dataset), "--checkpoint", str(checkpoint), "--output", str(output),
               "--device", "cpu", *more])
    return json.loads(output.read_text(),
                      parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_folder_is_scored(checkpoint, folder, tmp_path, capsys):
    """The result file holds scores, protocol, the method's settings and the dataset; the table and
    the mIoU are printed."""
    result = run(checkpoint, folder, tmp_path / "result.json")
    printed = capsys.readouterr().out
    assert f"mIoU {result['mIoU']:.2%}" in printed
    assert all(name in printed for name in result["classes"])
    assert result["classes"] == ["background", "cow", "grass", "sky", "submarine"]
    assert result["images"] == 3
    assert result["IoU"][4] in (0, None)            # nowhere in the truth: 0 if it was predicted
    mean = np.mean([iou for iou in result["IoU"] if iou is not None])
    assert result["mIoU"] == pytest.approx(mean)
    protocol = as_mapping(load_model(checkpoint).protocol)
    expected = {**protocol, "background": "prompt:background"}
    assert result["protocol"] == json.loads(json.dumps(expected))
    assert result["data"] == {"masks": f"masks by {folder}/classes.txt", "names": None,
                              "without": []}
    assert result["dataset"] == str(folder) and not result["partial"]
    assert result["precision"] == "fp32"
    assert result["method"] == "simzss" and result["settings"]["backbone"]["name"] == "toy"
    assert result["checkpoint"] == str(checkpoint)
    assert result["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert result["versions"]["torch"] == importlib.metadata.version("torch")
    commit = result["commit"]
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", commit)


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


def test_the_result_lies_beside_the_checkpoint(checkpoint, folder, tmp_path):
    """Without --output the result is written beside the checkpoint, named after the dataset and the
    classes left out, so that neither result overwrites the other."""
    (tmp_path / "model.safetensors").write_bytes(checkpoint.read_bytes())
    for without, name in ([], "eval_folder.json"), (["sky", "background"],
                          "eval_folder_without_background_without_sky.json"):
        eval.main(["--dataset", str(folder), "--checkpoint", str(tmp_path), "--without", *without])
        result = json.loads((tmp_path / name).read_text())
        assert result["images"] == 3 and len(result["classes"]) == 5 - len(without)


def test_pictures_of_what_is_scored(checkpoint, folder, tmp_path):
    """--save-images N writes photo, truth, prediction and overlay of N images side by side, with
    titles, below the result: of N parts of the dataset those with the most scored pixels. What is
    not scored is grey in truth and prediction."""
    Image.new("L", (128, 128), 255).save(folder / "masks" / "photo1.png")
    run(checkpoint, folder, tmp_path / "result.json", "--save-images", "2")
    pictures = sorted((tmp_path / "result_images").iterdir())
    assert [path.name for path in pictures] == ["0000.png", "0002.png"]
    picture = np.array(Image.open(pictures[0]))[24:]                    # 24: the titles
    photo = np.array(load_image(folder / "images" / "photo0.png"))
    mask = np.array(Image.open(folder / "masks" / "photo0.png"))
    H, W = mask.shape
    assert (picture[:H, :W] == photo).all() and picture.shape[1] > 4 * W
    truth = picture[:H, W + 4:2 * W + 4]            # after a gap
    colours = class_colours(["background", "cow", "grass", "sky", "submarine"])
    assert (truth[mask < 4] == colours[mask[mask < 4]]).all()
    assert (truth[mask == 255] == NOT_SCORED).all()
    prediction = picture[:H, 2 * W + 8:3 * W + 8]
    assert ((prediction == NOT_SCORED).all(axis=2) == (mask == 255)).all()


def test_results_go_where_they_are_sent(checkpoint, folder, tmp_path, fails):
    """--output names a file, whose folder is made, or a folder; a dataset may be named with a slash
    at its end; a place where nothing can be written is refused before anything is scored."""
    run(checkpoint, folder, tmp_path / "deep" / "er" / "result.json")
    eval.main(["--dataset", f"{folder}/", "--checkpoint", str(checkpoint), "--output",
               str(tmp_path)])
    assert json.loads((tmp_path / "eval_folder.json").read_text())["images"] == 3
    Painted.looked = 0
    (tmp_path / "file").touch()
    fails(eval.main, ["--dataset", folder, "--checkpoint", "painted", "--output",
                      tmp_path / "file" / "r.json"], "file")
    assert not Painted.looked


def test_a_result_of_an_odd_dataset_is_not_overwritten(checkpoint, folder, tmp_path, fails):
    """A JSON whose dataset is no name is the result of something else."""
    (tmp_path / "r.json").write_text('{"dataset": {"name": 3}}')
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint, "--output",
                      tmp_path / "r.json"], "r.json holds the result of {'name': 3}")


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
    Painted.looked = 0
    fails(eval.main, ["--dataset", tmp_path / "other", "--checkpoint", "painted",
                      "--output", output], output, folder, tmp_path / "other", "--output")
    assert output.read_bytes() == before and not Painted.looked


def test_a_method_without_patch_tokens_is_not_propagated(folder, fails):
    """--propagate is refused in one line, before anything is scored."""
    Painted.looked = 0
    fails(eval.main, ["--dataset", folder, "--checkpoint", "painted", "--propagate", "0.9"],
          "--propagate: painted has no patch tokens of unit norm", "leave it out")
    assert not Painted.looked


def test_limit_marks_the_result(checkpoint, folder, tmp_path, capsys):
    """--limit scores the first images only, checks the masks of these alone, and says so."""
    (folder / "masks" / "photo2.png").unlink()
    result = run(checkpoint, folder, tmp_path / "result.json", "--limit", "2")
    assert result["partial"] and result["images"] == 2
    assert "(only 2 images" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Several processes

def test_two_processes_count_what_one_counts(checkpoint, folder, tmp_path):
    """Two processes give for three images, bit for bit, the scores of one process, the same result
    file and the same pictures, with all that may be switched on at test time."""
    more = ["--propagate", "0.9", "--image-weight", "0.5", "--blend", "triangle", "--scales", "1",
            "1.5", "--refine-steps", "2", "--save-images", "3"]
    both = Processes(tmp_path, 2, eval.main,
                     ["--dataset", str(folder), "--checkpoint", str(checkpoint), "--output",
                      str(tmp_path / "two.json"), "--workers", "0", *more])
    assert both.wait() == [0, 0], both.output()
    alone = run(checkpoint, folder, tmp_path / "one.json", *more)
    switched = {"propagate": 0.9, "image_weight": 0.5, "blend": "triangle", "refine_steps": 2}
    assert switched.items() <= alone["protocol"].items()
    together = json.loads((tmp_path / "two.json").read_text())
    same = set(alone) - {"seconds", "images_per_second", "processes", "date"}
    assert {key: together[key] for key in same} == {key: alone[key] for key in same}
    assert together["processes"] == 2
    assert both.output().count("mIoU") == 1
    for i in range(3):
        two, one = (tmp_path / f"{name}_images" / f"000{i}.png" for name in ("two", "one"))
        assert two.read_bytes() == one.read_bytes()


@pytest.mark.parametrize("is_wrong", [False, True])
def test_the_first_process_checks_for_all(folder, tmp_path, is_wrong):
    """Of two processes the first looks at the masks and prints what it found; the other goes on
    without output, or ends with it."""
    if is_wrong:
        (folder / "masks" / "photo1.png").write_bytes(b"no image")
    both = Processes(tmp_path, 2, eval.main, ["--check", "--dataset", str(folder)])
    assert both.wait() == [int(is_wrong)] * 2
    first, second = (log.read_text() for log in both.logs)
    if is_wrong:
        assert "photo1.png is no readable mask" in first
        assert "failed its check: the first process says why" in second
    else:
        assert "3 images with masks" in first and "3 images" not in second


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
        result, images = classify(Named(), dataset, numbers(dataset), **settings)
        return result["top1"], result["top5"], images

    # b is 20, c is 30: 22 and 29 are right; 31 and 14 have their class second and second; of 68 c
    # is the fifth nearest
    assert classified(LabelledImages(labelled, names, 16), batch=2) == (2 / 5, 1, 5)
    dataset = LabelledImages(labelled, labels, 16)
    assert classified(dataset)[:2] == (2 / 5, 1)
    assert len(dataset.classes) == 10
    assert dataset[0][0].shape == (3, 16, 16) and dataset.size == 16
    names.write_text("10\n20\n95\n40\n50\n60\n70\n")    # c is now far from all of its images
    dataset = LabelledImages(labelled, names, 16)
    assert classified(dataset, limit=3) == (1 / 3, 1 / 3, 3)    # 22, 29 and 14


def test_classification_on_the_command_line(labelled, tmp_path, model, capsys):
    """A real model classifies an image folder by the names of its folders: top-1 is the share of
    images whose class token is nearest to its own folder's embedded name."""
    rng = np.random.default_rng(0)
    for path in labelled.glob("*/*.*"):
        noise = rng.integers(0, 256, (40, 30, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format="PNG")
    (labelled / "c").rename(labelled / "ice_cream")
    model.protocol = dataclasses.replace(model.protocol, templates="plain")
    save_model(tmp_path, model, {"run": {"image_size": 32}})
    eval.main(["--task", "classification", "--dataset", str(labelled),
               "--checkpoint", str(tmp_path), "--device", "cpu"])
    result = json.loads((tmp_path / "eval_val.json").read_text())
    names = ["a", "b", "d", "e", "f", "g", "ice cream"]
    words = model.embed_classes(names)[:, 0]
    right = []
    for path in sorted(labelled.glob("*/*.*")):
        name = path.parent.name.replace("_", " ")
        image = load_image(path).resize((32, 42), Image.BICUBIC).crop((0, 5, 32, 37))
        token = model.backbone(model.backbone.normalise(to_pixels(image)[None]))[0][0]
        nearest = (words @ token).argsort(descending=True).tolist()
        right.append([names.index(name) in nearest[:k] for k in (1, 5)])
    assert [result["top1"], result["top5"]] == np.mean(right, axis=0).tolist()
    assert result["classes"] == names and result["image_size"] == 32 and not result["partial"]
    printed = f"top-1 {result['top1']:.2%}   top-5 {result['top5']:.2%}   (5 images, 7 classes"
    assert printed in capsys.readouterr().out


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


@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "none"], ["no class folders in none; expected none/CLASS/*.jpg"]),
    (["--dataset", "imagenet"], ["no class folders in", "imagenet/val", "image-net.org"]),
    (["--names", "two.txt"],
     ["two.txt has 2 classes; expected those of the 7 folders", "such as a"]),
    (["--names", "labels.txt"], ["labels.txt has 2 classes", "such as c"]),
    (["--names", "none.txt"], ["no class file", "none.txt"])])
def test_wrong_image_folders_are_named(labelled, checkpoint, fails, monkeypatch, arguments, words):
    """Folders and names that do not belong together are named."""
    monkeypatch.chdir(labelled.parent)
    (labelled.parent / "two.txt").write_text("cat\ndog\n")
    (labelled.parent / "labels.txt").write_text("a: cat\nb: dog\n")
    fails(eval.main, ["--dataset", labelled, "--task", "classification", "--checkpoint",
                      checkpoint, *arguments], *words)


def test_drawn_scenes_have_no_files_to_check(capsys):
    """--check of the toy world is refused: it would look at nothing and say that all is well."""
    with pytest.raises(SystemExit):
        eval.main(["--dataset", "toy", "--check"])
    assert "--dataset toy is drawn" in capsys.readouterr().err


def test_what_masks_alone_have_is_refused_for_classification(labelled, capsys):
    """Options that mean nothing without masks are refused, not ignored."""
    for option in (["--check"], ["--background", "none"], ["--without", "a"]):
        with pytest.raises(SystemExit):
            eval.main(["--task", "classification", "--dataset", str(labelled), *option])
        assert option[0] in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------
# Mistakes

@pytest.mark.parametrize("arguments, words", [
    (["--dataset", "void"], ["unknown dataset 'void'", "toy, voc", "images/"]),
    (["--without", "background", "unicorn"], ["no class 'unicorn'", "it has background, cow, gr"]),
    (["--without", "background", "cow", "grass", "sky", "submarine"], ["no class names found"]),
    (["--dataset", "toy", "--without", "sky"], ["--without", "toy"]),
    (["--names", "two.txt"], ["two.txt has 2 classes", "expected the 5"]),
    (["--background", "prompt:wall, grass"], ["'grass'"])])
def test_mistakes_are_one_line(checkpoint, folder, fails, monkeypatch, arguments, words):
    """A dataset that is neither known nor a folder, classes to leave out that are not there or are
    all, other names that are too few, names and classes of the toy world, and a word of the
    background that is a class as well are refused in one line."""
    monkeypatch.chdir(folder)
    (folder / "two.txt").write_text("cow\ngrass\n")
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint, *arguments], *words)


def test_a_folder_may_be_called_like_a_benchmark(checkpoint, folder, tmp_path, monkeypatch):
    """./voc is one's own folder; voc is the benchmark."""
    folder.rename(tmp_path / "voc")
    monkeypatch.chdir(tmp_path)
    assert run(checkpoint, "./voc", tmp_path / "result.json")["images"] == 3


def test_a_photo_that_breaks_later_is_one_line(folder):
    """A photo that breaks after the check ends the scoring in one line with its name, also when a
    data worker reads it."""
    path = folder / "images" / "photo1.png"
    path.write_bytes(path.read_bytes()[:-2000])
    protocol = dataclasses.replace(WHOLE, background="prompt:background")
    with pytest.raises(SystemExit) as stopped, one_line_errors(""):
        evaluate(painted(), open_folder(folder), protocol, workers=1)
    assert str(stopped.value).startswith(f"error: {path} is no readable image")


def test_a_full_memory_is_one_line(folder, tmp_path, fails):
    """Where the windows do not fit into the GPU's memory, the script ends with a line that names
    the flags, not with a traceback."""
    fails(eval.main, ["--dataset", folder, "--checkpoint", "full", "--output",
                      tmp_path / "r.json"], "out of memory", "lower --batch, --window")


def test_ctrl_c_is_one_word(capsys):
    """Ctrl-C ends a script with a word and the usual status, wherever it is."""
    with pytest.raises(SystemExit) as stopped, one_line_errors(""):
        raise KeyboardInterrupt
    assert stopped.value.code == 130 and capsys.readouterr().err == "interrupted\n"


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
    save_model(tmp_path, model, {"run": {"train_data": "toy"}})
    assert run(tmp_path, folder, tmp_path / "result.json")["images"] == 3
    path = folder / "images" / "photo0.png"
    Image.open(path).convert("RGB").save(path)      # no longer a file of `save_scene`
    arguments = ["--checkpoint", tmp_path, "--dataset"]
    fails(eval.main, [*arguments, folder], path, "toy world", "--checkpoint")
    save_model(tmp_path / "photos", tiny(backbone={"name": "test_resnet", "weights": "random"}),
               {"run": {"train_data": "photos.json"}})
    fails(eval.main, ["--dataset", "toy", "--checkpoint", tmp_path / "photos"], "photos.json",
          "means nothing on the drawn scenes")
    fails(eval.main, [*arguments, labelled, "--task", "classification"],
          labelled / "b" / "1.png", "toy world", "--checkpoint")


# --------------------------------------------------------------------------------------------------
# Comparing runs

def write_run(path, run=None, **result):
    """A result file. run: settings of the training; result: what differs from one on the toy
    world."""
    result = {"dataset": "toy", "images": 3, "mIoU": 0.5, "method": "simzss", "settings": {},
              "data": {}, "protocol": {}, "training": {"run": run or {}}, **result}
    path.write_text(json.dumps(result))
    return str(path)


def compared(files, capsys):
    """The table that --compare prints, (heads, rows), split at white space."""
    eval.main(["--compare", *files])
    head, *rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    return head, rows


def test_compare_runs(tmp_path, capsys):
    """Runs are grouped by the settings in which they differ, seeds apart: mean, spread and each."""
    runs = [(0.05, 0, 0.5), (0.05, 1, 0.54), (1, 0, 0.3)]
    files = [write_run(tmp_path / f"{i}.json", {"seed": seed, "output": f"runs/{i}", "batch": 8},
                       mIoU=miou, settings={"local_weight": weight, "text": {"layers": 1}})
             for i, (weight, seed, miou) in enumerate(runs)]
    head, rows = compared(files, capsys)
    assert head == ["model.local_weight", "mIoU", "+-", "runs"]
    assert rows == [["0.05", "52.00", "2.83", "50.0,", "54.0"], ["1", "30.00", "-", "30.0"]]
    _, rows = compared(files[:2], capsys)
    assert rows == [["all", "52.00", "2.83", "50.0,", "54.0"]]


@pytest.mark.parametrize("results, heads, rows", [
    ([{"images": 5}, {"images": 20}], ["images"], [["5"], ["20"]]),
    ([{"protocol": {"window": 64, "stride": 32}}, {"protocol": {"window": 96, "stride": 48}}],
     ["protocol.window", "protocol.stride"], [["64", "32"], ["96", "48"]]),
    ([{"data": {"names": "a.txt"}}, {"data": {"names": None}}],
     ["data.names"], [["a.txt"], ["null"]]),
    ([{"run": {"cache_features": "a", "images": "x", "workers": 1}},
      {"run": {"cache_features": "b", "images": None, "workers": 2}}], ["runs"], [["all"]])])
def test_what_tells_runs_apart(tmp_path, capsys, results, heads, rows):
    """What differs has a column, but for settings of a run that do not change results."""
    files = [write_run(tmp_path / f"{i}.json", **result) for i, result in enumerate(results)]
    head, lines = compared(files, capsys)
    assert head[:len(heads)] == heads and head[len(heads)] == "mIoU"
    assert [line[:len(heads)] for line in lines] == rows


def test_methods_side_by_side(tmp_path, capsys):
    """Methods have a row each with their mean cost; a setting counts where runs of one method
    differ in it, data where any do."""
    cost = {"seconds": 60, "trained_parameters": 2_000_000, "peak_gib": 1.5}
    other = {**cost, "seconds": 80}
    runs = [("simzss", 8, {}, cost), ("simzss", 8, {}, other), ("sseg", 4, {"clusters": 2}, cost),
            ("sseg", 4, {"clusters": 8}, None)]
    files = [write_run(tmp_path / f"{i}.json", {"batch": batch, "seed": i}, method=method,
                       settings=settings, cost=cost)
             for i, (method, batch, settings, cost) in enumerate(runs)]
    head, rows = compared(files, capsys)
    assert head[:2] == ["method", "model.clusters"]
    assert rows == [["simzss", "null", "50.00", "0.00", "70", "2.0", "1.5", "50.0,", "50.0"],
                    ["sseg", "2", "50.00", "-", "60", "2.0", "1.5", "50.0"],
                    ["sseg", "8", "50.00", "-", "not", "known", "50.0"]]


def test_compare_takes_results_of_one_dataset_only(tmp_path, fails):
    """A file that is no result is named, and so are results of different datasets."""
    files = [write_run(tmp_path / "toy.json", {"seed": 1}),
             write_run(tmp_path / "voc.json", {"seed": 2}, dataset="voc")]
    fails(eval.main, ["--compare", *files], "voc.json is a result of voc", "toy.json of toy")
    fails(eval.main, ["--compare", tmp_path], f"no result {tmp_path / 'result.json'}")
    (tmp_path / "a.json").write_text('{"mIoU": 0.5}')
    fails(eval.main, ["--compare", tmp_path / "a.json"], tmp_path / "a.json",
          "no segmentation result")
