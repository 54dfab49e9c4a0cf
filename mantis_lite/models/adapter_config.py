"""An adapter's settings, read as data: what a LoRA needs, of known kinds and sizes, and nothing that PEFT would act on.

PEFT's own reader takes every key it knows, among them the names of modules to import and of files to unpickle.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import RecipeError, one_line
from .small_files import read_json
from .weights import open_tensors

MAX_RANK = 1024
"""Of an adapter: 64 is large, and each layer gets matrices of it before a tensor is looked at."""
MAX_NAMES = 10_000
"""Modules, or patterns of them, that one setting lists."""
PREFIX = "base_model.model."  # what PEFT puts before a module's name
A, B = re.compile(r"\.lora_(?:embedding_)?A(?:\.|$)"), re.compile(r"\.lora_(?:embedding_)?B(?:\.|$)")
OWN = re.compile(r"\.lora_|\.trainable_tokens_")
REMEDY = "Only the settings of plain LoRA and DoRA are read: take the adapter as it was trained, or do without it."

Name = Annotated[str, Field(max_length=1000)]
Names = Annotated[list[Name], Field(max_length=MAX_NAMES)]
Rank = Annotated[int, Field(gt=0, le=MAX_RANK)]
Scale = Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)]
Indices = Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=MAX_NAMES)]


class _Settings(BaseModel):
    """The keys of a LoRA and what may stand in each."""

    model_config = ConfigDict(extra="ignore", strict=True)

    peft_type: Literal["LORA"]
    peft_version: Name | None = None
    task_type: Literal["CAUSAL_LM", "SEQ_CLS", "SEQ_2_SEQ_LM", "FEATURE_EXTRACTION"] | None = None
    base_model_name_or_path: Name | None = None
    revision: Name | None = None
    inference_mode: bool = False
    r: Rank = 8
    lora_alpha: Scale = 8
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Annotated[str, Field(max_length=1_000_000)] | Names | None = None
    exclude_modules: Name | Names | None = None
    layers_to_transform: Annotated[int, Field(ge=0)] | Indices | None = None
    layers_pattern: Name | Names | None = None
    modules_to_save: Names | None = None
    trainable_token_indices: Indices | dict[Name, Indices] | None = None
    rank_pattern: Annotated[dict[Name, Rank], Field(max_length=MAX_NAMES)] = {}
    alpha_pattern: Annotated[dict[Name, Scale], Field(max_length=MAX_NAMES)] = {}
    init_lora_weights: bool | Literal["gaussian", "pissa", "olora", "orthogonal"] = True
    fan_in_fan_out: Literal[False] = False
    bias: Literal["none"] = "none"
    use_rslora: bool = False
    use_dora: bool = False


def read_settings(file: Path) -> dict[str, Any]:
    """The settings in an adapter_config.json, for peft's LoraConfig, which thinks of nothing beyond them.

    Keys of other methods may be there where they are off, as PEFT writes them. Raises RecipeError.
    """
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        remedy = "Name a folder with an adapter, as PEFT saves it."
        raise RecipeError(f"{file}: cannot be read: {one_line(error)}\n  {remedy}") from None
    if (kind := config.get("peft_type")) != "LORA":
        raise RecipeError(f"{file}: peft_type is {kind}\n  Only LORA is taken, DoRA included.")
    defaults = {"auto_mapping": None, "runtime_config": {"ephemeral_gpu_offload": False}} | LoraConfig().to_dict()
    for key, value in config.items():
        if key not in _Settings.model_fields and value and value != defaults.get(key):
            raise RecipeError(f"{file}: {key} is {one_line(ValueError(repr(value)))[:80]}\n  {REMEDY}")
    try:
        settings = _Settings.model_validate(config)
    except ValidationError as error:
        first = error.errors()[0]
        found = repr(first["input"])[:80]
        raise RecipeError(f"{file}: {first['loc'][0]} is {found}: {first['msg'].lower()}\n  {REMEDY}") from None
    for key in ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern"):
        value = getattr(settings, key) or ()
        for pattern in [value] if isinstance(value, str) else value:
            if not _is_quick(pattern):
                raise RecipeError(f"{file}: {key} has a pattern that may take for ever: {pattern[:80]!r}\n  {REMEDY}")
    return settings.model_dump(exclude_unset=True, exclude={"peft_version"})


def check_tensors(file: Path, settings: dict[str, Any]) -> None:
    """Look at the names, kinds and shapes of an adapter's tensors, of which none is read. Raises RecipeError.

    What of them fits the base model, only the loaded one tells.
    """
    again = "Take the adapter as it was trained."
    with open_tensors(file) as opened:
        shapes = {key: (opened.get_slice(key).get_shape(), opened.get_slice(key).get_dtype()) for key in opened.keys()}
    if not shapes:
        raise RecipeError(f"{file}: holds no tensors\n  {again}")
    ranks, pairs = {settings.get("r", 8), *settings.get("rank_pattern", {}).values()}, defaultdict[str, set[int]](set)
    for key, (shape, kind) in shapes.items():
        if not key.startswith(PREFIX):
            raise RecipeError(f"{file}: {key[:80]!r} is no name of an adapter's tensor\n  {again}")
        if kind not in ("F32", "F16", "BF16"):
            raise RecipeError(f"{file}: {key} is of {kind}, and no floating point number\n  {again}")
        if not OWN.search(key) and not any(f".{module}." in key for module in settings.get("modules_to_save") or ()):
            # PEFT would put it in the place of the base's own.
            raise RecipeError(f"{file}: {key} is a whole weight, which modules_to_save does not name\n  {again}")
        for at, half in enumerate((A, B)):
            if half.search(key) and len(shape) > at:
                pairs[half.sub("|", key)] |= {shape[at], -at - 1}
    for layer, found in pairs.items():
        if not {-1, -2} <= found:
            raise RecipeError(f"{file}: {layer.partition('|')[0]} has one half of a LoRA\n  {again}")
        if len(found) > 3 or not found & ranks:
            sizes = " and ".join(str(size) for size in sorted(found) if size >= 0)
            raise RecipeError(
                f"{file}: {layer.partition('|')[0]} is of rank {sizes}, by its settings {sorted(ranks)}\n  {again}"
            )


def _is_quick(pattern: str) -> bool:
    """Whether a regular expression is none of the known slow kinds: a group that repeats, or many repeats in a row."""
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    plain = re.sub(r"\\.|\[[^\]]*\]", "x", pattern)
    repeats = max(len(re.findall(r"[*+{]", part)) for part in plain.split("|"))
    perhaps = len(re.findall(r"[^(]\?", plain))
    return not re.search(r"\)[*+{]", plain) and repeats <= 3 and perhaps <= 20 * (1 + plain.count("|"))
