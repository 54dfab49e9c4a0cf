"""A Recipe -> a trained adapter or model in its run directory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import distributed
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..card import write_card
from ..contract import Contract, contract_of, facts_of
from ..data.dataset import collate_packs, pack_dataset
from ..data.packs import BLANK, Packs
from ..data.prepare import Prepared
from ..data.sample import Sample
from ..data.schedule import Schedule, pack_epoch
from ..data.vision import Vision
from ..data.windows import fetched_sets
from ..errors import DiskError, OutOfMemory, Stopped
from ..memory.estimate import Estimate
from ..memory.overrides import peak
from ..memory.shortage import shortage, telling
from ..models.adapters import PartSize, make_trainable, part_sizes, trained_parameters
from ..models.assemble import Assembled
from ..models.attention import chosen_attention
from ..models.checkpoint import Checkpoint, open_checkpoint
from ..models.head import with_head
from ..models.joining import with_weights
from ..models.kernels import chosen_kernels, fuse, fused_layers, words
from ..models.load import load_model
from ..models.precision import working_dtype
from ..models.sequence import share_rows
from ..models.vision_cache import VisionCache
from ..plain_clients import write_settings, write_template
from ..recipe import ModelRecipe, Recipe
from .broken import Broken
from .callbacks import Ahead, Aside, Intervals, MetricsFile, Seeds
from .charts import draw_curve
from .checkpoints import folder_of, require_space, written
from .held_out import Generations, asked_of
from .jsonlines import lines_of
from .lock import Lock
from .numbers import Numbers
from .pace import Pace
from .picked import refuse_unused
from .plan import Plan, follow_plan, make_plan
from .rates import require_trained
from .report import reported, run_facts
from .run_files import CURVE, GENERATIONS, METRICS
from .signals import Signals
from .strategy import join_processes, settled_launch
from .trackers import trackers
from .trainers import ChatTrainer, Lasting, ScoreTrainer, arguments, offloads
from .workers import Doing

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
            unused = "lora and trainable are not used, but for rates"
            notices.append(f"going on with {adapter} by its own settings: the recipe's {unused}")
        blind = self.trainer.numbers.parts.keys() - self._used(self.schedule.steps)
        notices.extend(f"{part}: no row has a picture, so it stays as it is" for part in sorted(blind))
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


def start(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    from_scratch: bool = False,
    import_upstream: bool = False,
    gpu: float | None = None,
    only: Schedule | None = None,
    accept_changes: bool = False,
) -> Run:
    """Read and plan the data, then load the model.

    `from_scratch` moves an old run aside; `import_upstream` allows the pickles of an adapter of the original code;
    `gpu` is the card, in GiB, that memory.fit=auto picks for, in place of the one at hand; `only` these packs are
    trained on, where it is given; `accept_changes` lets a stopped run go on with another recipe or data.

    Raises RecipeError, ResumeError, DataError, SampleError and FitError before any weight is loaded; OutOfMemory while
    it is. With memory.vision_cache, which opens all pictures then, also SampleError and RecipeError once it is; and
    RecipeError where the adapter that is gone on with does not train what trainable.lr names.
    """
    refuse_unused(recipe, gpu)
    recipe = settled_launch(recipe)
    reports = trackers(recipe.train.get("report_to"))
    ranks = join_processes(recipe)
    with ExitStack() as held:
        lock = Lock(recipe.run_dir)
        held.callback(lock.release)
        plan, told = None, None
        if ranks.is_first:
            plan = make_plan(recipe, lock, ranks, from_scratch, import_upstream, gpu, only, accept_changes)
            try:
                plan.open_run_dir(from_scratch)
                told = plan.tell()
            except OSError as error:
                found = f"run_dir: {recipe.run_dir} cannot be written: {error.strerror}"
                raise DiskError(f"{found}\n  Make room there, or set run_dir to another disk.") from error
        told = ranks.told(told)
        run = _load(plan or follow_plan(told, lock, ranks, import_upstream, only), import_upstream)
        for callback in (*reports, *callbacks):
            run.trainer.add_callback(callback)
        held.pop_all()  # the run lets go of its folder when it has trained
    return run


def train(
    recipe: Recipe,
    callbacks: Sequence[TrainerCallback] = (),
    from_scratch: bool = False,
    import_upstream: bool = False,
    accept_changes: bool = False,
) -> Path:
    """Train a recipe; returns the folder of the adapter, or of the model where the method is full."""
    return start(recipe, callbacks, from_scratch, import_upstream, accept_changes=accept_changes).train()


def _load(plan: Plan, import_upstream: bool) -> Run:
    """Load the model, make it trainable, and give it to a trainer."""
    training_arguments = arguments(plan.recipe, plan.schedule, plan.prepared.held_out is not None, plan.ranks)
    plan.checkpoint = with_weights(plan.checkpoint, training_arguments.seed)
    recipe, checkpoint, encoder, prepared = plan.recipe, plan.checkpoint, plan.encoder, plan.prepared
    set_seed(training_arguments.seed)  # the trainer's own comes too late for an adapter's first values
    head = _head(plan)
    with telling("while the model was loaded", plan.work, recipe):
        model = make_trainable(load_model(checkpoint, recipe, head), recipe, checkpoint.family, import_upstream)
        if chosen_kernels(recipe)["lora"] is None:
            fuse(model, ["lora"])
        if plan.ranks.sequence > 1:
            share_rows(model, distributed.new_subgroups(plan.ranks.sequence)[0])
        cache = None
        if recipe.memory.vision_cache != "off":  # an adapter that is gone on with says itself what trains
            trained = {size.part for size in part_sizes(model, checkpoint.family) if size.trainable}
            cache = VisionCache(checkpoint, recipe, encoder, trained)
        require_trained(recipe.trainable.lr.given, trained_parameters(model, checkpoint.family))
        broken = Broken(recipe, prepared)
        workers = training_arguments.dataloader_num_workers
        doing = Doing(workers, prepared.train.called), Doing(workers, (prepared.held_out or prepared.train).called)
        held_out = _held_out_packs(plan)
        shown = _datasets(plan, held_out, cache, broken, doing)
        # With its data sets made: they are hashed then, and the features with them, were they there already.
        kept = _fill(cache, model, training_arguments, plan, broken) if cache else None
        trainer = _trainer(plan, training_arguments, cache.vision if cache else encoder.vision, shown, model)
    for parameter in trainer.model.parameters() if not trainer.is_deepspeed_enabled else ():  # it keeps float32 beside
        if parameter.requires_grad:  # TRL puts QLoRA's adapters in bfloat16, where small steps are lost
            parameter.data = parameter.data.float()
    # Qwen's classes say that they cannot weigh a pack by its tokens in the whole step; like the others, they can.
    trainer.model_accepts_loss_kwargs = True
    trainer.remove_callback(PrinterCallback)
    run = Run(**vars(plan), trainer=trainer, head=head, kept=kept)
    trainer.ranks, trainer.family, trainer.rates = plan.ranks, checkpoint.family, recipe.trainable.lr.given
    trainer.seen_by = [path for part in ("projector", "vision_tower") for path in checkpoint.family.parts.get(part, ())]
    trainer.doing, trainer.doing_held_out = doing
    if held_out is not None:
        trainer.held_out_share = len(held_out) / np.count_nonzero(held_out.sizes)
    trainer.keep = recipe.train.get("save_total_limit")
    trainer.accepted = bool(plan.resumed.changed)
    if recipe.eval.patience and recipe.eval.every:
        trainer.patience = recipe.eval.patience * recipe.eval.every
    _watch(run, cache)
    return run


def _watch(run: Run, cache: VisionCache | None) -> None:
    """What a run adds to the trainer's own callbacks."""
    run_dir, schedule, trainer = run.recipe.run_dir, run.schedule, run.trainer
    parts = trained_parameters(trainer.model, run.checkpoint.family)
    trainer.numbers = Numbers(run_dir, schedule.steps, parts, run._used, run._named, run.ranks)
    for callback in (Seeds(), Intervals(), trainer.numbers):
        trainer.add_callback(callback)
    held_out = run.prepared.held_out if run.prepared.held_out is not None else ()
    run.answered = asked_of(run.recipe, held_out, trainer.model, run.encoder) if held_out else []
    if run.answered:
        trainer.add_callback(Generations(run_dir / GENERATIONS, trainer, run.encoder, run.answered))
    budget = run.recipe.packing.max_length if run.recipe.packing.enabled else None
    pace = Pace(schedule, run.prepared.train.lengths[:, 0], budget, run.on_gpu)
    trainer.add_callback(MetricsFile(run_dir / METRICS, schedule, pace, len(held_out)))
    if fetched_sets(run.prepared.train):
        trainer.add_callback(Ahead(schedule, run.prepared.train))
    if cache:
        trainer.add_callback(Aside(cache.unread(trainer.model)))


