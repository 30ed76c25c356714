"""What the README says of the code is so."""
import re
import subprocess
import sys

import pytest

import concepts
import eval
import segment
import train
from conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_lines_of_the_guide_are_those_that_it_names():
    """Each `name` (file.py:line) of the guide is defined in that line of that file."""
    places = re.findall(r"`([\w.]+)` \(([\w/]+\.py):(\d+)\)", README)
    assert len(places) > 10
    for name, file, line in places:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf" *(def|class) {name.split('.')[-1]}\b", text), (name, line)


@pytest.mark.parametrize("script", [concepts, eval, segment, train])
def test_flags_exist(script):
    """Every flag in a command of the README is one of its script."""
    help = subprocess.run([sys.executable, script.__file__, "--help"], capture_output=True, text=True).stdout
    commands = re.findall(rf"{script.__name__}\.py ([^`\n]*)", README)
    assert commands
    for flag in re.findall(r"(--[a-z][a-z-]*)", " ".join(commands)):
        assert f"{flag} " in help or f"{flag},"in help or f"{flag}\n" in help or f"{flag}]" in help, flag


def test_files_exist():
    """Every file and folder of the file map is there."""
    names = re.findall(r"^    ([\w.]+/?)  +\w", README.split("## Files")[1].split("## ")[0], flags=re.MULTILINE)
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name
