"""Pictures through a frozen tower once: what is kept of each, what may be, and how the model reads it in training."""

from __future__ import annotations

import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from .. import __version__
from ..data import media
from ..data.encode import Encoder
from ..data.features import SIZE, Features
from ..data.sample import Sample
from ..data.vision import Pixels, Size
from ..errors import RecipeError, SampleError
from ..recipe import Recipe
from .adapters import base_of, part_of
from .cacheable import Place, Plans, feature_bytes, projects, shown
from .checkpoint import Checkpoint
from .kernels import used_kernels
from .load import loader_workers, placed
from .precision import weights_dtype

GRID = "image_grid_thw"
"""What positions go by where a token has several: a picture's rows and columns of patches."""

ROOM = 0.9
"""How much of what is free on a disk or in the host's memory may be filled."""

MAKERS = ("torch", "transformers", "numpy", "pillow", "av", "bitsandbytes")
"""Packages whose version may change a picture's features."""

Opened = tuple[Size, Pixels]
"""A decoded picture: its size, and what the model takes of it."""


def require_encoder_outputs() -> None:
    """Raises RecipeError where transformers' models do not take features in place of pictures."""
    found = version("transformers")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < (5, 23):
        raise RecipeError(
            f"memory.vision_cache: needs transformers 5.23 or newer, and this is {found}\n"
            "  Install it: pip install -U 'transformers>=5.23,<6'; or leave memory.vision_cache out."
        )


