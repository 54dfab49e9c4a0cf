"""The trainers of transformers and TRL, with what packs and runs ask of them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import EvalPrediction, Trainer
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput, SchedulerType, TrainOutput
from trl import SFTTrainer
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from ..conflicts import METRICS
from ..data.deaths import TOLD
from ..data.encode import IGNORE
from ..data.labels import Labels
from ..errors import ResumeError, one_line
from ..metrics import Metrics, score_metrics
from ..models.head import score_loss
from ..models.lm_head import score_supervised
from .checkpoints import fault, folder_of, rotate, written
from .numbers import Numbers, numel
from .ranks import ALONE, Ranks
from .rates import group_by_part, like, rates_now
from .signals import leave_signals
from .slices import (
    begin_moments,
    load_computed,
    load_slices,
    save_slices,
    slices_of,
    steps_taken,
    trained,
    whole_weights,
)
from .strategy import gather_at_once, wrap_layers
from .workers import Deaths, Doing, Feed, WorkerError

log = logging.getLogger("mantis_lite")

SHARED = "shared.json"
"""In a checkpoint of what is in parts: the scheduler, and how many steps the optimizer has taken."""


class Lasting(Trainer):
    """What a run adds to a trainer so that it survives: whole checkpoints, sound steps, workers that may die.

    `numbers`, `doing` and `doing_held_out` are set before it trains.
    """

    numbers: Numbers
    ranks: Ranks = ALONE
    rates: Mapping[str, float] = {}
    """Learning rates of parts that have one of their own."""
    seen_by: Sequence[str] = ()
    """The parts of the model that pictures go through."""
    doing: Doing
    doing_held_out: Doing
    held_out_share = 1.0
    """Packs that are evaluated, by those of them that hold a sample."""
    keep: int | None = None
    """How many checkpoints are kept; the trainer's own way of removing them is left unused."""
    accepted = False
    """Whether the recipe was changed since the checkpoint that the run goes on from."""
    patience: int | None = None
    """Steps without a better evaluation after which the run ends."""
    owes_evaluation = False
    """Whether the run stopped before an evaluation that was due."""
    _rates_logged: Mapping[str, float] = {}
    _aside: Path | None = None
    _feed: Feed | None = None

    def save_now(self) -> Path:
        """Save a checkpoint of the step that was taken last; returns its folder. Raises DiskError, DivergedError."""
        self._save_checkpoint(self.model, None)
        return folder_of(Path(self.args.output_dir), self.state.global_step)

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a part of what trains, and no more."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def checkpoint_size(self) -> int:
        """About how many bytes a checkpoint takes: what is saved of the model, and two moments of what trains."""
        trains = [parameter for _, parameter in trained(self.model)]
        if self.is_sharded:
            return sum(12 * numel(p) for p in trains)
        kept = trains if isinstance(self.model, PeftModel) else list(self.model.parameters())
        return sum(p.numel() * p.element_size() for p in kept) + sum(8 * p.numel() for p in trains)

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._feed is not None:
                self._feed.close()

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the trainer's own, with a group for each part."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made:
            group_by_part(optimizer, self.numbers.parts, self.rates)
        return optimizer

    def _get_learning_rate(self) -> float:
        """As the trainer's own; where parts have theirs, each is logged beside that of the others."""
        if not self.rates:
            return super()._get_learning_rate()
        self._rates_logged = rates_now(self.optimizer, self.rates)
        return self._rates_logged["learning_rate"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "learning_rate" in logs:
            logs.update(self._rates_logged)
        super().log(logs, start_time)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.numbers.counted(super().training_step(*args, **kwargs))

    def get_train_dataloader(self) -> DataLoader:
        return _with_patient_workers(super().get_train_dataloader())

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        return _with_patient_workers(super().get_eval_dataloader(*args, **kwargs))

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        if self._feed is None or self._feed.first is not epoch_iterator:
            taken = self.state.global_step * self.args.gradient_accumulation_steps
            self._feed = Feed(self.callback_handler.train_dataloader, epoch_iterator, taken, self.doing)
        with self._saving():
            return super().get_batch_samples(self._feed, num_batches, device)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As the trainer's own, from its beginning when a worker dies, up to three times."""
        deaths = Deaths(self.doing_held_out)
        with self._saving():
            while True:
                try:
                    return super().evaluate(*args, **kwargs)
                except TOLD as error:
                    deaths.count(error)
                    if self.ranks.size > 1:  # the others are in the midst of it
                        raise
                    self._forget_evaluation()

    @contextmanager
    def _saving(self) -> Iterator[None]:
        """Save the steps that were taken before a run ends of its workers; of several processes, the others go on."""
        try:
            yield
        except WorkerError:
            if self.state.global_step and self.ranks.size == 1:
                self.save_now()
            raise

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As the trainer's own; a mean over packs is one over those that are not there to fill up a round."""
        found = super().evaluation_loop(*args, **kwargs)
        for name in found.metrics:
            if name.endswith("_loss") and self.args.prediction_loss_only:
                found.metrics[name] *= self.held_out_share
        return found

    def _forget_evaluation(self) -> None:
        """Drop what was gathered of an evaluation that is begun anew."""

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        """As the trainer's own; one that is owed counts as it would have in its time."""
        owed, self.owes_evaluation = self.owes_evaluation, False
        metrics = super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler and not owed)
        if owed:
            self._determine_best_metric(metrics, trial)
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the trainer's own; what may be gone back to is saved, and so is where patience ends."""
        name = self.args.metric_for_best_model
        if name and metrics.get(name, 0) is None:
            log.warning("%s is not defined in step %d, and counts as no better", name, self.state.global_step)
            metrics = metrics | {name: -math.inf if self.args.greater_is_better else math.inf}
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.args.load_best_model_at_end
        if self._is_enough:
            self.control.should_save = self.control.should_training_stop = True
            step, better = self.state.global_step, self.state.best_global_step
            if step < self.state.max_steps:
                log.warning("step %d ends the run: %s has not been better since step %d", step, name, better)
        return best

    @property
    def _is_enough(self) -> bool:
        best = self.state.best_global_step
        return self.patience is not None and best is not None and self.state.global_step - best >= self.patience

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As the trainer's own, unless the run has ended early before."""
        if self._is_enough:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        best = folder_of(Path(self.args.output_dir), self.state.best_global_step or 0)
        if self.state.best_global_step:  # the folder may have been moved since
            self.state.best_model_checkpoint = str(best)
        if self.is_sharded:
            return self._load_shares(best)
        super()._load_best_model()

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Nothing of a checkpoint may be left over, and nothing missing, but for what is another's double."""
        missing = set(load_result.missing_keys) - set(getattr(self.model, "all_tied_weights_keys", None) or ())
        assert not load_result.unexpected_keys and not missing, f"a checkpoint of another model: {load_result}"

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._aside is None else str(self._aside)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the trainer's own, in a folder that appears as a whole; then older ones are rotated."""
        run_dir, step = Path(self.args.output_dir), self.state.global_step
        folder = folder_of(run_dir, step)
        if self.ranks.told(folder.exists() and fault(folder) is None):
            return  # a signal came at a step that is saved anyway
        states = [value for state in self._states.values() for value in state.values() if torch.is_tensor(value)]
        self.numbers.require_finite([*self.numbers.parameters, *states], step)
        best = folder_of(run_dir, self.state.best_global_step) if self.state.best_global_step else None
        with written(folder, self.checkpoint_size(), self.ranks) as beside:
            self._aside = beside.parent
            try:
                Trainer._save_checkpoint(self, model, trial)  # TRL's own would write a card beside
            finally:
                self._aside = None
            self.state.best_model_checkpoint = str(best) if best else None
            if self.ranks.is_first:
                self.state.save_to_json(str(beside / TRAINER_STATE_NAME))  # with the folder's name as it will be
        if self.ranks.is_first:
            rotate(run_dir, self.keep, best)

    @property
    def _states(self) -> dict[Any, dict[str, Any]]:
        """What the optimizer keeps of each tensor that it is given."""
        inner = self.optimizer
        while hasattr(inner, "optimizer"):  # accelerate's wrapper, and DeepSpeed's
            inner = inner.optimizer
        return inner.state

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the trainer's own; what is in parts is saved with its moments."""
        if not self.is_sharded:
            super().save_model(output_dir, _internal_call)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the trainer's own; of what is in parts each process writes its own."""
        if not self.is_sharded:
            return super()._save_optimizer_and_scheduler(output_dir)
        save_slices(Path(output_dir), slices_of(self.model, self.optimizer.optimizer), self.ranks)
        if self.ranks.is_first:
            kept = {"scheduler": self.lr_scheduler.state_dict(), "steps": steps_taken(self._states)}
            (Path(output_dir) / SHARED).write_text(json.dumps(kept))

    def _prepare_for_training(self, max_steps: int, train_dataloader: DataLoader, resume_from_checkpoint: Any) -> Any:
        """As the trainer's own, which would look for a checkpoint of DeepSpeed's or FSDP's."""
        if not self.is_sharded:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        if self.is_fsdp_enabled:
            wrap_layers(self.model, self.accelerator.state.fsdp_plugin)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        if self.is_fsdp_enabled:  # or accelerate has silently made it DDP
            assert all(isinstance(parameter, DTensor) for _, parameter in trained(self.model)), "nothing is in parts"
        if is_deepspeed_zero3_enabled():
            gather_at_once(self.model, self.seen_by)
        if resume_from_checkpoint is not None:
            self._load_shares(Path(resume_from_checkpoint))
        return prepared

    def _load_shares(self, checkpoint: Path) -> None:
        """What this process holds of a checkpoint that any number of processes has written."""
        kept = json.loads((checkpoint / SHARED).read_text())
        begin_moments(self.model, self.optimizer.optimizer, kept["steps"])
        load_slices(checkpoint, slices_of(self.model, self.optimizer.optimizer))
        if self.is_deepspeed_enabled:
            load_computed(checkpoint, self.model, self.ranks)
        self._go_on(partial(self._load_scheduler, kept["scheduler"]))

    def _load_scheduler(self, state: dict[str, Any]) -> None:
        self.lr_scheduler.load_state_dict(state)
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """The weights alone: no pickle of the arguments, and no tokenizer that the base has as well.

        Of what is in parts all processes give theirs, and the first writes it.
        """
        if self.is_sharded:
            state_dict = whole_weights(self.model, self.ranks)
        if not self.ranks.is_first:
            return
        if isinstance(self.model, PeftModel):
            # No embedding changes its size here, and PEFT would ask the hub whether one did.
            more = {"save_embedding_layers": False}
        else:  # a checkpoint is read back by the model's own names, and what is published by the published ones
            more = {"save_original_format": self._aside is None}
        self.model.save_pretrained(output_dir, state_dict=state_dict, **more)

    def _save_rng_state(self, output_dir: str) -> None:
        """Nothing: each step draws from its own seed."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing: each step draws from its own seed."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        self._go_on(partial(super()._load_optimizer_and_scheduler, checkpoint))

    def _go_on(self, load: Callable[[], None]) -> None:
        """Load the optimizer's and the scheduler's state; rates and the like are the recipe's, where it was changed."""
        scheduler = self.lr_scheduler
        own = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            load()
        except ValueError as error:  # of torch, which counts groups and what is in them
            found = f"train: the optimizer's state is of another version of this package: {one_line(error)}"
            raise ResumeError(f"{found}\n  Add --from-scratch, or go on with the version it was begun with.") from None
        if not self.accepted:
            return
        if not isinstance(scheduler, LambdaLR):
            kind = SchedulerType(self.args.lr_scheduler_type).value
            found = f"{kind} sets its rates by how the run went, so that it cannot go on with another recipe"
            raise ResumeError(f"train.lr_scheduler_type: {found}\n  Add --from-scratch.")
        scheduler.base_lrs = [group["initial_lr"] for group in own]
        shares = [share(scheduler.last_epoch) for share in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * share for rate, share in zip(scheduler.base_lrs, shares, strict=True)]
        for group, kept, rate in zip(self.optimizer.param_groups, own, scheduler._last_lr, strict=True):
            group |= kept | {"lr": like(float(rate), kept["lr"])}

    def _load_scaler(self, checkpoint: str | None) -> None:
        if getattr(self.accelerator, "scaler", None) is not None:  # or the run goes on in another format of 16 bits
            super()._load_scaler(checkpoint)


