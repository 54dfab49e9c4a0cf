"""The trainers of transformers and TRL, with what packs ask of them; and the arguments of a run."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from ..data.dataset import Schedule
from ..data.encode import IGNORE
from ..data.labels import Labels
from ..errors import RecipeError, one_line
from ..metrics import score_metrics
from ..models.activations import tile_loss
from ..models.load import loader_workers, working_dtype
from ..recipe import Recipe
from .checkpoints import fault, folder_of, rotate, written
from .numbers import Numbers
from .signals import leave_signals
from .workers import Doing, Feed, WorkerError, dead_workers


class Lasting(Trainer):
    """What a run adds to a trainer so that it survives: whole checkpoints, sound steps, workers that may die.

    `numbers` and `doing` are set before it trains.
    """

    numbers: Numbers
    doing: Doing
    accepted = False
    """Whether the recipe was changed since the checkpoint that the run goes on from."""
    _aside: Path | None = None
    _feed: Feed | None = None

    def save_now(self) -> Path:
        """Save a checkpoint of the step that was taken last; returns its folder. Raises DiskError, DivergedError."""
        self._save_checkpoint(self.model, None)
        return folder_of(Path(self.args.output_dir), self.state.global_step)

    def checkpoint_size(self) -> int:
        """About how many bytes a checkpoint takes: what is saved of the model, and two moments of what trains."""
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        kept = trained if isinstance(self.model, PeftModel) else list(self.model.parameters())
        return sum(p.numel() * p.element_size() for p in kept) + sum(8 * p.numel() for p in trained)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.numbers.counted(super().training_step(*args, **kwargs))

    def get_train_dataloader(self) -> DataLoader:
        return _with_patient_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _with_patient_workers(super().get_eval_dataloader(*args, **kwargs))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if self._feed is None or self._feed.first is not epoch_iterator:
            taken = self.state.global_step * self.args.gradient_accumulation_steps
            self._feed = Feed(self.callback_handler.train_dataloader, epoch_iterator, taken, self.doing)
        try:
            return super().get_batch_samples(self._feed, num_batches, device)
        except WorkerError:
            if self.state.global_step:
                self.save_now()
            raise

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return super().evaluate(*args, **kwargs)
        except RuntimeError as error:
            if not dead_workers(error):
                raise
            if self.state.global_step:
                self.save_now()
            found = f"data: a DataLoader worker died as step {self.state.global_step} was evaluated: {one_line(error)}"
            raise WorkerError(
                f"{found}\n  Run again; where memory is short, lower train.dataloader_num_workers."
            ) from error

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the trainer's own, in a folder that appears as a whole; then older ones are rotated."""
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        folder = folder_of(run_dir, step)
        if folder.exists() and fault(folder) is None:
            return  # a signal came at a step that is saved anyway
        states = [
            value for state in self.optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        self.numbers.require_finite([*self.numbers.parameters, *states], step)
        best = folder_of(run_dir, self.state.best_global_step) if self.state.best_global_step else None
        self.state.best_model_checkpoint = best and str(best)
        with written(folder, self.checkpoint_size()) as beside:
            self._aside = beside.parent
            try:
                Trainer._save_checkpoint(self, model, trial)  # TRL's own would write a card beside
            finally:
                self._aside = None
        rotate(run_dir, self.args.save_total_limit, best)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The weights alone: no pickle of the arguments, and no tokenizer that the base has as well."""
        # No embedding changes its size here, and PEFT would ask the hub whether one did.
        asks_nobody = {"save_embedding_layers": False} if isinstance(self.model, PeftModel) else {}
        self.model.save_pretrained(output_dir, state_dict=state_dict, **asks_nobody)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: each step draws from its own seed."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: each step draws from its own seed."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the trainer's own; rates and decay are the recipe's, where it was changed since."""
        scheduler, groups = self.lr_scheduler, self.optimizer.param_groups
        own = [{key: group.get(key) for key in ("initial_lr", "weight_decay")} for group in groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.accepted and isinstance(scheduler, LambdaLR):
            scheduler.base_lrs = [group["initial_lr"] for group in own]
            shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
            scheduler._last_lr = [rate * share for rate, share in zip(scheduler.base_lrs, shares, strict=True)]
            for group, kept, rate in zip(self.optimizer.param_groups, own, scheduler._last_lr, strict=True):
                group |= kept | {"lr": rate}


class ChatTrainer(Lasting, SFTTrainer):
    """TRL's trainer, reporting nothing home; its loss holds the logits of a few tokens at a time."""

    def __init__(self, **settings: Any) -> None:
        tile_loss()
        super().__init__(**settings)

    def _send_telemetry(self) -> None:
        pass


class ScoreTrainer(Lasting):
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


def _with_patient_workers(loader: DataLoader) -> DataLoader:
    """Their own random numbers are drawn by nothing here, so that beginning a worker is free for this."""
    for each in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate's wraps one that iterates
        each.worker_init_fn = leave_signals
    return loader


def offloads(recipe: Recipe) -> bool:
    """Whether what is kept for the backward pass goes to the host's memory; without a GPU it is there already."""
    return recipe.memory.offload_activations and torch.cuda.is_available()


def arguments(recipe: Recipe, packs: Schedule, evaluates: bool) -> TrainingArguments:
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
        made = (TrainingArguments if scores else SFTConfig)(**(defaults | own | fixed))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train: {error}\n  Mend the value; keys are TrainingArguments' own.") from None
    made.report_to = []  # the run's trackers do that; transformers itself adds one that a cluster's environment names
    return made
