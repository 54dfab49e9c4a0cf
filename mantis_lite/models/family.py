"""What is to be said of a kind of model, and which kinds there are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..data.template import Template
from ..data.vision import Size, Vision
from ..recipe import MediaRecipe, Part

LLAMA_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""The linear layers of a Llama and its kin: Mistral, Qwen, and Idefics2's connector."""

SIGLIP_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
"""The linear layers of a CLIP or SigLIP tower."""


def sound(config: dict[str, Any]) -> None:
    """Nothing: transformers reads the published config as it was meant."""


@dataclass(frozen=True)
class Projection:
    """A projector that can be run apart from its tower: the rows that it reads of a picture, and the run itself.

    `run` takes the model within its class for a task, and what the tower gave of N pictures of a shape (N, P, W), or
    of N tiles; it returns (N, T, H) for their T placeholders.
    """

    rows: Callable[[Vision, Size], int]
    run: Callable[[Any, Tensor], Tensor]


class Processing(NamedTuple):
    """Settings of transformers' own processor by which it makes the same of pictures, and of its image processor."""

    processor: dict[str, Any]
    images: dict[str, Any]


@dataclass(frozen=True)
class Family:
    """Everything that is particular to a kind of model; CONTRIBUTING.md says how to add one.

    `templates` are those that prompt.template=auto chooses from, and `hub` those of the models' own pages, for "hub".
    `parts` gives the modules of each part, in the names
    of the loaded model; a part that is missing does not exist. `targets` are the linear layers that an adapter is laid
    on by default, and `tower_layers` a regular expression, within the vision tower, of the layers whose output is read.
    `vision` says how pictures enter, and `processor` how a plain client's processor is told to let them in the same.
    `splits` is whether media.image_splitting means anything to it, `caps` the names
    that media.max_image_size may take, and `scales` whether `vision` keeps to that size itself, so that pictures come
    to it as they are. `mend` corrects a published config.json, in place, that today's transformers would misread, and
    says what it did. `adapt` makes a loaded model read what `Vision.batch` gives. `projection` is how a projector
    trains on kept features of the tower, where it can.
    """

    model_types: tuple[str, ...]
    templates: tuple[Template, ...]
    parts: Mapping[Part, tuple[str, ...]]
    targets: Mapping[Part, tuple[str, ...]]
    processor: Callable[[PreTrainedConfig, MediaRecipe], Processing]
    vision: Callable[[PreTrainedConfig, BaseImageProcessor, MediaRecipe, Collection[str]], Vision]
    adapt: Callable[[PreTrainedModel, BaseImageProcessor], None]
    hub: tuple[Template, ...] = ()
    tower_layers: Callable[[PreTrainedConfig], str] = lambda config: ""
    splits: bool = False
    caps: Collection[str] = ()
    scales: bool = False
    mend: Callable[[dict[str, Any]], str | None] = sound
    projection: Projection | None = None
