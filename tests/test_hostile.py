"""Hostile input and hard ends: one clear line, or counted and left out; nothing is left running."""
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import uuid
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image, PngImagePlugin

import concepts
import eval
import segment
import train
from conftest import ROOT, tiny
from data import MAX_PIXELS
from machinery.training.captions import read_captions
from machinery.networks.checkpoint import load_model, save_model
from machinery.images import load_image
from machinery.networks.release import read_tensors
from machinery.training.resume import State, find_state
from machinery.scoring.results import compare
from machinery.training.shards import read_samples
from machinery.training.workers import cores_per_process
from model import VisionBackbone
from test_fidelity import denoiser_state, release
from test_shards import BANK, MATCH, opened, sample, write_tar

needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="no /proc here")


# --------------------------------------------------------------------------------------------------
# Settings at test time

@pytest.mark.parametrize("setting, words", [
    ("class_embedding=foo", "'caption' or 'concept', found 'foo'"),
    ("window=448.0", "window is 448.0; expected a number of pixels"),
    ("stride=null", "stride is None; expected a number of pixels")])
def test_settings_at_test_time_are_checked(checkpoint, fails, setting, words):
    """--protocol takes no value that means nothing."""
    fails(eval.main, ["--dataset", "toy", "--checkpoint", checkpoint, "--device", "cpu",
                      "--protocol", setting], words)


def test_a_threshold_is_a_number(fails, checkpoint):
    """A threshold that is no finite number would make every pixel background."""
    fails(segment.main, ["photo.jpg", "--classes", "cat", "--background", "threshold:nan",
                         "--checkpoint", checkpoint], "background 'threshold:nan'", "threshold:T")


# --------------------------------------------------------------------------------------------------
# What is left when a process is killed

def running(token):
    """Command lines of the processes that have a token in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and token.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:                             # it has just ended
            pass
    return found


def left_after_a_kill(command, is_busy, seconds=10):
    """Start a command, kill it with SIGKILL once is_busy() is true; what runs `seconds` later."""
    token = f"TOKEN={uuid.uuid4()}"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKEN": token.partition("=")[2]}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, env=environment)
    end = time.time() + 120
    while not is_busy(running(token)):
        assert process.poll() is None and time.time() < end, running(token)
        time.sleep(0.05)
    process.kill()
    process.wait()
    end = time.time() + seconds
    while running(token) and time.time() < end:
        time.sleep(0.2)
    return running(token)


def write_captions(folder, count):
    path = folder / "captions.tsv"
    path.write_text("".join(f"{i}.png\ta dog on the grass, number {i}\n" for i in range(count)))
    return path


@needs_proc
def test_parser_processes_end_with_their_command(tmp_path):
    """`concepts.py FILE --processes 2` that is killed leaves no parser process."""
    path = write_captions(tmp_path, 300_000)
    command = [sys.executable, ROOT / "concepts.py", path, "--parser", "match", "--processes", "2"]
    assert left_after_a_kill(command, lambda found: len(found) >= 4) == []


@needs_proc
def test_a_killed_parser_process_ends_the_command(tmp_path):
    """When a parser process is killed, the command ends with one line; it does not wait for it."""
    path = write_captions(tmp_path, 300_000)
    command = [sys.executable, ROOT / "concepts.py", path, "--parser", "match", "--processes", "2"]
    token = f"TOKEN={uuid.uuid4()}"
    environment = {**os.environ, "TOKEN": token.partition("=")[2]}
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL, env=environment)
    victims = []
    while not victims:
        time.sleep(0.05)
        victims = [int(folder.name) for folder in Path("/proc").iterdir()
                   if folder.name.isdigit() and is_spawned(folder, token)]
    time.sleep(1)                                   # it is at work
    os.kill(victims[0], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert "error: a parser process died" in errors.splitlines()[-1]


def is_spawned(folder, token):
    try:
        return (token.encode() in (folder / "environ").read_bytes()
                and b"spawn_main" in (folder / "cmdline").read_bytes())
    except OSError:
        return False


SLOW_EVAL = """
import sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import eval
from machinery.scoring.benchmarks import MaskedImages
def slow(self, i, item=MaskedImages.__getitem__):
    time.sleep(30)
    return item(self, i)
