"""A request of OpenAI's chat API -> what is asked of the model, and how it is to answer."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .data import media
from .data.columns import kind_of, short
from .data.encode import Encoder
from .data.paths import MediaFolder
from .data.sample import Sample
from .data.schema import parse
from .errors import MantisError, RecipeError
from .generate import checked

HARMLESS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier", "parallel_tool_calls")
"""Fields that are taken, and say nothing of the answer."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
}
"""Fields that nothing is done about, and what they may therefore say, besides null."""

EMPTY: tuple[Any, ...] = (None, [], {}, "")
"""What the other fields of a message may hold: clients send back an answer with all of its fields."""

ROLES = ("system", "user", "assistant")
PICTURE = re.compile(r"data:image/(jpeg|jpg|png|webp|gif|bmp|tiff);base64,")
CLIP = re.compile(r"data:video/([a-z0-9.-]{1,20});base64,")
WHERE = "messages"


class Refusal(MantisError):
    """A request that is not answered; `status` is HTTP's, `code` is what OpenAI's clients know it by."""

    def __init__(self, message: str, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait while another is answered."""

    body: int = 32 << 20
    """Bytes of a request, its pictures in base64."""
    pictures: int = 16
    """Pictures and clips of a request."""
    pixels: int = 200_000_000
    """Of a request's pictures together: a small file can be a large picture."""
    tokens: int = 1024
    """Of an answer."""
    waiting: int = 8
    seconds: float = 60.0
    """Within which a request has to be here whole."""


Stop = Annotated[str, Field(min_length=1, max_length=1000)]


class Fields(BaseModel):
    """The fields that the answer goes by. Without a temperature it is the same each time."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    model: str
    messages: list[Any] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    # What these may be is `checked`, as MantisChat's own.
    temperature: Any = None
    top_p: Any = None
    seed: Any = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    stream: bool | None = None
    stream_options: dict[str, bool | None] | None = None


@dataclass(frozen=True)
class Asked:
    """What a request asks: the sample to answer, and how. The files of its clips go with `folder`."""

    sample: Sample
    max_tokens: int
    sampling: dict[str, Any]
    stops: tuple[str, ...]
    stream: bool
    usage: bool
    """Whether a stream ends in a count of tokens."""
    folder: TemporaryDirectory[str] | None = None

    def close(self) -> None:
        if self.folder:
            self.folder.cleanup()


def read_request(body: Any, name: str, limits: Limits, encoder: Encoder) -> Asked:
    """Check a request's JSON, and write its files. Raises Refusal, SampleError."""
    fields = _fields(body)
    if fields.model != name:
        raise Refusal(f"model: {short(fields.model)} is not served here\n  Ask {name}.", 404, "model_not_found")
    most = fields.max_completion_tokens or fields.max_tokens or min(512, limits.tokens)
    if most > limits.tokens:
        raise Refusal(f"max_tokens: {most:,}, and an answer may have {limits.tokens:,}\n  Ask for a shorter one.")
    try:
        sampling = checked({"temperature": fields.temperature, "top_p": fields.top_p, "seed": fields.seed})
    except RecipeError as error:
        raise Refusal(str(error)) from None
    turns = [_turn(message, at) for at, message in enumerate(fields.messages, 1)]
    _refuse_many(turns, limits)
    clips = [part for part in _parts(turns) if part["type"] == "video_url"]
    folder = TemporaryDirectory(prefix="mantis-lite-") if clips else None
    try:
        sample = _sample(turns, clips, Path(folder.name) if folder else None)
        _refuse_large(encoder.frames.lay_out(sample), limits)
    except MantisError:
        if folder:
            folder.cleanup()
        raise
    return Asked(
        sample=sample,
        max_tokens=most,
        sampling=sampling,
        stops=(fields.stop,) if isinstance(fields.stop, str) else tuple(fields.stop or ()),
        stream=bool(fields.stream),
        usage=bool((fields.stream_options or {}).get("include_usage")),
        folder=folder,
    )


def _fields(body: Any) -> Fields:
    """The fields that count; raises Refusal for those that would count elsewhere and do not here."""
    if not isinstance(body, dict):
        raise Refusal(f'the request is {kind_of(body)}\n  Send an object: {{"model": ..., "messages": [...]}}.')
    for key, value in body.items():
        if key in NEUTRAL and value is not None and value not in NEUTRAL[key]:
            remedy = f"Leave it out, or give {' or '.join(repr(allowed) for allowed in NEUTRAL[key])}."
            raise Refusal(f"{key}: {short(value)} is not supported\n  {remedy}", code="unsupported_parameter")
    try:
        return Fields.model_validate({key: v for key, v in body.items() if key not in NEUTRAL and key not in HARMLESS})
    except ValidationError as error:
        first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        message = f"{short(where)}: no field that is known here\n  Leave it out."
        raise Refusal(message, code="unknown_parameter") from None
    raise Refusal(f"{where}: {first['msg'].lower()}\n  Mend it, or leave it out.")


def _turn(message: Any, at: int) -> dict[str, Any]:
    """A message as a row's turn, all of whose text stays text."""
    place = f"{WHERE}: turn {at}"
    if not isinstance(message, dict):
        raise Refusal(f'{place} is {kind_of(message)}\n  Give {{"role": "user", "content": "..."}}.')
    for key, value in message.items():
        if key not in ("role", "content") and value not in EMPTY:
            raise Refusal(f"{place} has {short(key)}, which is not supported\n  Give only its role and content.")
    if message.get("role") not in ROLES:
        found = short(message.get("role"))
        raise Refusal(f"{place} has the role {found}\n  The roles are {', '.join(ROLES)}.")
    content = message.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if isinstance(parts, list):
        parts = [_part(part, f"{WHERE}: part {number} of turn {at}") for number, part in enumerate(parts, 1)]
    return {"role": message["role"], "content": parts}


def _part(part: Any, place: str) -> dict[str, Any]:
    """A part of a message, whose picture or clip is in it. Raises Refusal for what lies elsewhere."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        return {"type": "text", "text": part.get("text")}
    if kind not in ("image_url", "video_url"):
        found = short(kind) if isinstance(part, dict) else kind_of(part)
        raise Refusal(f"{place} has the type {found}\n  The types are text, image_url and video_url.")
    given = part.get(kind)
    link = given.get("url") if isinstance(given, dict) else given
    if isinstance(given, dict) and given.get("detail") not in (None, "auto", "high"):
        raise Refusal(f"{place} has the detail {short(given['detail'])}\n  Scale the picture yourself.")
    known, example = (PICTURE, "data:image/png") if kind == "image_url" else (CLIP, "data:video/mp4")
    if not isinstance(link, str) or not known.match(link):
        # Nothing is fetched, and no file is opened, for whoever can send a request.
        found = f"{place} is no data: URL of a known format: {short(link)}"
        raise Refusal(f"{found}\n  Send the file itself, as {example};base64,...; links are not fetched.")
    return {"type": kind, kind: {"url": link}}


def _refuse_many(turns: list[dict[str, Any]], limits: Limits) -> None:
    found = sum(1 for part in _parts(turns) if part["type"] != "text")
    if found > limits.pictures:
        raise Refusal(f"{WHERE}: {found} pictures and clips, and {limits.pictures} are taken\n  Send fewer.")


def _refuse_large(sample: Sample, limits: Limits) -> None:
    """Raise Refusal for pictures that have too many pixels to be opened together; SampleError for a broken one."""
    sizes = [media.size(image, sample) for image in sample.images]
    found = sum(width * height for width, height in sizes)
    if found > limits.pixels:
        message = f"{WHERE}: pictures of {found:,} pixels together, and {limits.pixels:,} are taken"
        raise Refusal(f"{message}\n  Scale them down.", 413)


def _sample(turns: list[dict[str, Any]], clips: list[dict[str, Any]], folder: Path | None) -> Sample:
    """What the turns say, by the checks that rows of data go through; their clips become files of the folder."""
    spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
    if spoken[:1] != ["user"] or turns[-1]["role"] != "user":
        found = "the last turn is not the user's, or the first is the assistant's"
        raise Refusal(f"{WHERE}: {found}\n  Begin and end with a turn of the user's.")
    for at, part in enumerate(clips, 1):
        assert folder is not None
        file = folder / f"clip-{at}"
        file.write_bytes(_content(part["video_url"]["url"], f"clip {at}"))
        part["video_url"] = {"url": file.name}
    row = {"messages": [*turns, {"role": "assistant", "content": "."}]}  # rows end in an answer
    sample = parse(row, WHERE, MediaFolder(folder), "video" if clips else "chat")
    return replace(sample, turns=sample.turns[:-1])


def _parts(turns: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for turn in turns:
        if isinstance(turn["content"], list):
            yield from (part for part in turn["content"] if isinstance(part, dict))


def _content(link: str, place: str) -> bytes:
    try:
        return base64.b64decode(link.partition(",")[2], validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(f"{WHERE}: {place} is not base64 ({error})\n  Encode it again.") from None
