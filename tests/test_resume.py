"""Interrupted and resumed runs equal an uninterrupted one, and what goes wrong ends with a line."""
import io
import json
import os
import resource
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

import linear_method                                # noqa: F401, by its name in a recipe
import train
import troubled_method                              # noqa: F401
from conftest import read_log, write_tar
from data import GlobalBatches
from machinery.files import read_tensors
from machinery.networks.checkpoint import load_model
from machinery.training.resume import find_state, state_files
from processes import Processes, same_runs, stopped

TESTS = Path(__file__).parent
RECIPES = {"simzss": TESTS / "troubled.toml", "linear": TESTS / "linear.toml"}
STEPS = 12
SAVING = ["--set", "run.save_minutes=0"]            # a state after every step
HOLDER = """                                        # a process that has an output folder's lock
import sys, time
from types import SimpleNamespace
from machinery.training.run import only_run
with only_run(sys.argv[1], SimpleNamespace(rank=0)):
    print("locked", flush=True)
    time.sleep(600)
"""
DIED = "error: another process died or answers no more"


def command(folder, *more, recipe="simzss"):
    return [str(word) for word in ("--recipe", RECIPES[recipe], "--output", folder, *more)]


def run(folder, *more, recipe="simzss"):
    train.main(command(folder, *more, recipe=recipe))


def trouble(what, steps, ranks=(0, 1)):
    """Flags of a run to which something happens, see troubled_method.py."""
    return ["--set", f"model.trouble={what}", "--set", f"model.at={list(steps)}", "--set",
            f"model.ranks={list(ranks)}"]


def interrupted(folder, *more):
    """A run in this process that SIGTERM ends after step 6 of 12."""
    with pytest.raises(SystemExit) as ended:
        run(folder, *trouble("SIGTERM", [5]), *more)
    assert ended.value.code == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """{(method, processes): folder of an uninterrupted run}, without data workers."""
    folder = tmp_path_factory.mktemp("reference")
    both = {}
    for recipe in RECIPES:
        two = Processes(folder / recipe, 2, partial(run, recipe=recipe), folder / recipe / "2")
        run(folder / recipe / "1", recipe=recipe)
        assert two.wait() == [0, 0], two.output()
        both.update({(recipe, world): folder / recipe / f"{world}" for world in (1, 2)})
    return both


# --------------------------------------------------------------------------------------------------
# The same bits

@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("number, world", [
    (signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)])
def test_interrupted_and_resumed_is_uninterrupted(reference, tmp_path, recipe, number, world):
    """Ended by SIGTERM or SIGKILL at a random moment, with data workers, and resumed, a run logs
    the losses of an uninterrupted one and ends with its weights, bit by bit. After SIGTERM to one
    process all finish their step, save and end; SIGKILL costs the steps since the last state."""
    folder = tmp_path / "run"
    go = partial(run, recipe=recipe)
    saving = SAVING if number == signal.SIGKILL else []
    victims = range(world) if number == signal.SIGKILL else [world - 1]
    first = stopped(lambda: Processes(tmp_path, world, go, folder, "--workers", "2", *saving),
                    folder, number, victims)
    status = -number if number == signal.SIGKILL else 128 + number
    assert first.wait() == [status] * world, first.output()
    names = [path.name for path in state_files(folder)]
    if number == signal.SIGTERM:
        assert names == [f"state-{len(read_log(folder)):08d}.safetensors"]
    else:
        assert len(names) <= 2
    second = Processes(tmp_path, world, go, folder, "--resume", "auto", "--workers", "1")
    assert second.wait() == [0] * world, second.output()
    assert same_runs(folder, reference[recipe, world])
    assert not state_files(folder) and not list(folder.glob("*.partial"))