MaskedImages.__getitem__ = slow
eval.main(sys.argv[1:])
"""


@needs_proc
@pytest.mark.parametrize("world", [1, 2])
def test_scoring_processes_end_with_torchrun(folder, checkpoint, tmp_path, world):
    """eval.py with data workers, alone or under torchrun: ten seconds after a kill nothing runs."""
    script = tmp_path / "slow_eval.py"
    script.write_text(SLOW_EVAL.format(root=str(ROOT)))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *(torchrun if world > 1 else []), script, "--dataset", folder,
               "--without", "background", "--checkpoint", checkpoint, "--workers", "2", "--output",
               tmp_path]
    # the command, its ranks, and the data workers, which are forks of the ranks
    assert left_after_a_kill(command, lambda found: sum("slow_eval" in line for line in found)
                             >= 1 + (1 if world > 1 else 0) + 2 * world) == []


@needs_proc
def test_training_processes_end_with_torchrun(tmp_path):
    """train.py under torchrun, with data workers: ten seconds after a kill nothing runs."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
               "2", ROOT / "train.py", "--train-data", "toy", "--epoch-pairs", "40", "--batch", "8",
               "--steps", "1000000", "--image-size", "64", "--text-width", "32", "--text-layers",
               "1", "--workers", "1", "--eval-data", "none", "--output", tmp_path]
    assert left_after_a_kill(command, lambda found: (tmp_path / "log.jsonl").exists()
                             and len(found) >= 5) == []


@needs_proc
def test_feature_processes_end_with_their_command(tmp_path):
    """A killed computation of features leaves no data worker."""
    Image.new("RGB", (4000, 4000)).save(tmp_path / "0.png")
    for i in range(1, 150):
        os.link(tmp_path / "0.png", tmp_path / f"{i}.png")
    path = write_captions(tmp_path, 150)
    command = [sys.executable, ROOT / "train.py", "--train-data", path, "--parser", "match",
               "--backbone", "toy", "--cache-features", tmp_path / "cache", "--workers", "2",
               "--batch", "8", "--output", tmp_path / "run"]
    assert left_after_a_kill(command, lambda found: (tmp_path / "cache").exists()
                             and len(found) >= 3) == []


# --------------------------------------------------------------------------------------------------
# Limits of the system

MANY_FILES = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
import numpy as np, torch
from torch.utils.data import DataLoader
from machinery.training.features import FeatureCache
images = [np.full((4, 4, 3), i, np.uint8) for i in range(200)]
from PIL import Image
cache = FeatureCache(images, lambda i: Image.fromarray(images[i]), 4, sys.argv[1], {}, 10, 1)
cache.compute(lambda pixels: {"mean": pixels.float().mean((1, 2, 3))[:, None]})
for epoch in range(2):
    assert [int(cache.read(i)["mean"]) for i in range(200)] == list(range(200))
print("done")
"""


def test_the_feature_cache_opens_few_files(tmp_path):
    """200 files of features are written and read, twice, where 64 files may be open at a time."""
    done = subprocess.run([sys.executable, "-c", MANY_FILES, tmp_path / "cache"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.stdout == "done\n", done.stderr


def test_no_more_data_workers_than_cores(monkeypatch):
    """By default there are at most 8 data workers, and no more than cores of this process."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)), raising=False)
    assert cores_per_process() == 6 and train.parse_args([]).workers == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert cores_per_process() == 1 and train.parse_args([]).workers == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(640)), raising=False)
    assert train.parse_args([]).workers == 8
    assert eval.parse_args(["--dataset", "toy"]).workers == 4


# --------------------------------------------------------------------------------------------------
# The authors' files

