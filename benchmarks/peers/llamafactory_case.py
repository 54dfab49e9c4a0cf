"""LLaMA-Factory on the rows: padded, packed its two ways."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from .probe import RATE, Probe, begin


def run(settings: dict[str, Any], probe: Probe) -> None:
    """Train by its own command's function, with Llama 3's template, which it has for text, for LLaVA's pictures."""
    without_sound()
    from llamafactory.data.formatter import EmptyFormatter, StringFormatter
    from llamafactory.data.mm_plugin import get_mm_plugin
    from llamafactory.data.template import register_template
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp

    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    asked = header.format("user") + "{{content}}<|eot_id|>" + header.format("assistant")
    register_template(
        name="llava_llama3",
        format_user=StringFormatter(slots=[asked]),
        format_assistant=StringFormatter(slots=["{{content}}<|eot_id|>"]),
        format_prefix=EmptyFormatter(slots=["<|begin_of_text|>"]),
        mm_plugin=get_mm_plugin(name="llava", image_token="<image>"),
    )
    probe.clock(workflow, "get_dataset")
    run_exp(
        {
            "stage": "sft",
            "do_train": True,
            "model_name_or_path": settings["model"],
            "template": "llava_llama3",
            "dataset": "marked",
            "dataset_dir": settings["rows"],
            "cutoff_len": settings["limit"],
            "image_max_pixels": 1 << 30,  # else it makes large pictures smaller before the processor does
            "packing": settings.get("packing", False),
            "neat_packing": settings.get("neat_packing", False),
            "overwrite_cache": True,
            "finetuning_type": "lora",
            "lora_rank": 8,
            "lora_alpha": 16,
            "lora_target": "all",
            "output_dir": settings["out"],
            "learning_rate": RATE,
            "num_train_epochs": 1 + settings["rounds"],
            "per_device_train_batch_size": settings["batch"],
            "disable_shuffling": True,
            "disable_gradient_checkpointing": True,
            "use_cpu": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
        }
    )


def without_sound() -> None:
    """Let it import without torchaudio, which it needs for sound alone and whose published build is for CUDA."""
    sys.modules["torchaudio"] = module = ModuleType("torchaudio")
    module.__spec__ = ModuleSpec("torchaudio", None)


if __name__ == "__main__":
    run(*begin(sys.argv[1], "llamafactory", "trl", "peft"))
