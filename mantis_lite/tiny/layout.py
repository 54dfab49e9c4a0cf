"""The small files of Tiny Mantis, as Mantis-8B-siglip-llama3 is published: everything beside weights and vocabulary."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .pictures import SIDE

SPECIAL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<image>",
    "<|pad|>",
)
TEXT_TOKENS = 393
TOKENS = TEXT_TOKENS + len(SPECIAL)
_PLAIN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


def token_id(token: str) -> int:
    """Special tokens follow those of the text, as where Mantis added its own to Llama 3's."""
    return TEXT_TOKENS + SPECIAL.index(token)


def write(folder: Path) -> None:
    """Write all that does not have to be learned: every file but the weights and tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {
        "config.json": config(),
        "generation_config.json": generation_config(),
        "preprocessor_config.json": preprocessor_config(),
        "tokenizer_config.json": tokenizer_config(),
        "special_tokens_map.json": special_tokens_map(),
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def config() -> dict[str, Any]:
    """The architecture: a tower of four layers, of which three are read, and a Llama of four layers."""
    text = {
        "_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": token_id("<|begin_of_text|>"),
        "eos_token_id": token_id("<|end_of_text|>"),
        "head_dim": 32,
        "hidden_size": 128,
        "initializer_range": 0.06,  # the usual 0.02 is meant for larger layers, and learns slowly here
        "intermediate_size": 256,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "torch_dtype": "float16",
        "vocab_size": TOKENS,
    }
    tower = {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 96,
        "image_size": SIDE,
        "intermediate_size": 192,
        "layer_norm_eps": 1e-06,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "patch_size": 14,
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": token_id("<image>"),
        "model_type": "llava",
        "pad_token_id": token_id("<|pad|>"),
        "projector_hidden_act": "gelu",
        "text_config": text,
        "torch_dtype": "float16",
        "transformers_version": "4.39.2",
        "vision_config": tower,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": TOKENS,
    }


def generation_config() -> dict[str, Any]:
    """As published: the end of a turn, <|eot_id|>, is not among the stop tokens."""
    return {
        "_from_model_config": True,
        "bos_token_id": token_id("<|begin_of_text|>"),
        "eos_token_id": token_id("<|end_of_text|>"),
        "pad_token_id": token_id("<|pad|>"),
        "transformers_version": "4.39.2",
    }


def preprocessor_config() -> dict[str, Any]:
    return {
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "MLlavaProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": SIDE, "width": SIDE},
    }


def tokenizer_config() -> dict[str, Any]:
    added = {str(token_id(token)): {"content": token, **_PLAIN, "special": True} for token in SPECIAL}
    return {
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<image>", "<|pad|>"],
        "bos_token": "<|begin_of_text|>",
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|end_of_text|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 8192,
        "processor_class": "MLlavaProcessor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def special_tokens_map() -> dict[str, Any]:
    return {
        "additional_special_tokens": ["<image>", "<|pad|>"],
        "bos_token": {"content": "<|begin_of_text|>", **_PLAIN},
        "eos_token": {"content": "<|end_of_text|>", **_PLAIN},
    }
