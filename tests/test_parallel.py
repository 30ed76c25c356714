"""Several processes = one process, and little by little = all at once: the losses, their gradients, and whole training
runs (gloo, on the CPU)."""
import json
import os
import socket
import subprocess
import sys
import time
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import multiprocessing

from concepts import ConceptBank, tokenize
from conftest import ROOT, tiny
from data import GlobalBatches, load_pairs
from model import class_weights, concept_loss, similarity_pool
from train import average_gradients, backward, join_processes, main, parse_args


class Processes:
    """world processes that call function(*arguments), with the variables that torchrun sets; output goes to files."""

    def __init__(self, folder, world, function, *arguments):
        folder.mkdir(exist_ok=True)
        self.logs = [folder / f"output{rank}.txt" for rank in range(world)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            variables = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        context = multiprocessing.get_context("fork")           # nothing has to be imported again
        self.processes = [context.Process(target=self.run, args=(rank, variables, function, arguments))
                          for rank in range(world)]
        for process in self.processes:
            process.start()

    def run(self, rank, variables, function, arguments):
        sys.stdout = sys.stderr = open(self.logs[rank], "w", buffering=1)
        os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
        function(*arguments)

    def output(self):
        return "".join(log.read_text() for log in self.logs)

    def wait(self, seconds=90):
        """Exit statuses once all are done; a negative one is the signal that ended the process."""
        end = time.time() + seconds
        while time.time() < end and any(process.is_alive() for process in self.processes):
            time.sleep(0.02)                        # join() would wait for the data workers of a killed process
        statuses = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert None not in statuses, f"still running: {statuses} {self.output()}"
        return statuses


# ---------------------------------------------------------------------------------------------------------------------
# The losses

B, N, SIZES = 8, 5, (1, 2, 4)                       # pairs, patches, numbers of processes
WAYS = {"at once": (B, False), "by length": (2, False), "twice": (1, True)}
CAPTIONS = ["a cow", "grass, and on it a cow and one more cow", "the sea", "a boat on the sea under the wide blue sky",
            "sheep", "a sheep and a cow on the grass", "nothing to be seen here at all", "sky"]
IDS = {"mixed": [[0, -1, -1], [2, 0, 0], [4, -1, -1], [3, 4, 5], [1, -1, -1], [1, 0, 2], [-1] * 3, [5, -1, -1]],
       "some processes without": [[0, -1, -1], [2, 0, -1], [4, -1, -1], *[[-1] * 3] * 5],
       "none anywhere": [[-1] * 3] * B}
CASES = [(ids, target, way) for ids in IDS for target in ("concept", "argmax") for way in WAYS]


def losses_and_gradients(model, case, rank=0, world=1):
    """Losses and gradients of all parameters, of a process's rows of a batch, averaged over processes."""
    rows = slice(rank * B // world, (rank + 1) * B // world)
    (ids, target, way), batch = case, whole_batch(model, case)
    model.local_target, model.weight = target, 0.5
    model.zero_grad()
    M = int((batch["ids"][rows] >= 0).sum(1).max()) if world > 1 else 3         # each process pads to its own longest
    batch = {key: value[rows, :M] if key in ("ids", "spans") else value[rows] for key, value in batch.items()}
    group, twice = WAYS[way]
    losses = backward(model, batch, group, twice, nullcontext, torch.amp.GradScaler("cpu", enabled=False))
    average_gradients(list(model.trained().values()))
    return {key: value.item() for key, value in losses.items()}, {k: p.grad for k, p in model.trained().items()}


def whole_batch(model, case):
    """The same pairs for all cases, but for the concepts' ids."""
    generator = torch.Generator().manual_seed(0)
    features = F.normalize(torch.randn(B, 1 + N, model.backbone.width, generator=generator), dim=-1)
    tokens = torch.stack([tokenize(caption) for caption in CAPTIONS])
    start = torch.randint(1, 3, (B, 3, 1), generator=generator)
    spans, ids = torch.cat([start, start + 1 + start % 2], -1), torch.tensor(IDS[case[0]])
    return {"class_token": features[:, 0], "patch_tokens": features[:, 1:], "tokens": tokens, "ids": ids, "spans": spans}


def all_cases(model, folder):
    join_processes(parse_args(["--device", "cpu", "--timeout-minutes", "1"]), world=int(os.environ["WORLD_SIZE"]))
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {case: losses_and_gradients(model, case, rank, world) for case in CASES}
    model.weights_over = "process"
    found["over process"] = losses_and_gradients(model, CASES[0], rank, world)
    torch.save(found, folder / f"{world}-{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{(processes, rank, case): losses and gradients}"""
    folder, model = tmp_path_factory.mktemp("processes"), tiny()
    runs = [Processes(folder, world, all_cases, model, folder) for world in SIZES if world > 1]
    found = {(1, 0, case): losses_and_gradients(model, case) for case in CASES}
    for run, world in zip(runs, SIZES[1:]):
        assert run.wait() == [0] * world, run.output()
        for rank in range(world):
            found.update({(world, rank, case): values for case, values in torch.load(folder / f"{world}-{rank}").items()})
    return found


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("world", SIZES)
@pytest.mark.parametrize("ids", IDS)
def test_one_batch_has_one_loss_however_it_is_split(found, ids, world, way):
    """1 x 8 = 2 x 4 = 4 x 2 pairs: losses, counts and gradients agree to 1e-5 in float32 in each process, also when some
    processes or all are without concepts, with captions in groups by length, and encoded twice, one by one."""
    for target in ("concept", "argmax"):
        expected, gradients = found[1, 0, (ids, target, "at once")]
        assert (expected["local"] > 0) == (ids != "none anywhere")
        for rank in range(world):
            losses, split = found[world, rank, (ids, target, way)]
            assert losses == pytest.approx(expected, rel=1e-5)
            for name, gradient in gradients.items():
                assert gradient.norm() > 0, name
                assert (split[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("world", SIZES[1:])
def test_class_weights_over_the_process(found, world):
    """With weights_over "process" each process has class weights of its own pairs, and zeros for concepts that only others
    have, while the mean runs over all occurrences; the global loss does not change."""
    model = tiny()
    batch = whole_batch(model, CASES[0])
    with torch.no_grad():
        _, concepts = model.encode_text(batch["tokens"], batch["spans"])
        _, counts = class_weights(concepts, batch["ids"], len(model.bank))
        expected = 0
        for rows in torch.arange(B).chunk(world):
            ids = batch["ids"][rows]
            weights, _ = class_weights(concepts[rows], ids, len(model.bank))
            visual = similarity_pool(weights[ids.clamp(min=0)], batch["patch_tokens"][rows], model.pool_temperature)
            expected += concept_loss(visual, ids, weights, counts, model.local_temperature)
    everywhere = found[1, 0, CASES[0]][0]
    for rank in range(world):
        losses, _ = found[world, rank, "over process"]
        assert losses["local"] == pytest.approx(expected.item(), rel=1e-5)
        assert losses["local"] != pytest.approx(everywhere["local"], rel=1e-3)
        assert losses["global"] == pytest.approx(everywhere["global"], rel=1e-5)


def test_encoding_twice_keeps_its_precision():
    """In bfloat16, too, encoding twice gives the gradients of encoding once: both times in bfloat16, and with gradient."""
    found = []
    for twice in (False, True):
        model, autocast = tiny(), partial(torch.autocast, "cpu", torch.bfloat16)
        features = F.normalize(torch.randn(B, 1 + N, model.backbone.width, generator=torch.Generator().manual_seed(0)), dim=-1)
        batch = {"class_token": features[:, 0], "patch_tokens": features[:, 1:], "ids": torch.tensor(IDS["mixed"]),
                 "tokens": torch.stack([tokenize(caption) for caption in CAPTIONS]),
                 "spans": torch.tensor([1, 2]).expand(B, 3, 2)}
        backward(model, batch, B, twice, autocast, torch.amp.GradScaler("cpu", enabled=False))
        found.append({name: p.grad for name, p in model.trained().items()})
    for name, gradient in found[0].items():
        assert (found[1][name] - gradient).norm() <= 1e-5 * gradient.norm() > 0, name


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

STEPS, BATCH, PAIRS = 20, 8, 40
SETTINGS = (f"--train-data toy --batch {BATCH} --steps {STEPS} --epoch-pairs {PAIRS} --image-size 64 --text-width 32 "
            "--text-layers 1 --eval-data none --device cpu").split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two processes, by torchrun with a bank of one rare concept, and with all concepts three of four pairs at a time."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rare.txt").write_text("umbrella\n")
    options = {"all": ["--micro-batch", "3"], "rare": ["--bank", str(folder / "rare.txt"), "--eval-data", "toy"]}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
    rare = subprocess.Popen([*torchrun, *SETTINGS, "--output", folder / "rare", *options["rare"]], stderr=subprocess.PIPE,
                            stdout=subprocess.PIPE, text=True)
    every = Processes(folder, 2, main, [*SETTINGS, "--output", str(folder / "all"), *options["all"]])
    errors = rare.communicate(timeout=300)[1]
    return folder, options, {"rare": rare.returncode == 0 or errors, "all": every.wait() == [0, 0] or every.output()}


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["all", "rare"])
def test_torchrun_logs_the_losses_of_one_process(runs, tmp_path, name):
    """A run of two processes logs the losses of one process with the same global batch, step by step, with the
    whole bank in micro-batches and with a bank so small that in some steps one process has no concept, or none has."""
    folder, options, good = runs
    assert good[name] is True, good[name]
    main([*SETTINGS, *options[name], "--micro-batch", str(BATCH), "--output", str(tmp_path)])
    two, one = read_log(folder / name), read_log(tmp_path)
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two):
        assert (a["step"], a["concepts"], a["present"], a["lr"]) == (b["step"], b["concepts"], b["present"], b["lr"])
        for key in ("loss", "global", "local", "logit_scale"):
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-9), f"step {a['step']}, {key}"


def test_the_first_process_scores_all_images(runs):
    """At the end of a run of two processes one scores the whole dataset, while the other waits."""
    assert json.loads((runs[0] / "rare" / "result.json").read_text())["images"] == 100


def test_in_some_steps_one_process_had_no_concept(runs):
    """The run with the rare concept did have steps in which one process alone saw a concept, and steps without any."""
    bank = ConceptBank.from_file(runs[0] / "rare.txt")
    pairs = load_pairs("toy", bank, "match", 64, toy_scenes=PAIRS)
    counts = [[sum(len(pairs[key]["rows"]) for key in keys) for keys in GlobalBatches(PAIRS, BATCH, STEPS, PAIRS, rank, 2)]
              for rank in range(2)]
    assert [a + b for a, b in zip(*counts)] == [line["concepts"] for line in read_log(runs[0] / "rare")]
    assert any((a == 0) != (b == 0) for a, b in zip(*counts)) and any(a == b == 0 for a, b in zip(*counts))


def test_two_processes_share_the_feature_cache(tmp_path):
    """Two processes compute a feature cache together, each a part, and train from it with the losses of one process."""
    cache = ["--epoch-pairs", "150", "--cache-features", str(tmp_path / "cache")]
    both = Processes(tmp_path, 2, main, [*SETTINGS, *cache, "--output", str(tmp_path / "two")])
    assert both.wait() == [0, 0], both.output()
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    assert len(written) == 1 + 3                    # features.json, and 64 + 64 + 22 images
    main([*SETTINGS, *cache, "--output", str(tmp_path / "one")])
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    losses = [[line["loss"] for line in read_log(tmp_path / name)] for name in ("two", "one")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
