"""The pictures and clips that a row names, in its columns or as parts of a turn."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .sample import Image, Video

if TYPE_CHECKING:
    from .paths import MediaFolder


class Fault(Exception):
    """What is wrong inside a row and what to do; `parse` adds which row."""

    def __init__(self, found: str, remedy: str) -> None:
        self.found, self.remedy = found, remedy


def pictures_of(row: Mapping[str, Any], root: MediaFolder) -> tuple[list[Image], tuple[str, ...]]:
    """The pictures of `image`, else of `images`; and what was ignored."""
    one, many = row.get("image"), row.get("images")
    key, found = ("image", one) if one else ("images", many)
    both = one and many and many not in (one, [one])
    ignored = ('"images" was ignored, as the row has "image" too',) if both else ()
    if found is None:
        return [], ()
    if isinstance(found, list | tuple):
        return [read_image(item, f'"{key}"[{at}]', root) for at, item in enumerate(found)], ignored
    return [read_image(found, f'"{key}"', root)], ignored


def clips_of(row: Mapping[str, Any], root: MediaFolder) -> list[Video]:
    """The clips of `video`, else of `videos`; "start" and "end" beside the only one are its own."""
    given = {key: row[key] for key in ("video", "videos") if row.get(key) not in (None, [], ())}
    if not given:
        return []
    key, found = next(iter(given.items()))
    if len(given) > 1 and given["videos"] not in (found, [found]):
        raise Fault('"video" and "videos" name other clips', "Keep one of them.")
    if not isinstance(found, list | tuple):
        return [read_clip(found, f'"{key}"', root, row)]
    if len(found) > 1 and any(row.get(key) is not None for key in ("start", "end")):
        raise Fault(f'"start" or "end" beside several clips of "{key}"', 'Write {"path": ..., "start": s} for each.')
    return [read_clip(item, f'"{key}"[{at}]', root, row) for at, item in enumerate(found)]


def read_image(found: Any, place: str, root: MediaFolder) -> Image:
    if isinstance(found, dict):
        data, found = found.get("bytes"), found.get("path")
        if data is not None:  # beside bytes a path is only a name
            found = data
            if not isinstance(data, bytes):
                raise Fault(f'"bytes" of {place} is {kind_of(data)}', "Give bytes, or a path alone.")
    if isinstance(found, bytes):
        return Image(found)
    if not isinstance(found, str):
        raise Fault(f"{place} is {kind_of(found)}", 'Give a path, or {"path": ..., "bytes": ...}.')
    return Image(_data_uri(found, place) if found.startswith("data:") else root.find(found, place, "picture"))


def read_clip(found: Any, place: str, root: MediaFolder, beside: Mapping[str, Any] | None = None) -> Video:
    """A clip: a path, a list of its frames, or either as "path" or "video"; with "start" and "end" in s or `beside`."""
    part = dict(beside or {})
    if isinstance(found, dict):
        part |= {key: found[key] for key in ("start", "end") if found.get(key) is not None}
        if found.get("bytes") is not None:
            raise Fault(f"{place} is given as bytes", "Write them to a file, and give its path.")
        found = found["video"] if found.get("path") is None and "video" in found else found.get("path")
    start, end = (_seconds(part.get(key), f'"{key}" of {place}') for key in ("start", "end"))
    if end is not None and end <= (start or 0):
        raise Fault(f"{place} ends at {end:g} s, no later than it starts", 'Mend "start" and "end".')
    if isinstance(found, list | tuple) and found:
        if start is not None or end is not None:
            raise Fault(f"{place} has a start or end, and frames have no times", "Give the frames that are meant.")
        return Video(tuple(read_image(item, f"frame {at} of {place}", root) for at, item in enumerate(found, 1)))
    if not isinstance(found, str):
        raise Fault(f"{place} is {kind_of(found)}", 'Give a path, a list of frames, or {"path": ..., "start": s}.')
    clip = root.find(found, place, "clip")
    assert isinstance(clip, Path)  # within a .zip there are pictures alone
    return Video(clip, start, end)


def _seconds(found: Any, place: str) -> float | None:
    if found is None:
        return None
    if isinstance(found, bool) or not isinstance(found, int | float) or not isfinite(found) or found < 0:
        raise Fault(f"{place} is {short(found)}", "Give seconds from the clip's beginning, 0 or more.")
    return float(found)


def _data_uri(uri: str, place: str) -> bytes:
    head, _, body = uri.partition(",")
    if not head.endswith(";base64"):
        raise Fault(f"{place} is a data: URI without ;base64: {short(uri)}", "Encode it as base64.")
    return _decoded(body, f"{place} is a data: URI, which")


def read_base64(found: Any, place: str) -> bytes:
    """The bytes of a picture that is written as base64, in lines or in one, or as a data: URI of it."""
    if not isinstance(found, str):
        raise Fault(f"{place} is {kind_of(found)}", "Give the picture's bytes as base64.")
    return _data_uri(found, place) if found.startswith("data:") else _decoded("".join(found.split()), place)


def _decoded(text: str, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Fault(f"{place} is not base64 ({error})", "Encode it again.") from None


def short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text):,} characters)"


def kind_of(value: object) -> str:
    """The JSON name of a value's type, as "a list"."""
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    names |= {bool: "true or false", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")
