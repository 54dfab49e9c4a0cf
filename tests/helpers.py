"""A tiny LLaVA, a byte-level tokenizer, pictures and rows, all made from seeds; nothing is downloaded."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import BaseImageProcessor

from mantis_lite.data import template as templates
from mantis_lite.data.encode import Encoded, Encoder
from mantis_lite.data.template import Token, Wrap
from mantis_lite.data.vision import Vision
from mantis_lite.models.checkpoint import Checkpoint
from mantis_lite.recipe import Recipe
from mantis_lite.recipe_file import make_recipe

SHARED = Path(__file__).parents[2] / "shared"
TEMPLATES = {template.name: template for template in templates.TEMPLATES}
SIDE = 28
WORDS = [
    "What is in the picture?",
    "The first picture shows a small red circle, the second a dog.",
    "USER: ASSISTANT: ",
]


def tokenizer(
    template: str = "llama_3", more: Sequence[str] = ("<image>",), pad: Sequence[str] = ("<|pad|>",)
) -> Tokenizer:
    """A byte-level BPE with the special tokens of one template, a family's own and `<|pad|>`."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = [*sorted(TEMPLATES[template].tokens), *more, *pad]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=316 + len(special), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(WORDS, trainer)
    return made


def by_size(template: str = "llama_3", **settings) -> Encoder:
    """An Encoder whose pictures take tokens and patches by their size, so that a wrong size is a wrong length."""
    placeholder = Token("<image>")
    vision = Vision(
        placeholder=placeholder,
        wrap=Wrap(before=lambda j: f"(image {j}: <Image>", after=lambda j: "</Image>)"),
        tokens=lambda size: ((placeholder, size[0] // 4 + size[1] // 5),),
        patches=lambda size: size[0] * size[1] // 16,
        pixels=lambda picture: {"sizes": np.array([picture.size])},
        facts="by size",
    )
    return Encoder(tokenizer(template), TEMPLATES[template], vision, **settings)


def numbers_of(pixels: np.ndarray, processor: BaseImageProcessor) -> np.ndarray:
    """What a published processor's own arithmetic makes of our bytes: views (.., 3, H, W), or patches (N, n).

    Fuyu's patches go by place, and Qwen's by colour.
    """
    assert pixels.dtype == np.uint8
    if pixels.ndim == 2:
        by_place = "Fuyu" in type(processor).__name__
        colours = pixels.reshape(len(pixels), -1, 3).swapaxes(1, 2) if by_place else pixels.reshape(len(pixels), 3, -1)
        found = numbers_of(colours[..., None], processor)[..., 0]
        return (found.swapaxes(1, 2) if by_place else found).reshape(pixels.shape)
    if pixels.ndim > 3:
        return np.stack([numbers_of(view, processor) for view in pixels])
    rescaled = processor.rescale(pixels, processor.rescale_factor)
    return np.ascontiguousarray(processor.normalize(rescaled, processor.image_mean, processor.image_std))


def in_numbers(encoded: Encoded, processor: BaseImageProcessor) -> Encoded:
    """The same sample with its pictures as plain clients give them: in floating point."""
    made = [
        {name: numbers_of(array, processor) if array.dtype == np.uint8 else array for name, array in pixels.items()}
        for pixels in encoded.pixels
    ]
    return replace(encoded, pixels=made)


def golden_pictures() -> dict[str, bytes]:
    """The pictures that upstream was recorded with, by their files' names.

    A transparent one is without that, as upstream dropped it; here such a picture stands on white.
    """
    with np.load(SHARED / "golden/images.npz") as files:
        found = {Path(name).name: files[name].tobytes() for name in files}
    for name, content in found.items():
        picture = PIL.Image.open(io.BytesIO(content))
        if picture.has_transparency_data:
            picture.convert("RGB").save(file := io.BytesIO(), "PNG")
            found[name] = file.getvalue()
    return found


def tiny_llava(seed: int = 0) -> LlavaForConditionalGeneration:
    """A random LLaVA: a SigLIP tower of three layers, of which two are read, and a Llama with grouped heads."""
    tokens = tokenizer()
    torch.manual_seed(seed)
    text = LlamaConfig(
        vocab_size=tokens.get_vocab_size(),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # large enough that what a token sees moves its logits
    )
    tower = SiglipVisionConfig(
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=14,
        vision_use_head=False,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_index=tokens.token_to_id("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        initializer_range=0.2,
    )
    return LlavaForConditionalGeneration(config).eval()


def recipe(model: str | Path | dict = "unused", **settings) -> Recipe:
    """A recipe for a model on the CPU, also where there is a GPU: Liger's kernels are off unless they are asked for."""
    model = model if isinstance(model, dict) else str(model)
    settings["memory"] = {"kernels": "off"} | settings.get("memory", {})
    return make_recipe({"model": model, "data": "unused.json", "run_dir": "unused", "method": "lora"} | settings)


def train(recipe: Recipe, **options) -> Path:
    """The folder of the adapter, or of the model where the method is full."""
    from mantis_lite.training.start import start  # what only reads rows need not wait for it

    return start(recipe, **options).train()


def keeps_its_layout(checkpoint: Checkpoint, model: PreTrainedModel, folder: Path) -> None:
    """What a loaded checkpoint is saved as is the checkpoint, tensor by tensor."""
    model.save_pretrained(folder)
    published = load_file(checkpoint.folder / "model.safetensors")
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == published.keys()
    assert all(torch.equal(saved[key], published[key]) for key in published)


SHAPES = [(40, 30), (30, 40), (64, 20), (90, 60), (17, 70), (56, 56)]
"""(width, height) of pictures in turn: landscape, portrait, narrow and square."""


def picture(seed: int, width: int = 0, height: int = 0) -> bytes:
    """A PNG of noise; its shape goes by the seed where none is given."""
    if not width:
        width, height = SHAPES[seed % len(SHAPES)]
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def chat(*texts: str, images: tuple[int, ...] = (), **row) -> dict:
    """A row whose turns alternate from the user's, with pictures of these seeds as bytes."""
    roles = ("user", "assistant")
    turns = [{"role": roles[at % 2], "content": text} for at, text in enumerate(texts)]
    return row | {"images": [{"bytes": picture(seed)} for seed in images], "messages": turns}


def write_rows(path: Path, rows: list[dict]) -> str:
    """Write rows as JSON Lines, their pictures as files beside it; returns the path as text."""
    lines = []
    for at, row in enumerate(rows):
        names = []
        for number, image in enumerate(row["images"]):
            names.append(f"{path.stem}-{at}-{number}.png")
            (path.parent / names[-1]).write_bytes(image["bytes"])
        lines.append(json.dumps(row | {"images": names}))
    path.write_text("\n".join(lines) + "\n")
    return str(path)


BY_CLOCK = ("time", "runtime", "per_second", "total_flos", "seconds_left", "memory_gib")
"""The ends of the names that are logged of what another run of the same steps takes otherwise."""


def logs_of(run_dir: Path) -> list[dict]:
    """What a run logged, in order."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [log["loss"] for log in logs_of(run_dir) if "loss" in log]
