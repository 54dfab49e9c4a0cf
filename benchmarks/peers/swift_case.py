"""ms-swift on the rows: padded, and what it says of packing."""

from __future__ import annotations

import sys
from typing import Any

from swift import sft_main
from swift.pipelines import SwiftSft
from swift.template import TemplateMeta, register_template
from swift.template.templates.llava import LlavaHfTemplate

from .probe import RATE, Probe, begin

HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


class BareLlava(LlavaHfTemplate):
    """LLaVA's template without the line that it breaks after each picture."""

    def replace_tag(self, *args: Any, **kwargs: Any) -> list[str]:
        return ["<image>"]


def run(settings: dict[str, Any], probe: Probe) -> None:
    """Train by its own command's function, with Llama 3's template for LLaVA's pictures."""
    template = TemplateMeta(
        "llava_llama3_bare",
        prefix=["<|begin_of_text|>"],
        prompt=[HEADER.format("user") + "{{QUERY}}<|eot_id|>" + HEADER.format("assistant")],
        chat_sep=["<|eot_id|>"],
        suffix=["<|eot_id|>"],
        template_cls=BareLlava,
    )
    register_template(template)
    probe.clock(SwiftSft, "_prepare_dataset")
    own = {
        "model": settings["model"],
        "model_type": "llava1_5_hf",
        "template": "llava_llama3_bare",
        "dataset": f"{settings['rows']}/marked.json",
        "split_dataset_ratio": 0,
        "load_from_cache_file": False,
        "max_length": settings["limit"],
        "packing": settings.get("packing", False),
        "torch_dtype": "float32",
        "tuner_type": "lora",
        "lora_rank": 8,
        "lora_alpha": 16,
        "lora_dropout": 0,
        "target_modules": "all-linear",
        "output_dir": settings["out"],
        "learning_rate": RATE,
        "num_train_epochs": 1 + settings["rounds"],
        "per_device_train_batch_size": settings["batch"],
        "gradient_accumulation_steps": 1,
        "dataset_shuffle": False,
        "train_dataloader_shuffle": False,
        "dataloader_num_workers": 0,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    sft_main([word for name, value in own.items() for word in (f"--{name}", str(value))])


if __name__ == "__main__":
    run(*begin(sys.argv[1], "ms-swift", "trl", "peft"))
