"""Several processes = one process: the losses, their gradients, and whole training runs (gloo, on the CPU)."""
import json
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing, nn

from concepts import ConceptBank
from conftest import ROOT
from data import GlobalBatches, load_pairs
from model import SimZSS, concept_embeddings
from train import average_gradients, main

# ---------------------------------------------------------------------------------------------------------------------
# The losses

B, N, T, D, BANK = 6, 5, 7, 8, 9
IDS = {"mixed": [[3, 3, 1], [0, 3, -1], [5, -1, -1], [3, 8, -1], [0, -1, -1], [2, 2, 2]],
       "one process without": [[3, 3, 1], [0, 3, -1], [5, -1, -1], [-1] * 3, [-1] * 3, [-1] * 3],
       "none anywhere": [[-1] * 3] * 6}


def losses_and_gradients(ids, target, rows, cut_padding):
    """Losses of some rows of a random batch and the gradients of what all processes share: a text encoder of one
    matrix, and the logit scale."""
    torch.manual_seed(0)
    class_token, patches = F.normalize(torch.randn(B, D), dim=-1), F.normalize(torch.randn(B, N, D), dim=-1)
    words, matrix = torch.randn(B, T, D), nn.Parameter(torch.randn(D, D))
    start = torch.randint(0, T - 2, (B, 3, 1))
    spans, ids = torch.cat([start, start + torch.randint(1, 3, (B, 3, 1))], -1), torch.tensor(ids)
    model = SimZSS(nn.Identity(), nn.Identity(), range(BANK), weight=0.5, local_target=target)
    model.double()
    matrix.data = matrix.data.double()
    M = int((ids[rows] >= 0).sum(1).max()) if cut_padding else 3        # each process pads to its own longest
    tokens = F.normalize(words[rows].double() @ matrix, dim=-1)
    losses = model.losses(class_token[rows].double(), patches[rows].double(), tokens[:, -1],
                          concept_embeddings(tokens, spans[rows, :M]), ids[rows, :M])
    losses["loss"].backward()
    average_gradients([matrix, model.logit_scale])
    return {**{key: value.item() for key, value in losses.items()}, "grads": (matrix.grad, model.logit_scale.grad)}


def process(rank, rendezvous, output):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2,
                            timeout=timedelta(seconds=60))
    rows = slice(rank * B // 2, (rank + 1) * B // 2)
    torch.save({(case, target): losses_and_gradients(ids, target, rows, True) for case, ids in IDS.items()
                for target in ("concept", "argmax")}, f"{output}{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(process, (folder / "rendezvous", folder / "output"), nprocs=2)
    return [torch.load(folder / f"output{rank}") for rank in range(2)]


@pytest.mark.parametrize("target", ["concept", "argmax"])
@pytest.mark.parametrize("case", IDS)
def test_two_processes_have_the_losses_and_gradients_of_one(two_processes, case, target):
    """Losses, counts and gradients of two processes are those of one with the whole batch, in each of the two, also
    when one process or none has a concept."""
    one = losses_and_gradients(IDS[case], target, slice(0, B), False)
    assert (one["local"] > 0) == (case != "none anywhere")
    for found in (results[case, target] for results in two_processes):
        torch.testing.assert_close(found, one, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

STEPS, BATCH, PAIRS = 20, 8, 40
SETTINGS = (f"--train-data toy --batch {BATCH} --steps {STEPS} --epoch-pairs {PAIRS} --image-size 64 --text-width 32 "
            "--text-layers 1 --eval-data none --device cpu").split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """torchrun with two processes, started side by side: all concepts, and a bank of one rare concept."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rare.txt").write_text("umbrella\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
    options = {"all": [], "rare": ["--bank", str(folder / "rare.txt")]}
    started = {name: subprocess.Popen([*torchrun, *SETTINGS, "--output", folder / name, *more], stderr=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)
               for name, more in options.items()}
    errors = {name: run.communicate(timeout=300)[1] for name, run in started.items()}
    return folder, options, errors, {name: run.returncode for name, run in started.items()}


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["all", "rare"])
def test_torchrun_logs_the_losses_of_one_process(runs, tmp_path, name):
    """torchrun with two processes logs the losses of one process with the same global batch, step by step, with the
    whole bank and with one so small that in some steps one process has no concept, or none has."""
    folder, options, errors, status = runs
    assert status[name] == 0, errors[name]
    main([*SETTINGS, *options[name], "--output", str(tmp_path)])
    two, one = read_log(folder / name), read_log(tmp_path)
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two):
        assert (a["step"], a["concepts"], a["present"], a["lr"]) == (b["step"], b["concepts"], b["present"], b["lr"])
        for key in ("loss", "global", "local", "logit_scale"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-9), f"step {a['step']}, {key}"


def test_in_some_steps_one_process_had_no_concept(runs):
    """The run with the rare concept did have steps in which one process alone saw a concept, and steps without any."""
    bank = ConceptBank.from_file(runs[0] / "rare.txt")
    pairs = load_pairs("toy", bank, "match", 64, toy_scenes=PAIRS)
    counts = [[sum(len(pairs[key]["rows"]) for key in keys) for keys in GlobalBatches(PAIRS, BATCH, STEPS, PAIRS, rank, 2)]
              for rank in range(2)]
    assert [a + b for a, b in zip(*counts)] == [line["concepts"] for line in read_log(runs[0] / "rare")]
    assert any((a == 0) != (b == 0) for a, b in zip(*counts)) and any(a == b == 0 for a, b in zip(*counts))
