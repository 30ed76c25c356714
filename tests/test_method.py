"""The contract of a method: a new one is one file and one line, and everything works for it."""
import json
import os
import signal
from functools import partial

import pytest
import safetensors
import torch
from PIL import Image

import eval
import linear_method
import segment
import train
from conftest import read_log, without_times
from machinery.networks.checkpoint import load_model
from machinery.contract import METHODS, find_method
from machinery.training.resume import states
from machinery.training.run import Run
from processes import Processes

STEPS = 12
RUN = ["--method", "linear", "--train-data", "toy", "--epoch-pairs", "20", "--batch", "8",
       "--steps", str(STEPS), "--image-size", "64", "--eval-data", "none", "--device", "cpu"]


def run(folder, *more):
    train.main([*RUN, "--output", str(folder), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of an uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("linear") / "whole"
    run(folder, "--save-minutes", "0")
    return folder


@pytest.fixture
def photo(tmp_path):
    """File of an image that is no toy scene."""
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_a_method_is_found_by_its_name():
    """The table gives the class of each method, and an unknown name is refused with the known."""
    assert find_method("linear") is linear_method.Linear
    assert find_method("simzss").__name__ == "SimZSS"
    with pytest.raises(ValueError, match="unknown method 'magic'; expected one of simzss"):
        find_method("magic")


def test_every_method_keeps_the_contract():
    """Each class of the table has its own name, and what the scripts ask for without a default."""
    for name in METHODS:
        method = find_method(name)
        assert method.name == name
        for part in ("build", "rebuild", "config", "sample", "losses", "embed_classes",
                     "patch_scores"):
            assert part in vars(method) or part in vars(method.__mro__[1]), (name, part)


def test_it_learns(whole):
    """The loss falls, and its own parts are in the log."""
    log = read_log(whole)
    assert len(log) == STEPS and log[-1]["contrast"] < log[0]["contrast"]
    assert {line["weight"] for line in log} and len({line["weight"] for line in log}) == STEPS


def test_its_recipe_is_used(whole):
    """What a method's RECIPE says replaces train.py's defaults; the end of the schedule is its
    final rate, and gradients are clipped."""
    trained_with = load_model(whole).trained_with
    used = [trained_with[name] for name in ("base_rate", "clip", "beta2")]
    assert used == [0.1, 5, 0.98]
    peak = 0.1 * 8 / 256
    last = read_log(whole)[-1]["lr"]
    assert last == pytest.approx(train.learning_rate(STEPS - 1, STEPS, peak, 0.1, 0.1))
    assert last > 0.1 * peak
    assert trained_with["protocol"]["templates"] == "plain"
    assert "class_embedding" not in trained_with["protocol"]


def test_defaults_may_depend_on_flags(monkeypatch):
    """A method may set defaults by other flags; what is given counts."""
    monkeypatch.setattr(linear_method.Linear, "further_defaults",
                        staticmethod(lambda args: {"epochs": 2 * args.linear_width}))
    assert train.parse_args([*RUN, "--linear-width", "3"]).epochs == 6
    assert train.parse_args([*RUN, "--linear-width", "3", "--epochs", "1"]).epochs == 1


def test_a_recipe_may_count_in_steps(monkeypatch):
    """Where a method's recipe has a number of steps, --epochs replaces it, whatever the usual
    number of passes; --steps wins."""
    monkeypatch.setattr(linear_method.Linear, "RECIPE", {**linear_method.Linear.RECIPE, "steps": 7})
    method = ["--method", "linear", "--train-data", "toy"]
    for given, steps, epochs in (([], 7, None), (["--epochs", "10"], None, 10),
                                 (["--epochs", "10", "--steps", "3"], 3, 10)):
        args = train.parse_args([*method, *given])
        assert (args.steps, args.epochs) == (steps, epochs)


def test_two_processes_train_as_one(whole, tmp_path):
    """In two processes every logged loss, and the buffer, are those of one process."""
    both = Processes(tmp_path, 2, run, tmp_path)
    assert both.wait() == [0, 0], both.output()
    for one, two in zip(read_log(whole), read_log(tmp_path), strict=True):
        for key in ("loss", "contrast", "lag", "weight", "grad_norm"):
            assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-7), (one["step"], key)
    one = load_model(whole)
    two = load_model(tmp_path)
    torch.testing.assert_close(two.mean, one.mean, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(two.student.weight, one.student.weight, rtol=1e-3, atol=1e-5)


def killed_at(step, number, folder, *more):
    """A run that ends by a signal before a step."""
    rate = train.learning_rate

    def reached(now, *settings):
        if now == step:
            os.kill(os.getpid(), number)
        return rate(now, *settings)
    train.learning_rate = reached
    run(folder, *more)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_resumed_is_uninterrupted(whole, tmp_path, number):
    """Stopped and resumed, the run is the uninterrupted one bit by bit: losses, random numbers,
    weights and the buffer."""
    saving = ["--save-minutes", "0"] if number == signal.SIGKILL else []
    first = Processes(tmp_path, 1, partial(killed_at, 5), number, tmp_path / "run", *saving)
    expected = -number if number == signal.SIGKILL else 128 + number
    assert first.wait() == [expected], first.output()
    newest = states(tmp_path / "run")[0]
    with safetensors.safe_open(newest, "pt") as file:
        assert {"teacher.weight", "mean", "steps_seen"} <= set(file.keys())
    run(tmp_path / "run", "--resume", "auto")
    assert without_times(tmp_path / "run") == without_times(whole)
    before = load_model(whole).checkpoint()
    after = load_model(tmp_path / "run").checkpoint()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert int(after["steps_seen"]) == STEPS


def test_the_teacher_goes_on_where_it_stood(tmp_path):
    """A resumed run's teacher is the uninterrupted one's: it is in the states."""
    kept = []
    finish = Run.finish
    for folder, number in (("whole", None), ("resumed", signal.SIGTERM)):
        if number:
            first = Processes(tmp_path, 1, partial(killed_at, 5), number, tmp_path / folder)
            assert first.wait() == [128 + number], first.output()
        try:
            Run.finish = lambda run: kept.append(run.method.teacher.state_dict())
            run(tmp_path / folder, *(["--resume", "auto"] if number else []))
        finally:
            Run.finish = finish
    assert all(torch.equal(kept[0][name], kept[1][name]) for name in kept[0])


def test_a_checkpoint_holds_what_segments(whole):
    """Teacher and frozen parts are not in the checkpoint; the buffer is, and so is the name."""
    with safetensors.safe_open(whole / "model.safetensors", "pt") as file:
        names = set(file.keys())
        header = json.loads(file.metadata()["simzss"])
    assert names == {"student.weight", "student.bias", "mean", "steps_seen"}
    assert header["method"] == "linear" and header["config"] == {"width": 16}


def test_it_scores_and_segments(whole, folder, tmp_path, capsys):
    """eval.py and segment.py work with it as they are, by its own protocol."""
    eval.main(["--dataset", str(folder), "--checkpoint", str(whole), "--without", "background",
               "--device", "cpu", "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == "linear" and 0 <= result["mIoU"] <= 1
    assert result["protocol"]["templates"] == "plain" and result["protocol"]["window"] == 128
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, grass", "--checkpoint",
                  str(whole), "--output", str(tmp_path)])
    assert json.loads((tmp_path / "photo0.json").read_text())["names"] == ["cow", "grass"]


def test_a_model_that_needs_no_training(folder, photo, tmp_path, fails):
    """--checkpoint NAME:which is scored like a file; made for the toy world, it refuses photos."""
    chosen = ["--checkpoint", "words:4", "--device", "cpu", "--output"]
    path = tmp_path / "result.json"
    eval.main(["--dataset", str(folder), "--without", "background", *chosen, str(path)])
    result = json.loads(path.read_text())
    assert result["method"] == "linear" and "checkpoint" not in result
    fails(segment.main, [photo, "--classes", "cow", *chosen, tmp_path], "this model was trained on "
          "the drawn scenes", photo)


def test_what_it_does_not_offer_is_refused(whole, folder, tmp_path, fails):
    """A feature cache, chunks and settings of another method are refused in one line."""
    fails(train.main, [*RUN, "--output", tmp_path, "--cache-features", tmp_path / "cache"],
          "--cache-features", "linear has no features")
    fails(train.main, [*RUN, "--output", tmp_path, "--micro-batch", "4"], "--micro-batch",
          "linear computes its batch as a whole")
    fails(eval.main, ["--dataset", folder, "--checkpoint", whole, "--class-embedding", "concept",
                      "--without", "background"], "--class-embedding", "linear has no such setting")
