"""Tiny language models and vision towers as they are published apart, for what puts them together."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from helpers import SIDE, tokenizer
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
SEEN = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": 14,
    "initializer_range": 0.2,
}
READ = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
ENDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
GREY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SIDES = {"height": SIDE, "width": SIDE}
PROCESSORS: dict[str, dict[str, Any]] = {
    "siglip": {"image_processor_type": "SiglipImageProcessor", "size": SIDES},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": SIDE}, "crop_size": SIDES},
}
TOWERS = ("siglip", "siglip_vision_model", "clip", "clip_vision_model")


def save_llm(folder: Path, kind: str = "llama", spare: int = 0, shard: str = "1GB", **settings: Any) -> Path:
    """A language model of Llama-3's words, which has `spare` embeddings that are no word's."""
    tokens = tokenizer(more=(), pad=())
    torch.manual_seed(1)
    sizes = TEXT | {"vocab_size": tokens.get_vocab_size() + spare, "rope_theta": 5e5} | settings
    model = LlamaForCausalLM(LlamaConfig(**sizes)) if kind == "llama" else MistralForCausalLM(MistralConfig(**sizes))
    model.save_pretrained(folder, max_shard_size=shard)
    config = json.loads((folder / "config.json").read_text())
    config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": config.pop("dtype")}))  # as published
    PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<|eot_id|>").save_pretrained(folder)
    return folder


def save_tower(folder: Path, kind: str = "siglip", shard: str = "1GB") -> Path:
    """A tower alone, or within a whole CLIP or SigLIP."""
    torch.manual_seed(2)
    made = {
        "siglip": lambda: SiglipModel(SiglipConfig(text_config=READ | ENDS, vision_config=SEEN)),
        "siglip_vision_model": lambda: SiglipVisionModel(SiglipVisionConfig(**SEEN)),
        "clip": lambda: CLIPModel(CLIPConfig(text_config=READ | ENDS, vision_config=SEEN, projection_dim=8)),
        "clip_vision_model": lambda: CLIPVisionModel(CLIPVisionConfig(**SEEN)),
    }
    made[kind]().save_pretrained(folder, max_shard_size=shard)
    (folder / "preprocessor_config.json").write_text(json.dumps(GREY | PROCESSORS[kind.partition("_")[0]]))
    return folder
