"""Settings as data: one dataclass for each thing that is set, each field written once.

    @dataclass
    class TextSettings:
        layers: int = setting(12, "layers of the text encoder", least=1, flag="text-layers")

`add_flags` makes flags of a dataclass; `read` turns a mapping that comes from a file (a recipe, the
header of a checkpoint or state) into the dataclass and checks it. The dataclass may have a method
`check`: it raises ValueError for values that do not go together, and may make a path absolute.
After that only train.py's choice of a micro-batch and segment.py's own protocol change settings.
"""
import argparse
import dataclasses
import math
import operator
import tomllib
import types
import typing
from dataclasses import MISSING
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
LARGEST = 2 ** 63 - 1                               # whole number that torch and NumPy hold
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
         dict: "names with values"}
BOUNDS = {"least": (operator.ge, "at least"), "above": (operator.gt, "more than"),
          "most": (operator.le, "at most")}


def setting(default, help, least=None, above=None, most=None, choices=None, flag=True,
            changes_result=True):
    """A field of a settings dataclass.

    default: a value, a function that makes it, or MISSING: the recipe has to say it.
    help: one line; what it means, its unit, its range, the sign of a bad value.
    least, above, most: bounds of a number; `above` itself is out of bounds.
    choices: the values that are allowed.
    flag: True, a flag of the field's name; a text, a flag of that name; False, no flag of its own.
    changes_result: False for what a resumed run may change, such as the number of workers, and for
        what is compared in another way, such as the bank by its names (`State.check`).
    """
    metadata = {"help": help, "least": least, "above": above, "most": most, "choices": choices,
                "flag": flag, "changes_result": changes_result}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**made, metadata=metadata)


# --------------------------------------------------------------------------------------------------
# From a mapping to settings

def read(cls, mapping, source):
    """The settings dataclass cls with the values of a mapping (JSON or TOML), checked.

    source: names the mapping in errors. Raises ValueError, one line with the field's name.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{source}: expected settings by name, found {abbreviate(mapping)}")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    for name, value in mapping.items():
        if name not in fields:
            raise ValueError(f"{source}: there is no setting {abbreviate(name)}; expected one of "
                             f"{', '.join(fields)}")
        field = fields[name]
        values[name] = check_value(value, field.type, field.metadata, f"{source}: {name}")
    for name, field in fields.items():
        if name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{source}: the setting {name} is missing; it has no default "
                             f"({field.metadata['help']})")
    settings = cls(**values)
    if hasattr(settings, "check"):
        try:
            settings.check()
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None
    return settings


def check_value(value, hint, metadata, where):
    """A value as one of the field's type, `hint`, within its bounds. Raises ValueError."""
    if value is None and type(None) in typing.get_args(hint):
        return None
    hint = without_none(hint)
    if dataclasses.is_dataclass(hint):
        return read(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {abbreviate(value)}; expected a list")
        element = typing.get_args(hint)[0]
        return tuple(check_value(one, element, metadata, where) for one in value)
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"{where} is {abbreviate(value)}; expected a smaller number")
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} is {abbreviate(value)}; expected {KINDS[hint]}")
    if hint in (int, float):
        check_bounds(value, metadata, where)
    if hint is dict:
        for name, one in value.items():
            check_option(one, f"{where}: {abbreviate(name)}")
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{where} is {abbreviate(value)}; expected one of "
                         f"{', '.join(map(str, choices))}")
    return value


def without_none(hint):
    """The type of a field without "or None"."""
    if isinstance(hint, types.UnionType):
        [hint] = [option for option in typing.get_args(hint) if option is not type(None)]
    return hint


def check_bounds(value, metadata, where):
    bounds = {name: metadata[name] for name in BOUNDS if metadata.get(name) is not None}
    inside = all(BOUNDS[name][0](value, bound) for name, bound in bounds.items())
    if not inside or not math.isfinite(value):
        expected = " and ".join(f"{BOUNDS[name][1]} {bound}" for name, bound in bounds.items())
        raise ValueError(f"{where} is {value}; expected {expected or 'a finite number'}")


def check_option(value, where):
    """Raise ValueError for anything but a finite number, a text, true, false, none, or a list of
    these."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if type(one) in (bool, int, float, str):
            check_value(one, type(one), {}, where)
        elif one is not None:
            raise ValueError(f"{where} is {abbreviate(one)}; expected a number, a text, true, "
                             "false or a list of these")


def abbreviate(value):
    """A value in an error: its first characters, on one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def as_mapping(settings):
    """Settings as plain JSON values, which `read` takes back."""
    return dataclasses.asdict(settings)


