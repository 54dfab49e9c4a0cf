"""A sample's turns -> the model's next answer, greedily."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from .data.encode import Encoder
from .data.schema import Sample


@torch.no_grad()
def answer(model: PreTrainedModel, encoder: Encoder, sample: Sample, max_new_tokens: int = 512) -> str:
    """The text a model answers to a sample's turns, without its end token; the same each time (greedy)."""
    encoded = encoder.encode_prompt(sample)
    input_ids = torch.from_numpy(encoded.input_ids[None]).to(model.device)
    pixels = {name: torch.from_numpy(rows).to(model.device, model.dtype) for name, rows in encoded.pixels.items()}
    with _generating(model):
        ids = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            **pixels,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=encoder.token_id(encoder.template.end),
            pad_token_id=encoder.token_id(encoder.template.end),
        )
    return encoder.tokenizer.decode(ids[0, input_ids.shape[1] :].tolist(), skip_special_tokens=True).strip()


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
