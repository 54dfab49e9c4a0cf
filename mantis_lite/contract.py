"""What lies beside everything that was trained, `mantis_lite.json`: how it is to be used, and is held to."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .changes import changes
from .conflicts import CLIP_KEYS
from .data.encode import Encoder
from .data.prepare import Prepared
from .errors import RecipeError, one_line
from .files import write_whole
from .models.checkpoint import Checkpoint, public_name
from .models.small_files import read_json
from .models.upstream import WEIGHTS
from .models.weights import fingerprint, weight_files
from .recipe import Part, Problem, Recipe, Task

NAME = "mantis_lite.json"

Target = Literal["full", "dequantized"]
"""What an adapter is merged into: its base's weights, or what they are once they have been in 4 bits."""

DTYPES: dict[torch.dtype, Literal["float32", "bfloat16", "float16"]] = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}

PROCESSING = (
    *("do_resize", "size", "crop_size", "do_center_crop", "resample", "do_rescale", "rescale_factor", "do_normalize"),
    *("image_mean", "image_std", "do_convert_rgb", "do_image_splitting", "max_image_size", "patch_size"),
    *("temporal_patch_size", "merge_size", "min_pixels", "max_pixels", "do_pad"),
)
"""What an image processor may be told; what it is not told is left out."""

PACKAGES = (
    *("mantis_lite", "torch", "transformers", "peft", "trl", "bitsandbytes", "liger-kernel", "tokenizers"),
    *("safetensors", "pillow", "av", "numpy"),
)


