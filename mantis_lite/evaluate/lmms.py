"""A plug-in of lmms-eval: its tasks, asked of a run, an adapter or a model of ours.

It finds `manifest` by the entry point `lmms_eval.models`; nothing else of the package imports this module, as lmms-eval
is installed by those who want it. Written for lmms-eval 0.7, https://github.com/EvolvingLMMs-Lab/lmms-eval.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest

from ..chat import MantisChat, sampled
from ..data.sample import Image, Sample, Turn, Video
from ..data.schema import user_turn
from ..errors import RecipeError
from ..generate import answers
from ..prefill import greedy, log_likelihoods, read
from .asking import continuation

NAME = "mantis_lite"
PASSED = ("temperature", "top_p", "top_k", "repetition_penalty")
KNOWN = {*PASSED, "max_new_tokens", "until", "do_sample"}

log = logging.getLogger("mantis_lite")


def manifest() -> ModelManifest:
    """What lmms-eval is told: messages with pictures in their places, or a text with pictures in front."""
    here = __name__
    return ModelManifest(NAME, simple_class_path=f"{here}.MantisLite", chat_class_path=f"{here}.MantisLiteChat")


class MantisLite(lmms):
    """What is `pretrained`, a run, an adapter or a model; `bits` and `template` as of `mantis-lite chat`.

    The likeliest answer is given, unless a task asks for draws, which then have a seed. Raises RecipeError.
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
        if not str(batch_size).isdecimal():
            raise RecipeError(f"--batch_size: expected a number, found {batch_size}\n  Write --batch_size 4.")
        self.chat = MantisChat(pretrained, bits and int(bits), template)
        self.batch_size = int(batch_size)
        self.told: set[str] = set()

    @property
    def device(self) -> Any:
        return self.chat.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """What the model says to each request, in batches of those that ask for the same settings."""
        said: dict[int, str] = {}
        order = sorted(range(len(requests)), key=lambda at: repr(self._settings(requests[at])))
        for start in range(0, len(order), self.batch_size):
            for same in _alike(order[start : start + self.batch_size], lambda at: self._settings(requests[at])):
                samples = [self._sample(requests[at]) for at in same]
                for at, text in zip(same, self._answers(samples, self._settings(requests[same[0]])), strict=True):
                    said[at] = text
                    self.cache_hook.add_partial("generate_until", (requests[at].args[0], {}), text)
        return [said[at] for at in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each context and continuation, how unlikely it is (its NLL in nats), and whether it is the likeliest.

        lmms-eval takes the lowest number for the best choice, whatever its base class says; and 0.7 would make text of
        a pair that comes as it is.
        """
        found = []
        for context, target, pictures, number, task, split in (request.args for request in requests):
            doc = self.task_dict[task][split][number]
            text = target if isinstance(target, str) else target(doc)
            prompt = self.chat.encoder.encode_prompt(_plain(context, _flat(pictures(doc)), f"{task}:{number}"))
            ids = continuation(self.chat.encoder, text.strip())
            prefilled = read(self.chat.model, self.chat.encoder, [prompt])
            ((score,),) = log_likelihoods(self.chat.model, prefilled, [[ids]])
            found.append(GenerationResult((-score, greedy(self.chat.model, prefilled, [], len(ids)) == [ids])))
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise RecipeError("lmms-eval: tasks of several rounds are not asked\n  Leave them out.")

    def _settings(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _sample(self, request: Instance) -> Sample:
        context, _, pictures, number, task, split = request.args
        return _plain(context, _flat(pictures(self.task_dict[task][split][number])), f"{task}:{number}")

    def _answers(self, samples: Sequence[Sample], settings: dict[str, Any]) -> Iterator[str]:
        for key in settings.keys() - KNOWN - self.told:
            if settings[key] not in (None, 1, False, 0):
                log.warning("lmms-eval: %s=%s is left out; answers are the likeliest, or drawn", key, settings[key])
            self.told.add(key)
        drawn = {key: settings[key] for key in PASSED if settings.get(key) is not None}
        if settings.get("do_sample") is False:
            drawn["temperature"] = 0
        until = settings.get("until") or []
        most = int(settings.get("max_new_tokens") or 1024)
        model, encoder = self.chat.model, self.chat.encoder
        for text in answers(model, encoder, samples, most, sampled({**drawn, "seed": 0})):
            for end in [until] if isinstance(until, str) else until:
                text = text.partition(end)[0] if end else text
            yield text.strip()


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


def _alike(numbers: Sequence[int], settings: Callable[[int], Any]) -> list[list[int]]:
    """Neighbours that have the same settings."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and settings(groups[-1][0]) == settings(number):
            groups[-1].append(number)
        else:
            groups.append([number])
    return groups


def _flat(found: Any) -> list[Any]:
    """Pictures and clips, however deep in lists they are."""
    if not isinstance(found, list | tuple):
        return [] if found is None else [found]
    return [each for part in found for each in _flat(part)]


def _plain(text: str, media: Iterable[Any], where: str) -> Sample:
    """A text with pictures and clips at its marks, or in front of it."""
    parts = [_medium(each) for each in media]
    images = [part for part in parts if isinstance(part, Image)]
    return Sample(where, None, (user_turn(text, images, [part for part in parts if isinstance(part, Video)]),))


def _part(part: dict[str, Any]) -> str | Image | Video:
    if part["type"] == "text":
        return part["text"]
    if part["type"] not in ("image", "video"):
        raise RecipeError(f"lmms-eval: a message has {part['type']}\n  Leave the task out: it needs more than eyes.")
    found = _medium(part["url"])
    if isinstance(found, Video):
        return Video(found.source, part.get("start_time"), part.get("end_time"))
    return found


def _medium(found: Any) -> Image | Video:
    """A picture as lmms-eval has it, or the path of a clip."""
    if isinstance(found, PIL.Image.Image):
        file = io.BytesIO()
        found.convert("RGB").save(file, "PNG")
        return Image(file.getvalue())
    if isinstance(found, str):
        return Video(Path(found))
    raise RecipeError(f"lmms-eval: a task gives {type(found).__name__}\n  Leave it out: it needs more than eyes.")
