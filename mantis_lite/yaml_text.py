"""YAML text -> plain values; text that is made to run something, or to grow without end, is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, CollectionEndEvent, CollectionStartEvent, Event, ScalarEvent

from .errors import one_line

MAX_BYTES = 250_000
"""Of a file: a long recipe has 5,000, and a list of 500 sources 100,000; the slowest to read takes seconds."""
MAX_VALUES = 10_000
"""Keys, values, lists and 1,000 characters of text, each alias (*name) counted with all that it stands for."""
MAX_DEPTH = 50
"""Lists or mappings within each other."""


def read_text(file: Path) -> str:
    """The text of a YAML file. Raises OSError, and YAMLError in one line."""
    if not file.is_file():  # a pipe has no end
        raise FileNotFoundError("no such file")
    with file.open("rb") as opened:
        text = opened.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise YAMLError(f"more than {MAX_BYTES:,} bytes")
    try:
        return text.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise YAMLError(f"not UTF-8: byte {text[error.start]:#04x} at {error.start + 1}") from None


def dump_yaml(settings: Any) -> str:
    """Plain values as YAML that `load_yaml` reads back, in their order."""
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    text = io.StringIO()
    yaml.dump(settings, text)
    return text.getvalue()


def load_yaml(text: str) -> Any:
    """What YAML 1.2 says: `off` and `no` are strings, `1e-4` is a number. Raises YAMLError in one line.

    Refused are tags (!!python/..., !name), keys that come twice, several documents, and what goes beyond the limits.
    """
    try:
        _refuse_overgrown(text)
        return YAML(typ="safe", pure=True).load(text)
    except MarkedYAMLError as error:
        mark, problem = error.problem_mark, str(error.problem).partition(" with value ")[0]  # it may be a password
        raise YAMLError(f"line {mark.line + 1}: {problem}" if mark else one_line(error)) from None
    except (YAMLError, ValueError) as error:  # the latter for a date or number that cannot be
        raise YAMLError(one_line(error)) from None


def _refuse_overgrown(text: str) -> None:
    """Raise YAMLError for a tag, or beyond the limits; reads the text's events, which nests and expands nothing."""
    counts, sizes = [0], dict[str, int]()  # values in each list or mapping that is open; of each that has a name
    names: list[str | None] = []
    for event in YAML(typ="safe", pure=True).parse(text):
        if isinstance(event, CollectionStartEvent | ScalarEvent):
            _refuse_tag(event)
            if event.anchor in {*names, *sizes} - {None}:
                raise _at(event, f"the name &{event.anchor} is given twice")
        if isinstance(event, CollectionStartEvent):
            counts.append(0)
            names.append(event.anchor)
        elif isinstance(event, CollectionEndEvent | ScalarEvent | AliasEvent):
            size, name = _size(event, counts, names, sizes)
            counts[-1] += size
            if name is not None:
                sizes[name] = size
        if len(counts) > MAX_DEPTH:
            raise _at(event, f"more than {MAX_DEPTH} lists or mappings within each other")
        if sum(counts) > MAX_VALUES:
            raise _at(event, f"more than {MAX_VALUES:,} values, each alias counted with all that it stands for")


def _size(event: Any, counts: list[int], names: list[str | None], sizes: dict[str, int]) -> tuple[int, str | None]:
    """What has come to its end: how much it is, and its name where it has one. A list's or mapping's is taken off."""
    if isinstance(event, CollectionEndEvent):
        return counts.pop() + 1, names.pop()
    if isinstance(event, ScalarEvent):
        return 1 + len(event.value) // 1000, event.anchor
    if event.anchor in names:
        raise _at(event, f"*{event.anchor} stands within itself")
    return sizes.get(event.anchor, 1), None


def _refuse_tag(event: Any) -> None:
    if event.tag is not None:
        raise _at(event, f"the tag {event.tag} is not read here: write the value alone")


def _at(event: Event, found: str) -> YAMLError:
    return YAMLError(f"line {event.start_mark.line + 1}: {found}")
