"""One row of any accepted spelling -> one Sample. All checks of a row's shape happen here, once."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ..errors import SampleError

Role = Literal["system", "user", "assistant"]

MARK = "<image>"
TURNS = ("conversation", "conversations", "messages")
ROLES: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
ALTERNATE = ("user", "assistant")
A_TURN = '{"role": "user", "content": "..."}'
PAIRING = "Marks and images pair up in order."


@dataclass(frozen=True, slots=True)
class Image:
    """A picture, not yet opened: a file's path, or the bytes of a file."""

    source: Path | bytes


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker says: text and pictures, in the order the model reads them."""

    role: Role
    content: tuple[str | Image, ...]


@dataclass(frozen=True, slots=True)
class Sample:
    """One training example; `where` is "train.jsonl:12"; `notices` says what was dropped from the row."""

    where: str
    id: str | None
    turns: tuple[Turn, ...]
    notices: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        return tuple(part for turn in self.turns for part in turn.content if isinstance(part, Image))


def parse(row: Mapping[str, Any], where: str, root: Path) -> Sample:
    """Read one row; paths in it are relative to `root`. Raises SampleError.

    "<image>" in a turn's text is a mark, unless the turn is a list of typed parts or the row has no picture: there it
    stays text.
    """
    try:
        if not isinstance(row, Mapping):
            raise _Fault(f"the row is {_kind(row)}", 'Give {"images": [...], "messages": [...]}.')
        turns, notices = _turns(row, root)
        images, ignored = _column(row, root)
        literal = () if images else _marks_as_text(row, turns)
        read = _pair(turns, images)
        _refuse_half_characters(read)
    except _Fault as fault:
        raise SampleError(where, fault.found, fault.remedy, _id(row)) from None
    return Sample(where, _id(row), read, notices + ignored + literal)


def _refuse_half_characters(turns: tuple[Turn, ...]) -> None:
    """JSON may write half of an emoji, which no tokenizer takes."""
    for turn in turns:
        for part in turn.content:
            if isinstance(part, str) and not part.isascii():
                try:
                    part.encode()
                except UnicodeEncodeError as error:
                    found = f"a turn of the {turn.role} has half a character, {part[error.start]!a}"
                    raise _Fault(found, "Write its other half behind it, or take it out.") from None


class _Fault(Exception):
    """What is wrong inside a row and what to do; `parse` adds which row."""

    def __init__(self, found: str, remedy: str) -> None:
        self.found, self.remedy = found, remedy


# While a row is read, None in a turn's parts is a mark: a place for the next picture of the row.
_Parts = list[str | Image | None]
_Turns = list[tuple[Role, _Parts]]


def _id(row: Any) -> str | None:
    found = row.get("id") if isinstance(row, Mapping) else None
    return None if found is None else str(found)


def _turns(row: Mapping[str, Any], root: Path) -> tuple[_Turns, tuple[str, ...]]:
    """The turns of the row, checked to alternate from the user's; and what was dropped."""
    turns = [_turn(turn, number, root) for number, turn in enumerate(_listed(row), 1)]
    start = 1 if turns[0][0] == "system" else 0
    dropped = 0
    if turns[start:] and turns[start][0] == "assistant":
        del turns[start]  # as upstream, which drops one turn and no more
        dropped = 1
    for at, (role, _) in enumerate(turns[start:]):
        if role != ALTERNATE[at % 2]:
            number = at + 1 + start + dropped
            if role == "system":
                raise _Fault(f"turn {number} is the system's", "Only the first turn may be.")
            found = f"turns {number - 1} and {number} are both the {role}'s"
            raise _Fault(found, "Join them, or add the turn between them: user and assistant take turns.")
    if len(turns) < start + 2:
        raise _Fault("no assistant turn after a user turn", "Add the assistant's answer.")
    return turns, ("first turn was the assistant's and was dropped",) if dropped else ()


def _listed(row: Mapping[str, Any]) -> Sequence[Any]:
    key = next((key for key in TURNS if row.get(key) is not None), None)
    _refuse_other_tasks(row, chat=key is not None)
    if key is None:
        keys = ", ".join(str(key) for key in row) or "none"
        raise _Fault(
            'none of "conversation", "conversations" and "messages" has the turns',
            f"Add one of them; the row's keys are: {keys}.",
        )
    turns = row[key]
    if not isinstance(turns, list | tuple):
        raise _Fault(f'"{key}" is {_kind(turns)}', f"Give a list of turns like {A_TURN}.")
    if not turns:
        raise _Fault(f'"{key}" is empty', "Give at least a user turn and an assistant turn.")
    return turns


def _refuse_other_tasks(row: Mapping[str, Any], chat: bool) -> None:
    for key in ("video", "videos"):
        if row.get(key):
            raise _Fault(
                f'this is a video row: it has "{key}"',
                'task=chat needs pictures: give "images" and turns, or train on clips with task=video.',
            )
    if not chat and row.get("labels") is not None and row.get("prompt") is not None:
        raise _Fault(
            'this is a classification row: it has "labels" and "prompt"',
            'task=chat needs turns: give "messages", or train on labels with task=classify.',
        )


def _turn(turn: Any, number: int, root: Path) -> tuple[Role, _Parts]:
    if not isinstance(turn, dict):
        raise _Fault(f"turn {number} is {_kind(turn)}", f"Give an object like {A_TURN}.")
    speaker = turn.get("from")
    if speaker is None:
        speaker = turn.get("role")
    role = ROLES.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        found = "no role" if speaker is None else f"the unknown role {_short(speaker)}"
        remedy = "Use user or human, assistant or gpt; system for the first turn only."
        raise _Fault(f"turn {number} has {found}", remedy)
    for key in ("content", "text", "value"):
        content = turn.get(key)
        if content is not None:
            break
    if isinstance(content, str):
        return role, _split(content)
    if content is None:
        raise _Fault(f"turn {number} has no text", 'Give "content", "text" or "value"; "" is allowed.')
    if not isinstance(content, list | tuple):
        raise _Fault(f'"{key}" of turn {number} is {_kind(content)}', "Give a string or a list of parts.")
    parts = (_typed(part, f"part {at} of turn {number}", root) for at, part in enumerate(content, 1))
    return role, _merge(parts)


