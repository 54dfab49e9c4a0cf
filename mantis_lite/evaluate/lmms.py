"""A plug-in of lmms-eval: its tasks, asked of a run, an adapter or a model of ours.

It finds `manifest` by the entry point `lmms_eval.models`; nothing else of the package imports this module, as lmms-eval
is installed by those who want it. Written for lmms-eval 0.7, https://github.com/EvolvingLMMs-Lab/lmms-eval.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any

import PIL.Image
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from ..chat import MantisChat, sampled
from ..data.columns import Fault
from ..data.media import SUFFIXES
from ..data.sample import Image, Sample, Turn, Video
from ..data.schema import user_turn
from ..errors import RecipeError, SampleError
from ..generate import answers, refuse_long
from ..prefill import greedy, log_likelihoods, read
from .asking import continuation

NAME = "mantis_lite"
DRAWN = ("temperature", "top_p", "top_k")
"""Settings of a draw; the rest of what a task may say that an answer goes by."""
KNOWN = {*DRAWN, "repetition_penalty", "max_new_tokens", "until", "do_sample"}
NEUTRAL = (None, False, 0, 1)
"""What others may say that changes nothing, as num_beams=1."""
BOUNDS = (("start_time", "end_time"), ("video_start", "video_end"))

log = logging.getLogger("mantis_lite")


def manifest() -> ModelManifest:
    """What lmms-eval is told: messages with pictures in their places, or a text with pictures in front."""
    here = __name__
    return ModelManifest(NAME, simple_class_path=f"{here}.MantisLite", chat_class_path=f"{here}.MantisLiteChat")


class MantisLite(lmms):
    """What is `pretrained`, a run, an adapter or a model; `bits` and `template` as of `mantis-lite chat`.

    The likeliest answer is given, unless a task asks for draws, which have seeds. Raises RecipeError.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        bits: int | None = None,
        template: str | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            remedy = "Give pretrained, bits, template and batch_size."
            raise RecipeError(f"--model_args: {', '.join(unknown)}: no such argument\n  {remedy}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise RecipeError(f"--batch_size: expected a number, found {batch_size}\n  Write --batch_size 4.")
        self.chat = MantisChat(pretrained, bits and int(bits), template)
        if device is not None and not str(self.device).startswith(device.partition(":")[0]):
            raise RecipeError(f"--device: {device}, and the model is on {self.device}\n  Set CUDA_VISIBLE_DEVICES.")
        self.batch_size, self.seeds = int(batch_size), count()
        self.told: set[str] = set()

    @property
    def device(self) -> Any:
        return self.chat.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model says to each request, in batches of those that ask for the same settings."""
        said: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda at: repr(self._settings(requests[at])))
        for _, alike in groupby(order, lambda at: repr(self._settings(requests[at]))):
            numbers = list(alike)
            for start in range(0, len(numbers), self.batch_size):
                batch = numbers[start : start + self.batch_size]
                samples = [self._sample(requests[at]) for at in batch]
                for at, text in zip(batch, self._answers(samples, self._settings(requests[batch[0]])), strict=True):
                    said[at] = text
                    self.cache_hook.add_partial("generate_until", (requests[at].args[0], {}), text)
        return [said[at] for at in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each context and continuation, how unlikely it is (its NLL in nats), and whether it is the likeliest.

        lmms-eval takes the lowest number for the best choice, whatever its base class says; and 0.7 would make text of
        a pair that comes as it is. Neighbours with one context are choices of it: that is read once.
        """
        found: list[GenerationResult] = []
        for request in requests:
            if len(request.args) != 6:
                raise RecipeError("lmms-eval: acc_mutual_info weighs choices without their question\n  Leave it out.")
        for _, alike in groupby(requests, lambda request: (request.args[0], *request.args[3:])):
            same = list(alike)
            context, _, pictures, number, task, split = same[0].args
            doc = self.task_dict[task][split][number]
            texts = [target if isinstance(target, str) else target(doc) for _, target, *_ in (r.args for r in same)]
            sample = _plain(context, _flat(pictures(doc)), f"{task}:{number}")
            found += self._weighed(sample, [text.strip() for text in texts])
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise RecipeError("lmms-eval: tasks of several rounds are not asked\n  Leave them out.")

    def _weighed(self, sample: Sample, texts: Sequence[str]) -> Iterator[GenerationResult]:
        model, encoder = self.chat.model, self.chat.encoder
        if not all(texts):
            raise SampleError(sample.where, "a continuation is empty", "Leave the task out.")
        prompt, ids = encoder.encode_prompt(sample), [continuation(encoder, text) for text in texts]
        refuse_long(model, sample, len(prompt), max(map(len, ids)))
        prefilled = read(model, encoder, [prompt])
        (scores,) = log_likelihoods(model, prefilled, [ids])
        (likeliest,) = greedy(model, prefilled, [], max(map(len, ids)))
        for score, each in zip(scores, ids, strict=True):
            yield GenerationResult((-score, likeliest[: len(each)] == each))

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _sample(self, request: Instance) -> Sample:
        context, _, pictures, number, task, split = request.args
        return _plain(context, _flat(pictures(self.task_dict[task][split][number])), f"{task}:{number}")

    def _answers(self, samples: Sequence[Sample], settings: dict[str, Any]) -> Iterator[str]:
        for key in settings.keys() - KNOWN - self.told:
            if settings[key] not in NEUTRAL:
                log.warning("lmms-eval: %s=%s is left out; answers are the likeliest, or drawn", key, settings[key])
                self.told.add(key)
        until = settings.get("until") or []
        most = int(settings.get("max_new_tokens") or 1024)
        for text in answers(self.chat.model, self.chat.encoder, samples, most, self._drawn(settings)):
            for end in [until] if isinstance(until, str) else until:
                text = text.partition(end)[0] if end else text
            yield text.strip()

    def _drawn(self, settings: dict[str, Any]) -> dict[str, Any]:
        """How answers are drawn, by a seed that no batch had before: a task may ask the same thing many times."""
        more = {"repetition_penalty": settings.get("repetition_penalty")}
        temperature = settings.get("temperature")
        if settings.get("do_sample") is False or temperature == 0 or not (settings.get("do_sample") or temperature):
            return sampled(more)
        drawn = {key: settings[key] for key in DRAWN if settings.get(key)} | {"seed": next(self.seeds)}
        return sampled({"temperature": 1.0} | drawn | more)


class MantisLiteChat(MantisLite):
    """The same, of tasks that give messages: each picture and clip stays where it stands among the words."""

    is_simple = False

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _sample(self, request: Instance) -> Sample:
        _, messages, _, number, task, split = request.args
        turns = []
        for message in messages(self.task_dict[task][split][number]):
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            turns.append(Turn(message["role"], tuple(map(_part, parts))))
        return Sample(f"{task}:{number}", None, tuple(turns))


def _flat(found: Any) -> list[Any]:
    """Pictures and clips, however deep in lists they are."""
    if not isinstance(found, list | tuple):
        return [] if found is None else [found]
    return [each for part in found for each in _flat(part)]


def _plain(text: str, media: Iterable[Any], where: str) -> Sample:
    """A text with pictures and clips at its marks, or in front of it. Raises SampleError."""
    parts = [_medium(each) for each in media]
    images = [part for part in parts if isinstance(part, Image)]
    try:
        turn = user_turn(text, images, [part for part in parts if isinstance(part, Video)])
    except Fault as fault:
        raise SampleError(where, fault.found, fault.remedy) from None
    return Sample(where, None, (turn,))


def _part(part: dict[str, Any]) -> str | Image | Video:
    """A part of a message: text, or what its `url` is, whose own fields may lie within it."""
    if part["type"] == "text":
        return part["text"]
    if isinstance(part["url"], dict):
        part = part | part["url"]
    if part["type"] == "image" and isinstance(part["url"], str):
        return Image(Path(part["url"]))
    return _medium(part if part["type"] == "video" else part["url"], part["type"])


def _medium(found: Any, kind: str = "") -> Image | Video:
    """A picture as lmms-eval has it, or its path; a clip's path, or that with the s where it starts and ends."""
    if isinstance(found, PIL.Image.Image):
        file = io.BytesIO()
        found.convert("RGB").save(file, "PNG")
        return Image(file.getvalue())
    if isinstance(found, str) and kind != "audio":
        return Image(Path(found)) if found.lower().endswith(SUFFIXES) else Video(Path(found))
    if isinstance(found, dict) and found.get("type") == "video" and isinstance(found.get("url"), str):
        bounds = next((pair for pair in BOUNDS if any(key in found for key in pair)), BOUNDS[0])
        return Video(Path(found["url"]), *(found.get(key) for key in bounds))
    given = kind or type(found).__name__
    raise RecipeError(f"lmms-eval: a task gives {given}\n  Leave it out: it needs more than pictures and clips.")
