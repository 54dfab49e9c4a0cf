"""A Recipe -> a trained adapter or model in its run directory."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ..data.dataset import Schedule, collate_packs, pack_dataset, pack_epoch, schedule
from ..data.encode import Encoder
from ..data.labels import Labels, some
from ..data.prepare import Prepared, prepare, write_rejects
from ..data.vision import Vision
from ..errors import OutOfMemory, RecipeError, SampleError
from ..memory.overrides import Work
from ..memory.packs import Planned
from ..memory.shortage import shortage, telling
from ..models.adapters import PartSize, find_adapter, make_trainable, part_sizes
from ..models.attention import chosen_attention, require_attention
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.head import with_head
from ..models.kernels import chosen_kernels, fuse, fused_layers, words
from ..models.load import load_model, stated_head
from ..models.vision_cache import VisionCache, projects, require_encoder_outputs, trained_parts
from ..recipe import Recipe, load_recipe, save_recipe
from .callbacks import Aside, MetricsFile
from .curve import draw_curve
from .picked import as_started, notices_of, refuse_unused, settle
from .trainers import ChatTrainer, ScoreTrainer, arguments, offloads

LABELS = "labels.json"
"""What the scores of a run of task=classify mean, in order."""


@dataclass
class Run:
    """Everything a run stands on before its first step: data, plan and model; `trainer` does the rest."""

    recipe: Recipe
    checkpoint: Checkpoint
    encoder: Encoder
    prepared: Prepared
    schedule: Schedule
    trainer: Trainer
    head: PreTrainedConfig | None
    """The config that states a score head, where the task has one."""
    kept: str | None = None
    """What the vision cache holds, in words, where there is one."""
    picked: list[str] = field(default_factory=list)
    """What memory.fit=auto picked, in words."""

    @property
    def notices(self) -> list[str]:
        """What a user should know of the model before it trains."""
        notices = [self.checkpoint.notice] if self.checkpoint.notice else []
        use_cpu = bool(self.recipe.train.get("use_cpu"))
        notices.append(f"attention: {chosen_attention(self.recipe.memory.attention, use_cpu)}")
        chosen = chosen_kernels(self.recipe)
        notices.extend(words(fused_layers(self.trainer.model, self.checkpoint.family, chosen)))
        if adapter := self.recipe.model.adapter:
            notices.append(f"going on with {adapter} by its own settings: the recipe's lora and trainable are not used")
        return [*self.picked, *notices, *([self.kept] if self.kept else [])]

    @property
    def sizes(self) -> list[PartSize]:
        return part_sizes(self.trainer.model, self.checkpoint.family)

    def train(self) -> Path:
        """Train to the end, from the newest checkpoint where there is one; returns the folder of what was trained."""
        self.walk()
        draw_curve(self.recipe.run_dir / "metrics.jsonl", self.recipe.run_dir / "loss.png")
        return self.save()

    def walk(self) -> None:
        """Take the steps that are left, and save nothing beyond checkpoints. Raises OutOfMemory."""
        try:
            self.trainer.train(resume_from_checkpoint=get_last_checkpoint(str(self.recipe.run_dir)))
        except torch.OutOfMemoryError as error:
            raise self._out_of_memory(error) from None

    def _out_of_memory(self, error: torch.OutOfMemoryError) -> OutOfMemory:
        """What to say of a step without room: its largest pack, what takes most, and what would help."""
        step, each = min(self.trainer.state.global_step, self.schedule.steps - 1), self.schedule.accumulation
        packs = replace(self.schedule, packs=self.schedule.packs[step * each : (step + 1) * each])
        work = _work(self.recipe, self.checkpoint, self.encoder, self.prepared, packs)
        return shortage(f"in step {step + 1}", work, self.recipe, error)

    def save(self) -> Path:
        """Save the adapter as PEFT does, or the model in its published layout; returns the folder."""
        full = self.recipe.method == "full"
        folder = self.recipe.run_dir / ("model" if full else "adapter")
        self.trainer.model.save_pretrained(folder)
        if full:
            # Config, tokenizer and processor are the base's own files, to the letter: the published layout.
            self.checkpoint.copy_small_files(folder)
        if self.head is not None:
            self.head.save_pretrained(folder)  # what the scores are; beside an adapter PEFT takes no notice of it
            if self.encoder.score and self.encoder.score.tokens:
                self.encoder.tokenizer.save(str(folder / "tokenizer.json"))
        return folder


def start(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    from_scratch: bool = False,
    import_upstream: bool = False,
    gpu: float | None = None,
    only: Schedule | None = None,
) -> Run:
    """Read and plan the data, then load the model.

    `from_scratch` moves an old run aside; `import_upstream` allows the pickles of an adapter of the original code;
    `gpu` is the card, in GiB, that memory.fit=auto picks for, in place of the one at hand; `only` these packs are
    trained on, where it is given.

    Raises RecipeError, DataError, SampleError and FitError before any weight is loaded; OutOfMemory while it is. With
    memory.vision_cache, which opens all pictures then, also SampleError and RecipeError once it is.
    """
    refuse_unused(recipe, gpu)
    asked = recipe
    if not from_scratch:
        recipe = as_started(recipe)
        _refuse_another(recipe)
    kernels = chosen_kernels(recipe)
    require_attention(recipe.memory.attention)
    caches = recipe.memory.vision_cache != "off"
    if caches:
        require_encoder_outputs()
    if recipe.model.adapter:
        find_adapter(recipe.model.adapter, import_upstream)
    checkpoint = open_checkpoint(recipe.model)
    encoder = checkpoint.encoder(recipe)
    if caches:
        projects(checkpoint.family, checkpoint.config.model_type, trained_parts(recipe))
    head_recipe = stated_head(checkpoint, recipe)
    prepared = prepare(recipe.data, recipe.packing, encoder, task=recipe.task, head=head_recipe)
    packs = only or schedule(prepared.train, recipe.packing, recipe.train)
    work = _work(recipe, checkpoint, encoder, prepared, packs)
    settled = settle(work, recipe, gpu)
    if settled is not None:
        recipe = settled.recipe
        packs = only or schedule(prepared.train, recipe.packing, recipe.train)
    if prepared.labels is not None and not from_scratch:
        _refuse_other_labels(recipe.run_dir, prepared.labels)
    _open_run_dir(recipe, from_scratch)
    if settled is not None:
        settled.write(asked)
    if prepared.labels is not None:
        (recipe.run_dir / LABELS).write_text(json.dumps(asdict(prepared.labels), indent=2) + "\n")
    (recipe.run_dir / "rejects.jsonl").unlink(missing_ok=True)
    write_rejects(prepared.rejects, recipe.run_dir / "rejects.jsonl")
    training_arguments = arguments(recipe, packs, prepared.held_out is not None)
    set_seed(training_arguments.seed)  # the trainer's own comes too late for an adapter's first values
    head = _head(recipe, checkpoint, encoder, prepared)
    with telling("while the model was loaded", work, recipe):
        model = make_trainable(load_model(checkpoint, recipe, head), recipe, checkpoint.family, import_upstream)
        if kernels["lora"] is None:
            fuse(model, ["lora"])
        cache = None
        if caches:  # an adapter that is gone on with says itself what trains
            trained = {size.part for size in part_sizes(model, checkpoint.family) if size.trainable}
            cache = VisionCache(checkpoint, recipe, encoder, trained)
        broken = _Broken(recipe, prepared)
        shown = _datasets(recipe, cache.encoder if cache else encoder, prepared, packs, broken)
        # With its data sets made: they are hashed then, and the features with them, were they there already.
        kept = _fill(cache, model, training_arguments, prepared, packs, broken) if cache else None
        vision = cache.vision if cache else encoder.vision
        trainer = _trainer(recipe, training_arguments, checkpoint, vision, prepared.labels, shown, model)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL puts QLoRA's adapters in bfloat16, where small steps are lost
            parameter.data = parameter.data.float()
    # Qwen's classes say that they cannot weigh a pack by its tokens in the whole step; like the others, they can.
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    tokens = np.array([prepared.train.lengths[pack, 0].sum() for pack in packs.packs])
    for callback in (MetricsFile(recipe.run_dir / "metrics.jsonl", packs, tokens), *callbacks):
        trainer.add_callback(callback)
    if cache:
        trainer.add_callback(Aside(cache.unread(trainer.model)))
    return Run(recipe, checkpoint, encoder, prepared, packs, trainer, head, kept, notices_of(settled, asked, recipe))


def train(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    from_scratch: bool = False,
    import_upstream: bool = False,
) -> Path:
    """Train a recipe; returns the folder of the adapter, or of the model where the method is full."""
    return start(recipe, callbacks, from_scratch, import_upstream).train()


def _work(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, prepared: Prepared, packs: Schedule) -> Work:
    """What memory goes by."""
    rows = Planned(recipe, checkpoint, encoder, prepared.train, packs, prepared.held_out)
    return Work(checkpoint.config, checkpoint.family, checkpoint.image_processor, rows)


def _refuse_another(recipe: Recipe) -> None:
    """A finished run is not trained again, and a stopped one goes on only under the recipe it was started with."""
    run_dir, remedy = recipe.run_dir, "Add --from-scratch to move it aside, or set another run_dir."
    if any((run_dir / done).exists() for done in ("adapter", "model")):
        raise RecipeError(f"run_dir: {run_dir} holds a finished run\n  {remedy}")
    if run_dir.is_dir() and get_last_checkpoint(str(run_dir)):
        before, now = (r.model_dump(mode="json") for r in (load_recipe(run_dir / "recipe.yaml"), recipe))
        if changed := [key for key in now if before[key] != now[key]]:
            raise RecipeError(f"run_dir: {run_dir} holds a run with another {', '.join(changed)}\n  {remedy}")


def _refuse_other_labels(run_dir: Path, labels: Labels) -> None:
    """A stopped run's scores mean what they meant: changed data must not give them other names."""
    file = run_dir / LABELS
    if not (file.is_file() and get_last_checkpoint(str(run_dir))):
        return
    before, now = json.loads(file.read_text()), json.loads(json.dumps(asdict(labels)))
    if before != now:
        found = f"{run_dir} holds a run that scores {some(before['names'])}, and the data has {some(labels.names)}"
        raise RecipeError(f"head.labels: {found}\n  State head.labels, or add --from-scratch to move the run aside.")


