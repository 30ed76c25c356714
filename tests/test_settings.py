"""Settings: what is read, what is refused in one line, flags, recipes."""
import argparse
import json
from dataclasses import dataclass

import pytest

from machinery.settings import (MISSING, add_flags, add_set_flag, as_mapping, differences,
                                given, merge, read, read_recipe, setting)


@dataclass
class Engine:
    power: int = setting(100, "in kW", least=1, most=500)
    fuel: str = setting("petrol", "what it burns", choices=("petrol", "diesel"), flag="burns")
    serial: int = setting(0, "on the block", flag=False)


@dataclass
class Car:
    name: str = setting(MISSING, "of the model")
    engine: Engine = setting(Engine, "what drives it")
    mass: float = setting(900.0, "in kg", above=0)
    doors: int | None = setting(None, "how many", least=0)
    gears: tuple[float, ...] = setting((3.5, 2.0), "ratios", above=0)
    open: bool = setting(False, "has no roof")
    extras: dict = setting(dict, "by name", flag=False)
    seller: str | None = setting(None, "who sold it", changes_result=False)

    def check(self):
        if self.open and self.doors == 0:
            raise ValueError("no doors and no roof")


def error_of(mapping, cls=Car):
    """The one line with which a mapping is refused."""
    with pytest.raises(ValueError) as refused:
        read(cls, mapping, "car.toml")
    message = str(refused.value)
    assert message.startswith("car.toml") and len(message.splitlines()) == 1
    return message


def test_a_mapping_becomes_settings():
    """What a mapping says is in the settings, nested tables too, whole numbers as floats where a
    float is meant; the rest is at its default, and no two settings share a list or table."""
    car = read(Car, {"name": "T", "engine": {"power": 15}, "mass": 540, "doors": None,
                     "gears": [2, 1.5], "extras": {"radio": [1]}}, "car.toml")
    assert car == Car("T", Engine(15), 540.0, None, (2.0, 1.5), False, {"radio": [1]})
    assert type(car.mass) is float and type(car.gears[0]) is float
    other = read(Car, {"name": "A"}, "car.toml")
    assert other == Car("A") and other.engine is not Car("A").engine


@pytest.mark.parametrize("change, message", [
    ({"wheels": 4}, "car.toml: there is no setting 'wheels'; expected one of name, engine, mass, "
                    "doors, gears, open, extras, seller"),
    ({"name": 3}, "car.toml: name is 3; expected a text"),
    ({"mass": "heavy"}, "car.toml: mass is 'heavy'; expected a number"),
    ({"mass": 0}, "car.toml: mass is 0.0; expected more than 0"),
    ({"doors": 2.5}, "car.toml: doors is 2.5; expected a whole number"),
    ({"doors": -1}, "car.toml: doors is -1; expected at least 0"),
    ({"doors": True}, "car.toml: doors is True; expected a whole number"),
    ({"open": 1}, "car.toml: open is 1; expected true or false"),
    ({"gears": 2.0}, "car.toml: gears is 2.0; expected a list"),
    ({"gears": [2.0, 0]}, "car.toml: gears is 0.0; expected more than 0"),
    ({"mass": 10 ** 19}, "car.toml: mass is 10000000000000000000; expected a smaller number"),
    ({"extras": []}, "car.toml: extras is []; expected names with values"),
    ({"extras": {"radio": [[1]]}}, "car.toml: extras: 'radio' is [1]; expected a number, a text, "
                                   "true, false or a list of these"),
    ({"engine": 100}, "car.toml: engine: expected settings by name, found 100"),
    ({"engine": {"power": 501}}, "car.toml: engine: power is 501; expected at least 1 and at most "
                                 "500"),
    ({"engine": {"fuel": "coal"}}, "car.toml: engine: fuel is 'coal'; expected one of petrol, "
                                   "diesel"),
    ({"open": True, "doors": 0}, "car.toml: no doors and no roof")])
def test_each_mistake_has_its_line(change, message):
    """An unknown name, a wrong type, a number out of bounds, an unknown choice and values that do
    not go together are refused with the file, the field, what was found and what is expected."""
    assert error_of({"name": "T", **change}) == message


def test_a_setting_without_default_has_to_be_there():
    """A missing setting without default is named with its meaning."""
    assert error_of({}) == ("car.toml: the setting name is missing; it has no default (of the "
                            "model)")


NESTED = json.loads("[" * 900 + "]" * 900)
HOSTILE = [None, [], [None], ["x"], {}, {"x": 1}, "x", True, 1.5, float("inf"), float("nan"),
           10 ** 400, -10 ** 400, 2 ** 63, NESTED, {"x": NESTED}, "\n" * 1000]


@pytest.mark.parametrize("name", [*Car.__dataclass_fields__, "engine.power", "engine.fuel", "x"])
@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
def test_no_value_breaks_the_reader(name, value):
    """Whatever JSON holds gives settings of the right types, or a ValueError of one short line."""
    table, _, inner = name.partition(".")
    mapping = {"name": "T", table: {inner: value} if inner else value}
    try:
        car = read(Car, mapping, "car.toml")
    except ValueError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 200
    else:
        assert read(Car, json.loads(json.dumps(as_mapping(car))), "again") == car


def test_settings_are_a_table():
    """What is no table holds no settings."""
    for mapping in HOSTILE:
        if not isinstance(mapping, dict):
            assert "expected settings by name, found" in error_of(mapping)


# --------------------------------------------------------------------------------------------------
# Flags