def test_the_table_alone_is_no_denoiser(tmp_path):
    """A checkpoint without denoiser still has its position table, of any width: it is left out."""
    vit, text, state = release("test_vit", denoiser=False)
    state["visual.pos_embed"] = torch.randn(1, 37 * 37, 768)
    torch.save(state, tmp_path / "plain.pt")
    model = load_model(tmp_path / "plain.pt", backbone="test_vit")
    assert model.backbone.denoiser is None and not model.backbone.config["denoiser"]


class Harmful:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_numpy_scalars_are_read_and_nothing_else(tmp_path):
    """A checkpoint with NumPy scalars in its optimizer's state is read; one with any other object
    is refused, and nothing in it runs."""
    _, _, state = release("test_vit", denoiser=False)
    path = tmp_path / "run.pt"
    optimizer = {"lr": np.float64(0.1), "steps": np.int64(3), "done": np.bool_(True)}
    torch.save({"state_dict": state, "optimizer": optimizer}, path)
    assert load_model(path, backbone="test_vit").logit_scale.item() == 3.25
    for bad in (Harmful(tmp_path / "written"), np.array([1, "x"], object)):
        torch.save({"state_dict": state, "optimizer": {"lr": bad}}, path)
        with pytest.raises(ValueError, match="holds Python objects"):
            load_model(path, backbone="test_vit")
    assert not (tmp_path / "written").exists()


@pytest.mark.parametrize("name, given, expected", [
    ("vit_large_patch14_dinov2", None, "mean"), ("vit_large_patch14_dinov2", "class", "class"),
    ("vit_small_patch14_dinov2", None, "class"), ("vit_small_patch14_dinov2", "mean", "mean")])
