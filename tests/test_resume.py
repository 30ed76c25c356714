"""Interrupted and resumed runs equal an uninterrupted one, and what goes wrong ends with a
message."""
import json
import os
import signal
import time
from functools import partial

import pytest
import safetensors.torch
import torch

import train
from conftest import read_log, without_times
from data import GlobalBatches
from machinery.networks.checkpoint import load_model
from machinery.training.resume import find_state, states
from machinery.training.run import note_signals
from processes import Processes
from test_shards import flawed, write_shards

STEPS = 12
RUN = (f"--train-data toy --epoch-pairs 20 --batch 8 --steps {STEPS} --image-size 64 "
       "--text-width 32 --text-layers 1 --eval-data none --device cpu").split()
DIED = "error: another process died or answers no more"


def same(folder, reference):
    """Whether two runs are equal, in each step and in the weights at the end."""
    runs = (folder, reference)
    logs = [without_times(run) for run in runs]
    weights = [load_model(run).trained() for run in runs]
    return logs[0] == logs[1] and all(torch.equal(weights[0][name], p)
                                      for name, p in weights[1].items())


def run(folder, *more):
    train.main([*RUN, "--output", str(folder), *more])


def run_until(step, action, folder, *more, ranks=(0, 1)):
    """A run in which action() is called before a step, in some of its processes."""
    rate = train.learning_rate

    def reached(now, *settings):
        if now == step and int(os.environ.get("RANK", 0)) in ranks:
            action()
        return rate(now, *settings)

    train.learning_rate = reached
    try:
        run(folder, *more)
    finally:
        train.learning_rate = rate


def signalled(number):
    return lambda: os.kill(os.getpid(), number)


def interrupted(folder, *more):
    """A run in this process that SIGTERM ends after step 6 of 12."""
    with pytest.raises(SystemExit) as stopped:
        run_until(5, signalled(signal.SIGTERM), folder, *more)
    assert stopped.value.code == 128 + signal.SIGTERM


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """{processes: folder of an uninterrupted run}, without data workers."""
    folder = tmp_path_factory.mktemp("reference")
    two = Processes(folder, 2, run, folder / "2")
    run(folder / "1")
    assert two.wait() == [0, 0], two.output()
    return {1: folder / "1", 2: folder / "2"}


@pytest.mark.parametrize("number, world", [
    (signal.SIGTERM, 1), (signal.SIGKILL, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)])
def test_interrupted_and_resumed_is_uninterrupted(reference, tmp_path, number, world):
    """Stopped by SIGTERM or SIGKILL, with data workers, and resumed, a run logs the losses of an
    uninterrupted one and ends with its weights, bit by bit. After SIGTERM to one process all save
    and stop; SIGKILL costs the steps since the last state."""
    folder = tmp_path / "run"
    more = ["--workers", "2"]
    victims = (0, 1)
    status = -number
    saved = ["state-00000005.safetensors", "state-00000004.safetensors"]
    if number == signal.SIGTERM:
        victims = (world - 1,)
        status = 128 + number
        saved = ["state-00000006.safetensors"]
    else:
        more += ["--save-minutes", "0"]
    first = Processes(tmp_path, world, partial(run_until, ranks=victims), 5, signalled(number),
                      folder, *more)
    assert first.wait() == [status] * world, first.output()
    assert [path.name for path in states(folder)] == saved
    second = Processes(tmp_path, world, run, folder, "--resume", "auto", "--workers", "1")
    assert second.wait() == [0] * world, second.output()
    assert same(folder, reference[world]) and not states(folder)


@pytest.mark.parametrize("number, world", [(signal.SIGTERM, 1), (signal.SIGKILL, 2)])
def test_shards_interrupted_and_resumed_are_uninterrupted(tmp_path, number, world):
    """The same holds for a run on tar shards. It goes on where each of its data workers stood, in
    micro-batches, and the count of samples left out goes on as well."""
    write_shards(tmp_path / "shards", [9, 4, 6], flawed)
    more = ["--train-data", str(tmp_path / "shards"), "--parser", "match", "--backbone", "toy",
            "--workers", "2", "--micro-batch", "2", "--max-bad", "0.5", "--epoch-pairs", "16"]
    saving = ["--save-minutes", "0"] if number == signal.SIGKILL else []
    status = 128 + number if number == signal.SIGTERM else -number
    whole = Processes(tmp_path / "a", world, run, tmp_path / "whole", *more)
    first = Processes(tmp_path / "b", world, partial(run_until, ranks=(0, 1)), 5,
                      signalled(number), tmp_path / "run", *more, *saving)
    assert whole.wait() == [0] * world, whole.output()
    assert first.wait() == [status] * world, first.output()
    second = Processes(tmp_path / "b", world, run, tmp_path / "run", "--resume", "auto", *more)
    assert second.wait() == [0] * world, second.output()
    assert same(tmp_path / "run", tmp_path / "whole")
    assert read_log(tmp_path / "run")[-1]["bad_images"] > 5
    assert "pass 1, left out so far: no caption 5\n" in whole.output()