def command_line(words, values=None, without=()):
    """What `given` makes of a command line with the flags of Car."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_flags(parser.add_argument_group("the car"), Car, "car", values, without)
    add_set_flag(parser, "car.engine.serial=7")
    return given(parser.parse_args(words.split()))


def test_flags_give_what_was_said_and_nothing_else():
    """Each field with a flag, nested ones too, is set by it; what was not said leaves no trace."""
    assert command_line("") == {}
    assert command_line("--name T --power 15 --burns diesel --mass 1e3 --gears 2 1 --open") == {
        "car": {"name": "T", "engine": {"power": 15, "fuel": "diesel"}, "mass": 1000.0,
                "gears": [2.0, 1.0], "open": True}}
    assert command_line("--no-open --gears") == {"car": {"open": False, "gears": []}}


@pytest.mark.parametrize("words", ["--serial 7", "--extras x", "--fuel diesel", "--burns coal",
                                   "--power x"])
def test_flags_that_are_not_there_are_refused(words):
    """A field without flag, or with a flag of another name, has none; argparse refuses unknown
    choices and what is no number."""
    with pytest.raises(SystemExit):
        command_line(words)


@pytest.mark.parametrize("text, value", [
    ("car.engine.serial=7", {"engine": {"serial": 7}}), ("car.gears=[2,1]", {"gears": [2, 1]}),
    ("car.extras.radio=fm", {"extras": {"radio": "fm"}}), ("car.open=true", {"open": True}),
    ('car.name="1"', {"name": "1"}), ("car.name=a=b", {"name": "a=b"}),
    ("car.name=", {"name": ""})])
def test_any_setting_can_be_set_by_its_name(text, value):
    """--set TABLE.NAME=VALUE reaches settings without flag; the value is TOML's, or a plain word.
    It comes after the flags and leaves theirs in place."""
    assert command_line(f"--mass 5 --set {text}") == {"car": {"mass": 5.0, **value}}


@pytest.mark.parametrize("text", ["mass=5", "car.mass"])
def test_a_setting_is_set_by_table_name_and_value(text):
    """--set without a table, a name or a value is refused in one line."""
    with pytest.raises(ValueError, match="expected TABLE.NAME=VALUE; see the example in --help"):
        command_line(f"--set {text}")


def test_help_shows_what_holds_without_the_flag(capsys):
    """--help lists each flag once, under its heading, with its meaning, choices and the value that
    holds without it: of the recipe, or the default."""
    with pytest.raises(SystemExit):
        command_line("--help", {"mass": 650.0, "engine": {"power": 60}, "name": "100%"})
    text = " ".join(capsys.readouterr().out.split())
    for line in ("the car:", "--name NAME of the model (default: 100%)",
                 "--power N in kW (default: 60)", "--mass X in kg (default: 650.0)",
                 "--burns {petrol,diesel} what it burns (default: petrol)", "--doors N how many",
                 "ratios (default: 3.5 2.0)", "--open, --no-open"):
        assert line in text
        assert text.count(line) == 1
    assert "serial" not in text.replace("car.engine.serial=7", "")


def test_a_flag_can_be_left_out():
    """`without` names fields that get no flag."""
    assert command_line("--mass 5", without=["name"]) == {"car": {"mass": 5.0}}
    with pytest.raises(SystemExit):
        command_line("--name T", without=["name"])


# --------------------------------------------------------------------------------------------------
# Mappings

def test_later_mappings_win():
    """Merged tables keep what the later one does not say, at any depth; nothing given changes."""
    first = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    second = {"b": {"d": {"f": 4}, "c": 5}, "g": {"h": 6}}
    assert merge(first, second) == {"a": 1, "b": {"c": 5, "d": {"e": 3, "f": 4}}, "g": {"h": 6}}
    assert merge(first, {"b": 7}, {"b": {"c": 8}}) == {"a": 1, "b": {"c": 8}}
    assert first == {"a": 1, "b": {"c": 2, "d": {"e": 3}}} and second["g"] == {"h": 6}


def test_differences_that_change_a_result_are_named():
    """Two runs' settings differ where a result would: by the name of the flag, nested ones too, but
    not by what changes no result, nor by JSON's lists for tuples."""
    now = as_mapping(Car("T", Engine(15, "diesel"), seller="me"))
    then = json.loads(json.dumps(as_mapping(Car("T", Engine(20), seller="you", open=True))))
    assert differences(Car, then, now) == ["power was 20, is 15",
                                           "burns was 'petrol', is 'diesel'",
                                           "open was True, is False"]
    assert differences(Car, json.loads(json.dumps(now)), now) == []
    assert differences(Car, {**then, "engine": 3}, now)[0] == "power was None, is 15"


# --------------------------------------------------------------------------------------------------
# Recipes

def test_a_recipe_may_lie_anywhere(tmp_path):
    """A recipe is found by its name, or as a file."""
    path = tmp_path / "mine.toml"
    path.write_text('method = "simzss"\n[run]\nbatch = 8\n')
    assert read_recipe(str(path)) == {"method": "simzss", "run": {"batch": 8}}
    with pytest.raises(FileNotFoundError, match="no recipe 'paella'; expected .*simzss.*toy, or a "
                                                r"\.toml file"):
        read_recipe("paella")


@pytest.mark.parametrize("content, words", [
    (b"method = ", "is no recipe in TOML"), (b"\xff", "is no recipe in TOML"),
    (b"x = " + b"[" * 100_000, "is no recipe in TOML"),
    (b"[run]", 'expected a line method = "NAME"'),
    (b"method = 3", 'expected a line method = "NAME"'),
    (b'method = "simzss"\nrun = 3', r"run is 3; expected a table \[run\]")])
def test_what_is_no_recipe_is_refused(tmp_path, content, words):
    """A file that is no TOML, nested beyond all bounds, without a method, or with a value in place
    of a table is refused in one line that names it."""
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{words}") as refused:
        read_recipe(path)
    assert len(str(refused.value).splitlines()) == 1
