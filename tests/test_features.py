"""The feature cache: computed once, by several processes, gone on with after a kill, and only that
of the same images and networks (machinery/training/features.py)."""
import json
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torchvision.transforms import v2

import train
from conftest import ROOT, noise, read_log, tiny
from data import CaptionedImages
from machinery.images import to_pixels
from machinery.parallel import Processes
from machinery.training.features import BATCH, CachedFeatures, FeatureCache, open_cache
from model import create_trunk

ALONE = Processes(0, 1, "cpu", "cpu")
SIZE = 32                                           # pixels of the square
COUNTS = {"mean": [1], "ramp": [511]}               # 512 values: a row of 1 KiB


def pairs_of(images):
    return CaptionedImages(images, [""] * len(images), None, SIZE)


class Means:
    """A method whose features are the mean of an image, and that times 1, 2, ... 511.

    It keeps the numbers of images of its calls, and is stopped after some of them."""
    name = "means"

    def __init__(self, stop_after=None, key="means"):
        self.calls = []
        self.stop_after = stop_after
        self.key = key

    def feature_key(self):
        return self.key

    def features(self, batch):
        pixels = batch["pixels"]
        if len(pixels) > 1:                         # one image is asked for its shapes only
            if len(self.calls) == self.stop_after:
                raise KeyboardInterrupt
            self.calls.append(len(pixels))
        mean = pixels.float().mean((1, 2, 3))[:, None] / 256
        return {"mean": mean, "ramp": mean * torch.arange(1, 512)}


def plain(count):
    """Pairs of images (4, 4, 3) of one colour, their numbers."""
    return pairs_of([np.full((4, 4, 3), i % 256, np.uint8) for i in range(count)])


def cache_of(folder, pairs, method, size=4, precision=torch.float32, processes=ALONE):
    return open_cache(folder, pairs, method, size, precision, processes, workers=0)


def opened(folder, pairs, size=4, key="means", layout=COUNTS):
    """A cache as `open_cache` opens it, where nothing is computed."""
    return FeatureCache(folder, pairs, size, {"backbone": key, "precision": "torch.float32"},
                        layout)


def read(cache, numbers):
    """Features of some pairs, as a batch has them."""
    return CachedFeatures(cache, "cpu").of(torch.tensor([cache.row_of(i) for i in numbers]))


def check_means(cache, numbers):
    found = read(cache, numbers)
    means = torch.tensor(numbers)[:, None] % 256 / 256
    assert torch.equal(found["mean"], means.half())
    assert torch.equal(found["ramp"], (means * torch.arange(1, 512)).half())


# --------------------------------------------------------------------------------------------------
# What is kept

def test_cached_features_are_those_of_the_whole_image(tmp_path):
    """Cached features are the backbone's of the whole image, to the precision of float16, of each
    tensor in its own shape."""
    method = tiny()
    pairs = pairs_of([noise(i) for i in range(5)])
    cache = cache_of(tmp_path / "cache", pairs, method, SIZE)
    resize = v2.Resize((SIZE, SIZE), v2.InterpolationMode.BICUBIC)
    pixels = torch.stack([resize(to_pixels(pairs.pair(i).image())) for i in (3, 0, 3)])
    live = method.features({"pixels": pixels})
    found = read(cache, [3, 0, 3])
    assert found.keys() == live.keys() == {"class_token", "patch_tokens"}
    for name, value in found.items():
        assert value.dtype == torch.float16 and value.shape == live[name].shape
        torch.testing.assert_close(value.float(), live[name], atol=1e-3, rtol=0)


def test_training_from_cached_features(tmp_path, fails):
    """Features cached by one run serve the next, with the same losses; those of another backbone
    are refused."""
    run = ["--recipe", "toy", "--set", "run.epoch_pairs=40", "--batch", "8", "--epochs", "1",
           "--image-size", "64", "--text-width", "32", "--eval-data", "none", "--cache-features",
           str(tmp_path / "deep" / "cache")]
    logs = []
    written = []
    for i in range(2):
        train.main([*run, "--output", str(tmp_path / str(i))])
        logs.append([line["loss"] for line in read_log(tmp_path / str(i))])
        written.append(contents(tmp_path / "deep" / "cache"))
    assert logs[0] == logs[1] and written[0] == written[1]
    fails(train.main, [*run, "--set", "model.backbone.mean=[0.1, 0.1, 0.1]", "--output",
                       tmp_path / "2"], tmp_path / "deep" / "cache", "backbone")


