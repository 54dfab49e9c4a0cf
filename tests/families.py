"""A tiny random checkpoint of every family, as it is published: weights, config, tokenizer and image processor."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from helpers import SIDE, TEMPLATES, tiny_llava, tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
from transformers import (
    AutoModelForImageTextToText,
    FuyuConfig,
    Idefics2Config,
    Idefics3Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)

IDEFICS = ["<fake_token_around_image>", "<image>"]
TILES = [*IDEFICS, "<global-img>", *(f"<row_{r}_col_{c}>" for r, c in product(range(1, 5), repeat=2))]
QWEN = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|vision_pad|>", "<|video_pad|>"]
GREY = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}

# Large enough that what a token sees moves its logits.
SPREAD = {"initializer_range": 0.2}
TEXT = SPREAD | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}
TOWER = SPREAD | {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def unigram() -> Tokenizer:
    """Fuyu's kind: marks are pieces of the vocabulary, and what it does not know falls back to bytes."""
    marks = ["|ENDOFTEXT|", "|SPEAKER|", "|NEWLINE|"]
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    letters = [chr(code) for code in range(33, 127)]
    words = ["▁", "▁picture", "▁red", "image", "ing", "▁the"]
    scored = [(piece, 0.0) for piece in ["<unk>", "<s>", "</s>", *bytes_, *marks]]
    made = Tokenizer(models.Unigram([*scored, *((p, -8.0) for p in letters), *((p, -5.0) for p in words)], 0, True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "|ENDOFTEXT|", "|IMAGE|", "|ENDOFIMAGE|"]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return made


def idefics2(tokens: Tokenizer) -> Idefics2Config:
    return Idefics2Config(
        # A window shorter than a sample: Mistral's, which packs must keep too.
        text_config={**TEXT, "model_type": "mistral", "vocab_size": tokens.get_vocab_size(), "sliding_window": 40},
        vision_config={**TOWER, "image_size": 56, "patch_size": 14},
        perceiver_config={
            **SPREAD,
            "hidden_size": 32,
            "resampler_n_latents": 4,
            "resampler_depth": 1,
            "resampler_n_heads": 2,
            "resampler_head_dim": 8,
            "num_key_value_heads": 1,
        },
        image_token_id=tokens.token_to_id("<image>"),
        **SPREAD,
    )


def idefics3(tokens: Tokenizer, config: type[PreTrainedConfig] = Idefics3Config) -> PreTrainedConfig:
    return config(
        text_config={**TEXT, "model_type": "llama", "vocab_size": tokens.get_vocab_size()},
        vision_config={**TOWER, "image_size": 28, "patch_size": 7},
        scale_factor=2,
        image_token_id=tokens.token_to_id("<image>"),
        pad_token_id=0,
        **SPREAD,
    )


def tied(config: PreTrainedConfig) -> PreTrainedConfig:
    """One matrix for words going in and coming out, as small checkpoints have."""
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = True
    return config


def smolvlm(tokens: Tokenizer) -> PreTrainedConfig:
    return tied(idefics3(tokens, SmolVLMConfig))


def fuyu(tokens: Tokenizer) -> FuyuConfig:
    text = {key: value for key, value in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
    rope = {"rope_type": "default", "rope_theta": 25_000.0, "partial_rotary_factor": 0.5}
    text |= {"model_type": "persimmon", "vocab_size": tokens.get_vocab_size(), "rope_parameters": rope}
    return FuyuConfig(
        text_config=text, patch_size=10, hidden_size=32, image_token_id=tokens.token_to_id("|SPEAKER|"), **SPREAD
    )


def qwen(tokens: Tokenizer, config: type[PreTrainedConfig], vision: dict, section: list[int]) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": section}
    # As published, some embeddings are no token's.
    text = {**TEXT, "vocab_size": tokens.get_vocab_size() + 8, "rope_parameters": rope, "rope_scaling": rope}
    ids = {name: tokens.token_to_id(f"<|{mark}|>") for name, mark in QWEN_IDS.items()}
    return config(text_config=text, vision_config={**SPREAD, "depth": 3, "num_heads": 2, **vision}, **ids, **SPREAD)


QWEN_IDS = {
    "image_token_id": "image_pad",
    "video_token_id": "video_pad",
    "vision_start_token_id": "vision_start",
    "vision_end_token_id": "vision_end",
}


def qwen2_vl(tokens: Tokenizer) -> PreTrainedConfig:
    vision = {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14, "spatial_merge_size": 2}
    return tied(qwen(tokens, Qwen2VLConfig, vision, [2, 1, 1]))


def qwen2_5_vl(tokens: Tokenizer) -> PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 14, "window_size": 56}
    return qwen(tokens, Qwen2_5_VLConfig, vision | {"fullatt_block_indexes": [1]}, [2, 1, 1])


def qwen3_vl(tokens: Tokenizer) -> PreTrainedConfig:
    vision = {"hidden_size": 32, "intermediate_size": 48, "out_hidden_size": 32, "patch_size": 16}
    deep = {"num_position_embeddings": 16, "deepstack_visual_indexes": [1]}
    return qwen(tokens, Qwen3VLConfig, vision | deep, [2, 1, 1])


def bounded(longest: int, shortest: int) -> dict[str, int]:
    return {"longest_edge": longest, "shortest_edge": shortest}


TILED = {"size": {"longest_edge": 84}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": True}
WINDOWS = {"size": bounded(56 * 84, 28 * 28), "temporal_patch_size": 2, "merge_size": 2}

MADE: dict[str, tuple[Callable, str, list[str], dict]] = {
    "idefics2": (idefics2, "idefics_2", IDEFICS, {"size": bounded(84, 28)}),
    "idefics3": (idefics3, "idefics_3", TILES, TILED),
    "smolvlm": (smolvlm, "smolvlm", TILES, TILED | {"image_processor_type": "SmolVLMImageProcessor"}),
    "fuyu": (fuyu, "mfuyu_v1", [], {"size": {"height": 60, "width": 90}, "patch_size": {"height": 10, "width": 10}}),
    "qwen2_vl": (qwen2_vl, "qwen2_vl", QWEN, WINDOWS | {"patch_size": 14}),
    "qwen2_5_vl": (qwen2_5_vl, "qwen2_vl", QWEN, WINDOWS | {"patch_size": 14}),
    "qwen3_vl": (qwen3_vl, "qwen3_vl", QWEN, WINDOWS | {"patch_size": 16, "size": bounded(64 * 96, 32 * 32)}),
}

PROCESSORS = {
    "idefics2": "Idefics2ImageProcessor",
    "idefics3": "Idefics3ImageProcessor",
    "smolvlm": "SmolVLMImageProcessor",
    "fuyu": "FuyuImageProcessor",
    "qwen2_vl": "Qwen2VLImageProcessor",
    "qwen2_5_vl": "Qwen2VLImageProcessor",
    "qwen3_vl": "Qwen2VLImageProcessorFast",  # as published
}

FAMILIES = ["llava", *MADE]
M_ROPE = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


def tiny(name: str, seed: int = 0) -> PreTrainedModel:
    """The random model of a family."""
    if name == "llava":
        return tiny_llava(seed)
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(MADE[name][0](tokens_of(name))).eval()


def tokens_of(name: str) -> Tokenizer:
    if name == "llava":
        return tokenizer()
    if name == "fuyu":
        return unigram()
    return tokenizer(MADE[name][1], MADE[name][2])


def save(name: str, folder: Path) -> Path:
    """Write a family's `tiny` with its tokenizer and processor, as a checkpoint is published."""
    tiny(name).save_pretrained(folder)
    end = TEMPLATES[MADE[name][1]].end if name != "llava" else "<|eot_id|>"
    pad = "<unk>" if name == "fuyu" else "<|pad|>"
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokens_of(name), pad_token=pad, eos_token=str(end))
    wrapped.save_pretrained(folder)
    if name == "llava":
        processor = {"image_processor_type": "SiglipImageProcessor", "size": {"height": SIDE, "width": SIDE}}
    else:
        processor = {"image_processor_type": PROCESSORS[name]} | MADE[name][3]
    (folder / "preprocessor_config.json").write_text(json.dumps(GREY | processor))
    return folder
