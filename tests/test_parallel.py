"""Several processes compute what one does: the losses, their gradients, and whole training runs
(gloo, on the CPU)."""
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from conftest import ROOT, read_log, tiny
from machinery import parallel
from machinery.parallel import join_processes, progress
from machinery.tokenizer import tokenize
from machinery.training.loading import encode_in_micro_batches
from model import SimZSS
from processes import Processes, losses_and_gradients
from train import main


# --------------------------------------------------------------------------------------------------
# The losses

B = 8                                               # pairs
N = 5                                               # patches
SIZES = (1, 2, 4)                                   # numbers of processes
WAYS = ("at once", "one by one")                    # how a batch is encoded
CAPTIONS = ["a cow", "grass, and on it a cow and one more cow", "the sea",
            "a boat on the sea under the wide blue sky", "sheep", "a sheep and a cow on the grass",
            "nothing to be seen here at all", "sky"]
IDS = {"mixed": [[0, -1, -1], [2, 0, 0], [4, -1, -1], [3, 4, 5], [1, -1, -1], [1, 0, 2], [-1] * 3,
                 [5, -1, -1]],
       "some processes without": [[0, -1, -1], [2, 0, -1], [4, -1, -1], *[[-1] * 3] * 5],
       "none anywhere": [[-1] * 3] * B}
CASES = [(ids, target, way) for ids in IDS for target in ("concept", "argmax") for way in WAYS]


class OwnPadding(SimZSS):
    """Each process pads concepts to the most in its own rows, as in training."""

    def features(self, batch):
        M = int((batch["concepts"][..., 0] >= 0).sum(dim=1).max())
        return super().features({**batch, "concepts": batch["concepts"][:, :M]})


def compute(model, case, rank=0, world=1):
    """Losses and gradients of a case in a process."""
    ids, model.settings.local_target, way = case
    model.zero_grad()
    model.encode = partial(SimZSS.encode, model)
    if way == "one by one":
        model.encode = partial(encode_in_micro_batches, model.encode, model.order, size=1)
    return losses_and_gradients(model, whole_batch(IDS[ids]), rank, world)