class ChatTrainer(Lasting, SFTTrainer):
    """TRL's trainer, reporting nothing home; its loss is that of tokens with loss, the logits of a few at a time."""

    def __init__(self, **settings: Any) -> None:
        score_supervised()
        super().__init__(**settings)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """As TRL's; where processes share a pack that is evaluated, the mean of their losses is the whole pack's."""
        if self.ranks.sequence > 1 and num_items_in_batch is None:
            num_items_in_batch = inputs["labels"].ne(IGNORE).sum() * self.ranks.at_once
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _send_telemetry(self) -> None:
        pass

    def _forget_evaluation(self) -> None:
        self._metrics["eval"].clear()


class ScoreTrainer(Lasting):
    """transformers' trainer of a score head: a step's loss is the mean over the targets of all its packs."""

    def __init__(self, labels: Labels, offloads: bool, **settings: Any) -> None:
        super().__init__(compute_metrics=self._metrics, **settings)
        self.labels = labels
        self.kept = get_act_offloading_ctx_manager(self.model, warn_if_no_head=False) if offloads else nullcontext()

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.kept:  # as TRL's own trainer does
            return super().training_step(*args, **kwargs)

    def prediction_step(self, *args: Any, **kwargs: Any) -> tuple[None, Tensor | None, Tensor | None]:
        """As the trainer's own, but for the loss, which it would weigh by how many samples the packs at hand have.

        Packs of several processes, of unlike many samples, are filled up with unknown ones.
        """
        _, scores, targets = super().prediction_step(*args, **kwargs)
        if self.ranks.size == 1 or scores is None or targets is None:
            return None, scores, targets
        unknown = math.nan if targets.is_floating_point() else IGNORE
        pad = partial(self.accelerator.pad_across_processes, dim=0)
        return None, pad(scores), pad(targets, pad_index=unknown)

    def _metrics(self, found: EvalPrediction) -> dict[str, float | None]:
        scores, targets = torch.from_numpy(found.predictions), torch.from_numpy(found.label_ids)
        config = self.model.config
        loss = score_loss(scores, targets, config.problem_type, config.class_weights)
        undefined: Metrics = dict.fromkeys(METRICS[self.labels.problem])  # as all are, of scores that are no numbers
        return {"loss": loss.item()} | undefined | score_metrics(self.labels, found.predictions, found.label_ids)

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
        """Known targets of a step's packs: the trainer's own count takes NaN for a number, and -100.0 for none."""
        targets = [batch["labels"] for batch in batch_samples]
        known = [~t.isnan() if t.is_floating_point() else t != IGNORE for t in targets]
        count = torch.stack([each.sum() for each in known]).sum().to(device)
        return self.accelerator.gather(count).sum()


def _with_patient_workers(loader: DataLoader) -> DataLoader:
    """A loader whose workers leave signals to the trainer; its own seeding of them has no use, as none draws."""
    for each in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate's wraps one that iterates
        each.worker_init_fn = leave_signals
    return loader
