"""Class files and prompt templates: the names that one trains on, segments and scores."""
import os
import re
import sys
import unicodedata
from collections import Counter
from pathlib import Path

CLASSES = Path(__file__).parents[1] / "classes"
BENCHMARK_NAMES = ("voc", "voc20", "context", "context59", "coco-object", "coco-stuff",
                   "cityscapes", "ade20k")
MAX_FILE = 16 * 2 ** 20                             # bytes of a text file of names


def normalise_name(name):
    """Lower case, "-", "_" and white space as single spaces: names are compared in this form."""
    return " ".join(re.sub("[-_]", " ", name.lower()).split())


def read_lines(path):
    """Lines of a UTF-8 text file that are not empty."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no class file {path}: expected a text file with one class name "
                                "per line")
    if path.stat().st_size > MAX_FILE:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; expected one class name per "
                         "line")
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); expected one class name per line, "
                         "saved as UTF-8") from None
    return [line for line in lines if line.strip()]


def split_names(text, source="names"):
    """Names with commas between. "_" is a space, and what cannot be seen is no part of a name.
    Raises ValueError, which names the source, for semicolons."""
    if ";" in text:
        raise ValueError(f"{source}: {text!r} has semicolons; expected names with commas between")
    return [" ".join(visible(name).replace("_", " ").split()) for name in text.split(",")]


def read_classes(path):
    """The classes of `read_labels`, checked: lists of names."""
    return check_classes(read_labels(path)[1], path)


def read_labels(path):
    """A class file: one class per line, synonyms after commas; all lines may begin with a label, as
    in "7: road, street". Returns (labels or None, classes). Raises FileNotFoundError, ValueError.
    """
    lines = read_lines(path)
    bare = [line for line in lines if ":" not in line]
    if len(bare) == len(lines):
        return None, [split_names(line, path) for line in lines]
    if bare:
        raise ValueError(f'{path}: some lines begin with a label, as in "7: road", and some, such '
                         f"as {bare[0]!r}, do not")
    labels = [line.partition(":")[0].strip() for line in lines]
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if twice:
        raise ValueError(f"{path}: the label {twice[0]!r} is there twice")
    return labels, [split_names(line.partition(":")[2], path) for line in lines]


def visible(text):
    """A text without characters that cannot be seen, such as zero-width spaces."""
    return "".join(letter for letter in text if unicodedata.category(letter) != "Cf")


def check_classes(classes, source):
    """Return classes (lists of synonyms), or raise ValueError for an empty or duplicate name."""
    if not classes:
        raise ValueError(f"{source}: no class names found, expected at least one")
    count = Counter(normalise_name(name) for names in classes for name in names)
    twice = [name for name, times in count.items() if times > 1]
    if "" in count:
        raise ValueError(f"{source}: an empty class name; every class needs a name of its own")
    if twice:
        raise ValueError(f"{source}: duplicate class name {twice[0]!r}; every class needs a name "
                         "of its own")
    return classes


def name_classes(text):
    """Lists of names of --classes: names with commas between, or a class file. Raises ValueError,
    FileNotFoundError."""
    if os.path.isfile(text) or looks_like_file(text):
        return read_classes(text)
    if ":" in text:
        raise ValueError(f"--classes {text!r} has a colon; labels are for class files")
    return check_classes([[name] for name in split_names(text, "--classes")], "--classes")


def looks_like_file(text):
    """Whether a text is a file's name, "classes.csv" or "lists/classes", and no list of names."""
    return "," not in text and (os.sep in text or bool(re.fullmatch(r"\S+\.[a-z]{2,5}", text)))


def merge_equal_names(lists):
    """Lists of synonyms in which no name occurs twice, with one line of notice if some did.

    A name belongs to the first list that has it. What else a later list holds joins that one.
    """
    merged = []
    list_of = {}                                    # normalised name -> its list in merged
    repeated = []
    for synonyms in lists:
        known = [list_of[name] for name in map(normalise_name, synonyms) if name in list_of]
        target = known[0] if known else []
        if not known:
            merged.append(target)
        for name in synonyms:
            if normalise_name(name) in list_of:
                repeated.append(name)
            else:
                target.append(name)
                list_of[normalise_name(name)] = target
    if repeated:
        print(f"concept bank: names that are there more than once count once: {len(repeated)}, "
              f"such as {repeated[0]!r}", file=sys.stderr)
    return merged


IRREGULAR = {"person": "people", "man": "men", "woman": "women", "child": "children",
             "mouse": "mice", "sheep": "sheep", "knife": "knives", "shelf": "shelves",
             "leaf": "leaves", "foot": "feet", "goose": "geese"}


def plural(name):
    """English plural of a name's last word."""
    *before, word = name.split()
    if word in IRREGULAR:
        word = IRREGULAR[word]
    elif word.endswith("y") and word[-2:-1] not in "aeiou":
        word = word[:-1] + "ies"
    else:
        word += "es" if word.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return " ".join([*before, word])


def read_templates(name):
    """Prompt templates, each with one {}: of classes/templates/NAME.txt, or of any file."""
    path = named_file(name, CLASSES / "templates", "templates")
    templates = read_lines(path)
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"{path}: expected one template per line, each with one {{}} for the "
                         "class name")
    return templates


def named_file(name, folder, what):
    """Path of a text file in a folder by its name without .txt, or of any file.

    what: the file's content, in words, for the error.
    """
    path = folder / f"{name}.txt"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in folder.glob("*.txt")))
        raise FileNotFoundError(f"no {what} {name!r}; expected {known}, or a file with one per "
                                "line")
    return path
