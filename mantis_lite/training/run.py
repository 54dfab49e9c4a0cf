"""A Recipe -> a trained adapter or model in its run directory. The only file that knows the trainer."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedModel, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer_utils import get_last_checkpoint
from trl import SFTConfig, SFTTrainer

from ..data.dataset import Schedule, collate_packs, pack_dataset, pack_epoch, schedule
from ..data.encode import Encoder
from ..data.prepare import Prepared, prepare, write_rejects
from ..errors import RecipeError, SampleError
from ..models.adapters import PartSize, find_adapter, make_trainable, part_sizes
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.kernels import fused, require_liger
from ..models.load import load_model, working_dtype
from ..recipe import Recipe, load_recipe, save_recipe
from .callbacks import MetricsFile
from .curve import draw_curve


@dataclass
class Run:
    """Everything a run stands on before its first step: data, plan and model; `trainer` does the rest."""

    recipe: Recipe
    checkpoint: Checkpoint
    encoder: Encoder
    prepared: Prepared
    schedule: Schedule
    trainer: SFTTrainer

    @property
    def notices(self) -> list[str]:
        """What a user should know of the model before it trains."""
        notices = [self.checkpoint.notice] if self.checkpoint.notice else []
        if layers := fused(self.trainer.model):
            counts = ", ".join(f"{count} {name}" for name, count in layers.items())
            notices.append(f"fused layers of the language model: {counts}")
        if adapter := self.recipe.model.adapter:
            notices.append(f"going on with {adapter} by its own settings: the recipe's lora and trainable are not used")
        return notices

    @property
    def sizes(self) -> list[PartSize]:
        return part_sizes(self.trainer.model, self.checkpoint.family)

    def train(self) -> Path:
        """Train to the end, from the newest checkpoint where there is one; returns the folder of what was trained."""
        run_dir = self.recipe.run_dir
        self.trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run_dir)))
        draw_curve(run_dir / "metrics.jsonl", run_dir / "loss.png")
        return self.save()

    def save(self) -> Path:
        """Save the adapter as PEFT does, or the model in its published layout; returns the folder."""
        folder = self.recipe.run_dir / ("model" if self.recipe.method == "full" else "adapter")
        self.trainer.model.save_pretrained(folder)
        if self.recipe.method == "full":
            # Config, tokenizer and processor are the base's own files, to the letter: the published layout.
            self.checkpoint.copy_small_files(folder)
        return folder


def start(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    from_scratch: bool = False,
    import_upstream: bool = False,
) -> Run:
    """Read and plan the data, then load the model.

    `from_scratch` moves an old run aside; `import_upstream` allows the pickles of an adapter of the original code.

    Raises RecipeError, DataError, SampleError and FitError before any weight is loaded.
    """
    if not from_scratch:
        _refuse_another(recipe)
    if recipe.memory.kernels == "liger":
        require_liger()
    if recipe.model.adapter:
        find_adapter(recipe.model.adapter, import_upstream)
    checkpoint = open_checkpoint(recipe.model)
    encoder = checkpoint.encoder(recipe)
    prepared = prepare(recipe.data, recipe.packing, encoder)
    packs = schedule(prepared.train, recipe.packing, recipe.train)
    _open_run_dir(recipe, from_scratch)
    (recipe.run_dir / "rejects.jsonl").unlink(missing_ok=True)
    write_rejects(prepared.rejects, recipe.run_dir / "rejects.jsonl")
    arguments = _arguments(recipe, packs, prepared.held_out is not None)
    set_seed(arguments.seed)  # the trainer's own comes too late for an adapter's first values
    model = make_trainable(load_model(checkpoint, recipe), recipe, checkpoint.family, import_upstream)
    trainer = _trainer(recipe, arguments, checkpoint, encoder, prepared, packs, model)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL puts QLoRA's adapters in bfloat16, where small steps are lost
            parameter.data = parameter.data.float()
    # Qwen's classes say that they cannot weigh a pack by its tokens in the whole step; like the others, they can.
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    tokens = np.array([prepared.train.lengths[pack, 0].sum() for pack in packs.packs])
    for callback in (MetricsFile(recipe.run_dir / "metrics.jsonl", packs, tokens), *callbacks):
        trainer.add_callback(callback)
    return Run(recipe, checkpoint, encoder, prepared, packs, trainer)


def train(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    from_scratch: bool = False,
    import_upstream: bool = False,
) -> Path:
    """Train a recipe; returns the folder of the adapter, or of the model where the method is full."""
    return start(recipe, callbacks, from_scratch, import_upstream).train()


class _Trainer(SFTTrainer):
    """TRL's trainer, reporting nothing home."""

    def _send_telemetry(self) -> None:
        pass


