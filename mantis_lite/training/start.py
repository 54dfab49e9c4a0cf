"""A Recipe -> the run that is about to take its first step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial

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

from ..data.dataset import collate_packs, pack_dataset
from ..data.packs import Packs
from ..data.prepare import Prepared
from ..data.schedule import Schedule, pack_epoch
from ..data.vision import Vision
from ..data.windows import fetched_sets
from ..errors import DiskError
from ..memory.shortage import telling
from ..models.adapters import make_trainable, trained_parameters
from ..models.head import with_head
from ..models.joining import with_weights
from ..models.kernels import chosen_kernels, fuse
from ..models.load import load_model
from ..models.sequence import share_rows
from ..models.vision_cache import VisionCache
from ..recipe import Recipe
from .arguments import arguments, offloads
from .broken import Broken
from .callbacks import Ahead, Aside, Intervals, MetricsFile, Seeds
from .held_out import Generations, asked_of
from .lock import Lock
from .numbers import Numbers
from .pace import Pace
from .picked import refuse_unused
from .plan import Plan, follow_plan, make_plan
from .rates import require_trained
from .run import Run
from .run_files import GENERATIONS, METRICS
from .strategy import join_processes, settled_launch
from .trackers import trackers
from .trainers import ChatTrainer, Lasting, ScoreTrainer
from .workers import Doing


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
        trained = [*trained_parameters(model, checkpoint.family)]  # of an adapter that is gone on with, its own parts
        require_trained(recipe.trainable.lr.given, trained)
        cache = None
        if recipe.memory.vision_cache != "off":
            cache = VisionCache(checkpoint, recipe, encoder, trained)
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
    trainer.ranks, trainer.rates = plan.ranks, recipe.trainable.lr.given
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