def whole_batch(ids):
    """The same pairs for all cases, but for the concepts' ids. Padding is told by the id alone: it
    has spans, too."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(B, 1 + N, 128, generator=generator), dim=-1)
    tokens = torch.stack([tokenize(caption) for caption in CAPTIONS])
    start = torch.randint(1, 3, (B, 3, 1), generator=generator)
    concepts = torch.cat([torch.tensor(ids)[..., None], start, start + 1 + start % 2], -1)
    return {"class_token": features[:, 0], "patch_tokens": features[:, 1:], "tokens": tokens,
            "concepts": concepts}


def all_cases(model, folder):
    processes = join_processes("cpu", timeout_minutes=1)
    rank = processes.rank
    world = processes.world
    torch.save({case: compute(model, case, rank, world) for case in CASES},
               folder / f"{world}-{rank}")
    processes.end_together()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{(processes, rank, case): losses and gradients}"""
    folder = tmp_path_factory.mktemp("processes")
    model = tiny(method=OwnPadding, local_weight=0.5)
    runs = [Processes(folder / f"{world}", world, all_cases, model, folder) for world in SIZES[1:]]
    found = {(1, 0, case): compute(model, case) for case in CASES}
    for run, world in zip(runs, SIZES[1:]):
        assert run.wait() == [0] * world, run.output()
        for rank in range(world):
            of_rank = torch.load(folder / f"{world}-{rank}")
            found.update({(world, rank, case): values for case, values in of_rank.items()})
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("ids", IDS)
def test_one_batch_has_one_loss_however_it_is_split(found, ids, world, way):
    """1 x 8 = 2 x 4 = 4 x 2 pairs: losses, counts and gradients agree to 1e-5 in float32 in each
    process, also when some processes or all are without concepts, and with pairs that are encoded
    one by one."""
    for target in ("concept", "argmax"):
        expected, gradients = found[1, 0, (ids, target, "at once")]
        assert (expected["local"] > 0) == (ids != "none anywhere")
        for rank in range(world):
            losses, split = found[world, rank, (ids, target, way)]
            assert losses == pytest.approx(expected, rel=1e-5)
            for name, gradient in gradients.items():
                assert gradient.norm() > 0, name
                assert (split[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


# --------------------------------------------------------------------------------------------------
# Whole runs

STEPS = 15
BATCH = 8
PAIRS = 40
SETTINGS = (f"--recipe toy --set run.epoch_pairs={PAIRS} --batch {BATCH} --epochs 3 "
            "--image-size 64 --text-width 32 --eval-data none").split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes, by torchrun with a bank of one rare concept, and with all concepts three of
    four pairs at a time. Returns (folder, options by run, by run True or its errors)."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rare.txt").write_text("umbrella\n")
    options = {"all": ["--micro-batch", "3"],
               "rare": ["--bank", str(folder / "rare.txt"), "--eval-data", "toy"]}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                "2", ROOT / "train.py"]
    rare = subprocess.Popen([*torchrun, *SETTINGS, "--output", folder / "rare", *options["rare"]],
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    every = Processes(folder, 2, main, [*SETTINGS, "--output", str(folder / "all"),
                                        *options["all"]])
    errors = rare.communicate()[1]
    return folder, options, {"rare": rare.returncode == 0 or errors,
                             "all": every.wait() == [0, 0] or every.output()}


@pytest.mark.parametrize("name", ["all", "rare"])
def test_torchrun_logs_the_losses_of_one_process(runs, tmp_path, name):
    """A run of two processes logs the losses of one process with the same global batch, step by
    step, with the whole bank in micro-batches and with a bank so small that in some steps there is
    no concept."""
    folder, options, good = runs
    assert good[name] is True, good[name]
    main([*SETTINGS, *options[name], "--micro-batch", str(BATCH), "--output", str(tmp_path)])
    two = read_log(folder / name)
    one = read_log(tmp_path)
    assert len(one) == len(two) == STEPS and (name == "rare") == any(
        line["concepts"] == 0 for line in one)
    for a, b in zip(one, two):
        for key in ("step", "concepts", "present", "lr"):
            assert a[key] == b[key]
        for key in ("loss", "global", "local", "logit_scale"):
            close = pytest.approx(a[key], rel=1e-4, abs=1e-9)
            assert b[key] == close, f"step {a['step']}, {key}"


def test_two_processes_score_together(runs):
    """At the end of a run of two processes both score, and the first writes one result of all
    images."""
    assert json.loads((runs[0] / "rare" / "result.json").read_text())["images"] == 100


def test_two_processes_share_the_feature_cache(tmp_path):
    """Two processes compute a feature cache together, each a part of it, and train from it with the
    losses of one process."""
    settings = [*SETTINGS, "--set", "run.epoch_pairs=600", "--epochs", "0.1", "--cache-features",
                str(tmp_path / "cache")]
    both = Processes(tmp_path, 2, main, [*settings, "--output", str(tmp_path / "two")])
    assert both.wait() == [0, 0], both.output()
    by_two = {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()}
    assert by_two.keys() == {"features.json", "features.bin", "done-0.bin", "done-1.bin"}
    assert 0 < by_two["done-0.bin"].count(b"\1") < 600
    main([*settings, "--output", str(tmp_path / "one")])
    assert {path.name: path.read_bytes() for path in (tmp_path / "cache").iterdir()} == by_two
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_progress_is_a_line_a_minute_outside_a_terminal(capsys, monkeypatch):
    """Where stderr is no terminal the bar is a line now and then, and nothing in the first minute;
    other processes say nothing."""
    assert list(progress(range(3), desc="counting", unit=" steps")) == [0, 1, 2]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(parallel, "MINUTE", 1e-9)
    list(progress(range(3), desc="counting", unit=" steps"))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) >= 3 and all(line.startswith("counting: ") for line in lines)
    assert "counting: 2 of 3 steps, 00:00 gone, 00:00 to go" in lines
    list(progress(range(3), is_shown=False))
    assert capsys.readouterr().err == ""