def _refuse_another(recipe: Recipe) -> None:
    """A finished run is not trained again, and a stopped one goes on only under the recipe it was started with."""
    run_dir, remedy = recipe.run_dir, "Add --from-scratch to move it aside, or set another run_dir."
    if any((run_dir / done).exists() for done in ("adapter", "model")):
        raise RecipeError(f"run_dir: {run_dir} holds a finished run\n  {remedy}")
    if run_dir.is_dir() and get_last_checkpoint(str(run_dir)):
        before, now = (r.model_dump(mode="json") for r in (load_recipe(run_dir / "recipe.yaml"), recipe))
        if changed := [key for key in now if before[key] != now[key]]:
            raise RecipeError(f"run_dir: {run_dir} holds a run with another {', '.join(changed)}\n  {remedy}")


def _open_run_dir(recipe: Recipe, from_scratch: bool) -> None:
    run_dir = recipe.run_dir
    if from_scratch and run_dir.exists():
        aside = (run_dir.with_name(f"{run_dir.name}.{n}") for n in count(1))
        run_dir.rename(next(path for path in aside if not path.exists()))
    run_dir.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run_dir / "recipe.yaml")


def _trainer(
    recipe: Recipe,
    arguments: SFTConfig,
    checkpoint: Checkpoint,
    encoder: Encoder,
    prepared: Prepared,
    packs: Schedule,
    model: PreTrainedModel,
) -> SFTTrainer:
    broken = _Broken(recipe, prepared)
    held_out = prepared.held_out
    return _Trainer(
        model=model,
        args=arguments,
        data_collator=partial(collate_packs, vision=encoder.vision),
        train_dataset=pack_dataset(packs.packs, prepared.train, encoder, broken),
        eval_dataset=held_out and pack_dataset(pack_epoch(held_out, recipe.packing), held_out, encoder, broken),
        processing_class=AutoTokenizer.from_pretrained(checkpoint.folder),
    )


def _arguments(recipe: Recipe, packs: Schedule, evaluates: bool) -> SFTConfig:
    """TrainingArguments of a run: the recipe's own, and those the pack contract fixes. Raises RecipeError."""
    gpu = torch.cuda.is_available()
    dtype = working_dtype()
    checkpointing = recipe.memory.checkpointing == "full" or (recipe.memory.checkpointing == "auto" and gpu)
    own = {k: v for k, v in recipe.train.items() if k not in ("tokens_per_step", "samples_per_step")}
    defaults = {
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "use_cpu": not gpu,
        "dataloader_num_workers": min(4, os.cpu_count() or 1) if gpu else 0,
        "logging_nan_inf_filter": False,  # a NaN must be seen, not logged as 0.0
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "eval_strategy": "steps" if recipe.eval.every else "epoch" if evaluates else "no",
        "eval_steps": recipe.eval.every,
    }
    fixed = {
        "output_dir": str(recipe.run_dir),
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "gradient_accumulation_steps": packs.accumulation,
        "max_steps": packs.steps,
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",  # the plan has shuffled the packs
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False} if checkpointing else None,
    }
    if recipe.memory.optimizer != "auto":
        fixed["optim"] = recipe.memory.optimizer
    try:
        return SFTConfig(**(defaults | own | fixed))
    except (TypeError, ValueError) as error:
        raise RecipeError(f"train: {error}\n  Mend the value; keys are TrainingArguments' own.") from None


class _Broken:
    """Told of a picture that breaks when decoded: an error, or counted in rejects.jsonl up to 1% of the rows or one."""

    def __init__(self, recipe: Recipe, prepared: Prepared) -> None:
        self.skip = recipe.data.on_bad_row == "skip"
        self.path = recipe.run_dir / "rejects.jsonl"
        self.allowed = max(1, int(prepared.rows_read * 0.01))

    def __call__(self, error: SampleError) -> None:
        if not self.skip:
            raise error
        known = {json.loads(line)["where"] for line in self.path.read_text().splitlines()}
        if error.where in known:
            return
        write_rejects([error], self.path)
        if len(known) + 1 > self.allowed:
            # Not a DataError: in a DataLoader worker only an error of one row keeps its words.
            found = f"one of more than {self.allowed} rows that cannot be trained on, see {self.path}"
            raise SampleError(error.where, found, f"The last: {error.found}. {error.remedy}", error.sample_id)
