"""Samples' turns -> the model's next answers: one by one or in a batch, at once or word by word."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from .data.columns import short
from .data.encode import Encoded, Encoder
from .data.sample import Sample
from .errors import RecipeError, SampleError, did_you_mean
from .models.adapters import base_of
from .models.load import placed

GREEDY: dict[str, Any] = {"do_sample": False}


class Setting(NamedTuple):
    """What a setting of an answer may be, and the same in words."""

    kind: type[int] | type[float]
    holds: Callable[[Any], bool]
    words: str


SETTINGS = {
    "max_new_tokens": Setting(int, lambda found: found >= 1, "a whole number of 1 or more"),
    # Logits that are divided by far less are infinite, or no numbers at all, on the way to their softmax.
    "temperature": Setting(float, lambda found: found == 0 or 0.01 <= found <= 2, "0, or a number from 0.01 to 2"),
    "top_p": Setting(float, lambda found: 0 < found <= 1, "a number above 0, and 1 at most"),
    "top_k": Setting(int, lambda found: found >= 1, "a whole number of 1 or more"),
    "repetition_penalty": Setting(float, lambda found: 0.1 <= found <= 10, "a number from 0.1 to 10"),
    "seed": Setting(int, lambda found: -(1 << 63) <= found < 1 << 63, "a whole number of 64 bits"),
}
"""All that may be said of how to answer: others of transformers' would change what is batched, watched or returned."""


def checked(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that are given, and not None, as numbers that transformers takes. Raises RecipeError."""
    given = {}
    for name, found in settings.items():
        if name not in SETTINGS:
            remedy = f"Leave it out; the settings are {', '.join(SETTINGS)}."
            raise RecipeError(f"{name}: no such setting{did_you_mean(name, SETTINGS)}\n  {remedy}")
        kind, holds, words = SETTINGS[name]
        if found is None:
            continue
        is_number = isinstance(found, Integral if kind is int else Real) and not isinstance(found, bool)
        if not is_number or not holds(found):
            raise RecipeError(f"{name}: cannot be {short(found)}\n  Give {words}.")
        given[name] = kind(found)
    return given


def answer(model: PreTrainedModel, encoder: Encoder, sample: Sample, max_new_tokens: int = 512) -> str:
    """The text a model answers to a sample's turns, without its end token; the same each time (greedy)."""
    return answers(model, encoder, [sample], max_new_tokens)[0].strip()


def answers(
    model: PreTrainedModel,
    encoder: Encoder,
    samples: Sequence[Sample],
    max_new_tokens: int = 512,
    sampling: dict[str, Any] | None = None,
) -> list[str]:
    """The texts a model answers to each sample's turns, in one batch, without their end tokens.

    Raises SampleError, RecipeError.
    """
    encoded = [encoder.encode_prompt(sample) for sample in samples]
    for sample, found in zip(samples, encoded, strict=True):
        refuse_long(model, sample, len(found), max_new_tokens)
    ids = generate(model, encoder, encoded, max_new_tokens, sampling)
    return [text_of(encoder, found) for found in ids]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    encoder: Encoder,
    prompts: Sequence[Encoded],
    max_new_tokens: int = 512,
    sampling: dict[str, Any] | None = None,
    watch: Callable[[int], bool] | None = None,
) -> list[list[int]]:
    """The ids that go on from each of a batch of prompts, up to and without what ends them.

    `sampling` holds a seed, and what is said to transformers' GenerationConfig; without it the likeliest token is
    taken. `watch` is told each new id of a single prompt, and stops by returning False.
    """
    assert watch is None or len(prompts) == 1
    batch = _padded(encoder, prompts)
    ends = ends_of(model, encoder)
    choice = dict(sampling or GREEDY)
    seed = choice.pop("seed", None)
    settings = GenerationConfig(max_new_tokens=max_new_tokens, eos_token_id=ends, pad_token_id=ends[0], **choice)
    watched = _Watch(watch, ends) if watch else None
    with _generating(model), torch.random.fork_rng(enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        found = model.generate(
            **placed(batch, model),
            generation_config=settings,
            streamer=watched,
            stopping_criteria=StoppingCriteriaList([watched.stopped]) if watched else None,
        )
    return [_before_end(row, ends) for row in found[:, batch["input_ids"].shape[1] :].tolist()]


def text_of(encoder: Encoder, ids: Sequence[int]) -> str:
    """The text of an answer's ids; without the blank that its header ends in, which belongs to no answer."""
    text = encoder.tokenizer.decode(list(ids), skip_special_tokens=True)
    header = encoder.template.headers["assistant"][-1]
    return text.removeprefix(" ") if header.endswith(" ") else text


def refuse_long(model: PreTrainedModel, sample: Sample, tokens: int, max_new_tokens: int) -> None:
    """Raise SampleError where a prompt and its answer would be longer than the model's positions.

    RecipeError for an answer that has no length.
    """
    checked({"max_new_tokens": max_new_tokens})
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most and tokens + max_new_tokens > most:
        found = (
            f"{tokens:,} tokens, and up to {max_new_tokens:,} for the answer, where the model has {most:,} positions"
        )
        raise SampleError(sample.where, found, "Ask about fewer pictures, or for a shorter answer.", sample.id)


class _Watch(BaseStreamer):
    """Hands each new id on, and remembers whether to stop; transformers' streamers give words, and cannot stop."""

    def __init__(self, watch: Callable[[int], bool], ends: list[int]) -> None:
        self.watch, self.ends, self.prompt, self.goes_on = watch, ends, True, True

    def put(self, value: torch.Tensor) -> None:
        if self.prompt:  # what comes first is what was asked
            self.prompt = False
        elif self.goes_on and (token := int(value.reshape(-1)[0])) not in self.ends:
            self.goes_on = self.watch(token)

    def end(self) -> None:
        pass

    @property
    def stopped(self) -> StoppingCriteria:
        return _Stopped(self)


class _Stopped(StoppingCriteria):
    def __init__(self, watched: _Watch) -> None:
        self.watched = watched

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), not self.watched.goes_on, device=input_ids.device)


