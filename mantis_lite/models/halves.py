"""A language model and a vision tower as they are published, and the small files of the LLaVA that is made of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from ..errors import RecipeError
from .checkpoint import commit_of, find_folder, public_name, read_config, read_tokenizer
from .small_files import AS_PUBLISHED, read_small, refuse_hostile
from .weights import files_of

KINDS = {
    "llm": ("llama", "mistral"),
    "vision": ("clip", "clip_vision_model", "siglip", "siglip_vision_model"),
}
"""What either may be of; a whole CLIP or SigLIP gives its tower."""

FILES = {
    "llm": ["*.json", "tokenizer.model"],
    "vision": ["config.json", "preprocessor_config.json", "*.safetensors.index.json"],
}
NEEDED = {"llm": ("config.json",), "vision": ("config.json", "preprocessor_config.json")}
TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
"""What transformers reads beside a tokenizer, and names its special tokens."""
ADDED = ("<image>", "<|pad|>")
"""What stands for a picture, and what fills rows up; as published, no tokenizer calls the latter its padding."""

SAFE = (
    "Only safetensors are read: write it behind @ if a revision has them, as refs/pr/1; or load the model by "
    "transformers, save it by save_pretrained, and name that folder."
)


@dataclass(frozen=True)
class Half:
    """One of the two that are put together: the recipe's key, its name, and the folder of its small files."""

    key: str
    name: str
    revision: str | None
    folder: Path

    @property
    def kind(self) -> str:
        return str(read_small(self.folder / "config.json").get("model_type"))

    @property
    def public_name(self) -> str:
        return public_name(self.name)

    @property
    def public(self) -> str:
        """What a recipe that others may read says of it."""
        commit = commit_of(self.folder, self.revision)
        return f"{self.public_name}@{commit}" if commit else self.public_name

    def weights(self) -> list[Path]:
        """The files of its weights, fetched where they are not here. Raises RecipeError."""
        return files_of(f"model.{self.key}", self.name, commit_of(self.folder, self.revision), self.folder, SAFE)

    def refuse(self, found: str, remedy: str = AS_PUBLISHED) -> RecipeError:
        return RecipeError(f"model.{self.key}: {self.name} {found}\n  {remedy}")


def named(text: str) -> tuple[str, str | None]:
    """The name and revision of a half, written `name` or `name@revision`."""
    name, _, revision = (text, "", "") if Path(text).is_dir() else text.partition("@")
    return name, revision or None


def open_half(key: str, text: str) -> Half:
    """A half by `name` or `name@revision`, refused before a weight of it is read. Raises RecipeError."""
    name, revision = named(text)
    half = Half(key, name, revision, find_folder(f"model.{key}", name, revision, FILES[key]))
    refuse_hostile(half.folder)
    for file in NEEDED[key]:
        if not (half.folder / file).is_file():
            raise half.refuse(f"has no {file}")
    if half.kind not in KINDS[key]:
        raise half.refuse(f"is of type {half.kind}", f"Name one of these: {', '.join(KINDS[key])}.")
    if read_small(half.folder / "config.json").get("quantization_config"):
        raise half.refuse("is saved in few bits", "Name the original in 16 bits.")
    return half


def small_files(half: Half) -> list[Path]:
    """Those that what is put together goes by."""
    if half.key == "vision":
        return [half.folder / name for name in NEEDED["vision"]]
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", *TOKENIZER)
    return [half.folder / name for name in names if (half.folder / name).is_file()]


def write_small_files(llm: Half, tower: Half, folder: Path) -> None:
    folder.mkdir()
    tokenizer, ids, _ = tokenizer_of(llm)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in TOKENIZER:
        if (llm.folder / name).is_file():
            _write_json(folder / name, _with_added(name, read_small(llm.folder / name), ids))
    if (llm.folder / "tokenizer.model").is_file():
        shutil.copyfile(llm.folder / "tokenizer.model", folder / "tokenizer.model")
    shutil.copyfile(tower.folder / "preprocessor_config.json", folder / "preprocessor_config.json")
    config = _config(llm, tower, ids)
    _write_json(folder / "config.json", config)
    said = config["text_config"]
    if (llm.folder / "generation_config.json").is_file():
        said = said | read_small(llm.folder / "generation_config.json")
    ends = {key: said[key] for key in ("bos_token_id", "eos_token_id") if key in said}
    _write_json(folder / "generation_config.json", ends | {"pad_token_id": config["pad_token_id"]})


def tokenizer_of(llm: Half) -> tuple[Tokenizer, dict[str, int], list[int]]:
    """The language model's tokenizer with what Mantis adds, the ids of that, and those of them that are new."""
    tokenizer = read_tokenizer(llm.folder)
    known = tokenizer.get_vocab()
    words, last = read_config(llm.folder).vocab_size, max(known.values())
    if last >= words:
        raise llm.refuse(f"has {words:,} embeddings, and its tokenizer an id {last:,}")
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in ADDED])
    ids = {token: tokenizer.get_vocab()[token] for token in ADDED}
    return tokenizer, ids, [number for token, number in ids.items() if token not in known]


def _with_added(name: str, settings: dict[str, Any], ids: dict[str, int]) -> dict[str, Any]:
    """The settings of a tokenizer that transformers reads, with what Mantis adds."""
    if name == "added_tokens.json":
        return settings | ids
    listed = [token for token in settings.get("additional_special_tokens") or () if token not in ADDED]
    settings = settings | {"additional_special_tokens": [*listed, *ADDED]}
    if "added_tokens_decoder" in settings:
        plain = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
        new = {str(number): {"content": token, **plain, "special": True} for token, number in ids.items()}
        settings["added_tokens_decoder"] = settings["added_tokens_decoder"] | new
    return settings


def _config(llm: Half, tower: Half, ids: dict[str, int]) -> dict[str, Any]:
    """The published config.json; of the language model its own, to the letter, as its keys have other names today."""
    text = read_small(llm.folder / "config.json")
    known, whole = read_config(llm.folder), read_config(tower.folder)
    seen = getattr(whole, "vision_config", whole).to_diff_dict()
    image, pad = (ids[token] for token in ADDED)
    rows = max(known.vocab_size, image + 1, pad + 1)
    of_file = ("transformers_version", "torch_dtype", "dtype", "architectures", "_name_or_path")
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "ignore_index": -100,
        "image_token_index": image,
        "model_type": "llava",
        "pad_token_id": pad,
        "projector_hidden_act": "gelu",
        # The name is what the original code tells Llama-3's template by.
        "text_config": text | {"_name_or_path": llm.public_name, "vocab_size": rows},
        "tie_word_embeddings": known.tie_word_embeddings,
        "torch_dtype": text.get("torch_dtype") or text.get("dtype") or "float32",
        "vision_config": {key: value for key, value in seen.items() if key not in of_file},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "vocab_size": rows,
    }


def _write_json(file: Path, settings: dict[str, Any]) -> None:
    file.write_text(json.dumps(settings, indent=2) + "\n")
