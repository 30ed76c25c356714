"""Shared by all tests: a tiny model, a checkpoint of it, a folder to score on, and a check of how a
script fails.

Everything runs on the CPU, without network and without downloads.
"""
import io
import json
import os
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"                  # no network, in subprocesses neither
os.environ["CUDA_VISIBLE_DEVICES"] = ""             # --device auto means the CPU beside a GPU, too
os.environ["OMP_NUM_THREADS"] = "1"                 # tensors are small: more threads cost time

import numpy as np
import pytest
import torch
from PIL import Image

from machinery.networks.checkpoint import save_model
from machinery.settings import merge, read
from machinery.toy import save_scene, toy_scene
from model import SimZSS

torch.set_num_threads(1)

BANK = ["cow", "sheep", "grass", "boat", "sea", "sky"]
PROTOCOL = {"templates": "plain", "short_side": 64, "window": 64, "stride": 32}


def tiny(bank=BANK, seed=0, method=SimZSS, **settings):
    """An untrained SimZSS that fits into a test: the toy backbone, a text encoder of width 32 and
    one layer. settings: of the method, as in a recipe."""
    torch.manual_seed(seed)
    small = {"backbone": {"name": "toy"}, "text": {"width": 32, "layers": 1}}
    model = method(read(method.Settings, merge(small, settings), "tiny"), bank, training=True)
    model.protocol = read(method.Protocol, PROTOCOL, "tiny")
    return model


def noise(seed, height=40, width=50):
    """Random pixels (height, width, 3) uint8, different for each seed."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def parser_of_cats(folder):
    """A spaCy pipeline that knows only cats, saved in a folder; its path."""
    import spacy                                    # slow to import
    pipeline = spacy.blank("en", meta={"name": "cats"})
    ruler = pipeline.add_pipe("entity_ruler")
    ruler.add_patterns([{"label": "CONCEPT", "pattern": "cat", "id": "cat"}])
    pipeline.to_disk(folder)
    return str(folder)


def seen(pair, rng):
    """What SimZSS takes of a pair."""
    return {"pixels": pair.crop(rng), "tokens": pair.tokens(), "concepts": pair.concepts}


def write_tar(path, files):
    """A tar of (name, content) in that order."""
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def read_log(folder):
    """The lines of a run's log.jsonl."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def without_times(folder):
    """`read_log` without what no two runs have in common."""
    return [{key: value for key, value in line.items()
             if key not in ("pairs_per_second", "waited")} for line in read_log(folder)]


@pytest.fixture
def model():
    return tiny().eval()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """File of an untrained tiny model on the toy backbone."""
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_model(path, tiny(), {})
    return path


@pytest.fixture
def folder(tmp_path):
    """A segmentation folder: three photos of odd sizes, marked as toy scenes; five classes of which
    the last is nowhere; some pixels ignored."""
    folder = tmp_path / "folder"
    rng = np.random.default_rng(0)
    for part in ("images", "masks"):
        (folder / part).mkdir(parents=True)
    (folder / "classes.txt").write_text("background\ncow, cattle\ngrass\nsky\nsubmarine\n")
    for i, (height, width) in enumerate([(70, 101), (128, 128), (90, 64)]):
        image = Image.fromarray(toy_scene(rng)[0][:height, :width])
        save_scene(image, folder / "images" / f"photo{i}.png")
        mask = rng.integers(0, 4, (height, width)).astype(np.uint8)
        mask[:5] = 255
        Image.fromarray(mask).save(folder / "masks" / f"photo{i}.png")
    return folder


@pytest.fixture
def fails():
    """fails(main, arguments, *words): the script ends with one line that begins with "error:" and
    has all the words."""
    def fails(main, arguments, *words):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        message = stopped.value.code                # a text: printed to stderr, exit status 1
        assert isinstance(message, str) and message.startswith("error: ")
        assert len(message.splitlines()) == 1, message
        for word in words:
            assert str(word) in message, message
        return message
    return fails