def test_killed_again_and_again(reference, tmp_path):
    """A run that is ended again and again, and begun as often by one command, ends in the same bits
    as well: --resume auto in a new folder begins a run."""
    for step, what in ((2, "SIGKILL"), (3, "SIGTERM"), (7, "SIGKILL")):
        died = Processes(tmp_path, 1, run, tmp_path / "run", "--resume", "auto", *SAVING,
                         *trouble(what, [step]))
        assert died.wait() != [0], died.output()
    run(tmp_path / "run", "--resume", "auto")
    assert same_runs(tmp_path / "run", reference["simzss", 1])


def test_half_precision_goes_on_with_its_scale(tmp_path, monkeypatch):
    """In float16, gradients too large for it lower their scale, however often, and the scale is
    part of the state."""
    scaler = partial(torch.amp.GradScaler, init_scale=2.0 ** 40, growth_interval=4)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)
    more = ["--precision", "fp16", "--steps", "40"]
    run(tmp_path / "whole", *more)
    skipped = [line["skipped"] for line in read_log(tmp_path / "whole")]
    # the first steps are skipped, and now and then one that tries a higher scale
    assert skipped[20] == 21 < skipped[-1] < 39
    with pytest.raises(SystemExit):
        run(tmp_path / "run", *more, *trouble("SIGTERM", [33]))
    run(tmp_path / "run", "--resume", "auto", *more)
    assert same_runs(tmp_path / "run", tmp_path / "whole")


# --------------------------------------------------------------------------------------------------
# Tars

@pytest.fixture
def tars(tmp_path):
    """Flags of a run on four tars of six pairs, of which each first one has no caption."""
    image = io.BytesIO()
    Image.new("RGB", (64, 64), "green").save(image, "PNG")
    files = [("0.png", image.getvalue())]
    for i in range(1, 7):
        files += [(f"{i}.png", image.getvalue()), (f"{i}.txt", f"{i} dogs on grass".encode())]
    for number in range(4):
        write_tar(tmp_path / "tars" / f"{number:05}.tar", files)
    return ["--train-data", tmp_path / "tars", "--set", "run.epoch_pairs=24", "--set",
            "run.max_bad=0.5", "--workers", "2"]


def test_a_run_on_tars(tars, tmp_path, capsys):
    """A run on tars says after each pass what was left out. The one that is resumed begins the tars
    in work again, goes on with the log, and counts on."""
    folder = tmp_path / "run"
    interrupted(folder, *tars)
    assert "pass 1, left out so far: no caption" in capsys.readouterr().out
    before = read_log(folder)
    run(folder, *tars, "--resume", "auto", "--micro-batch", "2")
    log = read_log(folder)
    assert log[:6] == before and [line["step"] for line in log] == [*range(STEPS)]
    bad = [line["bad_images"] for line in log]
    assert bad == sorted(bad) and bad[5] < bad[-1]
    assert all(line["concepts"] > 0 for line in log)


def test_tars_of_two_processes(tars, tmp_path):
    """Two processes that are killed go on with tars as well, each with its own."""
    folder = tmp_path / "run"
    stopped(lambda: Processes(tmp_path, 2, run, folder, *tars, *SAVING), folder, signal.SIGKILL,
            [0, 1])
    second = Processes(tmp_path, 2, run, folder, *tars, "--resume", "auto")
    assert second.wait() == [0, 0], second.output()
    assert [line["step"] for line in read_log(folder)] == [*range(STEPS)]


def test_what_tars_do_not_have(tars, tmp_path, fails):
    """Tars are streamed: a feature cache for them is refused, and so is a number of pairs; their
    number of pairs is not known."""
    again = command(tmp_path / "run", *tars)
    fails(train.main, [*again, "--cache-features", tmp_path / "cache"], "--cache-features",
          "tars are streamed")
    fails(train.main, [*again, "--pairs", "4"], "--pairs 4", "name fewer of them")
    recipe = tmp_path / "endless.toml"
    recipe.write_text(RECIPES["simzss"].read_text().replace("epoch_pairs", "# epoch_pairs"))
    fails(train.main, ["--recipe", recipe, *tars[:2], "--epochs", "1"], "run.epoch_pairs=N",
          "--steps")