class VisionCache:
    """The features of a run's pictures: `encoder` writes samples with them in place of pixels, once `fill` is done.

    `vision` makes the model's inputs of them. `trained` are the parts that learn. Raises RecipeError where nothing can
    be kept of such a model.
    """

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, encoder: Encoder, trained: Collection[str]) -> None:
        self.checkpoint, self.recipe, self.pixels = checkpoint, recipe, encoder
        self.family, self.config = checkpoint.family, checkpoint.config
        self.projects = projects(self.family, self.config.model_type, trained)
        self.dtype = weights_dtype(recipe)
        self.bytes_of = feature_bytes(checkpoint, recipe, encoder.vision, trained)
        self.kept_from = {"vision_tower"} if self.projects else {"vision_tower", "projector"}
        self.features = Features()
        self.encoder = replace(encoder, features=self.features)
        self.vision = replace(encoder.vision, batch=self._batch)

    def fill(self, model: PreTrainedModel | PeftModel, plans: Plans, broken: Callable[[SampleError], None]) -> str:
        """Compute what is not kept yet, and let the model read it; returns what was done, in words.

        `model` is as it trains, where it computes. `broken` is told of a picture that breaks when decoded. Raises
        RecipeError where there is no room.
        """
        base = base_of(model)
        if self.recipe.memory.vision_cache == "disk":
            self.features.keep_on_disk(self._facts(base))
        places = shown(plans, self.pixels, self.features.key, broken)
        missing = {key: place for key, place in places.items() if self.features.get(key) is None}
        self._refuse_too_large(missing.values())
        with _evaluating(base), torch.no_grad():
            for key, found in self._opened(missing, plans):
                if isinstance(found, SampleError):
                    broken(found)
                    del places[key], missing[key]
                else:
                    self.features.put(key, self._compute(base, *found))
        base.model.register_forward_pre_hook(self._read, with_kwargs=True)
        total = sum(self.bytes_of(place.size) for place in places.values())
        where = self.features.folder or "memory"
        return f"vision cache: {len(places):,} pictures, {len(missing):,} of them new, {_megabytes(total)} in {where}"

    def unread(self, model: nn.Module) -> list[nn.Parameter]:
        """The parameters that training does not read; but for the model's first, which tells where the model is."""
        named = list(model.named_parameters())[1:]
        return [parameter for name, parameter in named if part_of(name, self.family) in self.kept_from]

    def _facts(self, base: PreTrainedModel) -> dict[str, Any]:
        """Everything besides a picture's content that its features depend on."""
        encoder, settings = self.pixels, self.recipe.media
        makers = [*MAKERS, "simplejpeg"] if settings.backend == "fast" else MAKERS
        weights = sha256()
        for name, value in base.state_dict().items():
            if part_of(name, self.family) in self.kept_from:
                weights.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
                weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return {
            "what": "features of pictures that mantis_lite keeps; it makes them anew where they are deleted",
            "model": self.config.to_json_string(),
            "weights": weights.hexdigest(),
            "kept": "what the tower gives to the projector" if self.projects else "what the projector gives",
            "precision": [str(self.dtype), _autocast(base.device.type)],
            "kernels": used_kernels(self.recipe),
            "processor": self.checkpoint.image_processor.to_json_string(),
            "media": [settings.image_splitting, settings.max_image_size, encoder.max_image_size, encoder.vision.facts],
            "pictures": [media.RULES, settings.backend],
            "versions": {"mantis_lite": __version__} | {name: version(name) for name in makers},
        }

    def _refuse_too_large(self, missing: Collection[Place]) -> None:
        needed, kind = sum(self.bytes_of(place.size) for place in missing), self.recipe.memory.vision_cache
        folder = self.features.folder
        free = psutil.virtual_memory().available if folder is None else shutil.disk_usage(folder).free
        if needed <= ROOM * free:
            return
        found = f"{kind}, and the features of {len(missing):,} pictures take {_megabytes(needed)}"
        room = (
            f"{folder or 'the memory of this machine'} has {_megabytes(free)} free, of which {ROOM:.0%} may be filled"
        )
        other = "let MANTIS_LITE_CACHE name a folder elsewhere" if folder else "set it to disk"
        raise RecipeError(f"memory.vision_cache: {found}; {room}\n  Leave it out, or {other}.")

    def _opened(self, missing: dict[str, Place], plans: Plans) -> Iterator[tuple[str, Opened | SampleError]]:
        """Missing pictures, decoded in workers where there is a GPU; or what is wrong with one."""
        together: defaultdict[tuple[int, int], list[tuple[str, Place]]] = defaultdict(list)
        for key, place in missing.items():
            together[place.plan, place.sample].append((key, place))
        loader: DataLoader = DataLoader(
            list(together.values()),  # type: ignore[arg-type]
            collate_fn=_Open(self.pixels, plans),
            num_workers=loader_workers(),
        )
        for found in loader:
            yield from found

    def _compute(self, base: Any, size: Size, pixels: Pixels) -> Pixels:
        """One picture alone, so that what is kept does not depend on the pictures beside it."""
        features = {SIZE: torch.tensor(size)}
        if GRID in pixels:
            features[GRID] = torch.from_numpy(pixels[GRID])
        if self.projects:  # of a picture's views each alone, as they may differ in shape
            made = {name: self._through_tower(base, {name: view}) for name, view in pixels.items()}
        else:
            seen = base.model.get_image_features(**self._placed(pixels, base), return_dict=True)
            made = {"output": torch.cat(list(seen.pooler_output)).flatten(0, -2)}
            if deeper := getattr(seen, "deepstack_features", None):
                made["deepstack"] = torch.stack([torch.cat(list(layer)) for layer in deeper])
        return features | {name: value.to("cpu", self.dtype).contiguous() for name, value in made.items()}

    def _placed(self, pixels: Pixels, base: Any) -> dict[str, Any]:
        return placed(self.pixels.vision.batch([pixels]), base)

    def _through_tower(self, base: Any, pixels: Pixels) -> Tensor:
        """What the tower gives to the projector (N, P, W)."""
        found: list[Tensor] = []
        (path,) = self.family.parts["projector"]
        with base.get_submodule(path).register_forward_pre_hook(lambda _, given: found.append(given[0])):
            base.model.get_image_features(**self._placed(pixels, base), return_dict=True)
        return torch.cat(found)

    def _batch(self, pictures: Sequence[Pixels]) -> dict[str, Any]:
        """The model's inputs from the features of all pictures of a pack, as plain dicts of tensors.

        `_read` makes of them what a model takes: that is a dict which cannot be updated, as copying to a GPU does.
        """
        if self.projects:
            # By name, as a file does not keep their order.
            views = [value for kept in pictures for name, value in sorted(kept.items()) if name not in (SIZE, GRID)]
            return {"mm_encoder_outputs": {"image": {"last_hidden_state": views}}}
        image: dict[str, Any] = {"pooler_output": [kept["output"] for kept in pictures]}
        if "deepstack" in pictures[0]:
            image["deepstack_features"] = list(zip(*(kept["deepstack"] for kept in pictures), strict=True))
        return {"mm_encoder_outputs": {"image": image}}

    def _read(self, model: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Before the model's forward pass: a batch's features as it takes them, through the projector where it trains.

        What the model's own generation hands on is left alone.
        """
        kept = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if type(kept) is not dict:
            return None
        if self.projects:
            kept = {"pooler_output": self._projected(model, kept["last_hidden_state"])}
        return args, kwargs | {"mm_encoder_outputs": {"image": BaseModelOutputWithDeepstackFeatures(**kept)}}

    def _projected(self, model: Any, views: Sequence[Tensor]) -> list[Tensor]:
        """What the projector makes of the tower's output for each view (N, P, W), those of a shape together."""
        assert self.family.projection
        alike: defaultdict[int, list[int]] = defaultdict(list)
        for at, view in enumerate(views):
            alike[view.shape[1]].append(at)
        found: dict[int, Tensor] = {}
        for members in alike.values():
            made = self.family.projection.run(model, torch.cat([views[at] for at in members]))
            found |= zip(members, made.split([len(views[at]) for at in members]), strict=True)
        return [found[at].flatten(0, 1) for at in range(len(views))]


class _Open:
    """A sample's pictures that are asked for -> their pixels, or what is wrong with each that breaks."""

    def __init__(self, encoder: Encoder, plans: Plans) -> None:
        self.encoder, self.plans = encoder, plans

    def __call__(self, batches: list[list[tuple[str, Place]]]) -> list[tuple[str, Opened | SampleError]]:
        (asked,) = batches
        _, first = asked[0]
        try:
            sample = self.encoder.frames.lay_out(self.plans[first.plan][0][first.sample])
            return self._open(sample, asked)
        except SampleError as error:
            if len(asked) == 1:
                return [(asked[0][0], error)]
            return [found for each in asked for found in self([[each]])]  # which of them it is

    def _open(self, sample: Sample, asked: list[tuple[str, Place]]) -> list[tuple[str, Opened | SampleError]]:
        images = [sample.images[place.picture] for _, place in asked]
        vision = self.encoder.vision
        pictures = self.encoder.frames.see(sample, self.encoder.max_image_size, vision.enough, images)
        return [(key, (p.size, vision.pixels(p))) for (key, _), p in zip(asked, pictures, strict=True)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _autocast(device: str) -> str | None:
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
