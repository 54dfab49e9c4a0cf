"""An adapter and its base -> one model in the base's published layout, a tensor at a time; and checked."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch

from .agreement import Agreement, compared, logits_of
from .card import write_card
from .contract import DTYPES, Contract, Target, Weighed, contract_of_adapter, facts_of, versions
from .data.prepare import prepare
from .data.sample import Image, Sample, Turn
from .errors import CheckError, DataError, DiskError, RecipeError, one_line
from .models.checkpoint import open_checkpoint
from .models.merging import Laid, combined, stand_in
from .models.precision import working_dtype
from .models.weights import room_for_names, weight_files, write_files
from .plain_clients import write_settings, write_template
from .recipe import ModelRecipe
from .tiny import tasks
from .trained import TOKENIZER, Trained, is_run, open_trained
from .training.checkpoints import UNFINISHED, written

LEAST = 0.995
"""The share of positions at which the merged model must choose the same as the adapter on its base."""
ROOM = 4096
"""Bytes for the names of what an adapter brings: a score head, words that go out."""
ROWS = 32
"""How many rows the two are run on."""


@dataclass(frozen=True)
class Merged:
    """The folder of a merged model, what the adapter was added to, and how the two agree, if that was looked at."""

    folder: Path
    base: Target
    agreement: Agreement | None


@dataclass(frozen=True)
class _Task:
    """What is merged: a trained adapter; it and others by weight, and how they are combined; what they are added to."""

    trained: Trained
    parts: list[tuple[Trained, float]]
    combine: str
    base: Target

    @property
    def adapters(self) -> list[tuple[str, float]]:
        return [(str(part.adapter), weight) for part, weight in self.parts]


def merge(
    source: str | Path,
    to: str | Path | None = None,
    base: Target | None = None,
    overrides: Sequence[str] = (),
    others: Sequence[tuple[str, float]] = (),
    weight: float = 1.0,
    combine: str = "linear",
    least: float | None = LEAST,
    watch: Callable[[list[Path]], Iterable[Path]] = iter,
) -> Merged:
    """Merge the adapter of a run, or any adapter, with its base, into the folder `to`, or merged/ beside the adapter.

    `base` is what it is added to: the base's own weights ("full"), or what those of QLoRA's parts are once they have
    been in 4 bits ("dequantized"): what its adapter was trained on, and so its default. `others` are more adapters,
    each with its weight, combined first by PEFT's `add_weighted_adapter`. Both the merged model and the adapter are
    then run on held-out rows; `least` None leaves that out. `watch` shows the files that are worked on.

    Raises RecipeError, DiskError, and CheckError where they agree less than `least`; nothing is left behind then.
    """
    task = _task(source, overrides, others, weight, combine, base)
    folder = _folder(task.trained, to)
    files = weight_files(task.trained.checkpoint)
    size = sum(file.stat().st_size for file in files)
    _require_room(folder, size)
    looks = None if least is None else (_samples(task.trained), _memory_for(size))
    with written(folder, size) as beside:
        contract = _write(task, files, beside, watch)
        found = None
        if looks and least is not None:
            found = _compare(task, beside, *looks)
            if not found.share >= least:
                raise CheckError(_disagreement(found, least, task))
            contract = contract.model_copy(update={"agreement": asdict(found)})
            contract.write(beside)
        write_card(beside, contract, folder.resolve().name)
    return Merged(folder, task.base, found)


def _task(
    source: str | Path,
    overrides: Sequence[str],
    others: Sequence[tuple[str, float]],
    weight: float,
    combine: str,
    base: Target | None,
) -> _Task:
    """What is asked for, once it is clear that the adapters are of one kind and of this base. Raises RecipeError."""
    trained = open_trained(source, overrides, 4 if base == "dequantized" else None)
    if trained.adapter is None:
        raise RecipeError(f"{source}: is a model, with no adapter beside it\n  Name a run or an adapter.")
    trained.require_base()
    parts = [(trained, weight), *((_alike(name, trained), share) for name, share in others)]
    return _Task(trained, parts, combine, _target(trained, base))


def _alike(name: str, trained: Trained) -> Trained:
    """Another adapter, of the same base and trained alike. Raises RecipeError."""
    model = trained.recipe.model
    own = [f"model.name={model.name}", *([f"model.revision={model.revision}"] if model.revision else [])]
    bits = 4 if trained.recipe.quantized and trained.contract is None else None
    other = open_trained(name, [*own, *(["model.any_base=true"] if trained.any_base else [])], bits)
    other.require_base()
    for what in ("task", "quantized"):
        if getattr(other.recipe, what) != getattr(trained.recipe, what):
            found = f"{getattr(other.recipe, what)}, and {trained.name} on {getattr(trained.recipe, what)}"
            raise RecipeError(f"--with: {name} was trained on another {what}: {found}\n  Combine what is alike.")
    if other.contract and trained.contract and other.contract.facts != trained.contract.facts:
        found = f"{name} was trained on other prompts or pictures than {trained.name}"
        raise RecipeError(f"--with: {found}\n  Combine what was trained in one template, with the same processor.")
    return other


def _folder(trained: Trained, to: str | Path | None) -> Path:
    """Where the merged model goes, cleared of what a merge that was killed has left. Raises RecipeError, DiskError."""
    assert trained.adapter is not None
    if to is None and not Path(trained.name).exists():
        raise RecipeError(f"--to: {trained.name} is on the hub, and no folder here\n  Name a folder: --to merged.")
    folder = Path(to) if to else trained.adapter.parent / "merged"
    if folder.exists():
        raise RecipeError(f"--to: {folder} exists already\n  Name another folder, or remove it.")
    if not folder.absolute().parent.is_dir():
        raise RecipeError(f"--to: there is no folder {folder.parent}\n  Make it, or name another.")
    for left in folder.absolute().parent.iterdir():
        killed = re.fullmatch(rf"{re.escape(folder.name + UNFINISHED)}(\d+)", left.name)
        if killed and left.is_dir() and not psutil.pid_exists(int(killed[1])):
            shutil.rmtree(left)
    return folder


def _target(trained: Trained, base: Target | None) -> Target:
    if "quantization_config" in trained.checkpoint.published:
        raise RecipeError(
            f"{trained.checkpoint.name}: is saved in few bits, into which nothing can be merged\n"
            "  Set model to the original in 16 bits."
        )
    if base == "dequantized" and trained.contract and not trained.contract.quantized:
        raise RecipeError("--base: dequantized, but the adapter was trained on no weight in 4 bits\n  Leave it out.")
    return base or ("dequantized" if trained.recipe.quantized else "full")


def _trained_in(contract: Contract | None) -> torch.dtype:
    """What weights were in before they were packed into 4 bits."""
    known: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPES.items()}
    return known.get(contract.dtype, working_dtype()) if contract else working_dtype()


def _require_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder.absolute().parent).free
    if size * 1.01 > free:
        sizes = f"the merged model takes about {size / 1e9:,.2f} GB, and {free / 1e9:,.2f} are free"
        raise DiskError(f"--to: {sizes} on the disk of {folder.parent}\n  Free some, or name a folder on another disk.")


def _memory_for(size: int) -> tuple[torch.dtype, str]:
    """The precision and device that the two models are compared in, one after the other. Raises RecipeError."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.2 * size:
        return working_dtype(), "cuda"
    free = psutil.virtual_memory().available
    if free > 2.4 * size:  # weights of 16 bits in 32
        return torch.float32, "cpu"
    if free > 1.2 * size:
        return torch.bfloat16, "cpu"
    sizes = f"the whole model takes {1.2 * size / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free"
    raise RecipeError(
        f"merge: to compare the merged model with the adapter, {sizes}\n"
        "  Merge where there is more memory; or with --no-check, which holds a tensor at a time."
    )


