"""How close `mantis-lite fit` comes: its estimates beside peaks measured here, on an H100, and published by others.

    python -m benchmarks.memory [cpu | gpu | published ...]

cpu: packs of small random models trained by the package on this CPU in float32; the peak is the sum of what torch's
allocator gave and took back, as its profiler lists it. gpu: benchmarks/results/gpu_step_*.json, whose rows are laid out
again. published: Llama-3.1-8B by torchtune and Unsloth, Qwen-7B by its team; what they ran is stated at each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

from mantis_lite import tiny
from mantis_lite.memory import seeing, standins
from mantis_lite.models import tower
from mantis_lite.recipe import Kernel

from . import results

TEXT = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "vocab_size": 1024,
}
TOWER = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
FULL = ["method=full", "trainable.projector=full"]
FUSED: frozenset[Kernel] = frozenset(("rms_norm", "swiglu"))
"""What others' compiled layers or own kernels are taken to be in one kernel."""

CASES: dict[str, tuple[str, int, list[str]]] = {
    "llava, lora, 512": ("llava", 512, ["method=lora"]),
    "llava, lora, 2048": ("llava", 2048, ["method=lora"]),
    "llava, lora, checkpointing, 2048": ("llava", 2048, ["method=lora", "memory.checkpointing=full"]),
    "llava, lora with dropout, 1024": ("llava", 1024, ["method=lora", "lora.dropout=0.1"]),
    "llava, dora, checkpointing, 1024": ("llava", 1024, ["method=lora", "lora.dora=true", "memory.checkpointing=full"]),
    "llava, full, 1024": ("llava", 1024, FULL),
    "llava, full, checkpointing, 4096": ("llava", 4096, [*FULL, "memory.checkpointing=full"]),
    "llava, qlora, 1024": ("llava", 1024, ["method=qlora"]),
    "llava, qlora, checkpointing, 4096": ("llava", 4096, ["method=qlora", "memory.checkpointing=full"]),
    "llava, lora, two layers checkpointed, 2048": ("llava", 2048, ["method=lora", "memory.checkpointing=2"]),
    "llava, lora, tiles of 512, 2048": (
        "llava",
        2048,
        ["method=lora", "memory.checkpointing=full", "memory.mlp_tile=512"],
    ),
    "idefics2, lora, 1024": ("idefics2", 1024, ["method=lora"]),
    "idefics2, lora with projector, checkpointing, 2048": (
        "idefics2",
        2048,
        ["method=lora", "trainable.projector=adapter", "memory.checkpointing=full"],
    ),
    "idefics2, full with tower, 512": ("idefics2", 512, [*FULL, "trainable.vision_tower=full"]),
    "idefics2, qlora, checkpointing, 2048": ("idefics2", 2048, ["method=qlora", "memory.checkpointing=full"]),
    "fuyu, lora, 1024": ("fuyu", 1024, ["method=lora"]),
    "fuyu, full, checkpointing, 1024": ("fuyu", 1024, [*FULL, "memory.checkpointing=full"]),
    "qwen2_vl, lora, 1024": ("qwen2_vl", 1024, ["method=lora"]),
    "qwen2_vl, qlora, checkpointing, 4096": ("qwen2_vl", 4096, ["method=qlora", "memory.checkpointing=full"]),
    "qwen3_vl, lora, 2048": ("qwen3_vl", 2048, ["method=lora"]),
}
"""A family, tokens in a pack, overrides."""


