"""Class files and prompt templates."""
from collections import Counter
from pathlib import Path

CLASSES = Path(__file__).parents[1] / "classes"

BENCHMARKS = ("voc", "voc20", "context", "context59", "coco-object", "coco-stuff", "cityscapes", "ade20k")



def read_classes(path):
    """Read a class file: one class per line, synonyms after commas. Returns a list of lists of names.

    Raises FileNotFoundError, or ValueError for a file without names and for a name that is there twice.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no class file {path}: expected a text file with one class name per line")
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); expected one class name per line") from None
    return check_classes([[name.strip() for name in line.split(",")] for line in lines if line.strip()], path)



def check_classes(classes, source):
    """Return classes (lists of synonyms) if no name is empty or there twice, else raise ValueError naming source."""
    if not classes:
        raise ValueError(f"{source}: no class names found, expected at least one")
    count = Counter(normalise_name(name) for names in classes for name in names)
    twice = [name for name, times in count.items() if times > 1]
    if "" in count or twice:
        raise ValueError(f"{source}: " + ("an empty class name" if "" in count else f"duplicate class name {twice[0]!r}")
                         + "; every class needs a name of its own")
    return classes



def normalise_name(name):
    return " ".join(name.lower().replace("-", " ").split())



def read_labels(path):
    """A class file whose lines may begin with "label: ". Returns (labels or None, classes)."""
    lines = Path(path).read_text("utf-8-sig", "surrogateescape").splitlines() if Path(path).is_file() else []
    lines = [line for line in lines if line.strip()]
    if not any(":" in line for line in lines):
        return None, read_classes(path)
    bare = [line for line in lines if ":" not in line]
    labels = [line.partition(":")[0].strip() for line in lines]
    twice = [label for label, times in Counter(labels).items() if times > 1]
    if bare or twice:
        raise ValueError(f"{path}: " + (f"the label {twice[0]!r} is there twice" if not bare else f"{bare[0]!r} has no "
                         'label before its name; expected "label: name" in every line or in none'))
    return labels, [[name.strip() for name in line.partition(":")[2].split(",")] for line in lines]



def read_templates(name):
    """Prompt templates by the name of a file in classes/templates/, or of any file: one per line, with one {} each."""
    path = CLASSES / "templates" / f"{name}.txt"
    path = path if path.is_file() else Path(name)
    if not path.is_file():
        known = sorted(p.stem for p in (CLASSES / "templates").glob("*.txt"))
        raise FileNotFoundError(f"no templates {name!r}; expected {', '.join(known)}, or a file with one per line")
    templates = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not templates or any(template.count("{}") != 1 for template in templates):
        raise ValueError(f"{path}: expected one template per line, each with one {{}} for the class name")
    return templates