def _write(task: _Task, files: list[Path], folder: Path, watch: Callable[[list[Path]], Iterable[Path]]) -> Contract:
    """Write the merged model; returns its contract, which lies beside it."""
    trained = task.trained
    laid = Laid(
        stand_in(trained.head or trained.checkpoint.config, trained.head is not None),
        trained.checkpoint.family,
        task.adapters,
        task.combine,
        trained.recipe.quantized if task.base == "dequantized" else (),
        _trained_in(trained.contract),
    )
    _write_weights(laid, files, folder, watch)
    _write_small_files(trained, laid, folder)
    contract = _contract(task, folder)
    contract.write(folder)
    return contract


def _write_weights(laid: Laid, files: list[Path], folder: Path, watch: Callable[[list[Path]], Iterable[Path]]) -> None:
    """Write the files of weights, each with the adapter in it, and their index where there are several."""
    of_files = ((file, chain(laid.merged(file), laid.new() if file == files[-1] else ())) for file in watch(files))
    write_files(folder, ((file.name, tensors, 2 * room_for_names(file) + ROOM) for file, tensors in of_files))


def _write_small_files(trained: Trained, laid: Laid, folder: Path) -> None:
    """Everything beside the weights: the base's own, to the letter but for what the adapter has changed."""
    checkpoint, encoder = trained.checkpoint, trained.encoder
    checkpoint.copy_small_files(folder)
    write_template(folder, encoder)
    write_settings(folder, checkpoint, encoder, trained.recipe)
    if trained.head is not None:
        trained.head.save_pretrained(folder)
        if encoder.score and encoder.score.tokens:
            encoder.tokenizer.save(str(folder / "tokenizer.json"))
        return
    config = _changed(checkpoint.published, laid)
    if config != checkpoint.published:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    assert trained.adapter is not None
    if laid.rows != checkpoint.config.get_text_config().vocab_size:
        for name in TOKENIZER:
            if (trained.adapter / name).is_file():
                shutil.copy(trained.adapter / name, folder)


