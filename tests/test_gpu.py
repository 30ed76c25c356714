"""The script for a lent GPU runs on a CPU, too."""
import pytest

import gpu


def test_all_checks_pass(capsys):
    """On the toy backbone all checks pass: each has a line, and none failed."""
    gpu.main(["--tiny", "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("failed: none")
    for name in ("NCCL", "memory", "precision", "random", "fp16", "recipe", "eval, segment",
                 *(f"step of {method}" for method in gpu.METHODS)):
        assert any(line.startswith(name) for line in lines), name


def test_a_check_that_fails_leaves_the_others(capsys, monkeypatch):
    """A check that fails is named, the next one runs, and the exit status is 1."""
    checks = lambda self: [("first", self.batch), ("second", self.nccl)]
    monkeypatch.setattr(gpu.Checks, "all", checks)
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--tiny", "--device", "cpu"])
    first, second, last = capsys.readouterr().out.splitlines()
    assert stopped.value.code == 1 and first.startswith("first") and "FAILED: TypeError" in first
    assert second.startswith("second") and last.endswith("failed: first")
