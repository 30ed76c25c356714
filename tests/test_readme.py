"""What the README and the pages in docs/ say of the code is so."""
import contextlib
import io
import re
import shlex

import pytest

import concepts
import eval
import segment
import train
from conftest import ROOT
from line_numbers import PLACE, line_of, pages, with_lines
from machinery.settings import RECIPES

PAGES = {page.name: page.read_text() for page in pages()}
README = PAGES["README.md"]
PARSERS = {"train": train.read_command_line, "eval": eval.parse_args, "segment": segment.parse_args,
           "concepts": concepts.parse_args}
FLAG = r"(?<![\w-])--[a-z][a-z_-]*"
TORCHRUN = {"--nnodes", "--node_rank", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint",
            "--rdzv_id"}
COMMAND = re.compile(r"\b(?:python|torchrun)\b.*?\b(train|eval|segment|concepts)\.py\b(.*)")


def code(text):
    """The pieces of code of a page: the lines of its blocks, and what stands in backticks. Blocks
    between ``` are left out: they are of add-a-method.md, and tested by test_add_a_method.py."""
    text = re.sub("```.*?```", "", text, flags=re.DOTALL).replace("\\\n", " ")
    blocks = re.findall(r"^    (.*)", text, flags=re.MULTILINE)
    rest = re.sub(r"^    .*", "", text, flags=re.MULTILINE)
    return blocks + [re.sub(r"\s+", " ", piece) for piece in re.findall(r"`([^`]+)`", rest)]


def commands(text):
    """(script, words) of each command of a page; $x and S stand for a number."""
    for piece in code(text):
        for part in re.split("&&|;|[|]| > ", piece):
            if found := COMMAND.search(part):
                words = re.sub(r"\$\w+|\bS\b", "1", found[2])
                yield found[1], shlex.split(words, comments=True)


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page):
    """Each command of a page is one that its script takes: its flags, their values, its recipe."""
    for script, words in commands(PAGES[page]):
        if "--help" not in words and (words or script == "train"):
            try:
                PARSERS[script](words)
            except (SystemExit, ValueError, OSError) as error:
                raise AssertionError(f"{script}.py {shlex.join(words)}: {error}") from None


def test_every_script_has_a_command_in_the_readme():
    """The README shows how each script is called, and so do these tests find its commands."""
    assert {script for script, _ in commands(README)} == PARSERS.keys()


@pytest.fixture(scope="module")
def flags():
    """All flags of all scripts, of train.py with each recipe."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        for script, parse in PARSERS.items():
            recipes = [["--recipe", str(path)] for path in sorted(RECIPES.glob("*.toml"))]
            for recipe in recipes if script == "train" else [[]]:
                with pytest.raises(SystemExit):
                    parse([*recipe, "--help"])
    return set(re.findall(FLAG, printed.getvalue())) | TORCHRUN


@pytest.mark.parametrize("page", PAGES)
def test_flags_exist(page, flags):
    """Each `--flag` of a page is one of some script, and each `--recipe` one of recipes/."""
    named = [piece for piece in code(PAGES[page]) if piece.startswith("--")]
    unknown = {flag for piece in named for flag in re.findall(FLAG, piece)} - flags
    assert unknown == set()
    for name in re.findall(r"--recipe ([a-z][\w-]*)", "\n".join(code(PAGES[page]))):
        assert (RECIPES / f"{name}.toml").is_file(), name


@pytest.mark.parametrize("page", PAGES)
def test_line_numbers_are_right(page):
    """Each `name` (file.py:line) is defined there. `python tests/line_numbers.py` writes them."""
    for name, file, line in PLACE.findall(PAGES[page]):
        assert line_of(file, name) == int(line), f"{name}: run python tests/line_numbers.py"


def test_the_tables_of_formulas_name_their_lines():
    """The README and docs/method.md lead from the formulas to the code."""
    assert len(PLACE.findall(README)) >= 5 and len(PLACE.findall(PAGES["method.md"])) >= 15


def test_line_numbers_are_written():
    """Functions, classes, methods and constants are found, decorated or not; what is nowhere
    defined is an error, as a page that names it is wrong."""
    text = "`Pair.crop` (data.py:1), `with_lines` (tests/line_numbers.py:0)"
    written = with_lines(text)
    for name, file, line in PLACE.findall(written):
        defined = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert f"def {name.split('.')[-1]}(" in defined
    assert with_lines(written) == written and len(PLACE.findall(written)) == 2
    assert line_of("tests/line_numbers.py", "ROOT") == 9
    with pytest.raises(ValueError, match="data.py does not define Pair.dog"):
        with_lines("`Pair.dog` (data.py:1)")
    with pytest.raises(ValueError, match="there is no nowhere.py"):
        with_lines("`dog` (nowhere.py:1)")


def test_files_exist():
    """Every file and folder of the file map is there, and every file of the top level is in it."""
    section = README.split("## Files")[1].split("## ")[0]
    names = re.findall(r"^    ([\w./]+)  +\w", section, flags=re.MULTILINE)
    assert len(names) > 8
    for name in names:
        assert (ROOT / name).exists(), name
    assert {path.name for path in ROOT.glob("*.py")} <= set(names)