def make_config(family: str, image: int | None) -> Any:
    """A random model small enough for a CPU; `image` is the id of the token that stands for pictures."""
    from transformers import FuyuConfig, Idefics2Config, LlavaConfig, Qwen2VLConfig, Qwen3VLConfig

    if family == "llava":
        vision = TOWER | {"model_type": "siglip_vision_model", "image_size": 112, "patch_size": 14}
        text: dict[str, Any] = TEXT | {"model_type": "llama"}
        layer = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
        return LlavaConfig(
            vision_config=vision | {"vision_use_head": False}, text_config=text, image_token_index=image, **layer
        )
    if family == "idefics2":
        resampler = {"resampler_n_latents": 16, "resampler_depth": 2, "resampler_n_heads": 4, "resampler_head_dim": 32}
        return Idefics2Config(
            text_config=TEXT | {"model_type": "mistral"},
            vision_config=TOWER | {"image_size": 224, "patch_size": 14},
            perceiver_config=resampler | {"hidden_size": 256, "num_key_value_heads": 2},
            image_token_id=image,
        )
    if family == "fuyu":
        text = {key: size for key, size in TEXT.items() if key not in ("num_key_value_heads", "head_dim")}
        rope = {"rope_type": "default", "rope_theta": 25_000.0, "partial_rotary_factor": 0.5}
        return FuyuConfig(
            text_config=text | {"model_type": "persimmon", "rope_parameters": rope},
            patch_size=30,
            hidden_size=256,
            image_token_id=image,
        )
    sections = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]}
    text = TEXT | {"rope_parameters": sections, "rope_scaling": sections}
    if family == "qwen2_vl":
        vision = {"embed_dim": 96, "hidden_size": 256, "mlp_ratio": 3, "depth": 3, "num_heads": 4, "patch_size": 14}
        return Qwen2VLConfig(text_config=text, vision_config=vision, image_token_id=image)
    vision = {"hidden_size": 96, "intermediate_size": 256, "out_hidden_size": 256, "depth": 3, "num_heads": 4}
    deep = {"patch_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [1]}
    return Qwen3VLConfig(text_config=text, vision_config=vision | deep, image_token_id=image)


MARKS = {
    "llava": ["<image>"],
    "idefics2": ["<s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"],
    "fuyu": ["<s>", "|ENDOFTEXT|", "<0x04>", "|SPEAKER|", "|NEWLINE|"],
    "qwen2_vl": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
    "qwen3_vl": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"],
}
PICTURES = {"llava": "<image>", "idefics2": "<image>", "fuyu": "|SPEAKER|"}
PROCESSORS: dict[str, dict[str, Any]] = {
    "llava": {"image_processor_type": "SiglipImageProcessor", "size": {"height": 112, "width": 112}},
    "idefics2": {"image_processor_type": "Idefics2ImageProcessor", "size": {"longest_edge": 224, "shortest_edge": 56}},
    "fuyu": {
        "image_processor_type": "FuyuImageProcessor",
        "size": {"height": 240, "width": 240},
        "patch_size": {"height": 30, "width": 30},
    },
    "qwen2_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"longest_edge": 224 * 224, "shortest_edge": 56 * 56},
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    },
    "qwen3_vl": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "size": {"longest_edge": 256 * 256, "shortest_edge": 64 * 64},
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
    },
}


def make_model(family: str, folder: Path) -> Path:
    """Save random weights with a tokenizer and an image processor, as a checkpoint is published."""
    import torch
    from tokenizers import Tokenizer
    from transformers import AutoModelForImageTextToText

    tokenizer = Tokenizer.from_file(str(tiny.CHECKPOINT / "tokenizer.json"))
    tokenizer.add_special_tokens([mark for mark in MARKS[family] if tokenizer.token_to_id(mark) is None])
    torch.manual_seed(0)
    config = make_config(family, tokenizer.token_to_id(PICTURES.get(family, "<|image_pad|>")))
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": MARKS[family][0],
        "eos_token": MARKS[family][1 % len(MARKS[family])],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    grey = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(grey | PROCESSORS[family]))
    return folder


