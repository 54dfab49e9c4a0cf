"""YAML that is made to run something, to grow without end or to mean two things is refused quickly, with its line."""

import os
import sys
import warnings

import pytest
from ruamel.yaml.error import YAMLError

from mantis_lite.data.mixture import sources_of
from mantis_lite.errors import DataError, RecipeError
from mantis_lite.recipe import SourceRecipe
from mantis_lite.recipe_file import load_recipe, make_recipe
from mantis_lite.yaml_text import MAX_BYTES, load_yaml

RAN = []
"""Stays empty: what an attack would call."""


def run(*_):
    RAN.append("run")


def laughs(item: str, first: str) -> str:
    """Each name nine of the one before: 9^9 values from a few lines."""
    lines = [f"a0: &a0 {first}"]
    lines += [f"a{at}: &a{at} {item.format(','.join([f'*a{at - 1}'] * 9))}" for at in range(1, 10)]
    return "\n".join(lines)


ATTACKS = {
    "os.system": ("x: !!python/object/apply:os.system ['exit 1']", "line 1: the tag .*os.system is not read here"),
    "object": ("x: !!python/object:test_hostile_yaml.run {}", "line 1: the tag"),
    "new": ("x: !!python/object/new:test_hostile_yaml.run [1]", "line 1: the tag"),
    "name": ("x: !!python/name:test_hostile_yaml.run", "line 1: the tag"),
    "name with a space": ("x: !!python/name:test_hostile_yaml.run ''", "line 1: the tag"),
    "module": ("x: !!python/module:os", "line 1: the tag"),
    "apply of ours": ("- !!python/object/apply:test_hostile_yaml.run []", "line 1: the tag"),
    "as a key": ("? !!python/object/apply:test_hostile_yaml.run []\n: 1", "line 1: the tag"),
    "whole tag": ("x: !<tag:yaml.org,2002:python/object/apply:test_hostile_yaml.run> []", "line 1: the tag"),
    "tag by another name": (
        "%TAG ! tag:yaml.org,2002:python/\n---\nx: !object/apply:test_hostile_yaml.run []",
        "line 3: the tag",
    ),
    "local tag": ("model: a\nx: !include /etc/passwd", "line 2: the tag !include is not read here"),
    "binary": ("x: !!binary aGk=", "line 1: the tag"),
    "set": ("x: !!set {a}", "line 1: the tag"),
    "tag alone": ("x: ! y", "line 1: the tag"),
    "billion laughs": (laughs("[{}]", "[lol,lol,lol]"), "more than 10,000 values"),
    "laughs in mappings": (laughs("{{x: [{}]}}", "{x: 1}"), "more than 10,000 values"),
    "laughs in merges": (laughs("{{<<: [{}]}}", "{x: 1}"), "more than 10,000 values"),
    "laughs in text": ("a: &a " + "y" * 200_000 + "\nb: [" + "*a," * 900 + "]", "more than 10,000 values"),
    "itself": ("a: &a [*a]", r"line 1: \*a stands within itself"),
    "itself, merged": ("a: &a\n  b: 1\n  <<: *a", r"line 3: \*a stands within itself"),
    "a name twice": ("a: &a 1\nb: &a 2\nc: *a", "line 2: the name &a is given twice"),
    "no such name": ("a: *b", "line 1: found undefined alias 'b'"),
    "deep lists": ("[" * 3000, "more than 50 lists or mappings within each other"),
    "deep mappings": ("{a: " * 3000, "more than 50 lists"),
    "deep blocks": ("- " * 3000 + "x", "more than 50 lists"),
    "deep lines": ("\n".join(" " * at + "a:" for at in range(400)), "line 50: more than 50 lists"),
    "many values": ("- 1\n" * 20_000, "line 10001: more than 10,000 values"),
    "many documents": ("---\n" * 20_000, "more than 10,000 values"),
    "two documents": ("model: a\n---\nmodel: b", "line 2: but found another document"),
    "a key twice": ("model: a\ndata: b\nmodel: c", 'line 3: found duplicate key "model"'),
    "a key twice, deep": ("train:\n  seed: 1\n  'seed': 2", 'line 3: found duplicate key "seed"'),
    "a long number": ("x: " + "9" * 9000, "4300"),
    "no date": ("x: 2001-02-30", "day is out of range"),
    "NUL": ("x: \0", "unacceptable character #x0000"),
    "a mapping as a key": ("? {a: 1}\n: b", "line 1: found unhashable key"),
    "another YAML": ("%YAML 9.1\n---\nx: 1", "line 1: found incompatible YAML document"),
    "too large": ("# " + "x" * MAX_BYTES, "more than 250,000 bytes"),
}
assert len(ATTACKS) >= 30


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "test_hostile_yaml", sys.modules[__name__])
    return tmp_path / "hostile.yaml"


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks(file, name):
    text, found = ATTACKS[name]
    file.write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RecipeError, match=rf"^{file}: not YAML: .*{found}"):
            load_recipe(str(file), ["data=x.json"])
        with pytest.raises(DataError, match=rf"^{file}: cannot be read: .*{found}.*\n  Give a data_config.yaml"):
            sources_of(SourceRecipe(path=str(file)), "chat")
    assert not RAN


@pytest.mark.parametrize("text", ["\xff", b"\xff\xfe\x00".decode("latin-1")])
def test_what_is_not_utf_8(file, text):
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match="not YAML: not UTF-8: byte 0xff at 1"):
        load_recipe(str(file), ["data=x.json"])
    with pytest.raises(DataError, match="cannot be read: not UTF-8: byte 0xff at 1"):
        sources_of(SourceRecipe(path=str(file)), "chat")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(RecipeError, match=r"pipe.yaml: no such file"):
        load_recipe(str(tmp_path / "pipe.yaml"))
    with pytest.raises(DataError, match=r"pipe.yaml: cannot be read: no such file"):
        sources_of(SourceRecipe(path=str(tmp_path / "pipe.yaml")), "chat")


@pytest.mark.parametrize("value", ["[" * 3000, "!!python/name:os.system", laughs("[{}]", "[x]").replace("\n", " ")])
def test_an_override_is_read_as_safely(value):
    """What is no YAML is text, as a path with YAML's own characters is."""
    made = make_recipe({"model": "a/b", "data": "x.json", "run_dir": "r"}, [f"prompt.system={value}"])
    assert made.prompt.system == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {x: 1}\nb: {<<: *a, y: 2}", {"a": {"x": 1}, "b": {"x": 1, "y": 2}}),
        ("- &word on\n- *word", ["on", "on"]),
        ("", None),
    ],
)
def test_names_are_read_within_the_limits(text, value):
    assert load_yaml(text) == value


def test_an_error_is_one_line():
    with pytest.raises(YAMLError) as caught:
        load_yaml("a: [1, 2\nb: 3")
    assert str(caught.value) == "line 2: expected ',' or ']', but got ':'"