class _Fields(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Base(_Fields):
    """The model that was trained on: what it is called elsewhere, its commit on the hub, and its weights in short.

    One that was put together is called by both names, " + " between them.
    """

    name: str
    revision: str | None = None
    weights: str

    @property
    def names(self) -> list[str]:
        return self.name.split(" + ")


class Facts(_Fields):
    """What a prompt and its pictures come to, and so must stay as it was in training."""

    family: str
    vocabulary: str
    """A hash of every token and its id."""
    template: str
    template_hash: str
    """Of everything that it writes, the system's words as well."""
    pictures: str
    """What their tokens and patches are counted by."""
    backend: str
    processor: dict[str, Any]
    frames: dict[str, Any]
    """Which frames of a clip are taken, and what is said of each."""


class Scores(_Fields):
    """The labels of a score head, in the order of its scores, and whether each is read at a token of its own."""

    problem: Problem
    names: list[str]
    tokens: bool


class Weighed(_Fields):
    """One of several adapters that were combined: the run that it is of, and its weight."""

    run: str
    weight: float


class Data(_Fields):
    """What was trained on: its rows, counted and by a hash of all that is in them."""

    rows: int
    held_out: int
    fingerprint: str


class Contract(_Fields):
    """How what lies beside it is to be used; `recipe` names no path of the machine that it was trained on."""

    format: Literal[1]
    kind: Literal["adapter", "model", "merged"]
    merged: Target | None = None
    """What a merged model's adapter was added to."""
    combined: list[Weighed] = []
    """The adapters that a merged model is made of, where they are several or weighed."""
    combine: str | None = None
    """How they were combined: one of PEFT's ways."""
    run: str = Field(pattern=r"^[0-9a-f]{16}$")
    """The same for whatever comes of one recipe, base and data."""
    task: Task
    method: str
    base: Base
    facts: Facts
    labels: Scores | None = None
    quantized: list[Part]
    dtype: Literal["float32", "bfloat16", "float16", "unknown"]
    data: Data | None
    recipe: dict[str, Any]
    metrics: dict[str, float | None] = {}
    agreement: dict[str, int | float | str] | None = None
    """How a merged model agrees with its adapter (`agreement.py`)."""
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Lay it beside what it is about."""
        write_whole(folder / NAME, (json.dumps(self.model_dump(mode="json"), indent=2) + "\n").encode())

    @property
    def made(self) -> tuple[Any, ...]:
        """What tells it from all else that was made."""
        return self.run, self.kind, self.merged, self.combine, tuple((part.run, part.weight) for part in self.combined)

    def refuse_contradictions(self, name: str, adapter: bool, recipe: Recipe, quantized: list[Part]) -> None:
        """Raise RecipeError where the contract says one thing, and what lies beside it or its own recipe another."""
        head = recipe.head.labels if recipe.task == "classify" else None
        said: dict[str, Any] = {
            "kind": self.kind == "adapter",
            "task": "chat" if self.task == "pretrain" else self.task,
            "labels": self.labels and self.labels.names,
        }
        found: dict[str, Any] = {"kind": adapter, "task": recipe.task, "labels": head}
        if self.kind == "adapter":  # else nothing is in few bits any more
            said["quantized"], found["quantized"] = self.quantized, quantized
        for key in said:
            if said[key] != found[key]:
                raise RecipeError(
                    f"{name}: its {NAME} says another {key} than its recipe or what lies beside it\n"
                    "  Take the folder as it was trained."
                )

    def refuse_others(self, name: str, checkpoint: Checkpoint, encoder: Encoder) -> None:
        """Raise RecipeError where prompts or pictures would come to something else than `name` was trained on."""
        for what, before, now in changes(self.facts.model_dump(), facts_of(checkpoint, encoder).model_dump()):
            raise RecipeError(
                f"{name}: was trained with {what} {before}, and here it is {now}\n"
                f"  Use it as it was trained: {NAME} beside it says how, and by which versions."
            )

    def refuse_another_base(self, name: str, checkpoint: Checkpoint) -> None:
        """Raise RecipeError where the weights are not those that `name` was trained on; fetches them where needed."""
        found = fingerprint(weight_files(checkpoint))
        if found != self.base.weights:
            at = f" at revision {self.base.revision}" if self.base.revision else ""
            own = f" at revision {checkpoint.commit}" if checkpoint.commit else ""
            raise RecipeError(
                f"{name}: was trained on {self.base.name}{at}, and the weights of {checkpoint.public_name}{own} are "
                "others\n  Set model (and model.revision) to that base; or, if it is the same model saved another way, "
                "model.any_base=true."
            )


def read_contract(folder: Path) -> Contract | None:
    """The contract in a folder, if there is one. Raises RecipeError for one that cannot be read."""
    file = folder / NAME
    if not os.path.lexists(file):
        return None
    try:
        return Contract.model_validate(read_json(file))
    except ValidationError as error:
        first = error.errors()[0]
        found = f"{'.'.join(map(str, first['loc']))}: {first['msg'].lower()}"
    except (OSError, ValueError) as error:
        found = one_line(error)
    raise RecipeError(
        f"{file}: cannot be read: {found}\n  Take it as it was written, or a newer mantis_lite."
    ) from None


def contract_of(
    kind: Literal["adapter", "model"],
    recipe: Recipe,
    checkpoint: Checkpoint,
    facts: Facts,
    prepared: Prepared,
    dtype: torch.dtype,
    metrics: Mapping[str, float | None],
) -> Contract:
    """The contract of what a run has trained."""
    base, held_out = _base(checkpoint), prepared.held_out
    digests = prepared.train.digest.tobytes() + (b"" if held_out is None else held_out.digest.tobytes())
    data = Data(
        rows=len(prepared.train),
        held_out=0 if held_out is None else len(held_out),
        fingerprint=sha256(digests).hexdigest()[:32],
    )
    public = public_recipe(recipe, checkpoint)
    of_run = json.dumps([base.model_dump(), data.model_dump(), public], sort_keys=True)
    return Contract(
        format=1,
        kind=kind,
        run=sha256(of_run.encode()).hexdigest()[:16],
        task=recipe.task,
        method=recipe.method,
        base=base,
        facts=facts,
        labels=_scores(labels.problem, labels.names, recipe) if (labels := prepared.labels) else None,
        quantized=recipe.quantized,
        dtype=DTYPES[dtype],
        data=data,
        recipe=public,
        metrics=dict(metrics),
        versions=versions(),
    )


def contract_of_adapter(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, folder: Path) -> Contract:
    """The contract of an adapter that came without one, trained elsewhere and as far as it shows."""
    weights = fingerprint([folder / WEIGHTS])
    return Contract(
        format=1,
        kind="adapter",
        run=weights[:16],
        task=recipe.task,
        method=recipe.method,
        base=_base(checkpoint),
        facts=facts_of(checkpoint, encoder),
        labels=_scores(recipe.head.problem, recipe.head.labels or (), recipe),
        quantized=recipe.quantized,
        dtype="unknown",
        data=None,
        recipe=public_recipe(recipe, checkpoint),
        versions=versions(),
    )


def facts_of(checkpoint: Checkpoint, encoder: Encoder) -> Facts:
    """What an encoder of a checkpoint makes of prompts and pictures, in short."""
    words = encoder.template.system if encoder.system is None else encoder.system
    written = replace(encoder.template, system=words)
    processor = checkpoint.image_processor
    told = {key: getattr(processor, key, None) for key in PROCESSING}
    return Facts(
        family=checkpoint.config.model_type,
        vocabulary=_hash(sorted(encoder.tokenizer.get_vocab().items())),
        template=encoder.template.name,
        template_hash=_hash(asdict(written)),
        pictures=f"{encoder.vision.facts} {encoder.max_image_size}",
        backend=encoder.frames.media.backend,
        frames={key: getattr(encoder.frames.media, key) for key in CLIP_KEYS} | {"gap": encoder.frames.gap},
        processor=json.loads(json.dumps({k: v for k, v in told.items() if v is not None}, default=dict)),
    )


def public_recipe(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """A recipe's settings as others may read them: of a path, the last name alone."""
    settings = recipe.model_dump(mode="json", exclude={"run_dir"})
    adapter, held_out = settings["model"]["adapter"], settings["data"]["eval"]
    model = checkpoint.public_model | {"adapter": adapter and public_name(adapter)}
    sources = [
        source | {key: source[key] and public_name(source[key]) for key in ("path", "media_dir")}
        for source in settings["data"]["sources"]
    ]
    data = {"sources": sources, "eval": public_name(held_out) if isinstance(held_out, str) else held_out}
    # Of TrainingArguments' own keys some are folders.
    train = {key: public_name(value) if _is_path(value) else value for key, value in settings["train"].items()}
    return settings | {"model": settings["model"] | model, "data": settings["data"] | data, "train": train}


def versions() -> dict[str, str]:
    """The packages at hand that numbers depend on."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _base(checkpoint: Checkpoint) -> Base:
    weights = fingerprint(weight_files(checkpoint))
    return Base(name=checkpoint.public_name, revision=checkpoint.commit, weights=weights)


def _scores(problem: Problem | None, names: Sequence[str], recipe: Recipe) -> Scores | None:
    if problem is None or recipe.task != "classify":
        return None
    return Scores(problem=problem, names=list(names), tokens=recipe.head.score == "special_tokens")


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and "/" in value


def _hash(value: Any) -> str:
    return sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:32]
