"""The measure by hand, and the command on a small folder."""
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import eval
from conftest import PROTOCOL
from eval import confusion_matrix, scores

# ---------------------------------------------------------------------------------------------------------------------
# The measure


def test_confusion_matrix_by_hand():
    """Pixels are counted by (truth, prediction); ignored pixels count nowhere, whatever is predicted there."""
    truth = torch.tensor([[0, 0, 1], [1, 255, 255]])
    prediction = torch.tensor([[0, 2, 1], [1, 1, 7]])
    matrix = confusion_matrix(prediction, truth, 3)
    assert matrix.dtype == torch.int64 and matrix.tolist() == [[1, 0, 1], [0, 2, 0], [0, 0, 0]]
    assert confusion_matrix(prediction.numpy().astype(np.uint8), truth.numpy().astype(np.uint8), 3).equal(matrix)


def test_confusion_matrix_equals_a_loop():
    """The matrix is what counting pixel by pixel gives, with any value to ignore."""
    rng = np.random.default_rng(0)
    truth, prediction = rng.integers(0, 6, (9, 11)), rng.integers(0, 5, (9, 11))
    expected = [[0] * 5 for _ in range(5)]
    for t, p in zip(truth.flatten(), prediction.flatten()):
        if t != 5:
            expected[t][p] += 1
    assert confusion_matrix(prediction, truth, 5, ignore_index=5).tolist() == expected


@pytest.mark.parametrize("prediction, truth, words", [([0, 1], [0, 3], "truth has values 0..3; expected 0..2, or 255"),
                                                      ([0, 1], [-1, 2], "truth has values -1..2"),
                                                      ([0, 3], [0, 1], "prediction has values 0..3; expected 0..2"),
                                                      ([0, 255], [0, 1], "prediction has values 0..255"),
                                                      ([0, 1, 2], [0, 1], "prediction has 3 pixels, truth 2")])
def test_values_that_cannot_be_are_refused(prediction, truth, words):
    """A value that is no class, in truth or prediction, and masks of different size are refused, not miscounted."""
    with pytest.raises(ValueError, match=words):
        confusion_matrix(torch.tensor(prediction), torch.tensor(truth), 3)


