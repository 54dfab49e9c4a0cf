"""A small random LLaVA that every tool can load: a SigLIP tower of 384/14, 729 tokens a picture, and a Llama."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

VOCABULARY = 8192
SPECIAL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>", "<|pad|>")
TEMPLATE = """\
{{- '<|begin_of_text|>' -}}
{%- for message in messages -%}
  {{- '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\\n\\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}
    {%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}
    {{- '<|eot_id|>' -}}
    {%- endgeneration -%}
  {%- else -%}
    {%- for part in message['content'] -%}
      {{- '<image>' if part['type'] == 'image' else part['text'] -}}
    {%- endfor -%}
    {{- '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
"""
"""Llama 3's template as this package writes it, with the marks by which TRL finds the answers."""


def write_model(folder: Path, texts: Iterable[str], side: int = 384) -> Path:
    """Write seeded weights, a tokenizer learned from `texts`, a processor and a template, as they are published."""
    import torch
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    folder.mkdir()
    torch.manual_seed(0)
    tokens = {"image_token_index": SPECIAL.index("<image>")}
    settings = {"vision_feature_layer": -2, "vision_feature_select_strategy": "full", "tie_word_embeddings": False}
    config = LlavaConfig(text_config=_decoder(), vision_config=_tower(side), **tokens, **settings)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    _tokenizer(texts).save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    for name, content in _small_files(side).items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def _decoder() -> dict[str, Any]:
    """Weights large enough that what a token sees moves its logits, so that a wrong mask is seen in the loss."""
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "initializer_range": 0.2}
    sizes = {"hidden_size": 128, "intermediate_size": 352, "vocab_size": VOCABULARY, "max_position_embeddings": 16384}
    ids = {"bos_token_id": 0, "eos_token_id": SPECIAL.index("<|eot_id|>"), "pad_token_id": SPECIAL.index("<|pad|>")}
    return {"model_type": "llama"} | layers | sizes | ids


def _tower(side: int) -> dict[str, Any]:
    layers = {"num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 128}
    return {"model_type": "siglip_vision_model", "image_size": side, "patch_size": 14} | layers


def _tokenizer(texts: Iterable[str]) -> Any:
    """A byte-level BPE over the rows' own words; special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(texts, trainer)
    return made


def _small_files(side: int) -> dict[str, dict[str, Any]]:
    names = {"bos_token": SPECIAL[0], "eos_token": "<|eot_id|>", "pad_token": "<|pad|>"}
    grey = {
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
    }
    image = {"image_processor_type": "SiglipImageProcessor", "size": {"height": side, "width": side}, "resample": 3}
    tokens = {"patch_size": 14, "vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}
    return {
        "tokenizer_config": names | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 16384},
        "preprocessor_config": grey | image,
        "processor_config": tokens | {"processor_class": "LlavaProcessor", "image_token": "<image>"},
    }
