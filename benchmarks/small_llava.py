"""A LLaVA as Mantis-CLIP is built, 576 tokens a picture, small enough that a CPU trains it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mantis_lite import tiny

TOKENS, SIDE, PATCH = 576, 336, 14
"""Of a picture; pixels of its side, and of a patch's."""
WORDS = 1024
"""Of the vocabulary that is learned from texts: a word of English is about two tokens."""


def make(
    folder: Path,
    texts: Sequence[str] = (),
    width: int = 128,
    mlp: int = 4096,
    layers: int = 1,
    words: int = WORDS,
) -> Path:
    """Save random weights as a checkpoint is published.

    Its tokenizer is learned from `texts`, with so many words in it, or else Tiny Mantis'.
    """
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    tokenizer = _learned(texts, words) if texts else _tiny()
    heads = max(1, width // 64)
    text = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 2),
        max_position_embeddings=1 << 17,
    )
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=SIDE, patch_size=PATCH),
        text_config=text,
        image_token_index=tokenizer.token_to_id("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    crop = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"} | crop))
    (folder / "tokenizer_config.json").write_bytes((tiny.CHECKPOINT / "tokenizer_config.json").read_bytes())
    return folder


def _tiny() -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tiny.CHECKPOINT / "tokenizer.json"))


def _learned(texts: Sequence[str], words: int) -> Any:
    from tokenizers import Tokenizer, pre_tokenizers, trainers

    tokenizer = _tiny()
    special = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    learning: dict[str, Any] = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=words, **learning))
    return Tokenizer.from_str(tokenizer.to_str())  # until it is read again it names special tokens by their old ids
