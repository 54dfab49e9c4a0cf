"""A conversation with a trained model: pictures and clips in any turn, answers at once or as they come."""

from __future__ import annotations

import copy
import json
import queue
import re
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .data.columns import Fault
from .data.encode import Encoder
from .data.paths import MediaFolder
from .data.sample import Image, Sample, Turn, Video
from .data.schema import parse, user_turn
from .data.zipped import Zipped
from .errors import RecipeError, SampleError
from .files import write_whole
from .generate import GREEDY, answers, checked, generate, refuse_long, text_of
from .trained import Trained, open_trained

FRAMES = 8
"""Of a clip, where the model was trained on pictures alone and nothing says how many it saw."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token that is a byte of a character: what it comes to, the tokens behind it tell."""

Picture = str | Path | bytes
"""A file's path, or the bytes of one."""


class MantisChat:
    """Chat with a run, an adapter, a merged model or a base.

    >>> chat = MantisChat("tiny")
    >>> first = chat("What is in the image?", images=["red.png"])    # doctest: +SKIP
    >>> for piece in chat.stream("And in this?", images=["blue.png"]): ...    # doctest: +SKIP

    It writes prompts in the template that was trained with, by the contract beside it; `template="hub"` is that of the
    base's own page. `bits` are those of the frozen weights, 4 or 16, else as trained; `system` is said first, in place
    of the template's own words. Raises RecipeError.
    """

    def __init__(
        self,
        source: str | Path,
        bits: int | None = None,
        template: str | None = None,
        system: str | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        overrides = [*overrides, *([f"prompt.template={template}"] if template else [])]
        self.trained: Trained = open_trained(source, overrides, bits)
        if self.trained.head is not None:
            raise RecipeError(f"{source}: scores, and does not answer\n  mantis-lite predict {source} data=new.json")
        self.system = system
        self.encoder: Encoder = for_chat(self.trained.encoder, system)
        self.model: PreTrainedModel = self.trained.load()
        self.turns: list[Turn] = []

    @property
    def history(self) -> list[dict[str, str]]:
        """What was said, by whom; pictures and clips as the marks they stand at."""
        return [{"role": turn.role, "text": turn.shown} for turn in self.turns]

    def __call__(
        self,
        text: str,
        images: Sequence[Picture] = (),
        videos: Sequence[str | Path] = (),
        max_new_tokens: int = 512,
        **sampling: Any,
    ) -> str:
        """The answer to the next turn; both stay in the history.

        "<image>" and "<video>" in the text say where pictures and clips go, else they come first. `sampling` holds
        temperature, top_p, top_k, repetition_penalty and seed; unless one of the first three asks for draws, the answer
        is the same each time. Raises SampleError, RecipeError.
        """
        return "".join(self.stream(text, images, videos, max_new_tokens, **sampling))

    def stream(
        self,
        text: str,
        images: Sequence[Picture] = (),
        videos: Sequence[str | Path] = (),
        max_new_tokens: int = 512,
        **sampling: Any,
    ) -> Iterator[str]:
        """As a call, in pieces as they come. Let go of half-way, what had come by then is the answer."""
        number = len(self.turns) // 2 + 1
        asked = _turn(text, images, videos, number)
        sample = Sample(f"turn {number}", None, (*self.turns, asked))
        said: list[str] = []
        pieces = stream(self.model, self.encoder, sample, max_new_tokens, sampled(sampling))
        try:
            for piece in pieces:
                said.append(piece)
                yield piece
        except (GeneratorExit, KeyboardInterrupt):
            pieces.close()
            self._keep(asked, said)
            raise
        self._keep(asked, said)

    def generate(self, prompts: Sequence[dict[str, Any]], max_new_tokens: int = 512, **sampling: Any) -> list[str]:
        """Answers to prompts that have nothing to do with each other, or the history, in one batch.

        Each is {"text": ..., "images": [...], "videos": [...]}. Raises SampleError, RecipeError.
        """
        samples = [
            Sample(f"prompt {at}", None, (_turn(asked["text"], asked.get("images", ()), asked.get("videos", ()), at),))
            for at, asked in enumerate(prompts, 1)
        ]
        return answers(self.model, self.encoder, samples, max_new_tokens, sampled(sampling))

    def fork(self, turns: Sequence[Turn] = ()) -> MantisChat:
        """Another conversation with the same model, that goes on from these turns; one of them answers at a time."""
        other = copy.copy(self)
        other.turns = list(turns)
        return other

    def reset(self) -> None:
        """Forget everything that was said."""
        self.turns.clear()

    def undo(self) -> bool:
        """Forget the last question and its answer; whether there was one."""
        found = bool(self.turns)
        del self.turns[-2:]
        return found

    def save(self, file: str | Path) -> Path:
        """Write the conversation as a row of data, with the paths of its pictures; raises SampleError, OSError.

        Rows of `task=chat`, or where there are clips of `task=video`, are read as the turns that they were, after what
        was given as `system`. Pictures that were given as bytes have no path.
        """
        if Path(file).exists():
            raise SampleError(str(file), "exists already", "Name another file.")
        turns = [*([Turn("system", (self.system,))] if self.system else []), *self.turns]
        sample = Sample("save", None, tuple(turns))
        if sample.videos and any(isinstance(p, str) and "<video>" in p for turn in turns for p in turn.content):
            found = 'a text has "<video>" in it, which in a row with clips is the place of one'
            raise SampleError("save", found, "Ask in other words, after /undo or /reset.")
        row = {"messages": [{"role": turn.role, "content": list(map(_saved, turn.content))} for turn in turns]}
        parse(row, "save", MediaFolder(outside=True), "video" if sample.videos else "chat")
        # A name that is no UTF-8 has halves of characters for its bytes, which are JSON as escapes alone.
        content = json.dumps(row, ensure_ascii=False, indent=2).encode(errors="backslashreplace")
        write_whole(Path(file), content + b"\n")
        return Path(file)

    def _keep(self, asked: Turn, said: Sequence[str]) -> None:
        answer = "".join(said)
        self.turns += [asked, Turn("assistant", (answer,) if answer else ())]


@dataclass
class Counts:
    """The tokens of a prompt, and those that its answer has so far, without what ends it."""

    prompt: int = 0
    answer: int = 0

    def counted(self, come: Iterable[int]) -> Iterator[int]:
        for token in come:
            self.answer += 1
            yield token


def stream(
    model: PreTrainedModel,
    encoder: Encoder,
    sample: Sample,
    max_new_tokens: int,
    sampling: dict[str, Any] | None = None,
    counts: Counts | None = None,
) -> Generator[str]:
    """The answer to a sample's turns in pieces, as they come; letting go of it stops the model.

    `counts` is kept up to date meanwhile. Raises SampleError, RecipeError.
    """
    prompt = encoder.encode_prompt(sample)
    refuse_long(model, sample, len(prompt), max_new_tokens)
    counts = counts or Counts()
    counts.prompt = len(prompt)
    come: queue.SimpleQueue[int | None] = queue.SimpleQueue()
    let_go = threading.Event()

    def watch(token: int) -> bool:
        come.put(token)
        return not let_go.is_set()

    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(generate, model, encoder, [prompt], max_new_tokens, sampling, watch)
        done.add_done_callback(lambda _: come.put(None))
        try:
            yield from _words(encoder, counts.counted(iter(come.get, None)))
            done.result()
        finally:
            let_go.set()


def _words(encoder: Encoder, come: Iterable[int]) -> Iterator[str]:
    """Pieces of text as ids come; what half a character makes is held back until it is whole."""
    ids: list[int] = []
    shown = text = ""
    for token in come:
        ids.append(token)
        text = text_of(encoder, ids)
        part = text.endswith("\N{REPLACEMENT CHARACTER}") or BYTE.fullmatch(encoder.tokenizer.id_to_token(token) or "")
        if len(text) > len(shown) and not part:
            yield text[len(shown) :]
            shown = text
    if text != shown:
        yield text[len(shown) :]


def for_chat(encoder: Encoder, system: str | None = None) -> Encoder:
    """As an encoder writes prompts of which nothing else is said: some frames of a clip, and the system's words."""
    media = encoder.frames.media
    if media.num_frames is None and media.fps is None:
        media = media.model_copy(update={"num_frames": FRAMES})
    frames = replace(encoder.frames, media=media)
    return replace(encoder, frames=frames, system=encoder.system if system is None else system)


def _turn(text: str, images: Sequence[Picture], videos: Sequence[str | Path], number: int) -> Turn:
    pictures = [Image(image if isinstance(image, bytes) else Path(image)) for image in images]
    for given in (*images, *videos):
        if not isinstance(given, bytes) and not Path(given).exists():
            raise SampleError(f"turn {number}", f"no such file: {given}", "Check its path.")
    try:
        return user_turn(text, pictures, [Video(Path(video)) for video in videos])
    except Fault as fault:
        raise SampleError(f"turn {number}", fault.found, fault.remedy) from None


def sampled(sampling: dict[str, Any]) -> dict[str, Any]:
    """What is given of sampling, for transformers; a temperature of 0, or none, draws nothing. Raises RecipeError."""
    given = checked(sampling)
    if given.get("temperature", 1) and given.keys() & {"temperature", "top_p", "top_k"}:
        return {"do_sample": True, **given}
    return GREEDY | {key: value for key, value in given.items() if key == "repetition_penalty"}


def _saved(part: str | Image | Video) -> dict[str, Any]:
    """A part of a turn as a row has it. Raises SampleError."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if isinstance(part, Image):
        return {"type": "image", "image": _path(part.source)}
    source = part.source
    clip = [_path(frame.source) for frame in source] if isinstance(source, tuple) else _path(source)
    times = {key: at for key, at in (("start", part.start), ("end", part.end)) if at is not None}
    return {"type": "video", "video": clip, **times}


def _path(source: Path | bytes | Zipped) -> str:
    if not isinstance(source, Path):
        raise SampleError("save", "a picture was given as bytes, and has no path", "Give pictures by their paths.")
    return str(source.absolute())