def test_what_shards_do_not_have(tmp_path, fails):
    """Shards are streamed: a feature cache for them is refused, and so is a number of pairs."""
    write_shards(tmp_path / "shards", [9])
    run = [*RUN, "--train-data", tmp_path / "shards", "--parser", "match", "--backbone", "toy"]
    fails(train.main, [*run, "--cache-features", tmp_path / "cache"], "--cache-features",
          "shards are streamed")
    fails(train.main, [*run, "--pairs", "4"], "--pairs 4", "name fewer of them")


# --------------------------------------------------------------------------------------------------
# Processes that die or hang, disks that are full

def test_a_dead_process_ends_the_others(reference, tmp_path):
    """When one of two processes is killed, the other ends with a message and leaves a state, from
    which one process alone goes on to the same losses."""
    both = Processes(tmp_path, 2, partial(run_until, ranks=(1,)), 5, signalled(signal.SIGKILL),
                     tmp_path / "run", "--save-minutes", "0")
    assert both.wait() == [1, -signal.SIGKILL], both.output()
    message = f"{DIED}; what was written is whole, a training goes on with --resume auto"
    assert message in both.output() and "Traceback" not in both.output()
    run(tmp_path / "run", "--resume", "auto", "--micro-batch", "2")
    alone, log = ([line["loss"] for line in read_log(folder)]
                  for folder in (tmp_path / "run", reference[2]))
    assert alone == pytest.approx(log, rel=1e-4)


def test_a_hung_process_ends_the_others(tmp_path):
    """When one of two processes hangs, the other ends with a message after --timeout-minutes."""
    both = Processes(tmp_path, 2, partial(run_until, ranks=(1,)), 5, signalled(signal.SIGSTOP),
                     tmp_path / "run", "--timeout-minutes", "0.1", "--save-minutes", "0")
    both.processes[0].join(60)
    both.processes[1].kill()
    assert both.wait() == [1, -signal.SIGKILL], both.output()
    assert DIED in both.output() and "Timed out" in both.output()
    assert find_state("auto", tmp_path / "run").step == 5


def test_a_dead_data_worker_ends_the_run(tmp_path, fails, monkeypatch):
    """A data worker that is killed, for example by a machine out of memory, ends the run with one
    line."""
    monkeypatch.setattr("data.CaptionedImages.open_image",
                        lambda self, i: signalled(signal.SIGKILL)())
    fails(train.main, [*RUN, "--output", tmp_path, "--workers", "1"], "another process died",
          "DataLoader worker")


