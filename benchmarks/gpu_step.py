"""Training steps of a model of Mantis' size on one GPU: tokens a second and peak memory.

    python -m benchmarks.gpu_step [llava | idefics2] [--out FOLDER] [--layers 32] [--steps 8]

Weights are random, in the shapes of Mantis-8B-siglip-llama3 or Mantis-8B-Idefics2; rows are seeded text with seeded
pictures, 2-6 a row, as in Mantis' chat examples. Every case runs in a process of its own through the package's own
training.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mantis_lite import tiny

from . import results

CASES = {
    "llava": {
        "qlora, packs of 8192": ["method=qlora"],
        "qlora, packs of 8192, sdpa with a T x T mask": ["method=qlora", "memory.attention=sdpa"],
        "qlora, one sample a row": ["method=qlora", "packing=off"],
        "qlora, packs of 5376": ["method=qlora", "packing.max_length=5376"],
        "lora bf16, packs of 8192": ["method=lora"],
    },
    "idefics2": {
        "qlora, packs of 8192": ["method=qlora"],
        "qlora, packs of 8192, pictures padded": ["method=qlora"],
        "qlora, projector frozen, packs of 8192": ["method=qlora", "trainable.projector=frozen"],
        "qlora, projector frozen, packs of 8192, pictures padded": ["method=qlora", "trainable.projector=frozen"],
        "qlora, one sample a row": ["method=qlora", "packing=off"],
    },
}
RECIPES = {"llava": "chat-siglip-llama3-qlora", "idefics2": "chat-idefics2-qlora"}

PADDED = "pictures padded"
"""Ends the name of a case in which pictures are laid out as transformers' processor does."""


