"""Models of Mantis' size with random weights, made where they train, and rows to train them on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

from mantis_lite import tiny

from . import card

BASES = {"llava": "Mantis-8B-siglip-llama3", "idefics2": "Mantis-8B-Idefics2"}
IDEFICS2_TOKENS = ["<s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"]
WORDS = ("red", "circle", "image", "green", "square", "the", "many", "is", "with", "star")
"""Each is one token of Tiny Mantis' behind a blank, and the first also without."""
LAYER = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL: dict[str, dict[str, Any]] = {
    "text_config": LAYER | {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512},
    "vision_config": LAYER,
    "perceiver_config": {
        "hidden_size": 64,
        "resampler_depth": 1,
        "resampler_n_heads": 2,
        "resampler_head_dim": 32,
        "num_key_value_heads": 1,
    },
}
SMALL_PICTURES = {"llava": {"height": 112, "width": 112}, "idefics2": {"shortest_edge": 56, "longest_edge": 112}}
"""What is smaller in a model that a CPU trains in a second."""


@dataclass(frozen=True)
class Place:
    """Where cases work: a `folder` of their own; with `small` shapes; at `full` length; with a profiler at a step."""

    folder: Path
    small: bool = False
    full: bool = False
    profile: bool = False

    def either(self, large: int, small: int) -> int:
        """A number of the published shapes, or the one that stands for it on a CPU."""
        return small if self.small else large


def small_files(family: str, folder: Path, small: bool = False) -> Path:
    """Write a model's config and processor as published, with Tiny Mantis' tokenizer; it has no weights."""
    from tokenizers import Tokenizer

    from mantis_lite.memory.bases import FOLDER

    if folder.is_dir():
        return folder
    folder.mkdir()
    facts = json.loads((FOLDER / f"TIGER-Lab--{BASES[family]}.json").read_text())
    config, processor = facts["config"], facts["preprocessor"]
    if small:
        config |= {part: config[part] | SMALL[part] for part in SMALL.keys() & config.keys()}
        processor["size"] = SMALL_PICTURES[family]
    if small and family == "llava":
        config["vision_config"]["image_size"] = 112
    config["text_config"]["max_position_embeddings"] = 1 << 20  # the longest rows go far beyond what was published
    tokenizer = Tokenizer.from_file(str(tiny.CHECKPOINT / "tokenizer.json"))
    named = json.loads((tiny.CHECKPOINT / "tokenizer_config.json").read_text())
    if family == "idefics2":
        tokenizer.add_special_tokens(IDEFICS2_TOKENS)
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<s>", "eos_token": "<end_of_utterance>"}
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {"config": config, "preprocessor_config": processor, "tokenizer_config": named}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Let the package find random weights in a folder without any: drawn on the card, 8B in a second or two."""
    from transformers import AutoModelForImageTextToText

    with patch.object(AutoModelForImageTextToText, "from_pretrained", _weights):
        yield


def _weights(
    name: str, config: Any, dtype: Any, quantization_config: Any = None, device_map: Any = None, **rest: Any
) -> Any:
    """What `from_pretrained` gives with `output_loading_info`."""
    from transformers import AutoModelForImageTextToText

    kind = AutoModelForImageTextToText._model_mapping[type(config)]
    model = drawn(kind, config, dtype, quantization_config, device_map)
    card.clean()  # of the weights that were put into 4 bits: with a file they are never whole on the card
    model.name_or_path = model.config.name_or_path = name  # PEFT asks the hub for a model without a folder
    return model, {"missing_keys": (), "unexpected_keys": ()}


def drawn(kind: Any, config: Any, dtype: Any, quantization: Any = None, device_map: Any = None) -> Any:
    """A model of this class with seeded weights, put into 4 bits as those of a file would be."""
    import torch

    torch.manual_seed(0)
    with torch.device(card.device()):
        model = kind._from_config(config, dtype=dtype)
    if quantization is None:
        return model
    weights, model = model.state_dict(), None
    return kind.from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, quantization_config=quantization, device_map=device_map
    )


def text_rows(model: Path, file: Path, lengths: Sequence[int], supervised: float = 1.0) -> Path:
    """Write chat rows of seeded words, as many tokens long, the last `supervised` share of them an answer."""
    from mantis_lite.data.paths import MediaFolder
    from mantis_lite.data.schema import parse
    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.recipe import ModelRecipe
    from mantis_lite.recipe_file import load_recipe

    random = np.random.default_rng(0)
    recipe = load_recipe("chat", [f"model={model}", f"data={file}"])
    encoder = open_checkpoint(ModelRecipe(name=str(model))).encoder(recipe)

    def row(asked: int, answered: int) -> dict[str, Any]:
        said = (" ".join([WORDS[0], *random.choice(WORDS, count - 1)]) for count in (asked, answered))
        roles = ("user", "assistant")
        return {"messages": [{"role": role, "content": words} for role, words in zip(roles, said, strict=True)]}

    around = len(encoder.encode(parse(row(100, 100), "row", MediaFolder(file.parent)))) - 200
    lines = []
    for length in lengths:
        words = max(2, length - around)
        answered = max(1, min(words - 1, round(length * supervised)))
        lines.append(json.dumps(row(words - answered, answered)))
    file.write_text("\n".join(lines) + "\n")
    return file
