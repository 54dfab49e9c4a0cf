"""The trainers of transformers and TRL, with what packs ask of them; and the arguments of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import EvalPrediction, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from ..data.dataset import Schedule
from ..data.encode import IGNORE
from ..data.labels import Labels
from ..errors import RecipeError
from ..metrics import score_metrics
from ..models.activations import tile_loss
from ..models.load import loader_workers, working_dtype
from ..recipe import Recipe


class ChatTrainer(SFTTrainer):
    """TRL's trainer, reporting nothing home; its loss holds the logits of a few tokens at a time."""

    def __init__(self, **settings: Any) -> None:
        tile_loss()
        super().__init__(**settings)

    def _send_telemetry(self) -> None:
        pass


class ScoreTrainer(Trainer):
    """transformers' trainer of a score head: a step's loss is the mean over the targets of all its packs."""

    def __init__(self, labels: Labels, offloads: bool, **settings: Any) -> None:
        super().__init__(compute_metrics=self._metrics, **settings)
        self.labels = labels
        self.kept = get_act_offloading_ctx_manager(self.model, warn_if_no_head=False) if offloads else nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self.kept:  # as TRL's own trainer does
            return super().training_step(*args, **kwargs)

    def _metrics(self, found: EvalPrediction) -> dict[str, float | None]:
        return score_metrics(self.labels, found.predictions, found.label_ids)

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict[str, Any]], device: torch.device) -> torch.Tensor:
        """Known targets of a step's packs: the trainer's own count takes NaN for a number, and -100.0 for none."""
        targets = [batch["labels"] for batch in batch_samples]
        known = [~t.isnan() if t.is_floating_point() else t != IGNORE for t in targets]
        return torch.stack([each.sum() for each in known]).sum().to(device)


def offloads(recipe: Recipe) -> bool:
    """Whether what is kept for the backward pass goes to the host's memory; without a GPU it is there already."""
    return recipe.memory.offload_activations and torch.cuda.is_available()


def arguments(recipe: Recipe, packs: Schedule, evaluates: bool) -> TrainingArguments:
    """TrainingArguments of a run: the recipe's own, and those the pack contract fixes. Raises RecipeError."""
    gpu = torch.cuda.is_available()
    dtype = working_dtype()
    own = {k: v for k, v in recipe.train.items() if k not in ("tokens_per_step", "samples_per_step")}
    defaults = {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not gpu,
        "dataloader_num_workers": loader_workers(),
        "logging_nan_inf_filter": False,  # a NaN must be seen, not logged as 0.0
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "steps" if recipe.eval.every else "epoch" if evaluates else "no",
        "eval_steps": recipe.eval.every,
    }
    scores = recipe.task == "classify"
    fixed: dict[str, Any] = {
        "output_dir": str(recipe.run_dir),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": packs.accumulation,
        "max_steps": packs.steps,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",  # the plan has shuffled the packs
        "remove_unused_columns": False,
        "prediction_loss_only": not scores,
        "gradient_checkpointing": False,  # what is computed again, models/activations.py has set
    }
    if scores:
        fixed["label_names"] = ["labels"]
    else:
        fixed |= {"max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True}}
        fixed["activation_offloading"] = offloads(recipe)
    if recipe.memory.optimizer != "auto":
        fixed["optim"] = recipe.memory.optimizer
    try:
        return (TrainingArguments if scores else SFTConfig)(**(defaults | own | fixed))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train: {error}\n  Mend the value; keys are TrainingArguments' own.") from None