def _changed(published: dict[str, Any], laid: Laid) -> dict[str, Any]:
    """The base's config, with the words that the adapter brought, and embeddings apart where it has parted them."""
    config = json.loads(json.dumps(published))
    words = config.get("text_config", config).get("vocab_size", laid.rows)
    for section in [config, *([config["text_config"]] if "text_config" in config else [])]:
        if laid.rows != words:
            section["vocab_size"] = laid.rows
        if laid.untied:
            section["tie_word_embeddings"] = False
    return config


def _contract(task: _Task, folder: Path) -> Contract:
    merged = open_checkpoint(ModelRecipe(name=str(folder)))
    now: dict[str, Any] = {"kind": "merged", "merged": task.base, "quantized": [], "versions": versions()}
    if len(task.parts) > 1 or task.parts[0][1] != 1:
        parts = [Weighed(run=_contract_of(part).run, weight=weight) for part, weight in task.parts]
        now |= {"combined": parts, "combine": task.combine}
    now |= {"facts": facts_of(merged, merged.encoder(task.trained.recipe))}
    return _contract_of(task.trained).model_copy(update=now)


def _contract_of(own: Trained) -> Contract:
    return own.contract or contract_of_adapter(own.recipe, own.checkpoint, own.encoder, own.folder)


def _compare(task: _Task, folder: Path, shown: tuple[list[Sample], str], machine: tuple[torch.dtype, str]) -> Agreement:
    """Run the adapter on its base, then the merged model, on the same rows. Raises CheckError, SampleError."""
    trained, encoder = task.trained, task.trained.encoder
    (samples, rows), (dtype, device) = shown, machine
    lay = partial(combined, adapters=task.adapters, combine=task.combine)
    first = trained.load(dtype, device, lambda model: lay(model)[0])
    one = logits_of(first, encoder, samples)
    del first
    gc.collect()
    second = open_trained(folder).load(dtype, device)
    other = logits_of(second, encoder, samples)
    problem = trained.recipe.head.problem if trained.head is not None else None
    return compared(one, other, problem, rows)


def _samples(trained: Trained) -> tuple[list[Sample], str]:
    """Rows to compare on: held out ones, else those trained on, else drawn ones; and which they are."""
    if is_run(trained.name) or is_run(Path(trained.name).parent):
        recipe = trained.recipe
        head = recipe.head if recipe.task == "classify" else None
        try:
            prepared = prepare(recipe.data, recipe.packing, trained.encoder, task=recipe.task, head=head)
        except DataError as error:
            remedy = "Add data=FILE, where they are now; or --no-check, which compares nothing."
            raise RecipeError(f"merge: the rows to compare on cannot be read: {one_line(error)}\n  {remedy}") from None
        rows = prepared.train if prepared.held_out is None else prepared.held_out
        which = "rows of training" if prepared.held_out is None else "held-out rows"
        found = [rows[at] for at in range(0, len(rows), max(1, len(rows) // ROWS))][:ROWS]
        return found, f"{len(found)} {which}"
    return [_drawn(number, trained.head is None) for number in range(ROWS)], f"{ROWS} drawn rows"


def _drawn(number: int, answered: bool) -> Sample:
    """A question about several pictures that are drawn for it, with its answer."""
    exercise, pictures = tasks.drawn(number)
    asked = Turn("user", (*(Image(picture) for picture in pictures), exercise.question))
    answer = (Turn("assistant", (exercise.answer,)),) if answered else ()
    return Sample(f"drawn:{number}", None, (asked, *answer))


def _disagreement(found: Agreement, least: float, task: _Task) -> str:
    remedy = "Its numbers may be too fine for the base's precision; --least lets it pass."
    if task.trained.recipe.quantized and task.base == "full":
        remedy = "The adapter was trained on weights in 4 bits: --base dequantized adds it to those."
    return (
        f"merge: the merged model chooses as the adapter does at {found.share:.2%} of {found.positions:,} positions of "
        f"{found.rows}, and {least:.2%} are asked for (KL {found.kl:.2e}, logits apart by {found.largest:.2e})\n"
        f"  {remedy}"
    )