def test_a_vit_l_takes_the_mean_of_its_patches(tmp_path, capsys, name, given, expected):
    """Of an imported ViT-L the mean of the patch tokens stands for the image, with a warning,
    unless --image-token says otherwise; of others the class token."""
    options = {"depth": 1, "img_size": 28}
    if "large" in name:
        options = {**options, "embed_dim": 64, "num_heads": 1}
    vit, text, state = release(name, denoiser=False, **options)
    path = tmp_path / "large.pt"
    torch.save(state, path)
    full = timm.create_model

    def small(name, **settings):                    # a ViT-L that is quick to make
        return full(name, **{**settings, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", small)
        model = load_model(path, backbone=f"{name}.lvd142m", image_token=given)
    warned = "takes the mean of the patch tokens" in capsys.readouterr().err
    assert warned == ("large" in name and given is None)
    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8)
    images = model.backbone.normalise(pixels)
    image, patches, _ = model.backbone(images)
    with torch.no_grad():
        features = vit.forward_features(images)
    own = features[:, 0] if expected == "class" else features[:, 1:].mean(dim=1)
    torch.testing.assert_close(image, torch.nn.functional.normalize(own, dim=-1))
    assert model.config()["backbone"]["image_token"] == expected


def test_the_image_token_is_kept(tmp_path):
    """A model trained with the mean of the patch tokens says so in its checkpoint."""
    train.main(["--train-data", "toy", "--epoch-pairs", "8", "--batch", "8", "--steps", "1",
                "--text-width", "32", "--eval-data", "none", "--image-token", "mean", "--output",
                str(tmp_path)])
    model = load_model(tmp_path)
    images = model.backbone.normalise(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    image, _, _ = model.backbone(images)
    tokens = model.backbone.trunk.forward_features(images)[:, 1:]
    torch.testing.assert_close(image, torch.nn.functional.normalize(tokens.mean(1), dim=-1))
    with pytest.raises(ValueError, match="'class' or 'mean', found 'cls'"):
        VisionBackbone("toy", image_token="cls")


def test_a_wrapped_denoiser_file(tmp_path):
    """{"denoiser": {...}} with names without "visual." is the same denoiser."""
    state = denoiser_state(128)
    torch.save(state, tmp_path / "flat.pth")
    wrapped = {key.removeprefix("visual."): value for key, value in state.items()}
    torch.save({"denoiser": wrapped}, tmp_path / "wrapped.pth")
    flat, other = (VisionBackbone("toy", denoiser=tmp_path / f"{name}.pth")
                   for name in ("flat", "wrapped"))
    assert flat.config["sha256"] == other.config["sha256"]
    wrapped["denoiser.extra"] = torch.ones(1)
    torch.save({"denoiser": wrapped}, tmp_path / "wrapped.pth")
    with pytest.raises(ValueError, match="1 unexpected: denoiser.extra"):
        VisionBackbone("toy", denoiser=tmp_path / "wrapped.pth")


# --------------------------------------------------------------------------------------------------
# Checkpoints that name other files

@pytest.mark.parametrize("change, words", [
    ({"name": "hf-hub:someone/else"}, "unknown backbone 'hf-hub:someone/else'"),
    ({"name": "local-dir:/tmp"}, "unknown backbone 'local-dir:/tmp'"),
    ({"options": {"checkpoint_path": "other.pth"}}, "backbone option 'checkpoint_path'"),
    ({"options": {"pretrained_cfg_overlay": {"file": "other.pth"}}}, "'pretrained_cfg_overlay'"),
    ({"options": {"cache_dir": "/tmp"}}, "backbone option 'cache_dir'")])
def test_a_checkpoint_opens_no_other_file(tmp_path, monkeypatch, change, words):
    """A header that names a hub, a folder or an option that loads is refused; timm never sees it.
    """
    path = tmp_path / "model.safetensors"
    save_model(path, tiny("test_vit"), {})
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["simzss"])
    header["config"]["backbone"].update(change)
    safetensors.torch.save_file(safetensors.torch.load_file(path), path,
                                {"simzss": json.dumps(header)})
    monkeypatch.setattr(timm, "create_model", lambda *_, **__: pytest.fail("timm was called"))
    with pytest.raises(ValueError, match=words):
        load_model(path)


def test_backbone_options_open_no_other_file(tmp_path, fails):
    """The flag --backbone-option takes no option that loads either."""
    fails(train.main, ["--train-data", "toy", "--epoch-pairs", "8", "--batch", "8", "--backbone",
                       "test_vit", "--backbone-option", "checkpoint_path=x.pth", "--output",
                       tmp_path], "checkpoint_path=x.pth")


# --------------------------------------------------------------------------------------------------
# JSON

DEEP = "[" * 100_000


@pytest.mark.parametrize("content", [DEEP, '{"images": ' + DEEP, "[]", "[1, 2]", "3", "null", '"x"',
                                     '{"images": [], "annotations": 3}', '{"images": {}}'])
def test_json_that_holds_no_captions(tmp_path, content):
    """Nested a hundred thousand deep, or a list or number at the top: one line."""
    path = tmp_path / "captions.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no captions file|holds no captions"):
        read_captions(path)


@pytest.mark.parametrize("content", [
    DEEP, "[]", "3", "null", '{"mIoU": {}}', '{"training": []}',
    '{"dataset": "a", "images": 1, "training": {}, "protocol": 3}'])
def test_json_that_is_no_result(tmp_path, content):
    """--compare refuses what is no result in one line."""
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is no segmentation result"):
        compare([path], tmp_path / "plot.png")


def test_a_log_with_other_lines(tmp_path):
    """A log whose lines are cut, nested or no objects does not keep a run from going on."""
    run = ["--train-data", "toy", "--epoch-pairs", "8", "--batch", "8", "--steps", "2",
           "--text-width", "32", "--eval-data", "none", "--output", str(tmp_path)]
    train.main(run)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + f'{DEEP}\n[1]\n{{"step": "x"}}\n{{"loss": 1}}\n{{"st')
    train.main([*run, "--resume", "auto"])
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1]