# --------------------------------------------------------------------------------------------------
# Processes that die or hang, disks that are full

def test_a_dead_process_ends_the_others(reference, tmp_path):
    """When one of two processes is killed, the other ends with a line and leaves a state, from
    which one process alone goes on, in micro-batches, to the same losses."""
    both = Processes(tmp_path, 2, run, tmp_path / "run", *SAVING, *trouble("SIGKILL", [5], [1]))
    assert both.wait() == [1, -signal.SIGKILL], both.output()
    message = f"{DIED}; go on with --resume auto"
    assert message in both.output() and "Traceback" not in both.output()
    run(tmp_path / "run", "--resume", "auto", "--micro-batch", "2")
    alone, log = ([line["loss"] for line in read_log(folder)]
                  for folder in (tmp_path / "run", reference["simzss", 2]))
    assert alone == pytest.approx(log, rel=1e-4)


def test_a_hung_process_ends_the_others(tmp_path):
    """When one of two processes hangs, the other ends with a line after run.timeout_minutes."""
    both = Processes(tmp_path, 2, run, tmp_path / "run", "--set", "run.timeout_minutes=0.15",
                     *SAVING, *trouble("SIGSTOP", [5], [1]))
    both.processes[0].join(300)
    both.processes[1].kill()
    assert both.wait() == [1, -signal.SIGKILL], both.output()
    assert DIED in both.output() and "Timed out" in both.output()
    assert find_state("auto", tmp_path / "run").step == 5


def test_a_dead_data_worker_ends_the_run(tmp_path, fails):
    """A data worker that is killed, for example by a machine out of memory, ends the run with one
    line, which does not speak of going on: there is no state yet."""
    line = fails(train.main, command(tmp_path, "--workers", "1", *trouble("bad pair", [])),
                 "another process died", "DataLoader worker")
    assert "--resume" not in line


def test_a_full_disk_leaves_the_last_state(reference, copied, fails):
    """A state that the disk has no room for ends the run with one line; the one before it is whole
    and is resumed from."""
    before = state_files(copied)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))      # bytes of a file
    try:
        fails(train.main, command(copied, *SAVING, "--resume", "auto"),
              "state-00000007.safetensors could not be written", "make room and go on with")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert state_files(copied) == before and not list(copied.glob("*.partial"))
    run(copied, "--resume", "auto")
    assert same_runs(copied, reference["simzss", 1])


def test_two_runs_do_not_share_a_folder(tmp_path, fails):
    """A run into a folder that another process trains into ends with one line, and leaves its files
    alone; once the other has ended, however that was, it begins, and clears what was half-written.
    """
    other = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE,
                             env={**os.environ, "PYTHONPATH": str(TESTS.parent)})
    assert other.stdout.readline() == b"locked\n"
    partial = tmp_path / "state-00000003.safetensors.1.partial"
    partial.touch()
    fails(train.main, command(tmp_path), "another run writes to", "--output")
    assert partial.exists()
    other.kill()
    other.communicate()
    run(tmp_path)
    assert not partial.exists() and not (tmp_path / "lock").exists()


# --------------------------------------------------------------------------------------------------
# What to go on from