def differences(cls, then, now):
    """["batch was 64, is 32", ...]: settings of cls that change a result and differ.

    then, now: mappings of `as_mapping`; then may be from a file.
    """
    found = []
    for field in dataclasses.fields(cls):
        before = then.get(field.name)
        after = now[field.name]
        if isinstance(after, dict) and dataclasses.is_dataclass(field.type):
            found += differences(field.type, before if isinstance(before, dict) else {}, after)
        elif field.metadata["changes_result"] and without_tuple(before) != without_tuple(after):
            flag = field.metadata["flag"]
            name = flag if isinstance(flag, str) else field.name
            found.append(f"{name} was {abbreviate(before)}, is {abbreviate(after)}")
    return found


def without_tuple(value):
    """JSON has lists in place of tuples."""
    return list(value) if isinstance(value, tuple) else value


# --------------------------------------------------------------------------------------------------
# Recipes

def read_recipe(name):
    """The content of a recipe: {"method": name, "run": {...}, "model": {...}, "protocol": {...}}.

    name: of a file in recipes/, or a path. Raises FileNotFoundError or ValueError.
    """
    path = RECIPES / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in RECIPES.glob("*.toml")))
        raise FileNotFoundError(f"no recipe {name!r}; expected {known}, or a .toml file")
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no recipe in TOML ({error})") from None
    if not isinstance(content.get("method"), str):
        raise ValueError(f'{path}: expected a line method = "NAME"')
    for name, table in content.items():
        if name != "method" and not isinstance(table, dict):
            raise ValueError(f"{path}: {name} is {abbreviate(table)}; expected a table [{name}]")
    return content


def merge(*mappings):
    """One mapping of several: later ones win, tables inside are merged, too."""
    merged = {}
    for mapping in mappings:
        for name, value in mapping.items():
            if isinstance(value, dict) and isinstance(merged.get(name), dict):
                value = merge(merged[name], value)
            merged[name] = value
    return merged


# --------------------------------------------------------------------------------------------------
# Flags

def add_flags(parser, cls, table, values=None, without=()):
    """Add a flag for each field of a settings dataclass that has one, nested ones included.

    parser: of argparse, or one of its groups.
    table: where the values belong, such as "run" or "model"; `given` returns them there.
    values: what holds without the flag, shown in --help; None = the dataclass's defaults.
    without: names of fields that get no flag here.
    A flag that is not given leaves no trace in what argparse returns.
    """
    for field in dataclasses.fields(cls):
        place = f"{table}.{field.name}"
        value = (values or {}).get(field.name, field.default)
        hint = without_none(field.type)
        if dataclasses.is_dataclass(hint):
            add_flags(parser, hint, place, value if isinstance(value, dict) else None)
        elif field.metadata["flag"] and field.name not in without:
            add_flag(parser, field, place, hint, value)


def add_flag(parser, field, place, hint, value):
    """One flag; see `add_flags`."""
    flag = field.metadata["flag"]
    flag = field.name.replace("_", "-") if flag is True else flag
    help = field.metadata["help"]
    if value is not None and value is not MISSING:
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        help += f" (default: {shown})"
    choices = field.metadata["choices"]
    if hint is bool:
        options = {"action": argparse.BooleanOptionalAction}
    elif typing.get_origin(hint) is tuple:
        options = {"type": typing.get_args(hint)[0], "nargs": "*", "metavar": "VALUE"}
    elif choices:
        options = {"type": hint, "choices": choices}
    else:
        options = {"type": hint, "metavar": {int: "N", float: "X"}.get(hint, "NAME")}
    parser.add_argument(f"--{flag}", dest=place, default=argparse.SUPPRESS,
                        help=help.replace("%", "%%"), **options)    # argparse fills in %(NAME)s


def add_set_flag(parser, example):
    """--set NAME=VALUE, for every setting that has no flag of its own."""
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE",
                        help=f"any other setting by its name in a recipe, such as {example}; may "
                             "be repeated")


def given(args):
    """What the command line says, as nested tables: {"run": {"batch": 64}}. Raises ValueError."""
    said = {}
    for place, value in vars(args).items():
        if "." in place:
            said = merge(said, nested(place, value))
    for text in getattr(args, "set", ()):
        place, equals, value = text.partition("=")
        if not equals or "." not in place:
            raise ValueError(f"--set {text}: expected TABLE.NAME=VALUE; see the example in --help")
        try:
            value = tomllib.loads(f"x = {value}")["x"]
        except tomllib.TOMLDecodeError:             # a plain word
            pass
        said = merge(said, nested(place, value))
    return said


def nested(place, value):
    """"run.batch", 64 -> {"run": {"batch": 64}}."""
    for name in reversed(place.split(".")):
        value = {name: value}
    return value
