"""Several processes compute what one does: the losses, their gradients, and whole training runs
(gloo, on the CPU)."""
import json
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from concepts import ConceptBank, Concepts
from conftest import ROOT, read_log, tiny
from data import GlobalBatches, load_pairs
from machinery.parallel import average_gradients, join_processes
from machinery.tokenizer import tokenize
from machinery.training.loading import encode_in_micro_batches
from model import SimZSS
from processes import Processes
from train import main, read_command_line


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


def losses_and_gradients(model, case, rank=0, world=1):
    """Losses and gradients of all parameters, of a process's rows of a batch, averaged over
    processes."""
    ids, target, way = case
    rows = slice(rank * B // world, (rank + 1) * B // world)
    batch = {key: value[rows] for key, value in whole_batch(model, case).items()}
    if world > 1:                                   # each process pads to its own longest
        M = int((batch["concepts"][..., 0] >= 0).sum(1).max())
        batch["concepts"] = batch["concepts"][:, :M]
    model.settings.local_target = target
    model.settings.local_weight = 0.5
    model.zero_grad()
    encode = model.encode
    if way == "one by one":
        encode = partial(encode_in_micro_batches, encode, size=1)
    losses = model.losses(encode(batch), batch)
    losses["loss"].backward()
    average_gradients(list(model.trained().values()))
    return ({key: value.item() for key, value in losses.items()},
            {name: p.grad for name, p in model.trained().items()})


def whole_batch(model, case):
    """The same pairs for all cases, but for the concepts' ids. Padding is told by the id alone: it
    has spans, too."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(B, 1 + N, model.backbone.width, generator=generator)
    features = F.normalize(features, dim=-1)
    tokens = torch.stack([tokenize(caption) for caption in CAPTIONS])
    ids = torch.tensor(IDS[case[0]])[..., None]
    start = torch.randint(1, 3, (B, 3, 1), generator=generator)
    concepts = torch.cat([ids, start, start + 1 + start % 2], -1)
    return {"class_token": features[:, 0], "patch_tokens": features[:, 1:], "tokens": tokens,
            "concepts": concepts}


def all_cases(model, folder):
    processes = join_processes("cpu", timeout_minutes=1)
    rank = processes.rank
    world = processes.world
    found = {case: losses_and_gradients(model, case, rank, world) for case in CASES}
    torch.save(found, folder / f"{world}-{rank}")
    processes.end_together()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{(processes, rank, case): losses and gradients}"""
    folder = tmp_path_factory.mktemp("processes")
    model = tiny()
    runs = [Processes(folder / f"{world}", world, all_cases, model, folder)
            for world in SIZES if world > 1]
    found = {(1, 0, case): losses_and_gradients(model, case) for case in CASES}
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
    step, with the whole bank in micro-batches and with a bank so small that in some steps one
    process has no concept, or none has."""
    folder, options, good = runs
    assert good[name] is True, good[name]
    main([*SETTINGS, *options[name], "--micro-batch", str(BATCH), "--output", str(tmp_path)])
    two = read_log(folder / name)
    one = read_log(tmp_path)
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two):
        for key in ("step", "concepts", "present", "lr"):
            assert a[key] == b[key]
        for key in ("loss", "global", "local", "logit_scale"):
            close = pytest.approx(a[key], rel=1e-4, abs=1e-9)
            assert b[key] == close, f"step {a['step']}, {key}"


def test_the_first_process_scores_all_images(runs):
    """At the end of a run of two processes one scores the whole dataset, while the other waits."""
    assert json.loads((runs[0] / "rare" / "result.json").read_text())["images"] == 100


def test_in_some_steps_one_process_had_no_concept(runs):
    """The run with the rare concept did have steps in which one process alone saw a concept, and
    steps without any."""
    folder, options, _ = runs
    recipe = read_command_line([*SETTINGS, *options["rare"]])
    concepts = Concepts(ConceptBank.by_name(recipe.run.bank), recipe.run.parser)
    sample = partial(SimZSS.sample, settings=recipe.model)
    pairs = load_pairs("toy", concepts, sample, recipe.run.image_size, toy_scenes=PAIRS)
    counts = [[sum(len(pairs[key]["concepts"]) for key in keys)
               for keys in GlobalBatches(PAIRS, recipe.run, range(STEPS), rank, 2)]
              for rank in range(2)]
    logged = [line["concepts"] for line in read_log(folder / "rare")]
    assert [a + b for a, b in zip(*counts)] == logged
    assert any((a == 0) != (b == 0) for a, b in zip(*counts))
    assert any(a == b == 0 for a, b in zip(*counts))


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