def _head(plan: Plan) -> PreTrainedConfig | None:
    """The config that states the score head to train: its labels, class weights and tokens."""
    labels, encoder = plan.prepared.labels, plan.encoder
    if labels is None:
        return None
    weights = plan.recipe.head.class_weights
    if weights == "balanced":
        weights = _balanced(plan.prepared)
    tokens = encoder.score.tokens if encoder.score else ()
    return with_head(plan.checkpoint.config, labels, weights, [encoder.token_id(token) for token in tokens])


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
    plan: Plan, held_out_packs: Packs | None, cache: VisionCache | None, broken: Broken, doing: tuple[Doing, Doing]
) -> tuple[Dataset, Dataset | None]:
    """The packs to train on, and those that are held out; `doing` is told what either's workers are at."""
    train, held_out = plan.prepared.train, plan.prepared.held_out
    encoder = cache.encoder if cache else plan.encoder
    ranks = plan.ranks
    packs = plan.schedule.laid_out(ranks.at_once, ranks.sequence)
    touch = plan.schedule.touch is not None
    shown = pack_dataset(packs, train, encoder, broken, train.targets, doing[0], touch, ranks.sequence)
    if held_out is None or held_out_packs is None:
        return shown, None
    targets = held_out.targets
    return shown, pack_dataset(held_out_packs, held_out, encoder, broken, targets, doing[1], fewest=ranks.sequence)


