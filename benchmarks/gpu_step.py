"""Training steps with pictures: their cases, and rows of pictures and text as in Mantis' chat examples.

`benchmarks.gpu` measures them as G5 and G6. benchmarks/results/gpu_step_*.json are earlier measurements of the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

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
