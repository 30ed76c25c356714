"""Settings as data: one dataclass for each thing that is set, each field written once.

    @dataclass
    class TextSettings:
        layers: int = setting(12, "layers of the text encoder", least=1, flag="text-layers")

A field has a name, a type, a default, bounds or choices, and a line of help. `add_flags` makes
flags of it; `read` turns any mapping that comes from a file (a recipe, a checkpoint's header, a
state, a result) into the dataclass and checks it. A dataclass with a method `check` raises ValueError there
for values that do not go together; it may also make a path absolute. Nothing else changes settings
after they were read.

A field without a default has to be in the recipe.
"""
import argparse
import dataclasses
import math
import tomllib
import types
import typing
from pathlib import Path

RECIPES = Path(__file__).parents[1] / "recipes"
LARGEST = 2 ** 63 - 1                               # whole number that torch and NumPy hold


def setting(default, help, least=None, above=None, most=None, choices=None, flag=True, group=None,
            changes_result=True):
    """A field of a settings dataclass.

    default: a value, a function that makes it (for a list, say), or MISSING, which means that the
    recipe has to say it.
    help: one line; what it means, its unit, its range, the sign of a bad value.
    least, above, most: bounds of a number; above is a lower bound that is not reached itself.
    choices: the values that are allowed.
    flag: True, a flag of the field's name; a text, a flag of that name; False, no flag of its own.
    group: heading under which --help lists the flag.
    changes_result: False for what a resumed run may change, such as the number of workers, and for
        what is compared by another value, such as the bank by its names (`State.check`).
    """
    metadata = {"help": help, "least": least, "above": above, "most": most, "choices": choices,
                "flag": flag, "group": group, "changes_result": changes_result}
    made = {"default_factory": default} if callable(default) else {"default": default}
    return dataclasses.field(**made, metadata=metadata)


MISSING = dataclasses.MISSING


# --------------------------------------------------------------------------------------------------
# From a mapping to settings

def read(cls, mapping, source):
    """The settings dataclass cls with the values of a mapping (JSON or TOML), checked.

    source: names the mapping in errors, such as its file. Raises ValueError, one line with the
    field's name, for an unknown name, a missing one, another type, a number that is not finite or
    out of bounds, and for what the dataclass's own `check` refuses.
    """
    if not isinstance(mapping, dict):
        raise ValueError(f"{source}: expected settings by name, found {short(mapping)}")
    known = {field.name: field for field in dataclasses.fields(cls)}
    unknown = [name for name in mapping if name not in known]
    if unknown:
        raise ValueError(f"{source}: there is no setting {short(unknown[0])}; expected one of "
                         f"{', '.join(known)}")
    hints = typing.get_type_hints(cls)
    values = {name: checked(value, hints[name], known[name].metadata, f"{source}: {name}")
              for name, value in mapping.items()}
    for name, field in known.items():
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


def checked(value, hint, metadata, where):
    """A value of a type and within bounds, or ValueError. hint: the field's type; see `read`."""
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    [hint] = [option for option in options if option is not type(None)]
    if dataclasses.is_dataclass(hint):
        return read(hint, value, where)
    origin = typing.get_origin(hint)
    if origin is tuple:
        element = typing.get_args(hint)[0]
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} is {short(value)}; expected a list")
        return tuple(checked(one, element, metadata, where) for one in value)
    kind = origin or hint
    if type(value) is int and abs(value) > LARGEST:
        raise ValueError(f"{where} is {short(value)}; expected a smaller number")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {short(value)}; expected {KINDS[kind]}")
    if kind in (int, float):
        check_bounds(value, metadata, where)
    if kind is dict:
        for name, one in value.items():
            check_option(one, f"{where}: {short(name)}")
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ValueError(f"{where} is {short(value)}; expected one of "
                         f"{', '.join(map(str, choices))}")
    return value


KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false",
         dict: "names with values"}


def check_bounds(value, metadata, where):
    least, above, most = (metadata.get(name) for name in ("least", "above", "most"))
    bounds = [f"at least {least}" * (least is not None), f"more than {above}" * (above is not None),
              f"at most {most}" * (most is not None)]
    fits = (math.isfinite(value) and (least is None or value >= least)
            and (above is None or value > above) and (most is None or value <= most))
    if not fits:
        expected = " and ".join(filter(None, bounds)) or "a finite number"
        raise ValueError(f"{where} is {value}; expected {expected}")


def check_option(value, where):
    """Raise ValueError for anything but a finite number, a text, true, false, none, or a list of
    these."""
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if one is not None:
            if type(one) not in (bool, int, float, str):
                raise ValueError(f"{where} is {short(one)}; expected a number, a text, true, false "
                                 "or a list of these")
            checked(one, type(one), {}, where)


def short(value):
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
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        before = then.get(field.name)
        after = now[field.name]
        if dataclasses.is_dataclass(hints[field.name]):
            found += differences(hints[field.name], before if isinstance(before, dict) else {},
                                 after)
        elif field.metadata["changes_result"] and plain(before) != plain(after):
            name = field.metadata["flag"] if isinstance(field.metadata["flag"], str) else field.name
            found.append(f"{name} was {short(before)}, is {short(after)}")
    return found


def plain(value):
    """JSON has no tuples."""
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
            raise ValueError(f"{path}: {name} is {short(table)}; expected a table [{name}]")
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

def add_flags(parser, cls, table, values=None, group=None, only=None):
    """Add a flag for each field of a settings dataclass that has one, nested ones included.

    table: where the values belong, such as "run" or "model"; `given` returns them there.
    values: what holds without the flag, shown in --help; None = the dataclass's defaults.
    group: heading for fields without one of their own.
    only: names of the fields to take; None = all.
    A flag that is not given leaves no trace in what argparse returns.
    """
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        place = f"{table}.{field.name}"
        value = (values or {}).get(field.name, field.default)
        hint = hints[field.name]
        if only is not None and field.name not in only:
            continue
        if dataclasses.is_dataclass(hint):
            add_flags(parser, hint, place, value if isinstance(value, dict) else None, group)
        elif field.metadata["flag"]:
            heading = field.metadata["group"] or group
            add_flag(headed(parser, heading), field, place, hint, value)


def headed(parser, heading):
    """The argument group of a heading, made when it is first asked for."""
    if heading is None:
        return parser
    for group in parser._action_groups:
        if group.title == heading:
            return group
    return parser.add_argument_group(heading)


def add_flag(parser, field, place, hint, value):
    """One flag; see `add_flags`."""
    flag = field.metadata["flag"]
    flag = f"--{field.name.replace('_', '-') if flag is True else flag}"
    if isinstance(hint, types.UnionType):
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    options = {"dest": place, "default": argparse.SUPPRESS, "help": field.metadata["help"]}
    if value is not None and value is not MISSING and not callable(value):
        shown = " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        options["help"] += f" (default: {shown})"
    options["help"] = options["help"].replace("%", "%%")            # argparse fills in %(NAME)s
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif typing.get_origin(hint) is tuple:
        options.update(type=typing.get_args(hint)[0], nargs="*", metavar="VALUE")
    else:
        options.update(type=hint, choices=field.metadata["choices"])
        if not options["choices"]:
            options["metavar"] = {int: "N", float: "X"}.get(hint, "NAME")
    parser.add_argument(flag, **{key: option for key, option in options.items()
                                 if option is not None})


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
            raise ValueError(f"--set {text}: expected TABLE.NAME=VALUE, such as run.beta2=0.99")
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