def _held_out_packs(plan: Plan) -> Packs | None:
    """The packs to evaluate on, as many for each process, where any are held out."""
    if plan.prepared.held_out is None:
        return None
    packs = pack_epoch(plan.prepared.held_out, plan.recipe.packing)
    return Schedule(packs, [len(packs)], len(packs)).laid_out(plan.ranks.at_once, plan.ranks.sequence)


def _fill(
    cache: VisionCache, model: PreTrainedModel, training_arguments: TrainingArguments, plan: Plan, broken: Broken
) -> str:
    """Fill the cache with every picture that the run will show, as its steps would compute them."""
    plans = [(plan.prepared.train, np.unique(plan.schedule.packs.samples).tolist())]
    if (held_out := plan.prepared.held_out) is not None:
        plans.append((held_out, list(range(len(held_out)))))
    device, dtype = training_arguments.device, torch.bfloat16 if training_arguments.bf16 else torch.float16
    if not cache.recipe.quantized:  # weights in 4 bits have been put there as they were loaded
        model.to(device)
    with torch.autocast(device.type, dtype, enabled=training_arguments.bf16 or training_arguments.fp16):
        return cache.fill(model, plans, broken)


def _trainer(
    plan: Plan,
    training_arguments: TrainingArguments,
    vision: Vision,
    shown: tuple[Dataset, Dataset | None],
    model: PreTrainedModel,
) -> Lasting:
    labels = plan.prepared.labels
    kind = ChatTrainer if labels is None else partial(ScoreTrainer, labels, offloads(plan.recipe))
    return kind(
        model=model,
        args=training_arguments,
        data_collator=partial(collate_packs, vision=vision, stretch=plan.ranks.stretch, sequence=plan.ranks.sequence),
        train_dataset=shown[0],
        eval_dataset=shown[1],
        processing_class=AutoTokenizer.from_pretrained(plan.checkpoint.folder),
    )
