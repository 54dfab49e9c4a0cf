"""Tiny Mantis with transformers' Trainer and PEFT, the usual way: what runs of this package are held against.

As transformers' own example scripts do: a seed, the model, a Trainer, `get_last_checkpoint` to go on from, and
`save_model` at the end. Settings are `rows` (JSON Lines of messages), `run_dir`, `train` (TrainingArguments' own) and
`augment`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from mantis_lite import tiny

RANK, ALPHA, DROPOUT, LAYERS = 8, 16, 0.2, ("q_proj", "v_proj")
"""Of the LoRA, on the language model alone, as this package has it."""


class Rows(Dataset):
    """Rows of text; with `augment`, one token of each is drawn anew from the global generator, as augmentations do."""

    def __init__(self, file: Path, tokenizer: Any, augment: bool) -> None:
        texts = ["\n".join(turn["content"] for turn in json.loads(line)["messages"]) for line in file.open()]
        self.rows = [tokenizer(text)["input_ids"] for text in texts]
        self.augment = augment

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = list(self.rows[index])
        if self.augment:
            ids[int(torch.randint(len(ids), ()))] = int(torch.randint(100, ()))
        return {"input_ids": ids}


def make(settings: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()) -> Trainer:
    """A trainer for the settings."""
    args = TrainingArguments(
        settings["run_dir"], **settings["train"], use_cpu=True, report_to="none", disable_tqdm=True
    )
    set_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(tiny.CHECKPOINT)
    tokenizer.pad_token = tokenizer.eos_token
    targets = rf".*language_model.*\.({'|'.join(LAYERS)})"
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=targets)
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(tiny.CHECKPOINT), lora)
    rows = Rows(Path(settings["rows"]), tokenizer, settings.get("augment", False))
    return Trainer(
        model,
        args,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        train_dataset=rows,
        callbacks=list(callbacks),
    )


def newest(run_dir: Path) -> Path | None:
    """The checkpoint that a script goes on from."""
    found = get_last_checkpoint(str(run_dir)) if run_dir.is_dir() else None
    return found and Path(found)


def train(settings: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Train, from the last checkpoint where there is one, and save the adapter and the log."""
    trainer = make(settings, callbacks)
    checkpoint = newest(Path(settings["run_dir"]))
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    trainer.save_model(str(Path(settings["run_dir"]) / "adapter"))
    trainer.save_state()