def test_pairs_share_their_image(tmp_path):
    """Several pairs of one image share a row. An unreadable image is refused when it is read, as
    without a cache."""
    for i in (0, 2):
        Image.fromarray(noise(i)).save(tmp_path / f"{i}.png")
    (tmp_path / "1.png").write_text("this is no photo")
    pairs = pairs_of([tmp_path / f"{i}.png" for i in (2, 1, 2, 0, 1)])
    method = Means()
    cache = cache_of(tmp_path / "cache", pairs, method)
    assert method.calls == [3]
    shared = read(cache, [0, 2, 3])["ramp"]
    assert torch.equal(shared[0], shared[1]) and not torch.equal(shared[0], shared[2])
    for i in (1, 4):
        with pytest.raises(ValueError, match="1.png was unreadable when the features were"):
            cache.row_of(i)


def test_only_the_pairs_in_use(tmp_path):
    """Features of the pairs in use are computed and stored, no others."""
    pairs = plain(20)
    pairs.use(6)
    method = Means()
    cache = cache_of(tmp_path, pairs, method)
    assert method.calls == [6] and cache.file.stat().st_size == 6 * 1024
    check_means(cache, pairs.used.tolist())


def test_features_are_not_sent_to_workers(tmp_path):
    """A worker that is not forked is told the rows only: none of the features is sent to it."""
    paths = [tmp_path / f"{i}.png" for i in range(2)]
    for i, path in enumerate(paths):
        Image.fromarray(noise(i)).save(path)
    cache = cache_of(tmp_path / "cache", pairs_of(paths), Means())
    sent = pickle.dumps(cache)
    assert len(sent) < cache.file.stat().st_size
    assert pickle.loads(sent).row_of(1) == cache.row_of(1)


# --------------------------------------------------------------------------------------------------
# Who computes what, and when

def test_processes_compute_each_row_once(tmp_path):
    """Each of three processes computes a third of the images, none is computed twice, and the rows
    are those that one process computes."""
    pairs = plain(6 * BATCH + 6)
    methods = [Means() for _ in range(3)]
    every = [opened(tmp_path / "cache", pairs) for _ in range(3)]
    for rank, (cache, method) in enumerate(zip(every, methods)):
        assert not cache.finished()
        cache.compute(lambda pixels: method.features({"pixels": pixels}), rank, world=3)
    assert [method.calls for method in methods] == [[BATCH, BATCH, 2]] * 3
    assert all(cache.finished() for cache in every)
    check_means(every[0], list(range(6 * BATCH + 6)))


def test_an_interrupted_computation_goes_on(tmp_path):
    """After an interruption only what is not marked as done is computed, by any number of
    processes; a finished cache computes nothing."""
    pairs = plain(4 * BATCH)
    with pytest.raises(KeyboardInterrupt):
        cache_of(tmp_path, pairs, Means(stop_after=2))
    cache = opened(tmp_path, pairs)
    assert (cache.read_marks() > 0).tolist() == [True] * 2 * BATCH + [False] * 2 * BATCH
    for processes, calls in [((2, 4), [BATCH]), ((0, 1), [BATCH]), ((0, 1), [])]:
        assert cache.finished() == (not calls)
        method = Means()
        cache.compute(lambda pixels: method.features({"pixels": pixels}), *processes)
        assert method.calls == calls
    check_means(cache, list(range(4 * BATCH)))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --------------------------------------------------------------------------------------------------
# Folders of something else

def test_features_of_something_else(tmp_path):
    """Features of another size, other images, another network or other tensors are refused. The
    error says what differs and what to do, and nothing is changed."""
    pairs = pairs_of([noise(i) for i in range(5)])
    opened(tmp_path, pairs)
    before = contents(tmp_path)
    what_to_do = "name another folder with --cache-features, or delete this one"
    for differs, other in [
            ("size", lambda: opened(tmp_path, pairs, size=48)),
            ("images, names_sha256", lambda: opened(tmp_path, pairs_of(pairs.images[:4]))),
            ("names_sha256", lambda: opened(tmp_path, pairs_of(pairs.images[::-1]))),
            ("backbone", lambda: opened(tmp_path, pairs, key="others")),
            ("layout", lambda: opened(tmp_path, pairs, layout={"mean": [512]}))]:
        message = rf"holds the features of something else \({differs} differ\); {what_to_do}"
        with pytest.raises(ValueError, match=message):
            other()
    assert contents(tmp_path) == before


