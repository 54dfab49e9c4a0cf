"""What a recipe's keys say against each other, or against what can be done: one line a mistake."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from .recipe import Recipe, Section

METRICS = {
    "regression": ("mse", "mae", "spearman", "pearson"),
    "single_label": ("accuracy", "macro_f1", "auroc"),
    "multi_label": ("accuracy", "macro_f1", "auroc"),
}
"""What a score head is evaluated by beside its loss, by what it scores."""

CLIP_KEYS = ("num_frames", "fps", "max_frames", "start", "end", "sampling", "frame_label")


def conflicts(recipe: Recipe) -> Iterator[str]:
    """Everything that is wrong with a recipe whose keys are each right by themselves."""
    for check in (
        *(_model_conflicts, _part_conflicts, _method_conflicts, _launch_conflicts),
        *(_media_conflicts, _head_conflicts, _pretrain_conflicts, _eval_conflicts),
    ):
        yield from check(recipe)


def _model_conflicts(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if not (model.llm or model.vision):
        if not model.name:
            yield "model.name: missing\n  Add model.name=..., or the key to the recipe."
        return
    one, other = ("llm", "vision") if model.llm else ("vision", "llm")
    if not (model.llm and model.vision):
        yield f"model.{other}: missing beside model.{one}: a model is put together from both\n  Add model.{other}=..."
    if recipe.task != "pretrain":
        yield f"model.{one}: puts a new model together, whose projector knows nothing yet\n  " + (
            f"Set task=pretrain; for task={recipe.task}, name what that made: model=RUN/model."
        )
    if model.name:
        yield f"model.name: beside model.{one}, a model to put together\n  Name either."
    if model.revision:
        yield f"model.revision: has no effect with model.{one}\n  Write it behind the name: model.{one}=NAME@REVISION."


def _pretrain_conflicts(recipe: Recipe) -> Iterator[str]:
    """Of captions, which are written as they stand."""
    if recipe.task != "pretrain":
        if recipe.prompt.template == "plain":
            yield f"prompt.template: plain writes captions, and this is task={recipe.task}\n  Leave it out."
        return
    if recipe.method != "full":
        yield f"method: {recipe.method}, but task=pretrain trains the projector's own weights\n  Set method=full."
    if recipe.prompt.template not in ("auto", "plain"):
        yield f"prompt.template: {recipe.prompt.template}, but captions are written plain\n  Leave it out."
    if changed := [key for key in _changed(recipe.prompt) if key != "template"]:
        yield f"prompt.{changed[0]}: has no effect with task=pretrain, which has no turns\n  Leave it out."


def _part_conflicts(recipe: Recipe) -> Iterator[str]:
    for name, training in recipe.parts.items():
        if training == "full" and name in recipe.quantized:
            yield f"trainable.{name}: full, but the part is held in 4 bits, which cannot be trained\n  " + (
                f"Set trainable.{name}=adapter, or method=lora."
            )
        elif training == "adapter" and recipe.method == "full":
            yield f"trainable.{name}: adapter, but method=full trains no adapter\n  Set method=lora."
        elif training == "full" and name == "language_model" and recipe.method != "full":
            yield f"trainable.language_model: full, but method={recipe.method}\n  Set method=full."
        elif training == "frozen" and name in recipe.trainable.lr.given and not recipe.model.adapter:
            yield f"trainable.lr.{name}: the part is frozen\n  Set trainable.{name}, or leave its rate out."
    frozen = set(recipe.parts.values()) == {"frozen"}
    if frozen and not (recipe.task == "classify" and recipe.method == "full"):  # a head alone can learn
        yield "trainable: every part is frozen, so nothing would be trained\n  Set trainable.language_model=adapter."
    elif recipe.method != "full" and "adapter" not in recipe.parts.values():
        yield f"trainable: no part takes an adapter, but method={recipe.method}\n  Set method=full."
    if recipe.trainable.lr.given and (optimizer := recipe.memory.optimizer).endswith(("lomo", "_layerwise")):
        found = f"memory.optimizer={optimizer} has one rate for all parts"
        yield f"trainable.lr: {found}\n  Set another, or leave the rates out."
    if recipe.trainable.lr.head and recipe.task != "classify":
        yield f"trainable.lr.head: has no effect with task={recipe.task}\n  Set task=classify, or leave it out."


def _method_conflicts(recipe: Recipe) -> Iterator[str]:
    if recipe.method == "full" and recipe.model.adapter:
        yield "model.adapter: has no effect with method=full\n  Set method=lora, or merge the adapter into its base."
    if recipe.model.any_base and not recipe.model.adapter:
        yield "model.any_base: has no effect without model.adapter\n  Leave it out."
    if recipe.method == "full" and (changed := _changed(recipe.lora)):
        yield f"lora.{changed[0]}: has no effect with method=full\n  Set lora=null, or method=lora."
    if recipe.quantized and recipe.method != "qlora":
        yield f"memory.quantize: {recipe.quantized}, but method={recipe.method}\n  Set method=qlora."
    if recipe.method == "qlora" and recipe.lora.init == "pissa":
        why = "pissa takes its first values from weights that are not in 4 bits"
        yield f"lora.init: {why}\n  Set method=lora, or another lora.init."
    if recipe.method == "qlora" and not recipe.quantized:
        yield "memory.quantize: [], but method=qlora holds something in 4 bits\n  Set method=lora."
    if isinstance(recipe.data.eval, float) and not 0 < recipe.data.eval < 1:
        found = recipe.data.eval
        yield f"data.eval: expected a share between 0 and 1, or a file, found {found}\n  Write data.eval=0.05."
    if recipe.memory.vision_cache != "off" and (how := recipe.part("vision_tower")) != "frozen":
        yield f"memory.vision_cache: {recipe.memory.vision_cache}, but trainable.vision_tower={how} changes what a " + (
            "picture's features are\n  Set trainable.vision_tower=frozen, or memory.vision_cache=off."
        )


def _eval_conflicts(recipe: Recipe) -> Iterator[str]:
    asked = recipe.eval
    if asked.every and recipe.data.eval is None:
        yield "eval.every: there is nothing to evaluate on\n  Set data.eval to a share (0.05) or a file."
    for key in ("metric", "generate"):
        if getattr(asked, key) and not asked.every:
            yield f"eval.{key}: nothing is evaluated while it trains\n  Set eval.every to a number of steps."
    known = "loss", *(METRICS.get(recipe.head.problem or "", ()) if recipe.task == "classify" else ())
    if asked.metric is not None and asked.metric not in known:
        yield f"eval.metric: {asked.metric} is not among what is evaluated\n  Set one of {', '.join(known)}."
    if asked.patience and asked.metric is None:
        yield "eval.patience: has no effect without a metric that is to get better\n  Set eval.metric=loss."
    for key in ("load_best_model_at_end", "metric_for_best_model", "greater_is_better"):
        if asked.metric is not None and key in recipe.train:
            yield f"train.{key}: has no effect beside eval.metric\n  Leave it out."
    if asked.metric is not None and asked.every:
        yield from _saving_conflicts(recipe.train, asked.every)
    if asked.generate and (why := silent(recipe)):
        yield f"eval.generate: {asked.generate}, but {why}\n  Leave it out; afterwards `mantis-lite evaluate` asks."


def _saving_conflicts(train: Mapping[str, Any], every: int) -> Iterator[str]:
    """Of a run that goes back to its best checkpoint."""
    steps, how = train.get("save_steps", every), train.get("save_strategy", "steps")
    if isinstance(steps, int | float) and steps % every:
        yield f"train.save_steps: {steps}, but eval.metric takes a multiple of eval.every\n  Set it to {every}."
    if how not in ("steps", "best"):
        yield f"train.save_strategy: {how}, but eval.metric goes back to what is saved by steps\n  Leave it out."


def silent(recipe: Recipe) -> str | None:
    """Why a model cannot answer while it trains."""
    if recipe.task not in ("chat", "video"):
        return f"task={recipe.task} answers nothing"
    if recipe.parts_weights or recipe.launch.sequence > 1:
        return "each GPU has a part of the weights, or of a row"
    if recipe.memory.vision_cache != "off":
        return "memory.vision_cache keeps what pictures come to, and not what sees"
    return None


def _launch_conflicts(recipe: Recipe) -> Iterator[str]:
    launch, strategy, parted, gpus = recipe.launch, recipe.strategy, recipe.parts_weights, recipe.launch.size
    if strategy == "single" and gpus > 1:
        yield f"launch.strategy: single, but {gpus} GPUs are asked for\n  Set launch.strategy=ddp, zero2 or zero3."
    if parted and recipe.quantized:
        yield f"launch.strategy: {strategy} would part weights that are in 4 bits\n  Set launch.strategy=ddp or zero2."
    if recipe.sharded and recipe.memory.optimizer not in ("auto", "adamw_torch", "adamw_torch_fused"):
        found = f"{recipe.memory.optimizer}, but launch.strategy={strategy} keeps AdamW's moments in parts"
        yield f"memory.optimizer: {found}\n  Leave memory.optimizer out, or set launch.strategy=ddp."
    if recipe.memory.vision_cache != "off" and strategy != "single":
        if parted or recipe.part("projector") != "frozen":
            why = f"launch.strategy={strategy} parts the tower" if parted else "several GPUs train a projector with it"
            yield f"memory.vision_cache: {recipe.memory.vision_cache}, but {why}\n  Set memory.vision_cache=off."
    if launch.sequence > 1:
        yield from _sequence_conflicts(recipe)


def _sequence_conflicts(recipe: Recipe) -> Iterator[str]:
    """Of rows that several GPUs share."""
    sequence, memory = recipe.launch.sequence, recipe.memory
    if recipe.strategy == "single":
        yield f"launch.sequence: {sequence} GPUs are to share each row, and one trains\n  Set launch.gpus={sequence}."
    if recipe.strategy == "fsdp2":
        yield "launch.sequence: it has not been tried with launch.strategy=fsdp2\n  Set launch.strategy=ddp or zero3."
    if recipe.task == "classify":
        yield "launch.sequence: a score head reads tokens of the whole row\n  Set launch.sequence=1."
    if memory.attention in ("sdpa", "eager"):
        found = f"{memory.attention}, but GPUs that share a row exchange it in this package's own attention"
        yield f"memory.attention: {found}\n  Set memory.attention=auto."
    if memory.vision_cache != "off":
        found = f"{memory.vision_cache}, but it has not been tried with launch.sequence={sequence}"
        yield f"memory.vision_cache: {found}\n  Set memory.vision_cache=off."
    if memory.mlp_tile:
        found = f"{memory.mlp_tile}, but it has not been tried with launch.sequence={sequence}"
        yield f"memory.mlp_tile: {found}\n  Leave it out."
    if memory.fit == "auto":
        found = f"auto counts whole rows, of which launch.sequence={sequence} has a GPU hold a part"
        yield f"memory.fit: {found}\n  Set memory.fit=off."


def _media_conflicts(recipe: Recipe) -> Iterator[str]:
    media = recipe.media
    of_clips = [key for key in _changed(media) if key in CLIP_KEYS]
    if of_clips and recipe.task in ("chat", "pretrain"):
        found = f"has no effect with task={recipe.task}, which has pictures only"
        yield f"media.{of_clips[0]}: {found}\n  Set task=video."
        return
    if recipe.task == "video" and media.num_frames is None and media.fps is None:
        yield "media.num_frames: task=video needs to know how many frames of a clip to take\n  Set media.num_frames=8."
    if media.num_frames is not None and media.fps is not None:
        yield "media.fps: beside media.num_frames, which says how many frames already\n  Leave one of them out."
    if (media.fps is None) != (media.max_frames is None):
        yield "media.fps: it and media.max_frames, the most frames of a clip, go together\n  Set both or neither."
    if media.end is not None and media.end <= (media.start or 0):
        yield f"media.end: {media.end:g} s is no later than the start\n  Mend media.start or media.end."
    if media.sampling == "upstream" and (media.start, media.end) != (None, None):
        yield "media.start: media.sampling=upstream takes whole clips\n  Leave out media.start and media.end."
    if media.frame_label is not None and (fault := _label_fault(media.frame_label)):
        yield f"media.frame_label: {fault}\n  Write it as {{time:.1f}}s or frame {{number}}."


def _label_fault(label: str) -> str | None:
    """What is wrong with the words before a frame, a format of its `time` in s and its `number`."""
    try:
        label.format(time=0.5, number=1)
    except (IndexError, KeyError):
        return f"{label!r} has a field that is neither time nor number"
    except (ValueError, AttributeError) as error:
        return f"{label!r} is not a format: {error}"
    return None


def _head_conflicts(recipe: Recipe) -> Iterator[str]:
    head = recipe.head
    if recipe.task != "classify":
        if changed := _changed(head):
            yield f"head.{changed[0]}: has no effect with task={recipe.task}\n  Set task=classify."
        return
    if head.problem is None:
        yield "head.problem: missing\n  Set it to regression, single_label or multi_label."
    if head.class_weights and head.problem == "regression":
        yield "head.class_weights: numbers have no classes\n  Leave it out."
    if head.labels and len(set(head.labels)) < len(head.labels):
        yield "head.labels: a name is there twice\n  Name each label once."
    if head.labels and isinstance(head.class_weights, list) and len(head.class_weights) != len(head.labels):
        counts = f"{len(head.class_weights)} weights for {len(head.labels)} labels"
        yield f"head.class_weights: {counts}\n  Give one a label."
    if isinstance(head.class_weights, list) and not head.labels:
        yield "head.class_weights: which is whose, is known where head.labels gives the order\n  State head.labels."
    if head.score == "special_tokens" and not head.labels:
        yield "head.labels: special_tokens writes the labels' names into the prompt\n  State head.labels."
    if recipe.train.get("batch_eval_metrics"):
        yield "train.batch_eval_metrics: has a wrong effect on a score head\n  Leave it out."
    unused = ["labels"] if head.score == "special_tokens" else ["template", "system", "labels"]
    if changed := [key for key in _changed(recipe.prompt) if key in unused]:
        yield f"prompt.{changed[0]}: has no effect with task=classify, head.score={head.score}\n  Leave it out."


def _changed(section: Section) -> list[str]:
    """The keys of a section that differ from what they are by themselves."""
    untouched = type(section)()
    return [key for key in type(section).model_fields if getattr(section, key) != getattr(untouched, key)]