def _split(text: str) -> _Parts:
    if MARK not in text:
        return [text] if text else []
    parts: _Parts = []
    for piece in text.split(MARK):
        parts += [piece, None] if piece else [None]
    del parts[-1]  # one mark fewer than pieces
    return parts


def _merge(parts: Iterator[str | Image | None]) -> _Parts:
    """Join neighbouring strings and leave out empty ones."""
    merged: _Parts = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, str) and isinstance(last, str):
            merged[-1] = last + part
        elif part != "":
            merged.append(part)
    return merged


def _typed(part: Any, place: str, root: Path) -> str | Image | None:
    """One part of a turn as TRL and OpenAI write them; None where the row's next picture goes."""
    if isinstance(part, str):
        return part  # a literal "<image>" here stays text: the pictures have parts of their own
    if not isinstance(part, dict):
        raise _Fault(f"{place} is {_kind(part)}", 'Give {"type": "text", "text": "..."} and the like.')
    kind = part.get("type")
    if kind == "text":
        text = part.get("text")
        if not isinstance(text, str):
            raise _Fault(f'"text" of {place} is {_kind(text)}', "Give a string.")
        return text
    if kind == "image":
        found = next((part[key] for key in ("image", "path", "url") if part.get(key) is not None), None)
        return None if found is None else _image(found, place, root)
    if kind == "image_url":
        link = part.get("image_url")
        return _image(link.get("url") if isinstance(link, dict) else link, place, root)
    raise _Fault(f"{place} has the type {_short(kind)}", "task=chat reads text, image and image_url.")


def _column(row: Mapping[str, Any], root: Path) -> tuple[list[Image], tuple[str, ...]]:
    """The pictures of `image`, else of `images`; and what was ignored."""
    one, many = row.get("image"), row.get("images")
    key, found = ("image", one) if one else ("images", many)
    both = one and many and many not in (one, [one])
    ignored = ('"images" was ignored, as the row has "image" too',) if both else ()
    if found is None:
        return [], ()
    if isinstance(found, list | tuple):
        return [_image(item, f'"{key}"[{at}]', root) for at, item in enumerate(found)], ignored
    return [_image(found, f'"{key}"', root)], ignored


def _image(found: Any, place: str, root: Path) -> Image:
    if isinstance(found, dict):
        data, found = found.get("bytes"), found.get("path")
        if data is not None:  # beside bytes a path is only a name
            found = data
            if not isinstance(data, bytes):
                raise _Fault(f'"bytes" of {place} is {_kind(data)}', "Give bytes, or a path alone.")
    if isinstance(found, bytes):
        return Image(found)
    if not isinstance(found, str):
        raise _Fault(f"{place} is {_kind(found)}", 'Give a path, or {"path": ..., "bytes": ...}.')
    if found.startswith("data:"):
        return Image(_data_uri(found, place))
    if "://" in found:
        raise _Fault(f"{place} is a link ({_short(found)})", "Download the picture and give the file's path.")
    if not found:
        raise _Fault(f"{place} is an empty path", "Give the file's path, or take the picture out of the row.")
    return Image(root / found)


def _data_uri(uri: str, place: str) -> bytes:
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise _Fault(f"{place} is a data: URI without ;base64: {_short(uri)}", "Encode it as base64.")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _Fault(f"{place} is a data: URI that is not base64 ({error})", "Encode it again.") from None


def _marks_as_text(row: Mapping[str, Any], turns: _Turns) -> tuple[str, ...]:
    """In a row without pictures or typed parts "<image>" is what someone wrote; turns it back into text and says so."""
    if not any(None in parts for _, parts in turns):
        return ()
    if any(isinstance(value, list | tuple) for turn in _listed(row) for value in turn.values()):
        return ()
    for _, parts in turns:
        parts[:] = _merge(MARK if part is None else part for part in parts)
    return ('"<image>" was read as text, as the row has no picture',)


def _pair(turns: _Turns, images: list[Image]) -> tuple[Turn, ...]:
    """Put the row's pictures in the places of the marks, in reading order; missing marks go in front."""
    marks = sum([parts.count(None) for _, parts in turns])
    if marks > len(images):
        counts = f"{_count(len(images), 'image')} but {_count(marks, MARK + ' mark')} in the turns"
        raise _Fault(counts, f"Add the picture or remove the mark. {PAIRING}")
    missing = len(images) - marks
    if missing and any(isinstance(part, Image) for _, parts in turns for part in parts):
        # The turns hold pictures too: the column may list the same ones again, so do not guess.
        counts = f"{_count(len(images), 'image')} beside the turns but {_count(marks, 'mark')} for them"
        raise _Fault(counts, f'Add a {{"type": "image"}} part, or drop the image from the row. {PAIRING}')
    first = next(parts for role, parts in turns if role == "user")
    first[:0] = [None] * missing
    pictures = iter(images)
    for _, parts in turns:
        if None in parts:
            parts[:] = [next(pictures) if part is None else part for part in parts]
    return tuple([Turn(role, tuple(cast("list[str | Image]", parts))) for role, parts in turns])


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def _kind(value: object) -> str:
    """The JSON name of a value's type, as "a list"."""
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    names |= {bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