def test_an_unfinished_run_is_not_overwritten(reference, tmp_path, fails):
    """Without --resume an unfinished run in the output folder is left alone, and the error names
    what can be done. --resume FILE goes on from a given state, also in another folder. A finished
    run may be overwritten, and --resume auto leaves it as it is."""
    folder = tmp_path / "run"
    interrupted(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    fails(train.main, command(folder), "unfinished run (state-00000006.safetensors)",
          "--resume auto", "--output")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    run(tmp_path / "other", "--resume", str(folder / "state-00000006.safetensors"))
    assert [line["step"] for line in read_log(tmp_path / "other")] == [*range(6, STEPS)]
    for _ in range(2):
        run(folder, "--resume", "auto")
        assert same_runs(folder, reference["simzss", 1])
    run(folder, "--seed", "1")
    assert not same_runs(folder, reference["simzss", 1])


def test_other_settings_are_refused(tmp_path, fails):
    """A run does not go on with other settings, data, method, bank or backbone than it began with;
    the error names them, and nothing else."""
    folder = tmp_path / "run"
    interrupted(folder)
    (tmp_path / "bank.txt").write_text("boat\n")
    again = command(folder, "--resume", "auto")
    message = fails(train.main, [*again, "--lambda", "0.1", "--seed", "3", "--steps", "9",
                                 "--bank", tmp_path / "bank.txt", "--workers", "1"],
                    folder / "state-00000006.safetensors", "lambda was 0.05, is 0.1",
                    "seed was 0, is 3", "steps was 12, is 9", "the bank differs", "--output")
    assert "workers" not in message and "base_rate" not in message
    fails(train.main, [*again, "--backbone", "test_resnet", "--backbone-weights", "random"],
          "backbone was 'toy', is 'test_resnet'", "the frozen weights differ")
    fails(train.main, command(folder, "--resume", "auto", recipe="linear"),
          "the method was troubled, is linear")


def test_processes_that_see_different_states_end_together(tmp_path):
    """Where one process finds a state and the other does not, as on two nodes without a shared
    disk, both end at once."""
    interrupted(tmp_path / "0")

    def resume():
        run(tmp_path / os.environ["RANK"], "--resume", "auto")

    two = Processes(tmp_path, 2, resume)
    assert two.wait() == [1, 1]
    assert two.output().count("the processes found different states; --output must be") == 2


# --------------------------------------------------------------------------------------------------
# State files of any content

def write_state(path, header, tensors):
    text = header if isinstance(header, str) else json.dumps(header)
    safetensors.torch.save_file(tensors, path, {"simzss": text})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a run that was stopped after step 6, with the states of steps 5 and 6."""
    folder = tmp_path_factory.mktemp("saved")
    interrupted(folder, *SAVING)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_broken_states_are_left_out(reference, copied, capsys):
    """--resume auto leaves out states that were cut short or are something else, says so, and takes
    the newest whole one."""
    newest, _ = state_files(copied)
    newest.write_bytes(newest.read_bytes()[:-100])
    (copied / "state-00000099.safetensors").write_text("nonsense")
    run(copied, "--resume", "auto")
    printed = capsys.readouterr()
    for name in (newest, "state-00000099.safetensors"):
        assert f"{name} cannot be read and is left out" in printed.err
    assert "resumed at step 5" in printed.out and same_runs(copied, reference["simzss", 1])


@pytest.mark.parametrize("place, value", [
    ("training.step", "3"), ("training.step", None), ("training.step", -1), ("training", []),
    ("settings.backbone", 3), ("left_out", [0]), ("left_out", "none"), ("skipped", "0"),
    ("method", None), ("training.steps", None), ("training.step", 1e300), ("format", "simzss-2"),
    ("training.step", 10 ** 9), ("left_out", [10 ** 30] * 8), ("skipped", 10 ** 40), ("scaler", 3),
    ("scaler", {"x": 1}), ("scaler", {"scale": "x"})])
def test_states_with_wrong_settings_are_left_out(copied, capsys, place, value):
    """--resume auto takes the state before one whose settings are missing or of another type, with
    the usual warning (test_checkpoint.py has more of them)."""
    newest = state_files(copied)[0]
    header, tensors = read_tensors(newest)
    *tables, last = place.split(".")
    table = header
    for name in tables:
        table = table[name]
    if value is None:
        del table[last]
    else:
        table[last] = value
    write_state(newest, header, tensors)
    assert find_state("auto", copied).step == 5
    assert f"{newest} cannot be read and is left out" in capsys.readouterr().err


@pytest.mark.parametrize("positions", [
    torch.zeros(0, 0, dtype=torch.int64), torch.zeros(1, 1), torch.full((1, 1), -5),
    torch.full((1, 1), 2 ** 62), torch.zeros(3, dtype=torch.int64)])
def test_states_with_wrong_positions_are_left_out(copied, positions):
    """Positions in tars that are no table of whole numbers, or beyond all bounds, are no state."""
    newest = state_files(copied)[0]
    header, tensors = read_tensors(newest)
    write_state(newest, header, {**tensors, "positions": positions})
    assert find_state("auto", copied).step == 5


def test_only_broken_states_end_the_run(tmp_path, fails):
    """States of which none can be read are not overwritten by a new run: it ends with a line. So
    does a run that names a state that is not there."""
    (tmp_path / "state-00000099.safetensors").write_text("nonsense")
    fails(train.main, command(tmp_path, "--resume", "auto"), "nothing to go on from",
          "state-00000099")
    fails(train.main, command(tmp_path, "--resume", "none.safetensors"),
          "--resume: no file none.safetensors", "auto")


def test_only_a_state_of_this_run_is_gone_on_from(copied, tmp_path, fails):
    """The checkpoint of an unfinished run is no state. A state of other frozen weights is refused,
    and one whose optimizer has a tensor of another shape, one too few or one of a foreign name, by
    the tensor's name."""
    again = command(tmp_path / "again", "--resume")
    fails(train.main, [*again, copied / "model.safetensors"], "nothing to go on from",
          "model.safetensors")
    path = state_files(copied)[0]
    header, tensors = read_tensors(path)
    name = "optimizer.exp_avg.text.tower.text_projection"
    other = {**tensors, name: tensors[name][:1]}
    fewer = {key: value for key, value in tensors.items() if key != name}
    more = {**tensors, "optimizer.exp_avg.dog": tensors[name].clone()}
    for changed, words in ((other, f"misshapen: {name}"), (fewer, f"missing: {name}"),
                           (more, "unexpected: optimizer.exp_avg.dog")):
        write_state(path, header, changed)
        fails(train.main, [*again, path], path, words)
    write_state(path, {**header, "frozen_sha256": "0"}, tensors)
    fails(train.main, [*again, path], path, "the frozen weights differ")


# --------------------------------------------------------------------------------------------------
# Steps that fail

def check_skipped(folder, steps, gradient=False):
    log = read_log(folder)
    skipped = [step in steps for step in range(STEPS)]
    assert [line["grad_norm"] is None for line in log] == skipped
    assert [line["loss"] is None for line in log] == [skip and not gradient for skip in skipped]
    assert [line["skipped"] for line in log] == [sum(skipped[:now + 1]) for now in range(STEPS)]
    for before, after in zip(log, log[1:]):         # no update: the next scale is the same
        assert (before["logit_scale"] == after["logit_scale"]) == (before["step"] in steps)
    assert all(p.isfinite().all() for p in load_model(folder).trained().values())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_steps_that_are_not_finite_are_skipped(tmp_path, capsys, what):
    """A loss, or a gradient, that is not finite changes no weight, is counted, and has no effect on
    later steps."""
    steps = (2, 3, 4, 5, 9)
    run(tmp_path, *trouble(what, steps))
    check_skipped(tmp_path, steps, what == "gradient")
    assert "5 steps were skipped" in capsys.readouterr().out


def test_all_processes_skip_the_same_steps(tmp_path):
    """A step that one process alone makes infinite is skipped by all."""
    both = Processes(tmp_path, 2, run, tmp_path / "run", *trouble("loss", (2, 3, 9), [1]))
    assert both.wait() == [0, 0], both.output()
    check_skipped(tmp_path / "run", (2, 3, 9))


def test_five_steps_in_a_row_end_the_run(tmp_path, fails):
    """Five steps in a row that are not finite end the run with a line that names some pairs of the
    last one."""
    settings = train.read_command_line(command(tmp_path)).run
    *_, keys = GlobalBatches(20, settings, range(7))            # of step 6: (position, pair)
    fails(train.main, command(tmp_path, *trouble("loss", range(2, 7))), "the loss is nan",
          "at step 6", "5 steps in a row", "; ".join(f"pair {pair}" for _, pair in keys[:3]),
          "--base-rate")
