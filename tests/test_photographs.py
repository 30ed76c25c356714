"""docs/photographs.py: the figures' photographs are made of COCO's own files."""
import importlib.util
import json

import numpy as np
import pytest
from PIL import Image

import eval
from conftest import ROOT
from machinery.scoring.benchmarks import open_folder
from machinery.training.captions import read_captions


@pytest.fixture(scope="module")
def photographs():
    """The script, as a module."""
    spec = importlib.util.spec_from_file_location("photographs", ROOT / "docs" / "photographs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_list_has_what_the_pages_say(photographs):
    """771 captions are trained on, and 106 photographs are scored."""
    ids = photographs.read_ids(ROOT / "docs" / "photographs.txt")
    assert {name: len(found) for name, found in ids.items()} == {"captions": 771, "scored": 106}


@pytest.mark.parametrize("segmentation", [
    [[1, 0, 2, 0, 2, 3, 1, 3]], {"counts": [4, 8, 12], "size": [4, 6]},
    {"counts": "48<", "size": [4, 6]}])
def test_outlines_of_all_kinds(photographs, segmentation):
    """A polygon, a list of runs and a run-length code give the same pixels."""
    expected = np.zeros((4, 6), bool)
    expected[:, 1:3] = True
    assert (photographs.region_of(segmentation, 4, 6) == expected).all()


def test_a_small_coco(photographs, tmp_path):
    """From COCO's files come captions for training and a folder to score on: masks of VOC's
    classes, small things over large ones, crowds not scored, other categories background."""
    (tmp_path / "annotations").mkdir()
    (tmp_path / "train2017").mkdir()
    for name in ("1.jpg", "2.jpg", "3.jpg"):
        Image.new("RGB", (6, 4)).save(tmp_path / "train2017" / name)
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 4, "width": 6} for i in (1, 2, 3)]
    captions = [{"id": 10 * i, "image_id": i, "caption": f"number {i}"} for i in (1, 2, 3)]
    (tmp_path / "annotations" / "captions_train2017.json").write_text(
        json.dumps({"images": images, "annotations": captions}))

    def thing(category, left, right, iscrowd=0):
        return {"image_id": 2, "category_id": category, "iscrowd": iscrowd,
                "area": right - left, "segmentation": [[left, 0, right, 0, right, 3, left, 3]]}

    categories = [{"id": 17, "name": "cat"}, {"id": 63, "name": "couch"}, {"id": 5, "name": "kite"}]
    things = [thing(17, 1, 1), thing(63, 0, 3), thing(5, 5, 5), thing(17, 4, 4, iscrowd=1)]
    (tmp_path / "annotations" / "instances_train2017.json").write_text(
        json.dumps({"images": images, "annotations": things, "categories": categories}))
    output = tmp_path / "made"
    photographs.make(tmp_path, output, {"captions": {10, 30}, "scored": {2}})
    assert read_captions(output / "captions.json") == [("1.jpg", "number 1"), ("3.jpg", "number 3")]
    assert [path.name for path in (output / "images").iterdir()] == ["2.jpg"]
    mask = np.array(Image.open(output / "masks" / "2.png"))
    assert mask[0].tolist() == [18, 8, 18, 18, 255, 0] and (mask == mask[0]).all()
    assert open_folder(output).classes[8] == ["cat"]
    eval.main(["--check", "--dataset", str(output)])
