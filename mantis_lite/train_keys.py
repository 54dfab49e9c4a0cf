"""The keys of a recipe's `train`: TrainingArguments' own and the sizes of a step; which are refused, and why."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from .errors import did_you_mean

REFUSED = {
    "per_device_train_batch_size": "a pack is the batch; size it with packing.max_length, and the step with "
    "train.tokens_per_step or train.samples_per_step",
    "per_device_eval_batch_size": "a pack is the batch; size it with packing.max_length",
    "output_dir": "the run's folder is run_dir",
    "remove_unused_columns": "the batch is made by the package, and nothing in it is unused",
    "label_smoothing_factor": "it would hold all logits at once, and a pack without an answer would have a loss of NaN",
    "gradient_checkpointing": "set memory.checkpointing",
    "gradient_checkpointing_kwargs": "set memory.checkpointing",
    "optim": "set memory.optimizer",
    "eval_strategy": "set eval.every",
    "eval_steps": "set eval.every",
    "do_eval": "set data.eval",
    "train_sampling_strategy": "the plan orders the packs; set packing.seed",
    "use_liger_kernel": "set memory.kernels",
    "resume_from_checkpoint": "running again in the same run_dir resumes",
    "prediction_loss_only": "evaluation gives the loss",
    "save_only_model": "a run goes on by the optimizer's state as well; set train.save_total_limit",
    "ignore_data_skip": "a run that goes on takes up the rows where it stopped",
    "enable_jit_checkpoint": "a signal has the run save by itself",
    "dataloader_in_order": "packs come in the order of the plan",
    "auto_find_batch_size": "a pack is the batch; `mantis-lite fit` says beforehand whether it fits",
    "do_train": "that is what the command does",
    "do_predict": "there is nothing to predict on",
    **dict.fromkeys(("deepspeed", "fsdp", "fsdp_config", "parallelism_config"), "set launch.strategy"),
    "accelerator_config": "the plan gives each GPU its packs",
    "average_tokens_across_devices": "the loss of a step is the mean over all that is trained of it, on all GPUs",
    **dict.fromkeys(
        ("push_to_hub", "hub_model_id", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision"),
        "a run pushes nothing while it trains; afterwards `mantis-lite push RUN_DIR user/name` does",
    ),
    **dict.fromkeys(
        ("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        "trackio keeps the run on this machine; what it makes of it on the hub, it makes public",
    ),
}

STEP_SIZES = ("tokens_per_step", "samples_per_step", "gradient_accumulation_steps")


@cache
def train_keys() -> dict[str, str]:
    """TrainingArguments' field names and annotations, read from its source: importing it would take seconds."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "training_args.py").read_text())
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = [(n.target, n.annotation) for n in body if isinstance(n, ast.AnnAssign)]
    keys = {name.id: ast.unparse(kind) for name, kind in fields if isinstance(name, ast.Name)}
    return {k: kind for k, kind in keys.items() if not k.startswith("_")} | dict.fromkeys(STEP_SIZES, "step size")


def train_problems(train: dict[str, Any]) -> Iterator[str]:
    """What is wrong with a recipe's `train`, a line each."""
    for key in train:
        if key in REFUSED:
            yield f"train.{key}: not set here: {REFUSED[key]}"
        elif key not in train_keys():
            yield f"train.{key}: no such key{did_you_mean(f'train.{key}', [f'train.{k}' for k in train_keys()])}"
    numbers = {"int": (int, "a whole number"), "float": (int | float, "a number")}
    for key, value in train.items():
        kind, name = numbers.get(train_keys().get(key, ""), (object, ""))
        if key not in REFUSED and (not isinstance(value, kind) or (name and isinstance(value, bool))):
            yield f"train.{key}: expected {name}, found {value!r}"
    if isinstance(rate := train.get("learning_rate"), int | float) and rate <= 0:
        yield f"train.learning_rate: expected more than 0, found {rate}"
    steps = [key for key in STEP_SIZES if key in train]
    if len(steps) > 1:
        yield f"train: {' and '.join(steps)} each set the size of a step\n  Keep one of them."
    for key in steps:
        if not isinstance(train[key], int) or train[key] < 1:
            yield f"train.{key}: expected a positive whole number, found {train[key]!r}"
