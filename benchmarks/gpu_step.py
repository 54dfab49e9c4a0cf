"""Training steps of a model of Mantis-8B-siglip-llama3's size on one GPU: tokens a second and peak memory.

    python -m benchmarks.gpu_step [--out FOLDER] [--layers 32] [--steps 6]

Weights are random, in the published shapes; rows are seeded text with seeded pictures, 2-6 a row, as in Mantis'
chat examples. Every case runs in a process of its own through the package's own training.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from mantis_lite import tiny

from . import results

CASES = {
    "qlora, packs of 8192": ["method=qlora"],
    "qlora, packs of 8192, sdpa with a T x T mask": ["method=qlora", "memory.attention=sdpa"],
    "qlora, one sample a row": ["method=qlora", "packing=off"],
    "qlora, packs of 5120": ["method=qlora", "packing.max_length=5120"],
    "lora bf16, packs of 8192": ["method=lora"],
}


def make_checkpoint(folder: Path, layers: int, base: Path) -> None:
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
    for picture in range(12):
        noise = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(folder / f"{picture}.jpg")
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


def measure(model: Path, data: Path, steps: int, overrides: list[str]) -> dict[str, float]:
    """Train `steps` optimizer steps of one pack each; the first two warm up and are left out of the times."""
    import torch
    from transformers import TrainerCallback

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
        run = start(load_recipe("chat", [*settings, *step, *overrides]), [Clock()])
        loaded = time.perf_counter() - begun
        weights = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run.train()
    warm = 2
    packs = run.schedule.packs[warm:]
    tokens = sum(int(run.prepared.train.lengths[pack, 0].sum()) for pack in packs)
    times = np.diff(ends)[warm - 1 :]
    return {
        "tokens_per_second": round(tokens / times.sum()),
        "samples_per_second": round(sum(map(len, packs)) / times.sum(), 3),
        "step_seconds_median": round(float(np.median(times)), 4),
        "step_seconds_min": round(float(times.min()), 4),
        "step_seconds_max": round(float(times.max()), 4),
        "tokens_per_step": round(tokens / len(packs)),
        "weights_gib": round(weights / 2**30, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2),
        "load_seconds": round(loaded, 1),
        "final_loss": round(run.trainer.state.log_history[-2]["loss"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--base", type=Path, default=tiny.CHECKPOINT, help="whose tokenizer and processor to take")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--case", nargs=3, metavar=("MODEL", "DATA", "CASE"))
    args = parser.parse_args()
    if args.case:
        model, data, case = args.case
        print(json.dumps(measure(Path(model), Path(data), args.steps, CASES[case])))
        return
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder) / "model", args.layers, args.base)
        data = make_data(Path(folder) / "data", 200)
        for case in CASES:
            command = [sys.executable, "-m", "benchmarks.gpu_step", "--steps", str(args.steps), "--case"]
            done = subprocess.run([*command, f"{folder}/model", str(data), case], capture_output=True, text=True)
            figures[case] = json.loads(done.stdout.splitlines()[-1]) if not done.returncode else done.stderr[-2000:]
            print(case, figures[case], flush=True)
            results.write("gpu_step", figures, args.out)


if __name__ == "__main__":
    main()