def _padded(encoder: Encoder, prompts: Sequence[Encoded]) -> dict[str, Any]:
    """The model's inputs: prompts (B, T) padded on the left, a mask of what is none, all pictures in their order.

    Padding repeats a prompt's last token: a repetition penalty counts it, and counts that one anyway.
    """
    longest = max(map(len, prompts))
    shape = len(prompts), longest
    ids = np.zeros(shape, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    for at, prompt in enumerate(prompts):
        ids[at] = prompt.input_ids[-1]
        ids[at, longest - len(prompt) :] = prompt.input_ids
        mask[at, longest - len(prompt) :] = 1
    batch: dict[str, Any] = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
    if pictures := [picture for prompt in prompts for picture in prompt.pixels]:
        batch |= encoder.vision.batch(pictures)
        if encoder.vision.positions:  # the model lays them out itself, and goes on from them as it generates
            placeholder = encoder.token_id(encoder.vision.placeholder)
            batch["mm_token_type_ids"] = torch.from_numpy(ids == placeholder).int()
    return batch


def ends_of(model: PreTrainedModel, encoder: Encoder) -> list[int]:
    """What ends an answer: the template's own token first, and those that the model was published with."""
    known = getattr(model.generation_config, "eos_token_id", None)
    published = known if isinstance(known, list) else [] if known is None else [known]
    return list(dict.fromkeys([encoder.token_id(encoder.template.end), *published]))


def _before_end(ids: list[int], ends: list[int]) -> list[int]:
    return ids[: next((at for at, token in enumerate(ids) if token in ends), len(ids))]


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode, no defaults of the checkpoint's own, and an attention that knows caches as packs' does not."""
    decoder, training = model.get_decoder(), model.training
    packed = decoder.config._attn_implementation
    plain = base_of(model)
    own = plain.generation_config
    decoder.set_attn_implementation("sdpa")
    model.eval()
    plain.generation_config = GenerationConfig()
    try:
        yield
    finally:
        plain.generation_config = own
        decoder.set_attn_implementation(packed)
        model.train(training)