def test_rows_without_their_description(tmp_path):
    """Rows without features.json are computed again."""
    cache_of(tmp_path, plain(3), Means())
    (tmp_path / "features.json").unlink()
    method = Means()
    check_means(cache_of(tmp_path, plain(3), method), [0, 1, 2])
    assert method.calls == [3]


def test_features_of_equally_named_images(tmp_path):
    """Images of the same names in another folder are other images, and so is one that was replaced
    under its old name."""
    for part, height in (("a", 40), ("b", 30)):
        (tmp_path / part).mkdir()
        Image.fromarray(noise(0, height)).save(tmp_path / part / "0.png")
    opened(tmp_path / "cache", pairs_of([tmp_path / "a" / "0.png"]))
    with pytest.raises(ValueError, match="something else"):
        opened(tmp_path / "cache", pairs_of([tmp_path / "b" / "0.png"]))
    Image.fromarray(noise(1)[:-1]).save(tmp_path / "a" / "0.png")
    with pytest.raises(ValueError, match="something else"):
        opened(tmp_path / "cache", pairs_of([tmp_path / "a" / "0.png"]))


def test_the_key_of_features(tmp_path):
    """The same weights at another path have the same cache; other weights have another."""
    keys = []
    for seed, name in zip([0, 0, 1], ["a.safetensors", "b.safetensors", "c.safetensors"]):
        torch.manual_seed(seed)
        trunk = create_trunk("test_resnet", "random")
        safetensors.torch.save_file(trunk.state_dict(), tmp_path / name)
        backbone = {"name": "test_resnet", "weights": str(tmp_path / name)}
        keys.append(tiny(backbone=backbone).feature_key())
    assert keys[0] == keys[1] != keys[2]
    json.dumps(keys)


def test_a_method_without_frozen_features(tmp_path):
    """A method that says that it has no features to keep is refused by its name."""
    with pytest.raises(ValueError, match="--cache-features: means has no features"):
        cache_of(tmp_path, plain(3), Means(key=None))


# --------------------------------------------------------------------------------------------------
# Disks

def test_features_in_a_new_folder(tmp_path, capsys):
    """The folder and those above it are made, and the size is printed before anything is computed.
    """
    folder = tmp_path / "new" / "features"
    opened(folder, plain(2000))
    assert f"the features of 2,000 images need 0.0 GB in {folder}, " in capsys.readouterr().out
    assert sorted(path.name for path in folder.iterdir()) == ["features.bin", "features.json"]
    assert (folder / "features.bin").stat().st_size == 2000 * 1024
    opened(folder, plain(2000))
    assert capsys.readouterr().out == ""


def test_features_that_do_not_fit(tmp_path):
    """Features that are larger than the free disk are refused before the first is written. The
    error names both sizes."""
    with pytest.raises(OSError, match=r"the features of 3 images need 6000000.0 GB in .*features, "
                                      r"[\d.]+ GB are free"):
        opened(tmp_path / "features", plain(3), layout={"mean": [10 ** 15]})
    assert not list(tmp_path.iterdir())


FULL = """
import resource, sys
sys.path.insert(0, "tests")
from test_features import opened, plain
resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20))
opened(sys.argv[1], plain(2000))
"""


def test_features_on_a_full_disk(tmp_path):
    """The disk space is taken before the first image is computed: a disk that does not give it ends
    in one line, and the next run begins again."""
    full = subprocess.run([sys.executable, "-c", FULL, tmp_path], cwd=ROOT, text=True,
                          capture_output=True)
    assert full.stdout.startswith("the features of 2,000 images need")
    assert full.stderr.splitlines()[-1].startswith("OSError: ")
    assert not opened(tmp_path, plain(2000)).finished()


def test_rows_that_were_cut_short(tmp_path):
    """A file of rows that lost its end is named."""
    cache = cache_of(tmp_path, plain(3), Means())
    os.truncate(cache.file, 1024)
    with pytest.raises(ValueError, match="features.bin has 1,024 bytes, expected 3,072; delete"):
        opened(tmp_path, plain(3))
