"""A run, from its first step to what it leaves behind."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from ..card import write_card
from ..contract import Contract, contract_of, facts_of
from ..data.packs import BLANK
from ..data.sample import Sample
from ..data.schedule import Schedule
from ..errors import OutOfMemory, Stopped
from ..memory.estimate import Estimate
from ..memory.overrides import peak
from ..memory.shortage import shortage
from ..models.adapters import PartSize, part_sizes
from ..models.assemble import Assembled
from ..models.attention import chosen_attention
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.kernels import chosen_kernels, fused_layers, words
from ..models.precision import working_dtype
from ..plain_clients import write_settings, write_template
from ..recipe import ModelRecipe
from .charts import draw_curve
from .checkpoints import folder_of, require_space, written
from .jsonlines import lines_of
from .plan import Plan
from .report import reported, run_facts
from .run_files import CURVE, METRICS
from .signals import Signals
from .trainers import Lasting

log = logging.getLogger("mantis_lite")


@dataclass
class Run(Plan):
    """Everything a run stands on before its first step: data, plan and model; `trainer` does the rest."""

    trainer: Lasting
    head: PreTrainedConfig | None
    """The config that states a score head, where the task has one."""
    kept: str | None
    """What the vision cache holds, in words, where there is one."""
    answered: list[Sample] = field(default_factory=list)
    """The held-out rows that are answered at each evaluation."""

    @property
    def notices(self) -> list[str]:
        """What a user should know of the run before it trains."""
        notices = [self.checkpoint.notice] if self.checkpoint.notice else []
        use_cpu = bool(self.recipe.train.get("use_cpu"))
        if isinstance(self.checkpoint, Assembled):
            notices.append(f"model: {self.checkpoint.public_name}, put together in {self.checkpoint.folder}")
        notices.append(f"attention: {chosen_attention(self.recipe.memory.attention, use_cpu)}")
        if self.ranks.sequence > 1:
            notices.append(f"launch.sequence: {self.ranks.sequence} GPUs share each row, its pictures are seen by each")
        chosen = chosen_kernels(self.recipe)
        notices.extend(words(fused_layers(self.trainer.model, self.checkpoint.family, chosen)))
        if adapter := self.recipe.model.adapter:
            own = f"going on with {adapter} by its own settings"
            notices.append(f"{own}: the recipe's lora and trainable are not used, but for rates")
        unused = self.trainer.numbers.parts.keys() - self._used(self.schedule.steps)
        notices.extend(f"{part}: no row has a picture, so it stays as it is" for part in sorted(unused))
        return [
            *self.resumed.notices(),
            *self.picked,
            *self.schedule.notices,
            *notices,
            *([self.kept] if self.kept else []),
        ]

    @property
    def sizes(self) -> list[PartSize]:
        return part_sizes(self.trainer.model, self.checkpoint.family)

    @cached_property
    def estimate(self) -> Estimate | str | None:
        """What a step should take of the GPU, or why that cannot be said; None where there is no GPU."""
        return peak(self.work, self.recipe) if self.on_gpu else None

    @property
    def on_gpu(self) -> bool:
        return self.trainer.args.device.type == "cuda"

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What the run's page says of it, in JSON."""
        return run_facts(self)

    def train(self) -> Path:
        """Train to the end, from the newest checkpoint that is whole; returns the folder of what was trained.

        Raises Stopped once a signal has had the run save and stop; OutOfMemory, DivergedError, DiskError.
        """
        if self.ranks.is_first:
            self.lock.take()
        try:
            if self.ranks.is_first:
                self._require_space()
            self.ranks.wait()
            with reported(self), Signals(self.trainer.save_now) as signals:
                self.trainer.add_callback(signals)
                self.walk()
                state = self.trainer.state
                if signals.caught and state.global_step < state.max_steps:
                    raise Stopped(signals.caught, folder_of(self.recipe.run_dir, state.global_step))
                folder = self.save()
                self._draw_curve()
        finally:
            self.lock.release()
        return folder

    def walk(self) -> None:
        """Take the steps that are left, and save nothing beyond checkpoints. Raises OutOfMemory, DivergedError."""
        checkpoint = self.resumed.checkpoint
        if checkpoint:
            self.trainer.owes_evaluation = self.trainer.args.eval_on_start = self._owes_evaluation()
        try:
            self.trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(error) from None

    def save(self) -> Path:
        """Save the adapter as PEFT does, or the model in its published layout; returns the folder.

        Raises DiskError, and DivergedError for weights that are no numbers.
        """
        full = self.recipe.method == "full"
        folder = self.recipe.run_dir / ("model" if full else "adapter")
        self.trainer.numbers.require_finite(self.trainer.numbers.parameters, self.trainer.state.global_step)
        with written(folder, self.trainer.checkpoint_size(), self.ranks) as beside:
            self.trainer._save(str(beside))
            if self.ranks.is_first:
                self._save_beside(beside, full)
        return folder

    def _save_beside(self, folder: Path, full: bool) -> None:
        """What makes weights, of a whole model or of an adapter, something to be used."""
        encoder = self.checkpoint.encoder(self.recipe.in_use)
        if full:
            # Config, tokenizer and processor are the base's own files, to the letter: the published layout.
            self.checkpoint.copy_small_files(folder)
            write_settings(folder, self.checkpoint, encoder, self.recipe)
        if self.head is not None:
            self.head.save_pretrained(folder)  # what the scores are; beside an adapter PEFT takes no notice of it
            if self.encoder.score and self.encoder.score.tokens:
                self.encoder.tokenizer.save(str(folder / "tokenizer.json"))
        write_template(folder, encoder)
        used = open_checkpoint(ModelRecipe(name=str(folder))) if full else self.checkpoint
        contract = self._contract(used)
        contract.write(folder)
        write_card(folder, contract, self.recipe.run_dir.resolve().name)

    def _contract(self, used: Checkpoint) -> Contract:
        """How what was trained is to be used, with the checkpoint it is used by; and the metrics of its step."""
        state, went_back = self.trainer.state, self.trainer.args.load_best_model_at_end
        step = (went_back and state.best_global_step) or state.global_step
        lines = [line for line in lines_of(self.recipe.run_dir / METRICS) if line["step"] <= step]
        kept = {k: v for line in lines for k, v in line.items() if k == "loss" or k.startswith("eval_")}
        return contract_of(
            "model" if self.recipe.method == "full" else "adapter",
            self.recipe,
            self.checkpoint,
            facts_of(used, used.encoder(self.recipe.in_use)),
            self.prepared,
            working_dtype(),
            {name: value for name, value in kept.items() if isinstance(value, int | float | None)},
        )

    def _draw_curve(self) -> None:
        if not self.ranks.is_first:
            return
        try:
            draw_curve(self.recipe.run_dir / METRICS, self.recipe.run_dir / CURVE)
        except OSError as error:
            log.warning("%s cannot be drawn: %s", CURVE, error.strerror)

    def _require_space(self) -> None:
        args, left = self.trainer.args, self.schedule.steps - self.resumed.step
        every = args.save_steps if args.save_steps >= 1 else args.save_steps * self.schedule.steps
        saves = 1 + (int(left / every) if args.save_strategy == "steps" else args.save_strategy != "no")
        require_space(self.recipe.run_dir, self.trainer.checkpoint_size(), saves, self.trainer.keep)

    def _owes_evaluation(self) -> bool:
        """Whether the run stopped after a step before it had been evaluated."""
        step, every = self.resumed.step, self.recipe.eval.every
        due = self.prepared.held_out is not None and (step == self.schedule.steps or (every and step % every == 0))
        lines = lines_of(self.recipe.run_dir / METRICS) if due else []
        return bool(due) and not any(line["step"] == step and "eval_loss" in line for line in lines)

    def _packs(self, step: int) -> Schedule:
        """The packs of a step, which are counted from 1."""
        each = self.schedule.per_step
        return replace(self.schedule, packs=self.schedule.packs[(step - 1) * each : step * each])

    def _named(self, step: int) -> list[list[str]]:
        called = self.prepared.train.called
        return [[called(index) for index in pack if index != BLANK] for pack in self._packs(step).packs]

    def _used(self, step: int) -> set[str]:
        """The parts that the packs since the run went on, up to a step, have a use for."""
        each = self.schedule.per_step
        packs = self.schedule.packs[self.resumed.step * each : step * each]
        seen = self.prepared.train.lengths[packs.samples, 1].any()
        return {"language_model", "head"} | ({"projector", "vision_tower"} if seen else set())

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> OutOfMemory:
        """What to say of a step without room: its largest pack, what takes most, and what would help."""
        step = min(self.trainer.state.global_step + 1, self.schedule.steps)
        work = replace(self, schedule=self._packs(step)).work
        return shortage(f"in step {step}", work, self.recipe, error)