def make_idefics2(folder: Path, layers: int, base: Path) -> None:
    """Save random weights in the shapes of Mantis-8B-Idefics2, with the tokenizer of `base` and Idefics2's tokens."""
    import torch
    from tokenizers import Tokenizer
    from transformers import Idefics2ForConditionalGeneration

    from .gpu_vision import published_config

    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "<fake_token_around_image>", "<image>", "<end_of_utterance>"])
    config = published_config(layers, 32003, tokenizer.token_to_id("<image>"))
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = Idefics2ForConditionalGeneration(config)
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()  # the cases run beside this process
    torch.set_default_dtype(torch.float32)
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<s>", "eos_token": "<end_of_utterance>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named))
    processor = {"image_processor_type": "Idefics2ImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def make_llava(folder: Path, layers: int, base: Path) -> None:
    """Save random weights in the shapes of Mantis-8B-siglip-llama3, with the tokenizer of `base`."""
    import torch
    from transformers import AutoImageProcessor, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig.from_pretrained(base).to_dict()
    config["vision_config"] |= {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    config["vision_config"] |= {"num_attention_heads": 16, "image_size": 384, "patch_size": 14}
    config["text_config"] |= {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": layers}
    config["text_config"] |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    config["text_config"] |= {
        "vocab_size": 128258,
        "max_position_embeddings": 8192,
        "initializer_range": 0.02,
    }
    config |= {"vocab_size": 128258, "initializer_range": 0.02}
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    model.save_pretrained(folder, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()  # the cases run beside this process
    torch.set_default_dtype(torch.float32)
    for file in base.glob("*token*.json"):
        (folder / file.name).write_text(file.read_text())
    processor = AutoImageProcessor.from_pretrained(base, backend="pil")
    processor.size = {"height": 384, "width": 384}
    processor.save_pretrained(folder)


def make_data(folder: Path, rows: int) -> Path:
    """Write chat rows of 2-6 pictures and about 600 tokens of text."""
    random = np.random.default_rng(0)
    folder.mkdir()
    shapes = [(640, 480), (480, 640), (1024, 683), (683, 1024), (500, 375), (800, 800)]
    for picture in range(12):
        noise = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize(shapes[picture % len(shapes)]).save(folder / f"{picture}.jpg")
    words = ["red", "circle", "image", "which", "square", "the", "shows", "is", "and", "two"]
    lines = []
    for _ in range(rows):
        turns = []
        for _ in range(6):
            turns.append({"role": "user", "content": " ".join(random.choice(words, 30))})
            turns.append({"role": "assistant", "content": " ".join(random.choice(words, 30))})
        images = [f"{picture}.jpg" for picture in random.integers(0, 12, random.integers(2, 7))]
        lines.append(json.dumps({"images": images, "messages": turns}))
    path = folder / "rows.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def padded(pictures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Idefics2's pictures in transformers' layout: all as large as the largest, and a mask."""
    from .gpu_vision import pad

    return pad([view for picture in pictures for view in picture.values()])


def measure(model: Path, data: Path, steps: int, family: str, case: str) -> dict[str, float]:
    """Train `steps` optimizer steps of one pack each; the first two warm up and are left out of the times."""
    import torch
    from transformers import TrainerCallback

    from mantis_lite.data.dataset import collate_packs
    from mantis_lite.recipe import load_recipe
    from mantis_lite.training.run import start

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        settings = [f"model={model}", f"data={data}", f"run_dir={folder}/run", "train.save_strategy=no"]
        step = [
            "train.samples_per_step=null",
            "train.gradient_accumulation_steps=1",
            f"train.max_steps={steps}",
        ]
        begun = time.perf_counter()
        run = start(load_recipe(RECIPES[family], [*settings, *step, *CASES[family][case]]), [Clock()])
        if case.endswith(PADDED):
            vision = replace(run.encoder.vision, batch=padded)
            run.trainer.data_collator = partial(collate_packs, vision=vision)
        loaded = time.perf_counter() - begun
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run.train()
    warm = 2
    packs = run.schedule.packs[warm:]
    tokens, patches = (sum(int(run.prepared.train.lengths[pack, at].sum()) for pack in packs) for at in (0, 1))
    times = np.diff(ends)[warm - 1 :]
    return {
        "tokens_per_second": round(tokens / times.sum()),
        "samples_per_second": round(sum(map(len, packs)) / times.sum(), 3),
        "step_seconds_median": round(float(np.median(times)), 4),
        "step_seconds_min": round(float(times.min()), 4),
        "step_seconds_max": round(float(times.max()), 4),
        "tokens_per_step": round(tokens / len(packs)),
        "patches_per_step": round(patches / len(packs)),
        "weights_gib": round(weights / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "load_seconds": round(loaded, 1),
        "final_loss": round(run.trainer.state.log_history[-2]["loss"], 4),
    }


def _fault(stderr: str) -> dict[str, str]:
    """Why a case has no figures: it needs more memory than there is, or something else broke."""
    found = re.search(r"OutOfMemoryError: (.*? in use\.) Of the allocated", stderr)
    return {"out_of_memory": found[1]} if found else {"failed": stderr[-2000:]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("family", nargs="?", default="llava", choices=list(CASES))
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--base", type=Path, default=tiny.CHECKPOINT, help="whose tokenizer and processor to take")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--only", default="", help="the cases with this in their names")
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "DATA", "CASE"))
    args = parser.parse_args()
    if args.case:
        model, data, case = args.case
        print(json.dumps(measure(Path(model), Path(data), args.steps, args.family, case)))
        return
    figures, make = {}, {"llava": make_llava, "idefics2": make_idefics2}[args.family]
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder) / "model", args.layers, args.base)
        data = make_data(Path(folder) / "data", 200)
        for case in (case for case in CASES[args.family] if args.only in case):
            command = [sys.executable, "-m", "benchmarks.gpu_step", args.family, "--steps", str(args.steps), "--case"]
            done = subprocess.run([*command, f"{folder}/model", str(data), case], capture_output=True, text=True)
            figures[case] = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else _fault(done.stderr)
            print(case, figures[case], flush=True)
            results.write(f"gpu_step_{args.family}", figures, args.out)


if __name__ == "__main__":
    main()
