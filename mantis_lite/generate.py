"""A sample's turns -> the model's next answer, greedily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from .data.encode import Encoded, Encoder
from .data.sample import Sample
from .models.load import placed


@torch.no_grad()
def answer(model: PreTrainedModel, encoder: Encoder, sample: Sample, max_new_tokens: int = 512) -> str:
    """The text a model answers to a sample's turns, without its end token; the same each time (greedy)."""
    encoded = encoder.encode_prompt(sample)
    inputs = {"input_ids": torch.from_numpy(encoded.input_ids[None]), **_vision_inputs(encoder, encoded)}
    with _generating(model):
        ids = model.generate(
            **placed(inputs, model),
            attention_mask=torch.ones(1, len(encoded), dtype=torch.int64, device=model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=encoder.token_id(encoder.template.end),
            pad_token_id=encoder.token_id(encoder.template.end),
        )
    return encoder.tokenizer.decode(ids[0, len(encoded) :].tolist(), skip_special_tokens=True).strip()


def _vision_inputs(encoder: Encoder, encoded: Encoded) -> dict[str, Any]:
    if not encoded.pixels:
        return {}
    inputs = encoder.vision.batch(encoded.pixels)
    if encoder.vision.positions:  # the model lays them out itself, and goes on from them as it generates
        placeholder = encoder.token_id(encoder.vision.placeholder)
        inputs["mm_token_type_ids"] = torch.from_numpy(encoded.input_ids[None] == placeholder).int()
    return inputs


@contextmanager
def _generating(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode and an attention that knows caches: the one for packs does not."""
    decoder, training = model.get_decoder(), model.training
    packed = decoder.config._attn_implementation
    decoder.set_attn_implementation("sdpa")
    model.eval()
    try:
        yield
    finally:
        decoder.set_attn_implementation(packed)
        model.train(training)