# --------------------------------------------------------------------------------------------------
# Tars whose headers claim gigabytes

GIGA = 8 * 2 ** 30


def claimed(name, size, kind=tarfile.REGTYPE):
    """A header that claims a size."""
    member = tarfile.TarInfo(name)
    member.size = size
    member.type = kind
    return member.tobuf(tarfile.GNU_FORMAT)


def pad(content):
    return content + bytes(-len(content) % 512)


def sparse(name):
    """A sparse file of 8 GB: one that has a single byte on disk."""
    content = f"1\n{GIGA - 1}\n1\n".encode()
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": name,
           "GNU.sparse.realsize": str(GIGA)}
    member = tarfile.TarInfo(name)
    member.pax_headers = pax
    member.size = 512 + 1
    return member.tobuf(tarfile.PAX_FORMAT) + pad(pad(content) + b"x")


@pytest.mark.parametrize("header", [
    claimed("b.jpg", GIGA), claimed("b.txt", GIGA), claimed("b.json", GIGA), sparse("b.jpg"),
    sparse("b.txt"), claimed("././@LongLink", GIGA, tarfile.GNUTYPE_LONGNAME),
    claimed("pax", GIGA, tarfile.XHDTYPE), claimed("pax", 2 ** 62, tarfile.XHDTYPE)],
    ids=["image", "text", "json", "sparse image", "sparse text", "long name", "pax", "huge pax"])
def test_headers_that_claim_gigabytes(tmp_path, header):
    """Such a sample counts as bad, or the tar as cut there; what stands before it is used, and
    memory stays small, in training and in annotation."""
    good = write_tar(tmp_path / "good.tar", sample(1)).read_bytes()
    end = good.rindex(b"000000001.txt") + 1024      # the samples without the end of the tar
    (tmp_path / "good.tar").unlink()
    (tmp_path / "a.tar").write_bytes(good[:end] + header + bytes(1024))
    write_tar(tmp_path / "b.tar", sample(2))
    shards = opened(tmp_path)
    [state] = shards.begin(1)
    stream = shards.read(state)
    tracked = peak_memory(lambda: [next(stream) for _ in range(2)])
    assert tracked < 100 * 2 ** 20
    tool = (BANK, MATCH)
    annotated = peak_memory(lambda: [concepts.annotate_shard(tool, tmp_path / name)
                                     for name in ("a.tar", "b.tar")])
    assert annotated < 100 * 2 ** 20
    with tarfile.open(tmp_path / "a.tar", "r:") as tar:
        try:
            list(read_samples(tar))
        except tarfile.ReadError:
            pass                                    # nothing else may come out


def peak_memory(function):
    """Bytes that Python allocates at the peak of a call."""
    tracemalloc.start()
    function()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


# --------------------------------------------------------------------------------------------------
# State files

