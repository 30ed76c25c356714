"""Write the line numbers that README.md and docs/ name: `name` (file.py:12) is defined in line 12.

    python tests/line_numbers.py                        # after code has moved
"""
import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACE = re.compile(r"`([\w.]+)` \(([\w/]+\.py):(\d+)\)")        # `Class.function` (file.py:12)


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def line_of(file, name):
    """Line in which a function, class, method ("Class.function") or constant of a file is defined.
    """
    path = ROOT / file
    if not path.is_file():
        raise ValueError(f"there is no {file}, which should define {name}")
    found = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        found = next((node for node in found.body if part in names_of(node)), None)
        if found is None:
            raise ValueError(f"{file} does not define {name}")
    return found.lineno


def names_of(node):
    """Names that a statement defines."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def with_lines(text):
    """A page with the right line numbers. Raises ValueError for what is defined nowhere."""
    return PLACE.sub(lambda place: f"`{place[1]}` ({place[2]}:{line_of(place[2], place[1])})", text)


def main():
    for page in pages():
        text = page.read_text(encoding="utf-8")
        written = with_lines(text)
        if written != text:
            page.write_text(written, encoding="utf-8")
            print(f"{page.relative_to(ROOT)} has new line numbers")


if __name__ == "__main__":
    main()
