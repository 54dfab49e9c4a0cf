"""Merging an adapter into a model of several files of weights: the most memory that takes, and the time.

    python -m benchmarks.merging

A LLaVA of random bfloat16 weights and a LoRA of rank 16 on all layers of its language model. Each merge runs in a
process whose own memory is looked at every 5 ms; what the libraries held before is not counted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from . import results

WIDTH, LAYERS, SHARD = 2048, 16, "200MB"


def make_base(folder: Path) -> int:
    """Write the model; returns its bytes of weights."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.recipe import ModelRecipe

    tiny = open_checkpoint(ModelRecipe(name="tiny"))
    settings = json.loads((tiny.folder / "config.json").read_text())
    settings["text_config"] |= {"hidden_size": WIDTH, "intermediate_size": 5504, "num_hidden_layers": LAYERS}
    settings["text_config"] |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(**settings), dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=SHARD)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (folder / name).write_bytes((tiny.folder / name).read_bytes())
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def make_adapter(base: Path, folder: Path) -> int:
    """Write an adapter for the model; returns its bytes of weights."""
    from peft import get_peft_model

    from mantis_lite.models.adapters import lora_config
    from mantis_lite.models.checkpoint import open_checkpoint
    from mantis_lite.models.merging import stand_in
    from mantis_lite.recipe import LoraRecipe, ModelRecipe, Part, Training

    checkpoint = open_checkpoint(ModelRecipe(name=str(base)))
    plain = stand_in(checkpoint.config, scores=False)
    parts: dict[Part, Training] = {"language_model": "adapter", "projector": "frozen", "vision_tower": "frozen"}
    adapted = get_peft_model(plain, lora_config(plain, checkpoint.family, parts, LoraRecipe(r=16)))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return (folder / "adapter_model.safetensors").stat().st_size


def merge_alone(adapter: str, base: str, to: str, target: Any) -> None:
    """Merge, and print what that took."""
    from mantis_lite.merge import merge

    before, begun, seen = own_memory(), time.perf_counter(), [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            seen.append(own_memory())

    watching = threading.Thread(target=watch)
    watching.start()
    merge(adapter, to, target, [f"model={base}"], least=None)
    done.set()
    watching.join()
    print(json.dumps({"seconds": time.perf_counter() - begun, "peak": max(seen) - before, "libraries": before}))


def own_memory() -> int:
    """Bytes that this process alone holds: what it has mapped of files the system takes back when it needs room."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def in_a_process(*words: str) -> dict[str, Any]:
    """What a step prints last, in a process of its own: what this one holds would count as that one's."""
    command = [sys.executable, "-m", "benchmarks.merging", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--make", nargs=2, help="only make this base and adapter")
    parser.add_argument("--merge", nargs=4, help="only merge this adapter, base, folder and --base")
    args = parser.parse_args()
    if args.make:
        made_base, made_adapter = map(Path, args.make)
        made = {"weights": make_base(made_base), "adapter": make_adapter(made_base, made_adapter)}
        print(json.dumps(made))
        return
    if args.merge:
        merge_alone(*args.merge)
        return
    with tempfile.TemporaryDirectory() as scratch:
        base, adapter = f"{scratch}/base", f"{scratch}/adapter"
        made = in_a_process("--make", base, adapter)
        shards = [file.stat().st_size for file in Path(base).glob("*.safetensors")]
        figures = {"weights_mib": made["weights"] >> 20, "files": len(shards), "largest_file_mib": max(shards) >> 20}
        figures |= {"adapter_mib": made["adapter"] >> 20}
        for what in ("full", "dequantized"):
            found = in_a_process("--merge", adapter, base, f"{scratch}/{what}", what)
            figures |= {f"{what}_seconds": round(found["seconds"], 1), f"{what}_peak_mib": found["peak"] >> 20}
            figures["libraries_mib"] = found["libraries"] >> 20
    print(figures)
    results.write("merging", figures)


if __name__ == "__main__":
    main()
