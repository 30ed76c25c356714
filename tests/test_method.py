"""The contract of a method: a new one is one file, one line and a recipe, and all works for it.

Killing and resuming it is in test_resume.py.
"""
import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval
import linear_method
import segment
import train
from conftest import read_log
from machinery.contract import METHODS, Method, find_method
from machinery.files import read_tensors
from machinery.networks.checkpoint import load_model
from machinery.training.resume import state_files
from processes import Processes, stopped

RUN = ["--recipe", str(Path(__file__).with_name("linear.toml"))]
STEPS = 12


def run(folder, *more):
    train.main([*RUN, "--output", str(folder), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder of a run in one process."""
    folder = tmp_path_factory.mktemp("linear") / "whole"
    run(folder)
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


# Test files add methods of their own, which are for scoring only
WHOLE = [name for name, place in METHODS.items()
         if place.startswith(("model.", "methods.", "linear_method."))]


@pytest.mark.parametrize("name", WHOLE)
def test_every_method_keeps_the_contract(name):
    """Each class of the table has its own name, settings and protocol, and what the scripts ask for
    without a default."""
    method = find_method(name)
    assert method.name == name and issubclass(method.Protocol, Method.Protocol)
    assert dataclasses.is_dataclass(method.Settings)
    for part in ("sample", "encode", "losses", "embed_classes", "patch_scores"):
        assert getattr(method, part) is not getattr(Method, part), part


def test_it_learns(whole):
    """The loss falls, and the method's own losses are in the log."""
    log = read_log(whole)
    assert len(log) == STEPS and log[-1]["contrast"] < log[0]["contrast"]
    assert len({line["weight"] for line in log}) == STEPS       # drawn anew in each step


def test_its_recipe_is_used(whole):
    """A checkpoint keeps the run's settings, those of the recipe; the rate follows them."""
    model = load_model(whole)
    used = model.trained_with["run"]
    assert [used[name] for name in ("base_rate", "clip", "beta2", "steps")] == [0.1, 5, 0.98, 12]
    settings = train.read_command_line(RUN).run
    peak = 0.1 * 8 / 256
    rates = [line["lr"] for line in read_log(whole)]
    assert rates == [train.learning_rate(step, STEPS, peak, settings) for step in range(STEPS)]
    assert rates[0] == peak > rates[-1] > 0.1 * peak
    assert (model.protocol.templates, model.settings.width) == ("plain", 16)


def test_its_settings_are_flags(tmp_path, fails):
    """A method's settings have flags beside those of the run; any other goes by --set."""
    recipe = train.read_command_line([*RUN, "--linear-width", "3", "--set", "model.lengths=unit"])
    assert (recipe.model.width, recipe.model.lengths) == (3, "unit")
    fails(train.main, [*RUN, "--linear-width", "0"], "model: width is 0; expected at least 1")
    fails(train.main, [*RUN, "--set", "model.lengths=short"], "lengths is 'short'", "drawn, unit")


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


def test_what_is_kept(tmp_path):
    """A state has the teacher and the buffers, a checkpoint what segmenting needs: no teacher, and
    neither has what is frozen."""
    folder = tmp_path / "run"
    stopped(lambda: Processes(tmp_path, 1, run, folder), folder, signal.SIGTERM, [0])
    header, of_checkpoint = read_tensors(folder / "model.safetensors")
    _, of_state = read_tensors(state_files(folder)[0])
    kept = {"student.weight", "student.bias", "mean", "steps_seen"}
    assert of_checkpoint.keys() == kept
    assert {name for name in of_state if not name.startswith("optimizer.")} == kept | {
        "teacher.weight", "teacher.bias"}
    assert not torch.equal(of_state["teacher.weight"], of_state["student.weight"])
    assert (header["method"], header["settings"]) == ("linear", {"width": 16, "lengths": "drawn"})


def test_it_scores_and_segments(whole, folder, photo, tmp_path, fails):
    """eval.py and segment.py work with it as they are, by its own protocol; trained on the toy
    world, it refuses photos."""
    eval.main(["--dataset", str(folder), "--checkpoint", str(whole), "--without", "background",
               "--device", "cpu", "--output", str(tmp_path / "result.json")])
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == "linear" and 0 <= result["mIoU"] <= 1
    assert result["protocol"]["templates"] == "plain" and result["protocol"]["window"] == 128
    segment.main([str(folder / "images" / "photo0.png"), "--classes", "cow, grass", "--checkpoint",
                  str(whole), "--output", str(tmp_path)])
    assert json.loads((tmp_path / "photo0.json").read_text())["names"] == ["cow", "grass"]
    fails(segment.main, [photo, "--classes", "cow", "--checkpoint", whole, "--output", tmp_path],
          "was trained on the drawn scenes", photo)


def test_a_model_that_needs_no_training(folder, tmp_path, fails):
    """--checkpoint NAME:which is scored like a file; another `which` is refused."""
    chosen = ["--dataset", str(folder), "--without", "background", "--device", "cpu", "--output",
              str(tmp_path / "result.json"), "--checkpoint"]
    eval.main([*chosen, "words:unit"])
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["method"], result["settings"]["lengths"]) == ("linear", "unit")
    assert "checkpoint" not in result
    fails(eval.main, [*chosen, "words:short"], "lengths is 'short'; expected one of drawn, unit")


def test_what_it_does_not_offer_is_refused(whole, folder, tmp_path, fails):
    """A feature cache, micro-batches and settings of another method are refused in one line."""
    again = [*RUN, "--output", tmp_path]
    fails(train.main, [*again, "--cache-features", tmp_path / "cache"], "--cache-features",
          "linear has no features")
    fails(train.main, [*again, "--micro-batch", "4"], "--micro-batch",
          "linear computes its batch as a whole")
    fails(train.main, [*again, "--set", "model.local_weight=1"], "no setting 'local_weight'",
          "width, lengths")
    fails(eval.main, ["--dataset", folder, "--checkpoint", whole, "--class-embedding", "concept",
                      "--without", "background"], "no setting 'class_embedding'")


# --------------------------------------------------------------------------------------------------
# Its parameter groups

class Still(linear_method.Linear):
    """Nothing pulls at its weights, all ones, but weight decay."""
    name = "still"

    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        for p in self.student.parameters():
            torch.nn.init.ones_(p)

    def losses(self, encoded, batch):
        return {"loss": 0 * sum(p.sum() for p in self.student.parameters())}

    def parameter_groups(self):
        decayed, free = super().parameter_groups()
        return [{**decayed, "rate": 0.5}, free]


METHODS["still"] = "test_method.Still"


def test_groups_reach_the_optimizer(tmp_path):
    """A group's decay counts times the weight decay, and its rate times the learning rate: after a
    step of rate 0.2, half of it for matrices, 1 has become 1 - 0.1 * 0.3."""
    recipe = tmp_path / "still.toml"
    recipe.write_text(Path(RUN[1]).read_text().replace('"linear"', '"still"'))
    train.main(["--recipe", str(recipe), "--steps", "1", "--base-rate", str(0.2 * 256 / 8),
                "--set", "run.weight_decay=0.3", "--output", str(tmp_path / "run")])
    student = load_model(tmp_path / "run").student
    torch.testing.assert_close(student.weight, torch.full_like(student.weight, 0.97))
    assert (student.bias == 1).all()