RUN = ["--train-data", "toy", "--epoch-pairs", "16", "--batch", "8", "--steps", "6", "--text-width",
       "32", "--eval-data", "none", "--save-minutes", "0"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Folder of a run that was stopped after step 3, with the states of steps 2 and 3."""
    folder = tmp_path_factory.mktemp("interrupted")
    rate = train.learning_rate

    def stop(step, *settings):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return rate(step, *settings)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "learning_rate", stop)
        train.main([*RUN, "--output", str(folder)])
    return folder


def change(header, path, value):
    """Set or, with None, delete an entry of nested dicts."""
    *parents, last = path.split(".")
    for parent in parents:
        header = header[parent]
    if value is None:
        del header[last]
    else:
        header[last] = value


@pytest.mark.parametrize("path, value", [
    ("training.step", "3"), ("training.step", None), ("training.step", -1), ("training", []),
    ("training", None), ("config.bank", None), ("config.backbone", None), ("config", []),
    ("config", None), ("counts", [0]), ("counts", "none"), ("skipped", "0"), ("method", None),
    ("method", "magic"), ("training.steps", None), ("training.step", 1e300)])
def test_states_with_wrong_settings_are_left_out(interrupted, tmp_path, capsys, path, value):
    """--resume auto takes the state before one whose settings are missing or of another type, with
    the usual warning."""
    for file in interrupted.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    newest = tmp_path / "state-00000003.safetensors"
    with safetensors.safe_open(newest, "pt") as file:
        header = json.loads(file.metadata()["simzss"])
    change(header, path, value)
    safetensors.torch.save_file(safetensors.torch.load_file(newest), newest,
                                {"simzss": json.dumps(header)})
    assert find_state("auto", tmp_path).step == 2
    assert f"{newest} cannot be read and is left out" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["[]", "3", DEEP, "null"])
def test_headers_that_are_no_objects(tmp_path, content):
    """A header that is a list, a number or nested too deep is refused."""
    path = tmp_path / "state-00000001.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(1)}, path, {"simzss": content})
    with pytest.raises(ValueError):
        State(path)
    with pytest.raises(ValueError, match="is no SimZSS checkpoint"):
        load_model(path)


# --------------------------------------------------------------------------------------------------
# Images

def test_huge_images_count_as_bad(tmp_path):
    """A PNG above the stated number of pixels is refused before it is decoded; a JPEG counts after
    its reduction."""
    side = int(MAX_PIXELS ** 0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "big.png")
    with pytest.raises(ValueError, match=f"{side} x {side} pixels, at most 67,108,864"):
        load_image(tmp_path / "big.png", 448, MAX_PIXELS)
    assert load_image(tmp_path / "big.png").size == (side, side)
    Image.new("L", (side, side)).save(tmp_path / "big.jpg")
    assert max(load_image(tmp_path / "big.jpg", 448, MAX_PIXELS).size) < side / 4


def test_a_run_leaves_huge_images_out(tmp_path, capsys):
    """In training such an image is replaced by the next pair and counted."""
    for i in range(20):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / f"{i}.png")
    side = int(MAX_PIXELS ** 0.5) + 1
    Image.new("1", (side, side)).save(tmp_path / "7.png")
    path = write_captions(tmp_path, 20)
    train.main(["--train-data", str(path), "--parser", "match", "--backbone", "toy", "--text-width",
                "32", "--text-layers", "1", "--image-size", "64", "--batch", "20", "--steps", "1",
                "--workers", "0", "--eval-data", "none", "--output", str(tmp_path / "run")])
    assert "left out: bad image 1" in capsys.readouterr().out


def test_images_warn_of_nothing(tmp_path):
    """Broken EXIF data, a size near Pillow's bound and pixels that are no numbers raise no warning
    of their own."""
    # One directory of one entry: the position of another directory, which is beyond the file
    entry = struct.pack("<HHII", 0x8769, 4, 1, 123456789)
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4)
    Image.new("RGB", (16, 16)).save(tmp_path / "exif.jpg", exif=exif)
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nan.tif")
    info = PngImagePlugin.PngInfo()
    info.add_itxt("XML:com.adobe.xmp", "<broken")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png", pnginfo=info)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_image(tmp_path / "exif.jpg").size == (16, 16)
        assert load_image(tmp_path / "nan.tif").getpixel((0, 0)) == (0, 0, 0)
        assert load_image(tmp_path / "large.png").size == (10_000, 10_000)


def test_weights_files_hold_tensors_only(tmp_path):
    """A weights file with an object that would run is refused, and does not run."""
    torch.save({"state_dict": {"a": Harmful(tmp_path / "written")}}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="holds Python objects"):
        read_tensors(tmp_path / "weights.pth", "--backbone-weights")
    assert not (tmp_path / "written").exists()
    image = io.BytesIO()
    Image.new("RGB", (4, 4)).save(image, "PNG")
    (tmp_path / "weights.pth").write_bytes(image.getvalue())
    with pytest.raises(ValueError, match="is no readable weights file"):
        read_tensors(tmp_path / "weights.pth", "--backbone-weights")