def make_rows(folder: Path) -> Path:
    """Sixty rows of one or two pictures of three shapes, and a few dozen words."""
    random = np.random.default_rng(0)
    folder.mkdir()
    for number, size in enumerate([(224, 168), (168, 224), (200, 200)]):
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(folder / f"{number}.jpg")
    words = ["red", "circle", "image", "which", "square", "the", "shows", "is", "and", "two"]
    lines = []
    for _ in range(60):
        asked, said = (" ".join(random.choice(words, 20)) for _ in range(2))
        images = [f"{picture}.jpg" for picture in random.integers(0, 3, random.integers(1, 3))]
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"images": images, "messages": turns}))
    (folder / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "rows.jsonl"


def on_cpu(model: Path, data: Path, tokens: int, overrides: Sequence[str]) -> dict[str, float]:
    """Train two steps of one pack each, and estimate the same."""

    from mantis_lite.memory.estimate import estimate
    from mantis_lite.memory.packs import largest_packs
    from mantis_lite.memory.step import machine_of
    from mantis_lite.recipe_file import make_recipe
    from mantis_lite.report.probe import peak_on_cpu
    from mantis_lite.training.start import start

    with tempfile.TemporaryDirectory() as folder:
        settings = {"model": str(model), "data": str(data), "run_dir": f"{folder}/run", "lora": {"r": 8}}
        train = {"max_steps": 2, "gradient_accumulation_steps": 1, "save_strategy": "no"}
        own = [word for word in overrides if not (word.startswith("lora.") and "method=full" in overrides)]
        if "method=full" in overrides:
            settings.pop("lora")
        recipe = make_recipe(settings | {"train": train}, [f"packing.max_length={tokens}", *own])
        run = start(recipe, [])
        peak = peak_on_cpu(run.trainer.model, run.trainer.train)
        packs = largest_packs(run.schedule, run.prepared.train, run.encoder).values()
        machine = machine_of(recipe, accumulates=False, gpu=False)
        found = [estimate(run.checkpoint.config, recipe, pack, machine, run.checkpoint.family) for pack in packs]
    return compared(max(each.allocated for each in found) / 2**20, peak / 2**20, "mib")


def compared(estimated: float, found: float, unit: str) -> dict[str, float]:
    """An estimate beside what was found, and by how much of it the estimate is off."""
    error = round(estimated / found - 1, 4)
    return {f"estimated_{unit}": round(estimated, 3), f"measured_{unit}": round(found, 3), "error": error}


def cpu() -> dict[str, Any]:
    """Every case of CASES, and the mean of the errors' sizes."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = make_rows(Path(folder) / "data")
        made: dict[str, Path] = {}
        for name, (family, tokens, overrides) in CASES.items():
            if family not in made:
                made[family] = make_model(family, Path(folder) / family)
            figures[name] = on_cpu(made[family], data, tokens, overrides)
            print(name, figures[name], flush=True)
    errors = [abs(figure["error"]) for figure in figures.values()]
    return {"cases": figures, "mean_absolute_error": round(sum(errors) / len(errors), 4), "largest": max(errors)}


GPU_STEPS = {"llava": "Mantis-8B-siglip-llama3", "idefics2": "Mantis-8B-Idefics2"}


def step_checkpoint(family: str, folder: Path) -> Path:
    """The small files of the models that benchmarks/gpu_step.py trains, as it makes them."""
    from tokenizers import Tokenizer

    from mantis_lite.memory.bases import FOLDER

    facts = json.loads((FOLDER / f"TIGER-Lab--{GPU_STEPS[family]}.json").read_text())
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(tiny.CHECKPOINT / "tokenizer.json"))
    if family == "idefics2":
        tokenizer.add_special_tokens(MARKS["idefics2"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(facts["config"]))
    (folder / "preprocessor_config.json").write_text(json.dumps(facts["preprocessor"]))
    return folder


@contextmanager
def as_measured() -> Iterator[None]:
    """What Idefics2's connector and the loss took at a time, and pictures in float32, when GPUs were measured."""
    import torch

    def numbers(*where: Any) -> Any:
        return seeing._come("pixels", torch.float32, *where)

    with (
        patch.object(tower, "PROJECTOR_PATCHES", 16_384),
        patch.object(standins, "GPU_TILE", 4_096),
        patch.object(seeing, "_pixels", numbers),
    ):
        yield


def on_gpu(family: str, case: str, measured_gib: float, model: Path, data: Path) -> dict[str, float]:
    """An estimate of the first eight packs of a case of benchmarks/gpu_step.py, beside what an H100 measured."""
    from mantis_lite.data.prepare import prepare
    from mantis_lite.data.schedule import Schedule, pack_epoch
    from mantis_lite.memory.estimate import estimate
    from mantis_lite.memory.packs import largest_packs
    from mantis_lite.memory.step import machine_of
    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.recipe_file import load_recipe

    from . import gpu_step

    words = [f"model={model}", f"data={data}", *gpu_step.CASES[family][case]]
    recipe = load_recipe(gpu_step.RECIPES[family], words)
    checkpoint = open_checkpoint(recipe.model)
    encoder = checkpoint.encoder(recipe)
    samples = prepare(recipe.data, recipe.packing, encoder).train
    plan = Schedule(pack_epoch(samples, recipe.packing)[:8], [8], 1)
    machine = replace(machine_of(recipe, accumulates=False), kernels=frozenset())  # there were none then
    packs = largest_packs(plan, samples, encoder).values()
    with as_measured():
        found = [estimate(checkpoint.config, recipe, pack, machine, checkpoint.family) for pack in packs]
    return compared(max(each.allocated for each in found) / 2**30, measured_gib, "gib")


def gpu() -> dict[str, Any]:
    """Every case of benchmarks/results/gpu_step_*.json that the package can lay out."""
    from . import gpu_step

    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = gpu_step.make_data(Path(folder) / "data", 200)
        for family in GPU_STEPS:
            model = step_checkpoint(family, Path(folder) / family)
            taken = json.loads((results.FOLDER / f"gpu_step_{family}.json").read_text())
            for case, found in taken["figures"].items():
                if "peak_gib" in found and not case.endswith(gpu_step.PADDED):
                    name = f"{family}, {case}"
                    figures[name] = on_gpu(family, case, found["peak_gib"], model, data)
                    print(name, figures[name], flush=True)
    errors = [abs(figure["error"]) for figure in figures.values()]
    return {"cases": figures, "mean_absolute_error": round(sum(errors) / len(errors), 4), "largest": max(errors)}


def of_llama(
    method: str, lora: dict[str, Any], optimizer: str = "auto", layers: int = 32, **shape: Any
) -> tuple[Any, Any]:
    """The config of Llama-3.1-8B, or of another shape, and a recipe for it."""
    from transformers import LlamaConfig

    from mantis_lite.recipe_file import make_recipe

    own = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = LlamaConfig(**(own | {"num_hidden_layers": layers, "vocab_size": 128256} | shape))
    settings = {"model": "a decoder", "data": "none.json", "run_dir": "none", "method": method, "lora": lora}
    return config, make_recipe(settings | {"memory": {"optimizer": optimizer}})


def torchtune() -> dict[str, Any]:
    """Llama-3.1-8B by torchtune (its README: two rows of 2,048, compiled, an RTX 4090), max_memory_allocated.

    Its config: LoRA of rank 8 on all seven layers in bfloat16, AdamW in bfloat16, layers checkpointed, loss in chunks.
    A compiled layer is taken to keep what one of fused kernels does.
    """
    import torch

    from mantis_lite.memory.estimate import estimate
    from mantis_lite.memory.step import Machine, Pack

    machine, pack = Machine(kernels=FUSED, trained=torch.bfloat16), Pack(4096, 2048, 4096)
    figures = {}
    for name, method, published in (("H3, qlora", "qlora", 7.4), ("H4, lora", "lora", 16.2)):
        config, recipe = of_llama(method, {"r": 8, "alpha": 16})
        figures[name] = compared(estimate(config, recipe, pack, machine).allocated / 2**30, published, "gib")
    return figures


def gaps_a_token() -> float:
    """Bytes a token that torch's allocator holds beyond tensors, without expandable segments and with room to spare.

    The median of what an H200 gave for layers that no kernel computes at once (benchmarks/results/gpu.json).
    """
    found = []
    for cases in json.loads((results.FOLDER / "gpu.json").read_text())["figures"].values():
        for case in cases.values():
            if "memory.kernels=off" in case.get("setting", {}).get("words", ()) and "allocator" not in case:
                tokens = max(pack["tokens"] for pack in case["setting"]["packs"])
                found.append((case["reserved_gib"] - case["peak_gib"]) * 2**30 / tokens)
    return float(np.median(found))


def qwen() -> dict[str, Any]:
    """Qwen-7B by its team (README of QwenLM/Qwen: an A100 of 80 GB, one row), in 1e9 bytes of the whole card.

    finetune.py: rank 64 on every layer in float32 with dropout, AdamW, layers checkpointed, all logits at once; what
    the allocator held beyond tensors is taken from another card (`gaps_a_token`). With Int4 (GPTQ's;
    nf4 here) in float16, where the loss keeps to 16 bits, and under DeepSpeed, whose two buffers for gradients are 2e8
    numbers each (ds_config_zero2.json, overlap_comm). AutoGPTQ unpacks weights by ordinary operations
    (qlinear_cuda_old.py), so that autograd keeps those of a layer, in 16 bits, until its backward pass is done. Its
    query, key and value are one layer, three here: 17 million more in adapters.
    """
    from mantis_lite.memory.estimate import CONTEXT, estimate
    from mantis_lite.memory.step import Machine, Pack

    shape = {"intermediate_size": 11008, "num_key_value_heads": 32, "vocab_size": 151936, "attention_bias": True}
    published = {
        "lora": {256: 20.1, 512: 20.4, 1024: 21.5, 2048: 23.8, 4096: 29.7, 8192: 36.6},
        "qlora": {256: 11.5, 512: 11.5, 1024: 12.3, 2048: 13.9, 4096: 16.9, 8192: 23.5},
    }
    figures, gaps = {}, gaps_a_token()
    for method, points in published.items():
        machine = Machine(head="full" if method == "lora" else "full, 16 bits")
        unpacked = 2 * 4096 * (4 * 4096 + 3 * shape["intermediate_size"])
        buffers = 0 if method == "lora" else 2 * 2 * 200_000_000 + unpacked
        for tokens, found in points.items():
            config, recipe = of_llama(method, {"r": 64, "dropout": 0.05}, "auto", **shape)
            tensors = estimate(config, recipe, Pack(tokens, tokens, tokens), machine).allocated + buffers
            total = tensors + CONTEXT + gaps * tokens
            figures[f"H7, {method}, {tokens}"] = compared(total / 1e9, found, "gb")
    return figures


def unsloth() -> dict[str, Any]:
    """Llama-3.1-8B by Unsloth (its docs: QLoRA of rank 32 on all layers, one row): the longest by the card's size.

    Its sizes are read as 1e9 bytes, of which a process can have memory/card.py's share; its technique as fused kernels,
    what layers keep on the host, AdamW in 8 bits. Its own table is a straight line, and so is the estimate.
    """
    from mantis_lite.memory.card import USABLE
    from mantis_lite.memory.estimate import estimate
    from mantis_lite.memory.step import Machine, Pack

    config, recipe = of_llama("qlora", {"r": 32}, "adamw_8bit")
    machine = Machine(kernels=FUSED, offload=True)
    less, more = (estimate(config, recipe, Pack(tokens, tokens, tokens), machine).total for tokens in (20_000, 40_000))
    each = (more - less) / 20_000
    longest = {8: 2_972, 12: 21_848, 16: 40_724, 24: 78_475, 40: 153_977, 48: 191_728, 80: 342_733}
    return {
        f"H6, {size} GB": compared((size * 1e9 * USABLE - less) / each + 20_000, found, "tokens")
        for size, found in longest.items()
    }


def published() -> dict[str, Any]:
    """Points H3, H4, H6 and H7 of the project's notes, by who measured them."""
    figures = torchtune() | qwen() | unsloth()
    for name, figure in figures.items():
        print(name, figure, flush=True)
    errors = [figure["error"] for figure in figures.values()]
    return {"points": figures, "lowest": min(errors), "highest": max(errors)}


def main() -> None:
    groups = {"cpu": cpu, "gpu": gpu, "published": published}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(groups), metavar="GROUP", help=", ".join(groups))
    file = results.FOLDER / "memory.json"
    known = json.loads(file.read_text())["figures"] if file.is_file() else {}
    results.write("memory", known | {name: groups[name]() for name in parser.parse_args().groups})


if __name__ == "__main__":
    main()