def test_a_full_disk_leaves_the_last_checkpoint(reference, tmp_path, monkeypatch):
    """A state that the disk has no room for ends the run with one line; the one before it is whole
    and is resumed from."""
    save = safetensors.torch.save_file
    folder = tmp_path / "run"

    def full(tensors, path, metadata):
        if "state-00000003" in str(path):
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(tensors, path, metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    message = "error: .*state-00000003.safetensors could not be written .*No space left on device"
    with pytest.raises(SystemExit, match=message):
        run(folder, "--save-minutes", "0")
    left = sorted(path.name for path in folder.glob("state*"))
    assert left == ["state-00000001.safetensors", "state-00000002.safetensors"]
    monkeypatch.setattr(safetensors.torch, "save_file", save)
    run(folder, "--resume", "auto")
    assert same(folder, reference[1])


# --------------------------------------------------------------------------------------------------
# What to go on from

def test_broken_states_are_left_out(reference, tmp_path, capsys):
    """--resume auto leaves out states that were cut short or are something else, says so, and takes
    the newest whole one."""
    folder = tmp_path / "run"
    interrupted(folder, "--save-minutes", "0")
    newest, whole = states(folder)
    newest.write_bytes(newest.read_bytes()[:-100])
    (folder / "state-00000099.safetensors").write_text("nonsense")
    run(folder, "--resume", "auto")
    printed = capsys.readouterr()
    for name in (newest, "state-00000099.safetensors"):
        assert f"{name} cannot be read and is left out" in printed.err
    assert "resumed at step 5" in printed.out and same(folder, reference[1])


def test_only_broken_states_end_the_run(tmp_path, fails):
    """States of which none can be read are not overwritten by a new run: it ends with a line."""
    tmp_path.joinpath("state-00000099.safetensors").write_text("nonsense")
    fails(train.main, [*RUN, "--output", tmp_path, "--resume", "auto"],
          "nothing to go on from", "state-00000099")


def read_state(path):
    """(metadata, tensors) of a state's file."""
    with safetensors.safe_open(path, "pt") as file:
        return file.metadata(), {key: file.get_tensor(key) for key in file.keys()}


def test_only_a_state_of_this_run_is_gone_on_from(tmp_path, fails):
    """The checkpoint of an unfinished run is no state. A state whose optimizer has a tensor of
    another shape, one too few or one of a foreign name is refused, by the tensor's name."""
    folder = tmp_path / "run"
    interrupted(folder)
    again = [*RUN, "--output", tmp_path / "again", "--resume"]
    fails(train.main, [*again, folder / "model.safetensors"], "nothing to go on from",
          "model.safetensors")
    path = states(folder)[0]
    header, tensors = read_state(path)
    name = "optimizer.exp_avg.text.tower.text_projection"
    other = {**tensors, name: tensors[name][:1]}
    fewer = {key: value for key, value in tensors.items() if key != name}
    more = {**tensors, "optimizer.exp_avg.dog": tensors[name].clone()}
    for changed, words in ((other, f"misshapen: {name}"), (fewer, f"missing: {name}"),
                           (more, "unexpected: optimizer.exp_avg.dog")):
        safetensors.torch.save_file(changed, path, header)
        fails(train.main, [*again, path], path, words)


def test_a_state_from_before_a_setting_goes_on(reference, tmp_path, fails):
    """A state of a run that did not have a setting yet goes on with what such runs did, and is
    refused with another value of it. A setting that all runs have may not be missing."""
    folder = tmp_path / "run"
    interrupted(folder)
    path = states(folder)[0]
    header, tensors = read_state(path)
    whole = json.loads(header["simzss"])

    def write_without(name):
        training = {key: value for key, value in whole["training"].items() if key != name}
        content = {"simzss": json.dumps({**whole, "training": training})}
        safetensors.torch.save_file(tensors, path, content)

    write_without("base_rate")
    fails(train.main, [*RUN, "--output", folder, "--resume", "auto"], "base_rate was None")
    write_without("prompt_weight")
    fails(train.main, [*RUN, "--output", folder, "--resume", "auto", "--prompt-weight", "1"],
          "prompt_weight was 0.0, is 1.0")
    run(folder, "--resume", "auto")
    assert same(folder, reference[1])


def test_an_unfinished_run_is_not_overwritten(reference, tmp_path, fails):
    """Without --resume an unfinished run in the output folder is left alone, and the error names
    what can be done. --resume FILE goes on from a given state, also in another folder. A finished
    run may be overwritten, and --resume auto leaves it as it is."""
    folder = tmp_path / "run"
    interrupted(folder)
    before = {path: path.read_bytes() for path in folder.iterdir()}
    fails(train.main, [*RUN, "--output", folder],
          "unfinished run (state-00000006.safetensors)", "--resume auto", "--output")
    assert before == {path: path.read_bytes() for path in folder.iterdir()}
    run(tmp_path / "other", "--resume", str(folder / "state-00000006.safetensors"))
    assert [line["step"] for line in read_log(tmp_path / "other")] == [*range(6, STEPS)]
    run(folder, "--resume", "auto")
    assert same(folder, reference[1])
    run(folder, "--resume", "auto")
    assert same(folder, reference[1])
    run(folder, "--seed", "1")
    assert not same(folder, reference[1])


def test_resume_auto_begins_where_nothing_is(reference, tmp_path):
    """--resume auto in a new folder begins a run, so that a job's command need not change when it
    is started again."""
    run(tmp_path, "--resume", "auto")
    assert same(tmp_path, reference[1])


def test_other_settings_are_refused(tmp_path, fails):
    """A run does not go on with other settings, data, bank or backbone than it began with; the
    error names them."""
    folder = tmp_path / "run"
    interrupted(folder)
    (tmp_path / "bank.txt").write_text("boat\n")
    again = [*RUN, "--output", folder, "--resume", "auto"]
    fails(train.main, [*again, "--lambda", "0.1", "--seed", "3", "--steps", "9",
                       "--bank", tmp_path / "bank.txt"],
          folder / "state-00000006.safetensors", "lambda was 0.05, is 0.1", "seed was 0, is 3",
          "steps was 12, is 9", "the bank differs")
    fails(train.main, [*again, "--backbone", "test_resnet", "--backbone-weights", "random",
                       "--text-width", "32"],
          "backbone was toy, is test_resnet", "the backbone differs")


def test_processes_go_on_from_one_state(tmp_path, fails, monkeypatch):
    """Processes that find different states, because they share no folder, do not go on."""
    interrupted(tmp_path)
    # as if there were a second process whose step is twice as large
    monkeypatch.setattr("machinery.training.resume.sum_over_processes", lambda step: 2 * step)
    fails(train.main, [*RUN, "--output", tmp_path, "--resume", "auto"],
          "different states", "--output", "share")


def test_a_second_signal_ends_the_process(monkeypatch):
    """A second signal at once, as launchers send it, counts as the first; later it ends the process
    in the middle of a step."""
    now = 0.0
    monkeypatch.setattr(time, "time", lambda: now)
    with note_signals() as signals:
        os.kill(os.getpid(), signal.SIGINT)
        now = 1.0
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals == [signal.SIGINT, signal.SIGTERM]
        now = 5.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


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
        run_until(33, signalled(signal.SIGTERM), tmp_path / "run", *more)
    run(tmp_path / "run", "--resume", "auto", *more)
    assert same(tmp_path / "run", tmp_path / "whole")


# --------------------------------------------------------------------------------------------------
# Steps that fail

def poisoned(steps, folder, *more, ranks=(0, 1), gradients=False):
    """A run in which features (or gradients) of some steps are not finite in some of its
    processes."""
    whole = train.join
    average = train.average_gradients
    seen = []                                       # the batches so far

    def next_batch(parts, rows):
        batch = whole(parts, rows)
        seen.append(batch)
        if len(seen) - 1 in steps and not gradients and int(os.environ.get("RANK", 0)) in ranks:
            batch["class_token"][0, 0] = float("nan")
        return batch

    def average_gradients(parameters):
        if len(seen) - 1 in steps and gradients:
            parameters[1].grad[0] = float("inf")
        average(parameters)

    train.join = next_batch
    train.average_gradients = average_gradients
    try:
        run(folder, *more)
    finally:
        train.join = whole
        train.average_gradients = average


def check_skipped(folder, steps, gradients=False):
    log = read_log(folder)
    skipped = [step in steps for step in range(STEPS)]
    assert [line["grad_norm"] is None for line in log] == skipped
    assert [line["loss"] is None for line in log] == [skip and not gradients for skip in skipped]
    assert [line["skipped"] for line in log] == [sum(skipped[:now + 1]) for now in range(STEPS)]
    for before, after in zip(log, log[1:]):         # no update: the next scale is the same
        assert (before["logit_scale"] == after["logit_scale"]) == (before["step"] in steps)
    assert all(p.isfinite().all() for p in load_model(folder).trained().values())


@pytest.mark.parametrize("gradients", [False, True])
def test_steps_that_are_not_finite_are_skipped(tmp_path, capsys, gradients):
    """A loss, or gradients, that are not finite change no weight, are counted, and have no effect
    on later steps."""
    steps = (2, 3, 4, 5, 9)
    poisoned(steps, tmp_path, gradients=gradients)
    check_skipped(tmp_path, steps, gradients)
    assert "5 steps were skipped" in capsys.readouterr().out


def test_all_processes_skip_the_same_steps(tmp_path):
    """A loss that one process alone makes infinite is skipped by all."""
    both = Processes(tmp_path, 2, partial(poisoned, ranks=(1,)), (2, 3, 9), tmp_path / "run")
    assert both.wait() == [0, 0], both.output()
    check_skipped(tmp_path / "run", (2, 3, 9))


def test_five_steps_in_a_row_end_the_run(tmp_path, fails):
    """Five steps in a row that are not finite end the run with a line that names the file with
    their samples."""
    report = tmp_path / "nonfinite-0.json"
    fails(lambda arguments: poisoned(range(2, 7), *arguments), [tmp_path],
          "the loss is nan", "at step 6", "5 steps in a row", report)
    failures = json.loads(report.read_text())
    assert [failure["step"] for failure in failures] == [2, 3, 4, 5, 6]
    keys = [*GlobalBatches(20, 8, 3, 20)][2]        # of step 2: (position, pair)
    assert failures[0]["samples"] == [f"pair {pair}" for _, pair in keys]


def test_processes_that_see_different_states_end_together(tmp_path):
    """Where one process finds a state and the other does not, as on two nodes without a shared
    disk, both end at once."""
    interrupted(tmp_path / "0")

    def resume():
        run(tmp_path / os.environ["RANK"], "--resume", "auto")

    two = Processes(tmp_path, 2, resume)
    assert two.wait(60) == [1, 1]
    assert two.output().count("the processes found different states") == 2
