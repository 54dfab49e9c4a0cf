"""TRL's SFTTrainer on the rows, by its own collator for pictures."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, Image, List
from peft import LoraConfig
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import SFTConfig, SFTTrainer

from .probe import RATE, Probe, begin

LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def run(settings: dict[str, Any], probe: Probe) -> None:
    """Train as TRL's own examples for pictures do; pictures are opened as the dataset's column of them says."""
    rows = json.loads(Path(settings["rows"], "parts.json").read_text())
    data = Dataset.from_list(rows).cast_column("images", List(Image()))
    arguments = SFTConfig(
        output_dir=settings["out"],
        learning_rate=RATE,
        num_train_epochs=1 + settings["rounds"],
        per_device_train_batch_size=settings["batch"],
        max_length=None,
        packing=settings.get("packing", False),
        assistant_only_loss=settings["answers"],
        train_sampling_strategy="sequential",
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = SFTTrainer(
        LlavaForConditionalGeneration.from_pretrained(settings["model"], dtype=torch.float32),
        arguments,
        train_dataset=data,
        processing_class=AutoProcessor.from_pretrained(settings["model"]),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=LAYERS),
    )
    trainer.train()


if __name__ == "__main__":
    run(*begin(sys.argv[1], "trl", "peft"))