def _open_run_dir(recipe: Recipe, from_scratch: bool) -> None:
    run_dir = recipe.run_dir
    if from_scratch and run_dir.exists():
        aside = (run_dir.with_name(f"{run_dir.name}.{n}") for n in count(1))
        run_dir.rename(next(path for path in aside if not path.exists()))
    run_dir.mkdir(parents=True, exist_ok=True)
    save_recipe(recipe, run_dir / "recipe.yaml")


def _head(recipe: Recipe, checkpoint: Checkpoint, encoder: Encoder, prepared: Prepared) -> PreTrainedConfig | None:
    """The config that states the score head to train: its labels, class weights and tokens."""
    labels = prepared.labels
    if labels is None:
        return None
    weights = recipe.head.class_weights
    if weights == "balanced":
        weights = _balanced(prepared)
    tokens = encoder.score.tokens if encoder.score else ()
    return with_head(checkpoint.config, labels, weights, [encoder.token_id(token) for token in tokens])


def _balanced(prepared: Prepared) -> list[float]:
    """Weights that make up for how often classes, or a label's yes and no, occur in an epoch of training.

    All classes count the same then, and the weight of the average row is 1 (King and Zeng 2001); what always or never
    occurs is left at 1.
    """
    train, labels = prepared.train, prepared.labels
    assert train.targets is not None and labels is not None
    often = np.array(train.weights)[train.source]  # how often the source's weight has a row come
    if labels.problem == "single_label":
        found = np.bincount(train.targets, often, minlength=len(labels.names))
        return [float(often.sum() / ((found > 0).sum() * count)) if count else 1.0 for count in found]
    shares = np.average(train.targets, axis=0, weights=often)
    return [float((1 - share) / share) if 0 < share < 1 else 1.0 for share in shares]