def test_scores_by_hand():
    """IoU is right / (truth + predicted - right); a class that is nowhere does not count, one only predicted counts as
    0 in mIoU and not in mAcc."""
    found = scores([[3, 1, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    assert found["IoU"][:3] == pytest.approx([3 / 5, 2 / 3, 0]) and math.isnan(found["IoU"][3])
    assert found["mIoU"] == pytest.approx((3 / 5 + 2 / 3 + 0) / 3)
    assert found["mAcc"] == pytest.approx((3 / 5 + 2 / 2) / 2)
    assert found["aAcc"] == pytest.approx(5 / 7)


def test_a_perfect_prediction_scores_one():
    """A prediction that equals the truth scores 1 in every class and every mean, although ignored pixels differ."""
    truth = torch.tensor([0, 1, 1, 3, 255])
    found = scores(confusion_matrix(torch.tensor([0, 1, 1, 3, 2]), truth, 5))
    assert found["mIoU"] == found["mAcc"] == found["aAcc"] == 1
    assert [iou == 1 for iou in found["IoU"]] == [True, True, False, True, False]


# ---------------------------------------------------------------------------------------------------------------------
# The command

def run(checkpoint, dataset, output, *more):
    """eval.py's result, read as strict JSON (NaN is none)."""
    eval.main(["--dataset", str(dataset), "--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu",
               *more])
    return json.loads(output.read_text(), parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


def test_a_folder_is_scored(checkpoint, folder, tmp_path, capsys):
    """The result file holds scores, protocol, backbone and the dataset; the table and the mIoU are printed."""
    result = run(checkpoint, folder, tmp_path / "result.json")
    printed = capsys.readouterr().out
    assert f"mIoU {result['mIoU']:.2%}" in printed and all(name in printed for name in result["classes"])
    assert result["classes"] == ["background", "cow", "grass", "sky", "submarine"] and result["images"] == 3
    assert result["IoU"][4] in (0, None)            # nowhere in the truth: 0 if it was predicted
    assert result["mIoU"] == pytest.approx(np.mean([iou for iou in result["IoU"] if iou is not None]))
    assert result["protocol"] == PROTOCOL and result["backbone"]["name"] == "toy"
    assert result["dataset"] == str(folder) and result["checkpoint"] == str(checkpoint)


def test_without_a_class(checkpoint, folder, tmp_path):
    """A class left out is neither predicted nor scored: the others score as if its pixels had been ignored and its name
    had never been there."""
    result = run(checkpoint, folder, tmp_path / "without.json", "--without", "background")
    (folder / "classes.txt").write_text("cow, cattle\ngrass\nsky\nsubmarine\n")
    for path in (folder / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.where((mask == 0) | (mask == 255), 255, mask - 1).astype(np.uint8)).save(path)
    expected = run(checkpoint, folder, tmp_path / "expected.json")
    assert result["classes"] == ["cow", "grass", "sky", "submarine"]
    assert (result["IoU"], result["mIoU"], result["aAcc"]) == (expected["IoU"], expected["mIoU"], expected["aAcc"])


def test_classes_can_be_put_in_other_words(checkpoint, folder, tmp_path):
    """With --names classes are prompted with other words, line by line, and scored as if the folder had those; classes
    are left out by the folder's own names."""
    (tmp_path / "names.txt").write_text("backdrop\nbull, ox\nlawn\nheaven\nu-boat\n")
    result = run(checkpoint, folder, tmp_path / "names.json", "--names", str(tmp_path / "names.txt"), "--without", "sky")
    (folder / "classes.txt").write_text((tmp_path / "names.txt").read_text())
    expected = run(checkpoint, folder, tmp_path / "expected.json", "--without", "heaven")
    assert result["IoU"] == expected["IoU"] and result["mIoU"] == expected["mIoU"]
    assert result["classes"] == ["backdrop", "bull", "lawn", "u-boat"]


def test_the_protocol_can_be_changed(checkpoint, folder, tmp_path):
    """Templates, window and stride of the command line take the place of the checkpoint's and are recorded."""
    result = run(checkpoint, folder, tmp_path / "result.json", "--templates", "simple7", "--stride", "16", "--window", "48")
    assert result["protocol"] == {**PROTOCOL, "templates": "simple7", "stride": 16, "window": 48}


def test_a_class_that_is_nowhere_is_null(tmp_path):
    """In the result file a class without any pixel has null for its IoU."""
    eval.write_result(tmp_path / "result.json", scores([[4, 0, 0], [1, 3, 0], [0, 0, 0]]))
    assert json.loads((tmp_path / "result.json").read_text())["IoU"] == [0.8, 0.75, None]


def test_the_result_lies_beside_the_checkpoint(checkpoint, folder):
    """Without --output the result is written beside the checkpoint, named after the dataset."""
    eval.main(["--dataset", str(folder), "--checkpoint", str(checkpoint.parent)])
    assert json.loads((checkpoint.parent / "eval_folder.json").read_text())["images"] == 3


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes

def test_unknown_datasets_are_named(checkpoint, fails):
    """A dataset that is neither known nor a folder is named, with what would do."""
    fails(eval.main, ["--dataset", "void", "--checkpoint", checkpoint], "unknown dataset 'void'", "'toy'", "images/, masks/")


def test_classes_to_leave_out_must_be_there(checkpoint, folder, fails):
    """A class to leave out that the dataset lacks is named, and one class must remain."""
    arguments = ["--dataset", folder, "--checkpoint", checkpoint, "--without"]
    fails(eval.main, [*arguments, "background", "unicorn"], "no class 'unicorn'")
    fails(eval.main, [*arguments, "background", "cow", "grass", "sky", "submarine"], folder, "class")


def test_the_toy_world_passes_over_nothing(checkpoint, folder, fails):
    """Classes to leave out and other names, which the toy world does not have, are refused there, not passed over."""
    fails(eval.main, ["--dataset", "toy", "--checkpoint", checkpoint, "--without", "sky"], "--without", "toy")
    fails(eval.main, ["--dataset", "toy", "--checkpoint", checkpoint, "--names", folder / "classes.txt"], "--names", "toy")


def test_other_names_must_be_as_many(checkpoint, folder, tmp_path, fails):
    """A file of other names with more or fewer classes than the dataset is refused with both numbers."""
    (tmp_path / "names.txt").write_text("cow\ngrass\n")
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint, "--names", tmp_path / "names.txt"],
          "names.txt has 2 classes", "expected the 5")


def test_masks_that_cannot_be_right_stop_the_scoring(checkpoint, folder, fails):
    """A mask of wrong values, of another size or cut short stops the scoring with the file's name."""
    path = folder / "masks" / "photo1.png"
    Image.fromarray(np.full((128, 128), 9, np.uint8)).save(path)
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint], path, "value 9", "0..4")
    Image.fromarray(np.zeros((128, 127), np.uint8)).save(path)
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint], path, "(128, 127)")
    path.write_bytes(path.read_bytes()[:60])
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint], path)


def test_more_classes_than_masks_can_hold_are_refused(checkpoint, folder, fails):
    """A folder of more classes than 8-bit masks can tell apart, 255 being ignored, is refused with their number."""
    for count in (256, 300):
        (folder / "classes.txt").write_text("".join(f"thing number {i}\n" for i in range(count)))
        fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint], "classes.txt", count, 255)


def test_nothing_to_score_is_said(checkpoint, folder, tmp_path, fails):
    """A dataset of which every pixel is ignored has no mIoU, and that is said."""
    for path in (folder / "masks").iterdir():
        mask = np.array(Image.open(path))
        Image.fromarray(np.full_like(mask, 255)).save(path)
    fails(eval.main, ["--dataset", folder, "--checkpoint", checkpoint, "--output", tmp_path / "r.json"], folder, "ignored")
