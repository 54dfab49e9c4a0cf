"""Idefics2's vision tower and connector over pictures of mixed shapes on one GPU: by shape, against the stock layout.

    python -m benchmarks.gpu_vision [--out FOLDER] [--pictures 24] [--repeats 7]

Weights are random, in the published shapes (27 layers of 1,152, 64 latents); pictures are noise of the sizes below, in
a seeded order. All ways get the same pictures, run in turn, and must give the same features. `unbounded` is by shape
with any number of patches at a time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import results

# (width, height) after the processor's bounds of 378 and 980 px: photos in both directions, squares, small ones.
MIXES = {
    "photos of many sizes": [(980, 653), (980, 735), (653, 980), (640, 480), (480, 640), (980, 551), (768, 768)],
    "photos of 640 x 480 and 480 x 640": [(640, 480), (480, 640)],
    "photos of one size": [(980, 735)],
    "small pictures": [(378, 378), (400, 378), (378, 500), (448, 378)],
    "one panorama among small pictures": [(378, 378), (378, 378), (378, 378), (980, 378)],
}


def published_config(layers: int, vocabulary: int, image_token: int) -> Any:
    """Mantis-8B-Idefics2's shapes, with fewer layers or words in the language model where asked for."""
    from transformers import Idefics2Config

    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    text = {"model_type": "mistral", "num_hidden_layers": layers, "vocab_size": vocabulary, "hidden_size": 4096}
    return Idefics2Config(
        vision_config=vision | {"image_size": 980, "patch_size": 14},
        text_config=text | {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 32768},
        perceiver_config={"hidden_size": 4096},
        image_token_id=image_token,
    )


def make_model() -> Any:
    """The tower and connector of Mantis-8B-Idefics2 with random weights; of the language model, one small layer."""
    import torch
    from transformers import Idefics2ForConditionalGeneration
    from transformers.models.idefics2.image_processing_pil_idefics2 import Idefics2ImageProcessorPil

    from mantis_lite.models.idefics2 import IDEFICS2

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = Idefics2ForConditionalGeneration(published_config(1, 1000, 999)).bfloat16().eval()
    IDEFICS2.adapt(model, Idefics2ImageProcessorPil())
    return model


def layouts(sizes: list[tuple[int, int]]) -> dict[str, dict[str, Any]]:
    """The same pictures by shape, without a bound, and as the stock processor pads them, on the GPU."""
    from accelerate.utils import send_to_device

    from mantis_lite.models import idefics2, tower

    random = np.random.default_rng(0)
    views = [random.standard_normal((3, height, width), dtype=np.float32) for width, height in sizes]
    made = {"by_shape": {"pixel_values": idefics2.by_shape(views, 14)}, "stock": pad(views)}
    bound, tower.TOWER_PATCHES = tower.TOWER_PATCHES, 10**9
    made["unbounded"] = {"pixel_values": idefics2.by_shape(views, 14)}
    tower.TOWER_PATCHES = bound
    return {name: send_to_device(inputs, "cuda") for name, inputs in made.items()}


def pad(views: Sequence[np.ndarray]) -> dict[str, Any]:
    """Pictures as transformers' processor lays them out: all as large as the largest, and a mask."""
    import torch

    height, width = (max(view.shape[at] for view in views) for at in (1, 2))
    padded = torch.zeros(1, len(views), 3, height, width)
    mask = torch.zeros(1, len(views), height, width, dtype=torch.int64)
    for at, view in enumerate(views):
        padded[0, at, :, : view.shape[1], : view.shape[2]] = torch.from_numpy(view)
        mask[0, at, : view.shape[1], : view.shape[2]] = 1
    return {"pixel_values": padded, "pixel_attention_mask": mask}


def timed(model: Any, inputs: dict[str, Any]) -> tuple[float, float, Any]:
    """Seconds, peak GiB above the weights, and the features."""
    import torch

    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, begun = torch.cuda.memory_allocated(), time.perf_counter()
    with torch.no_grad():
        found = model.model.get_image_features(**inputs).pooler_output
        features = found.flatten(0, -2) if torch.is_tensor(found) else torch.cat(found)
    torch.cuda.synchronize()
    return time.perf_counter() - begun, (torch.cuda.max_memory_allocated() - before) / 2**30, features


def compare(model: Any, sizes: list[tuple[int, int]], repeats: int) -> dict[str, Any]:
    """Every layout in turn; the first of each warms up."""
    inputs = layouts(sizes)
    runs = [{name: timed(model, each) for name, each in inputs.items()} for _ in range(repeats + 1)][1:]
    expected = runs[-1]["stock"][2].float()
    figures: dict[str, Any] = {
        "pictures": len(sizes),
        "shapes": len(set(sizes)),
        "patches": sum((width // 14) * (height // 14) for width, height in sizes),
        "patches_padded": len(sizes) * max(w // 14 for w, _ in sizes) * max(h // 14 for _, h in sizes),
    }
    for name in inputs:
        error = float((runs[-1][name][2].float() - expected).norm() / expected.norm())
        assert error < 0.05, error  # bf16, and another kernel without the mask
        times = [1000 * run[name][0] for run in runs]
        figures[name] = {
            "ms": round(float(np.median(times)), 2),
            "ms_min_max": [round(edge(times), 2) for edge in (min, max)],
            "peak_gib": round(runs[-1][name][1], 3),
            "difference": round(error, 5),
        }
    figures["times_faster"] = round(figures["stock"]["ms"] / figures["by_shape"]["ms"], 2)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=results.FOLDER)
    parser.add_argument("--pictures", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    model, figures = make_model(), {}
    for name, mix in MIXES.items():
        chosen = np.random.default_rng(1).integers(0, len(mix), args.pictures)
        figures[name] = compare(model, [mix[at] for at in chosen], args.repeats)
        print(name, figures[name], flush=True)
        results.write("gpu_vision", figures, args.out)


if __name__ == "__main__":
    main()