def _datasets(
    recipe: Recipe, encoder: Encoder, prepared: Prepared, packs: Schedule, broken: _Broken
) -> tuple[Dataset, Dataset | None]:
    """The packs to train on, and those that are held out."""
    train, held_out = prepared.train, prepared.held_out
    evaluated = held_out and pack_dataset(
        pack_epoch(held_out, recipe.packing), held_out, encoder, broken, held_out.targets
    )
    return pack_dataset(packs.packs, train, encoder, broken, train.targets), evaluated


def _fill(
    cache: VisionCache,
    model: PreTrainedModel,
    training_arguments: TrainingArguments,
    prepared: Prepared,
    packs: Schedule,
    broken: _Broken,
) -> str:
    """Fill the cache with every picture that the run will show, as its steps would compute them."""
    plans = [(prepared.train, sorted({index for pack in packs.packs for index in pack}))]
    if prepared.held_out is not None:
        plans.append((prepared.held_out, list(range(len(prepared.held_out)))))
    device, dtype = training_arguments.device, torch.bfloat16 if training_arguments.bf16 else torch.float16
    if not cache.recipe.quantized:  # weights in 4 bits have been put there as they were loaded
        model.to(device)
    with torch.autocast(device.type, dtype, enabled=training_arguments.bf16 or training_arguments.fp16):
        return cache.fill(model, plans, broken)


def _trainer(
    recipe: Recipe,
    training_arguments: TrainingArguments,
    checkpoint: Checkpoint,
    vision: Vision,
    labels: Labels | None,
    shown: tuple[Dataset, Dataset | None],
    model: PreTrainedModel,
) -> Trainer:
    kind = ChatTrainer if labels is None else partial(ScoreTrainer, labels, offloads(recipe))
    return kind(
        model=model,
        args=training_arguments,
        data_collator=partial(collate_packs, vision=vision),
        train_dataset=shown[0],
        eval_dataset=shown[1],
        processing_class=AutoTokenizer.from_pretrained(checkpoint.folder),
    )


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
