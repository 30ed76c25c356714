"""The scripts that print the tables of the pages (docs/toy_tables.py, docs/test_time.py)."""
import os
import shlex
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import eval
import segment
import train

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))
import test_time
import toy_tables
from toy_tables import ROWS, TABLES, Row, commands


PARSERS = {"train.py": train.read_command_line, "eval.py": eval.parse_args,
           "segment.py": segment.parse_args}


@pytest.mark.parametrize("name", ROWS)
def test_every_command_is_one(name):
    """The commands of a row are accepted by their scripts, which are there; each row stands in a
    table."""
    for command in commands(name, 0):
        script, *arguments = shlex.split(command)[1:]
        if script in PARSERS:
            PARSERS[script](arguments)
        else:
            assert script in ("-c", "-m") or (toy_tables.ROOT / script).exists()
    assert any(name in rows for rows in TABLES.values())
    assert {row for rows in TABLES.values() for row in rows} <= set(ROWS)


def test_every_row_has_a_file_of_its_own():
    """No two rows or seeds keep their results in one place."""
    places = {toy_tables.result_file(name, seed) for name in ROWS for seed in range(3)}
    assert len(places) == 3 * len(ROWS)


@pytest.fixture
def rows(tmp_path, monkeypatch):
    """Three small rows: a figure, one that needs it, and one that fails."""
    monkeypatch.chdir(tmp_path)                     # the script changes the folder
    monkeypatch.setattr(toy_tables, "RUNS", tmp_path / "tables")
    monkeypatch.setattr(toy_tables, "ROWS", {
        "first": Row("First", ["-c \"import os; print('mIoU 1' + os.environ['OMP_NUM_THREADS'] + "
                               "'.{seed}0%')\""], (0, 2)),
        "second": Row("Second", ["-c \"open('{first}.json'); print('mIoU 50.00%')\""], (0,)),
        "broken": Row("Broken", ["-c \"raise SystemExit(3)\""], (0,))})
    monkeypatch.setattr(toy_tables, "TABLES", {"one": ["second"], "two": ["first"],
                                               "three": ["broken"]})


def test_tables_are_measured_once(rows, capsys):
    """Rows run on one thread, those that others need before them, and are kept: the second call
    runs nothing and prints the same table, with mean, seconds, torch and processor."""
    toy_tables.main(["one", "two"])
    first = capsys.readouterr().out
    assert first.count("python -c") == 2 + 3 and "| Second | 50.0 | 50.0 | 0 |" in first
    assert "| First | 11.0 11.2 | 11.1 ± 0.1 | 0 |" in first and "One thread, torch " in first
    toy_tables.main(["one", "two"])
    assert first.endswith(capsys.readouterr().out)


def test_a_row_that_fails(rows, capsys):
    """The others are measured, and the message names the command and its log."""
    with pytest.raises(SystemExit, match="broken-0.log"):
        toy_tables.main(["--jobs", "2"])
    assert "| First |" in capsys.readouterr().out


def test_a_piece_and_a_dry_run(rows, capsys, tmp_path):
    """--rows and --seeds choose; --dry-run prints commands and runs none."""
    toy_tables.main(["--dry-run", "--rows", "first", "--seeds", "5"])
    assert capsys.readouterr().out.count("python") == 1 and not (tmp_path / "tables").exists()


def test_a_picture_of_methods(checkpoint, monkeypatch):
    """Photo, truth and a column of each model, for each scene SHOWN, with a legend."""
    monkeypatch.setattr(toy_tables, "folder", lambda name, seed: checkpoint)
    width, height = toy_tables.draw_methods({"simzss": "one", "sseg": "two"}).size
    assert width > 4 * 192 and height > len(toy_tables.SHOWN) * 192


def test_costs_of_switches(checkpoint, tmp_path, monkeypatch, capsys):
    """Each switch is put alone on the protocol that the model was loaded with, at each size, and
    costs the median of three runs."""
    Image.new("RGB", (64, 48), "red").save(tmp_path / "photo.png")
    monkeypatch.setattr(test_time, "SIZES", [(320, 240), (100, 100)])
    used = []
    monkeypatch.setattr(segment, "segment_image", lambda *args, **protocol:
                        used.append(protocol) or (torch.zeros(2, 2), torch.zeros(2, 2)))
    monkeypatch.setattr(test_time, "apart", lambda segmenter, photo:
                        segmenter(photo) and (len(used), photo.width))
    test_time.costs(str(tmp_path / "photo.png"), "cow, sea", str(checkpoint))
    rows = capsys.readouterr().out.splitlines()[2:]
    assert len(rows) == 2 * len(test_time.COSTS)
    assert rows[0] == "| 320 x 240 | as it is | 2.00 | 320.00 |"
    off, propagated, weighted = used[0], used[3], used[6]
    assert propagated == {**off, "propagate": 0.9} and weighted == {**off, "image_weight": 0.5}
    assert off["propagate"] == 0 and off["blend"] == "mean"


def test_a_photo_is_segmented_apart(checkpoint):
    """Seconds and GiB of the child; one that dies, as for want of memory, is not waited for."""
    segmenter = segment.Segmenter("cow, sea", str(checkpoint))
    seconds, memory = test_time.apart(segmenter, Image.new("RGB", (64, 48)))
    assert 0 < seconds < 60 and 0.05 < memory < 50
    with pytest.raises(ValueError):
        test_time.apart(lambda photo: os._exit(9), None)
