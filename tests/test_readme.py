"""What the README and the pages in docs/ say of the code is so."""
import re
import subprocess
import sys

import pytest

import concepts
import eval
import segment
import train
from conftest import ROOT
from machinery.contract import METHODS

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
PAGES = {"README.md": README, **DOCS}


def test_lines_of_the_guide_are_those_that_it_names():
    """Each `name` (file.py:line) of the guide is defined in that line of that file."""
    places = [(page, *place) for page, text in PAGES.items()
              for place in re.findall(r"`([\w.]+)` \(([\w/]+\.py):(\d+)\)", text)]
    assert len(places) > 10
    for page, name, file, line in places:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name.split('.')[-1]}\b", text), (page, name, line)


@pytest.mark.parametrize("script", [concepts, eval, segment, train])
def test_flags_exist(script, capsys, tmp_path):
    """--help works from any folder, and every flag in a command of the guide is one of its script,
    of train.py with one of the methods."""
    run = subprocess.run([sys.executable, script.__file__, "--help"], cwd=tmp_path,
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    help = run.stdout
    for name in METHODS if script is train else ():
        with pytest.raises(SystemExit):
            train.parse_args(["--method", name, "--help"])
        help += capsys.readouterr().out
    known = set(re.findall(r"--[a-z][a-z-]*", help))
    pattern = rf"{script.__name__}\.py ([^`\n]*)"
    assert re.search(pattern, README)
    for page, text in PAGES.items():
        commands = " ".join(re.findall(pattern, text.replace("\\\n", " ")))
        for flag in re.findall(r"--[a-z][a-z-]*", commands):
            assert flag in known, (page, flag)


def test_files_exist():
    """Every file and folder of the file map is there."""
    section = README.split("## Files")[1].split("## ")[0]
    names = re.findall(r"^    ([\w.]+/?)  +\w", section, flags=re.MULTILINE)
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name
