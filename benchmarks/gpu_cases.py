"""The cases of `benchmarks.gpu`, by group: what each measures, and about how long it takes on an H100.

Cases without pictures are text alone in a LLaVA model, whose tower is idle: what is published of Llama-3-8B compares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mantis_lite import tiny
from mantis_lite.memory.estimate import GIB
from mantis_lite.memory.overrides import TILE
from mantis_lite.recipe_file import load_recipe
from mantis_lite.report.probe import probe

from . import card, gpu_kernels, gpu_peer, gpu_step
from .gpu_models import Place, random_weights, small_files, text_rows
from .gpu_training import RATE, StepClock, learning, measured, peaks_by_length, prepared, room

Figures = dict[str, Any]
QLORA, LORA = "method=qlora", "method=lora"
CHECKPOINTED, KEPT = "memory.checkpointing=full", "memory.checkpointing=off"
TILED, OFFLOADED = f"memory.mlp_tile={TILE}", "memory.offload_activations=true"
PLAIN = "memory.kernels=off"
ALL_IN_4_BITS = "memory.quantize=[language_model,projector,vision_tower]"


def rank(r: int) -> list[str]:
    return [f"lora.r={r}", f"lora.alpha={2 * r}", "lora.dropout=0"]


@dataclass(frozen=True)
class Case:
    """A row of the table; `seconds` is about what it takes, `long` whether it is left to `--full`."""

    name: str
    seconds: float
    measure: Callable[[Place], Figures]
    long: bool = False


def documents(place: Place, model: Path, count: int, supervised: float) -> Path:
    """Text rows of 2,048 tokens on average, half as many to half as many again."""
    middle = place.either(2048, 192)
    lengths = np.random.default_rng(1).integers(middle // 2, middle + middle // 2 + 1, count).tolist()
    return text_rows(model, place.folder / "documents.jsonl", lengths, supervised)


def steps_of(place: Place, count: int = 6) -> int:
    """Timed steps."""
    return 2 if place.small else 20 if place.full else count


def packs(place: Place, words: Sequence[str], supervised: float = 0.18, gib: float | None = None) -> Figures:
    """Steps of a pack of 8,192 tokens of documents; a Mantis row of 576 tokens a picture has 18% of them supervised."""
    model = small_files("llava", place.folder / "llava", place.small)
    data = documents(place, model, 6 * steps_of(place), supervised)
    size = f"packing.max_length={place.either(8192, 640)}"
    return measured(place, "llava", [size, *RATE, *words], model, data, steps_of(place), gib)


def full_rows(place: Place, words: Sequence[str]) -> Figures:
    """Steps of two rows of 4,096 tokens, all of them supervised."""
    model, length = small_files("llava", place.folder / "llava", place.small), place.either(4096, 192)
    data = text_rows(model, place.folder / "full.jsonl", [length] * 2 * steps_of(place))
    words = [f"packing.max_length={2 * length}", *RATE, *words]
    return measured(place, "llava", words, model, data, steps_of(place))


def usual(place: Place, method: str, r: int) -> Figures:
    """The documents of `packs`, the usual way."""
    model = small_files("llava", place.folder / "llava", place.small)
    data = documents(place, model, 6 * steps_of(place), 0.18)
    return gpu_peer.measured(place, method, r, model, data, steps_of(place, 4))


def rows_with_pictures(place: Place) -> Path:
    """Those of benchmarks/gpu_step.py."""
    data = place.folder / "pictures" / "rows.jsonl"
    return data if data.is_file() else gpu_step.make_data(data.parent, place.either(200, 12))


def pictures(
    place: Place, family: str, name: str, words: Sequence[str] = (), steps: int = 8, gib: float | None = None
) -> Figures:
    """A case of benchmarks/gpu_step.py: from files of rows and JPEG, decoded beside the card."""
    model, data = small_files(family, place.folder / family, place.small), rows_with_pictures(place)
    alone = name.endswith("one sample a row")
    steps = 24 if alone and not place.small else steps_of(place, steps)
    small = ["packing.max_length=2048"] if place.small else []
    return measured(place, family, [*RATE, *gpu_step.CASES[family][name], *words, *small], model, data, steps, gib)


def lengths_alone(place: Place, family: str, words: Sequence[str], lengths: Sequence[int]) -> Figures:
    """The peak by the length of a row."""
    model = small_files(family, place.folder / family, place.small)
    lengths = [length // place.either(1, 64) for length in lengths]
    data = text_rows(model, place.folder / "lengths.jsonl", [lengths[0], *lengths])
    room = f"packing.max_length={max(lengths)}"
    return peaks_by_length(place, family, [*RATE, "memory.checkpointing=full", room, *words], model, data)


def probed(place: Place, family: str) -> Figures:
    """What `mantis-lite fit RECIPE data=... --probe` shows of a recipe as it is: several packs a step, and dropout."""
    model, data = small_files(family, place.folder / family, place.small), rows_with_pictures(place)
    small = ["packing.max_length=2048"] if place.small else []
    recipe = load_recipe(gpu_step.RECIPES[family], [f"model={model}", f"data={data}", *small])
    card.limit(None)
    card.clean()
    with random_weights():
        found = probe(recipe)
    shown = {what: (round(said / GIB, 3), round(took / GIB, 3)) for what, said, took in found.figures}
    return {"tokens": found.pack.tokens, "patches": found.pack.patches, "estimated and measured gib": shown}


LONGEST = [QLORA, *rank(32), "memory.optimizer=adamw_bnb_8bit", TILED, OFFLOADED]


def longest(place: Place, gib: int) -> Figures:
    """The longest row in so large a card: on the line through two short ones, then tried, shorter until it fits."""
    caps = {size: room(size) for size in (8, 12, 16, 24)}
    short = lengths_alone(place, "llava", LONGEST, [4096, 16384])
    (less, low), (more, high) = ((int(n), each["peak_gib"]) for n, each in short["by_length"].items())
    each = max(1e-9, (high - low) / (more - less))
    line = {size: int(less + (cap - low) / each) if card.there() else 100 for size, cap in caps.items()}
    figures: Figures = {"on_the_line": {f"{size} GB": tokens for size, tokens in line.items()}, "tried": {}}
    model = small_files("llava", place.folder / "llava", place.small)
    if card.there() and line[gib] < 512:
        return figures | {"out_of_memory": "nothing fits"}
    for share in (0.97, 0.93, 0.88):
        tokens = int(line[gib] * share)
        data = text_rows(model, place.folder / "longest.jsonl", [min(512, tokens), tokens])
        words = [*RATE, "memory.checkpointing=full", f"packing.max_length={tokens}", *LONGEST]
        found = peaks_by_length(place, "llava", words, model, data, caps[gib])
        figures["tried"][str(tokens)] = found.get("out_of_memory") or found["by_length"]
        if "out_of_memory" not in found:
            return figures | {"tokens": tokens, "limit_gib": round(caps[gib], 3)}
    return figures


def curve(place: Place) -> Figures:
    """Tiny Mantis on the same rows every step, packed and one by one: the loss must be the same."""
    model, rows = tiny.CHECKPOINT, place.either(12, 4)
    lengths = np.random.default_rng(2).integers(60, 200, rows).tolist()
    data = text_rows(model, place.folder / "curve.jsonl", lengths, 0.5)
    steps = 200 if place.full else place.either(40, 3)
    losses = {}
    for name, packing in (("packed", "packing.max_length=512"), ("one by one", "packing=off")):
        words = [packing, *RATE, LORA, "lora.dropout=0", f"train.samples_per_step={rows}"]
        run = prepared(place, "llava", words, model, data, steps, StepClock())
        run.train()
        losses[name] = [log["loss"] for log in run.trainer.state.log_history if "grad_norm" in log]
        found = learning(run)
    packed, alone = (np.array(each) for each in losses.values())
    figures = {"steps": steps, "largest_difference": float(abs(packed - alone).max())}
    return figures | {"largest_share": float((abs(packed - alone) / alone).max()), "losses": losses} | found


def _kept(count: int) -> list[str]:
    return [LORA, *rank(16), f"memory.checkpointing={count}" if count else KEPT]


def _packs(name: str, seconds: float, *words: str, long: bool = False) -> Case:
    return Case(name, seconds, partial(packs, words=words), long)


def _pictures(family: str, seconds: float) -> list[Case]:
    """Those of benchmarks/gpu_step.py that the package lays out itself."""
    names = [name for name in gpu_step.CASES[family] if not name.endswith(gpu_step.PADDED)]
    own = [Case(n, seconds, partial(pictures, family=family, name=n), "sdpa" in n or "5376" in n) for n in names]
    plain = "qlora, packs of 8192, no fused kernels"
    return [*own, Case(plain, seconds, partial(pictures, family=family, name=names[0], words=[PLAIN]), long=True)]


def _peaks(name: str, seconds: float, *words: str, r: int, lengths: Sequence[int]) -> Case:
    words = (QLORA, *rank(r), *words)
    return Case(f"llava r{r}, {name}", seconds, partial(lengths_alone, family="llava", words=words, lengths=lengths))


def _idefics2(name: str, *words: str, long: bool = False) -> Case:
    first = next(iter(gpu_step.CASES["idefics2"]))
    measure = partial(pictures, family="idefics2", name=first, words=[CHECKPOINTED, *words], steps=3)
    return Case(f"idefics2 r16 with pictures, {name}", 20, measure, long)


def _picked(gib: int) -> Case:
    """Idefics2 with pictures as memory.fit=auto has it."""
    first = next(iter(gpu_step.CASES["idefics2"]))
    measure = partial(pictures, family="idefics2", name=first, steps=3, gib=gib)
    return Case(f"idefics2 r16 with pictures, memory.fit=auto in {gib} GB", 30, measure)


ALL_LENGTHS, TWO_LENGTHS = (2048, 4096, 8192, 16384, 32768), (2048, 8192)
USUAL_QLORA = (QLORA, *rank(64), CHECKPOINTED)

GROUPS: dict[str, list[Case]] = {
    "G0": [Case("product and copy", 5, gpu_kernels.roof)],
    "G3": [
        _packs("qlora r64, packs of 8192", 20, *USUAL_QLORA),
        Case("the usual way, a row at a time", 23, partial(usual, method="qlora", r=64)),
        _packs("qlora r64, packs of 8192, no fused kernels", 15, *USUAL_QLORA, PLAIN),
    ],
    "G2": [
        _packs("lora r64, packs of 8192", 15, LORA, *rank(64), CHECKPOINTED),
        _packs("lora r64, packs of 8192, no fused kernels", 15, LORA, *rank(64), CHECKPOINTED, PLAIN),
        Case("the usual way, a row at a time", 30, partial(usual, method="lora", r=64), long=True),
    ],
    "G1": [
        Case("lora r16, 2 x 4096, nothing checkpointed", 15, partial(full_rows, words=[LORA, *rank(16), KEPT])),
        Case("the same, no fused kernels", 15, partial(full_rows, words=[LORA, *rank(16), KEPT, PLAIN])),
    ],
    "G7": [
        _peaks("checkpointed", 16, r=64, lengths=ALL_LENGTHS),
        _peaks("mlp_tile", 18, TILED, r=64, lengths=ALL_LENGTHS),
        _peaks("mlp_tile, offloaded", 22, TILED, OFFLOADED, r=64, lengths=ALL_LENGTHS),
        _idefics2("all in 4 bits", ALL_IN_4_BITS),
        _idefics2("all in 4 bits, mlp_tile, offloaded", ALL_IN_4_BITS, TILED, OFFLOADED),
        _peaks("checkpointed", 6, r=8, lengths=TWO_LENGTHS),
        _peaks("mlp_tile", 7, TILED, r=8, lengths=TWO_LENGTHS),
        _peaks("mlp_tile, offloaded", 8, TILED, OFFLOADED, r=8, lengths=TWO_LENGTHS),
        _picked(8),
        *(Case(f"{family}, fit --probe", 20, partial(probed, family=family)) for family in gpu_step.RECIPES),
        _idefics2("mlp_tile", TILED, long=True),
        _idefics2("mlp_tile, offloaded", TILED, OFFLOADED, long=True),
    ],
    "G5": _pictures("llava", 20),
    "G6": _pictures("idefics2", 22),
    "G10": [
        Case(f"{name}, {share:.0%} supervised", 3, partial(gpu_kernels.loss_layer, name=name, supervised=share))
        for share in (1.0, 0.18)
        for name in gpu_kernels.LOSSES
    ],
    "G9": [Case("nf4, doubly quantised, to bfloat16", 4, gpu_kernels.out_of_4_bits)],
    "G8": [
        Case(
            f"qlora r32, AdamW in 8 bits, mlp_tile, offloaded, in {size} GB",
            seconds,
            partial(longest, gib=size),
            size > 12,
        )
        for size, seconds in ((8, 25), (12, 45), (16, 120), (24, 240))
    ],
    "G11": [
        _packs("qlora r64, packs of 8192", 18, *USUAL_QLORA),
        _packs("qlora r64, packs of 8192, offloaded", 25, *USUAL_QLORA, OFFLOADED),
    ],
    "G4": [
        _packs(f"lora r16, packs of 8192, {count} of 32 layers checkpointed", 13, *_kept(count), long=count in (32, 24))
        for count in (16, 8, 0, 32, 24)
    ]
    + [
        Case(
            f"lora r16, packs of 8192, memory.fit=auto in {gib} GB",
            16,
            partial(packs, words=[LORA, *rank(16)], gib=gib),
            gib != 40,
        )
        for gib in (40, 24)
    ],
    "G12": [Case("packed and one by one", 40, curve)],
}
"""In the order of their worth: what time does not allow is left out from behind."""
