"""A recipe and its plan -> the trainer's TrainingArguments."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from ..data.schedule import Schedule
from ..errors import RecipeError
from ..models.load import loader_workers
from ..models.precision import working_dtype
from ..recipe import Recipe
from .ranks import ALONE, Ranks
from .strategy import process_arguments, strategy_arguments

LESS_IS_BETTER = ("loss", "mse", "mae")
SAVE_STEPS = 500
"""About how often a run saves that keeps its best checkpoint: where it is evaluated, too. transformers' own number."""


def offloads(recipe: Recipe) -> bool:
    """Whether what is kept for the backward pass goes to the host's memory; without a GPU it is there already."""
    return recipe.memory.offload_activations and torch.cuda.is_available()


def arguments(recipe: Recipe, packs: Schedule, evaluates: bool, ranks: Ranks = ALONE) -> TrainingArguments:
    """TrainingArguments of a run: the recipe's own, and those the pack contract fixes. Raises RecipeError."""
    gpu = torch.cuda.is_available()
    dtype = working_dtype()
    own = {k: v for k, v in recipe.train.items() if k not in ("tokens_per_step", "samples_per_step", "report_to")}
    defaults = {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not gpu,
        "dataloader_num_workers": loader_workers(),
        "logging_nan_inf_filter": False,  # a NaN must be seen, not logged as 0.0
        "logging_steps": 1,
        "disable_tqdm": True,
        "eval_strategy": "steps" if recipe.eval.every else "epoch" if evaluates else "no",
        "eval_steps": recipe.eval.every,
        "eval_on_start": evaluates,  # to know later what it was like before; and what fails there, fails at once
        **process_arguments(ranks),
    }
    scores = recipe.task == "classify"
    fixed: dict[str, Any] = {
        "output_dir": str(recipe.run_dir),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "save_total_limit": None,  # Lasting removes checkpoints
        "gradient_accumulation_steps": packs.accumulation(ranks.at_once),
        "max_steps": packs.steps,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",  # the plan has shuffled the packs
        "remove_unused_columns": False,
        "prediction_loss_only": not scores,
        "gradient_checkpointing": False,  # what is computed again, models/activations.py has set
        "average_tokens_across_devices": True,
        **strategy_arguments(recipe),
    }
    if scores:
        fixed["label_names"] = ["labels"]
    else:
        fixed |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        fixed["activation_offloading"] = offloads(recipe)
    if metric := recipe.eval.metric:
        assert recipe.eval.every
        defaults["save_steps"] = max(1, SAVE_STEPS // recipe.eval.every) * recipe.eval.every
        fixed |= {"load_best_model_at_end": True, "metric_for_best_model": f"eval_{metric}"}
        fixed["greater_is_better"] = metric not in LESS_IS_BETTER
    if recipe.memory.optimizer != "auto":
        fixed["optim"] = recipe.memory.optimizer
    try:
        made = (TrainingArguments if scores else SFTConfig)(**(defaults | own | fixed))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train: {error}\n  Mend the value; keys are TrainingArguments' own.") from None
    made.report_to = []  # the run's trackers do that; transformers itself adds one that a cluster's environment names
    return made
