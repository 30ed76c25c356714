"""docs/add-a-method.md: its method and its recipe, as they stand there, train, go on and score."""
import re
import signal

import pytest

import eval
import train
from conftest import ROOT, read_log
from machinery import contract
from machinery.networks.checkpoint import load_model

BLOCK = r"```{}\n(.*?)```"


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Path of the page's recipe; its method can be found."""
    page = (ROOT / "docs" / "add-a-method.md").read_text()
    [method] = re.findall(BLOCK.format("python"), page, re.DOTALL)
    [recipe] = re.findall(BLOCK.format("toml"), page, re.DOTALL)
    [line] = re.findall(r'^    "(.*)": "methods\.(.*)",$', page, re.MULTILINE)
    name, place = line
    (tmp_path / f"{place.partition('.')[0]}.py").write_text(method)
    (tmp_path / "recipe.toml").write_text(recipe)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(contract.METHODS, name, place)
    return str(tmp_path / "recipe.toml")


def test_the_page_s_method_trains_goes_on_and_scores(recipe, tmp_path, monkeypatch):
    """An interrupted run ends with the weights of one that was not, and eval.py scores it."""
    def run(folder, *more):
        train.main(["--recipe", recipe, "--set", "run.epoch_pairs=64", "--steps", "6",
                    "--output", str(tmp_path / folder), *more])

    def interrupt(method, step, steps):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)

    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(contract.Method, "after_step", interrupt)
        with pytest.raises(SystemExit):
            run("parts")
    assert len(read_log(tmp_path / "parts")) == 3
    run("parts", "--resume", "auto")
    words = [load_model(tmp_path / folder).words.weight for folder in ("whole", "parts")]
    assert words[0].equal(words[1])
    losses = [line["loss"] for line in read_log(tmp_path / "whole")]
    assert losses[-1] < losses[0]
    eval.main(["--dataset", "toy", "--limit", "2", "--checkpoint", str(tmp_path / "parts")])
