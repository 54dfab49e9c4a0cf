"""benchmarks/README.md, benchmarks/scaling.svg and tables in docs/, of benchmarks/results/*.json.

    python -m benchmarks.table

Nothing in them is typed: tests hold the page to the results. A benchmark that has no results yet has no rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import rc_context
from matplotlib.figure import Figure

import benchmarks.likelihood
import benchmarks.pictures
import benchmarks.zips

from . import results

PAGE = Path(__file__).parent / "README.md"
PLOT = Path(__file__).parent / "scaling.svg"
Figures = dict[str, Any]


class Row(NamedTuple):
    """A line of the table: what was asked, what was found, and, where there is a target, whether it was met."""

    what: str
    found: str
    target: str = ""
    met: bool | None = None


def said(values: Figures, unit: str = "") -> str:
    """Median, minimum and maximum in words."""
    edges = ", ".join(number(values[edge]) for edge in ("min", "max"))
    return f"{number(values['median'])}{unit} ({edges.replace(', ', ' to ')})"


def number(value: float) -> str:
    """To three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{float(f'{value:.3g}'):g}"


def percent(share: float) -> str:
    return f"{100 * share:.2f}%"


def at_most(what: str, values: Figures, limit: float, unit: str) -> Row:
    return Row(what, said(values, unit), f"at most {limit:g}{unit}", values["median"] <= limit)


def at_least(what: str, values: Figures, limit: float, unit: str = " times") -> Row:
    return Row(what, said(values, unit), f"at least {limit:g}{unit}", values["median"] >= limit)


def planning(figures: Figures) -> Iterator[Row]:
    for kind, found in figures["plan"].items():
        what = f"packing {found['samples']:,} samples at {kind} tokens a picture"
        yield at_most(what, found["seconds"], 0.5, " s")
        bound = found["fill_of_global_best_fit_decreasing"]
        target = f"at most 0.1 points below best fit over single samples, {percent(bound)}"
        yield Row(
            f"fill of packs at {kind} tokens a picture", percent(found["fill"]), target, found["fill"] >= bound - 0.001
        )
    for name, found in figures["packers"].items():
        if name != "plan":
            what = f"the time of {name}, against ours (it fills {percent(found['fill'])})"
            yield at_least(what, found["times_as_long_as_plan"], 20)
            if found["times_as_long_as_plan"]["median"] < 20:
                seconds = found["samples"] / found["samples_per_second"]["median"]
                yield Row("a twentieth of that time", f"{seconds / 20:.3g} s")
    yield Row("to draw a random order of all and to sort it by length, alone", said(figures["order_seconds"], " s"))
    worst = max(found["micro_step"]["max"] for found in figures["balance"].values())
    yield Row(
        "the costliest of 8 to 512 GPUs' packs over their mean, at most", percent(worst), "below 3%", worst < 0.03
    )


def preparation(figures: Figures) -> Iterator[Row]:
    for name, found in figures.items():
        if "cold_over_tokenizer" in found:
            what = f"a first start on {found['rows']:,} rows, {name}, against tokenizing them"
            yield at_most(what, found["cold_over_tokenizer"], 1.3, " times")
    if found := figures.get("against others"):
        others = said(found["rows_per_second"]["opened"])
        what = f"a first start on real rows, against opening their pictures ({others} rows a second)"
        yield at_least(what, found["times_faster"], 30)


def pictures(figures: Figures) -> Iterator[Row]:
    for name, case in figures["cases"].items():
        for way in ("pil", "fast"):
            rates = said(case["per_second"][way])
            what = f"{name}: `{way}` against the published processor ({rates} pictures a second of a core)"
            yield at_least(what, case["times_stock"][way], {"pil": 1.5, "fast": 4}[way])
        size = case["bytes_of_a_sample"]
        less = round(size["stock"] / size["ours"], 1)  # the shapes of pictures are sent beside their bytes
        least = 8 if "Idefics2" in name else 4
        what = f"{name}: MB of a sample that leave a worker ({size['stock'] / 1e6:.1f} by the processor)"
        yield Row(what, f"{size['ours'] / 1e6:.1f}", f"at most 1/{least}", less >= least)


def packed(figures: Figures) -> Iterator[Row]:
    found = figures["collating"]
    ours, theirs = (found["packs_per_second"][way] for way in ("boundaries", "a T x T mask"))
    what = f"packs of {found['tokens']:,} tokens a second, collated with boundaries"
    yield Row(what, said(ours), "at least 65, 50 times what an H100 trains", ours["median"] >= 65)
    yield Row("the same with a T x T mask", said(theirs))
    size = {way: f"{count / 1e6:,.1f}" for way, count in found["bytes"].items()}
    yield Row("MB of such a batch (with a T x T mask)", f"{size['boundaries']} ({size['a T x T mask']})")
    for name, step in figures["steps"].items():
        yield Row(f"a step on {name}: tokens a second, packed", said(step["tokens_per_second"]["packed"]))
        alone = step["packed_over_padded_by_padding_alone"]
        what = f"packed against padded batches of 4, {name} ({alone:.2f} times by padding alone)"
        ratio = step["packed_over_padded"]
        least = max(0.95 * alone, 1.55) if name == "mixture of lengths" else 0.95 * alone
        yield Row(what, said(ratio, " times"), f"at least {least:.2f} times", ratio["median"] >= least)
        yield at_least(f"packed against one sample a row, {name}", step["packed_over_one_sample_a_row"], 1)
    for name, waste in figures["waste"].items():
        yield Row(f"padding in batches of 4, {name}", percent(waste["padding_of_batches_of_4"]))
        padding, fill = waste["padding_of_packs"], percent(waste["fill_of_packs"])
        what = f"padding of packs, {name} (their room is {fill} full)"
        yield Row(what, percent(padding), "at most 1.5%", padding <= 0.015)
        lost = (
            f"{waste['supervised_tokens_cut']:,} of {waste['supervised_tokens']:,}, {waste['pictures_cut']:,} pictures"
        )
        yield Row(f"tokens with loss cut at {8192:,} where rows are cut, {name}; here such a row is named", lost)


def loss(figures: Figures) -> Iterator[Row]:
    for name in ("all supervised", "18% supervised"):
        found = figures[name]
        least = {"all supervised": 8, "18% supervised": 20}[name]
        held, words = found["memory"], f"{figures['vocabulary']:,} words, {name}"
        what = f"memory of full logits against the loss as trained, {held['tokens']:,} tokens of {words}"
        row = Row(what, f"{held['times_less']:g} times", f"at least {least} times", held["times_less"] >= least)
        yield row if held["tokens"] >= 8192 else Row(row.what, row.found)
        took = found["time"]
        yield at_least(f"time of the same, {took['tokens']:,} tokens", took["times_faster"], 1)


def startup(figures: Figures) -> Iterator[Row]:
    commands, checked = figures["commands"], figures["check"]
    yield at_most("`mantis-lite --help`", commands["mantis-lite --help"]["seconds"], 0.3, " s")
    for name in ("import mantis_lite", "trl --help", "mantis-lite train --help"):
        yield Row(f"`{name}`", said(commands[name]["seconds"], " s"))
    rows = f"{checked['rows']:,} rows"
    for row in (
        at_most(f"`check` of {rows}, nothing remembered", checked["check, cold"]["seconds"], 10, " s"),
        Row(
            "the same with Tiny Mantis' tokenizer, a token a letter",
            said(checked["check, Tiny Mantis, cold"]["seconds"], " s"),
        ),
        at_most(f"`check` of {rows}, the second time", checked["check, warm"]["seconds"], 1, " s"),
        at_most(f"preparing {rows}, the second time", checked["preparing again"]["seconds"], 1, " s"),
    ):
        yield row if checked["rows"] >= 10_000 else Row(row.what, row.found)


def clips(figures: Figures) -> Iterator[Row]:
    eight = f"{figures['pictures_per_clip']} frames of a clip, over {figures['clips']} clips"
    yield Row(f"{eight}: milliseconds", said(figures["single_pictures_ms"]))
    yield at_least(
        f"{eight}, against decoding it into pictures, as upstream does", figures["times_faster_than_all_to_images"], 3
    )
    yield at_least(f"{eight}, against decoding it alone", figures["times_faster_than_decoding"], 3)


def scaling(figures: Figures) -> Iterator[Row]:
    for name, curve in figures.items():
        if name == "workers":
            for workers, times in curve["times_as_fast_as_none"].items():
                if workers != "0":
                    what = (
                        f"packs through {workers} worker{'s' * (workers != '1')} against none, of {curve['cpus']} cores"
                    )
                    yield Row(what, said(times, " times"))
            continue
        sizes = [f"{int(size):,}" for size in curve["seconds"]]
        masked = "mask" in name
        target = "" if masked else "linear: at most 1.15"
        what = f"{curve['of']}, from {sizes[0]} to {sizes[-1]}: exponent"
        yield Row(what, f"{curve['exponent']:.2f}", target, None if masked else curve["linear"])


def shards(figures: Figures) -> Iterator[Row]:
    for name, values in figures.items():
        if name.endswith("rows_per_second"):
            yield Row(f"{name.removesuffix(', rows_per_second')}: rows a second", said(values))


def zips(figures: Figures) -> Iterator[Row]:
    for way, rates in figures["per_second"].items():
        yield Row(f"pictures {way}: sizes a second of a core", said(rates["sizes"]))
        yield Row(f"pictures {way}: decoded a second of a core", said(rates["pixels"]))
    yield Row(f"the index of a zip of {figures['names']:,} names", said(figures["seconds_to_index"], " s"))


def likelihood(figures: Figures) -> Iterator[Row]:
    found = figures["a_second"]
    yield Row("questions a second, a prompt read once for all its options", said(found["once"]))
    yield Row("questions a second, a prompt read with each option", said(found["alone"]))


ROWS: dict[str, tuple[str, Callable[[Figures], Iterator[Row]]]] = {
    "planning": ("C1, planning", planning),
    "preparation": ("C2, preparation", preparation),
    "pictures": ("C3 and C4, pictures and their bytes", pictures),
    "packed": ("C5, C6 and C10, collating, packed steps, waste", packed),
    "loss": ("C7, the loss layer", loss),
    "startup": ("C9, starting", startup),
    "clips": ("C11, video", clips),
    "scaling": ("Scaling", scaling),
    "shards": ("Shards", shards),
    "zips": ("Pictures in zips", zips),
    "likelihood": ("Choices by likelihood", likelihood),
}
"""A file of results, and of a benchmark of that name: what it is about, and its rows."""

LIMITS = {
    "planning": "A packer that does not look back, or at 1,000 samples at a time, is so quick that a twentieth of its "
    "time is less than it takes to put all samples in order, with which a better fill begins.",
    "preparation": "Rows are parsed, checked and hashed, and pictures' headers read, by Python, on the cores that the "
    "tokenizer has for itself when it is alone.",
    "pictures": "Of large pictures most of the time is their decoding: `pil`'s to the bit, as Pillow does it for the "
    "processor too, and `fast`'s whole where the model sees more than half of a side. And where all pictures have one "
    "shape there is no padding to save: 3 bytes a pixel, of 20.",
}
"""Why a target of a benchmark may be out of reach: said below its table where one is not met."""


def read(folder: Path = results.FOLDER) -> dict[str, Figures]:
    """The results that there are, by name."""
    files = {name: folder / f"{name}.json" for name in ROWS}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.is_file()}


INTRODUCTION = """# Benchmarks

`make bench` runs these on the machine at hand and then writes this page (`python -m benchmarks.table`); with
`python -m benchmarks.NAME` one of them, whose docstring says what it does. Ways take turns, five times at least, and
must give the same result, or there is none. A figure is the median of its turns (from the least to the most). Of two
ways the quotient is taken turn by turn: only that means something on another machine."""

OTHERS = """
## Others

`make bench-peers` ([other trainers on the same rows](peers/README.md)), `make bench-gpu`
([measured](../docs/measured.md)) and `make bench-reliability` ([reliability](../docs/reliability.md)) have tables of
their own, and `python -m benchmarks.memory` ([memory](../docs/memory.md#how-near-it-comes)) finds the same bytes on any
machine. What takes longer is not part of `make bench`: `python -m benchmarks.planning --large`,
`python -m benchmarks.preparation --whole`, `python -m benchmarks.reading`, `python -m benchmarks.merging`."""


def page(found: dict[str, Figures]) -> Iterator[str]:
    """The lines of benchmarks/README.md."""
    rows = {name: list(ROWS[name][1](taken["figures"])) for name, taken in found.items()}
    targets = [row for of in rows.values() for row in of if row.met is not None]
    yield INTRODUCTION
    yield ""
    minutes = sum(taken.get("seconds", 0) for taken in found.values()) / 60
    met = sum(bool(row.met) for row in targets)
    yield f"{met} of {len(targets)} targets are met. What follows took {minutes:.0f} minutes in all."
    for name, of in rows.items():
        yield from section(name, of, found[name])
    yield OTHERS


def section(name: str, rows: Sequence[Row], taken: Figures) -> Iterator[str]:
    """A benchmark's heading, what it ran on, and its table."""
    yield ""
    yield f"## {ROWS[name][0]}"
    yield ""
    yield f"`python -m benchmarks.{name}`: {on(taken)}."
    yield ""
    yield "| what | found | target | met |"
    yield "|---|---|---|---|"
    for row in rows:
        met = "" if row.met is None else "yes" if row.met else "**no**"
        yield f"| {row.what} | {row.found} | {row.target} | {met} |"
    if name in LIMITS and any(row.met is False for row in rows):
        yield ""
        yield LIMITS[name]
    if name == "scaling":
        yield ""
        yield f"![time by size]({PLOT.name})"


def on(taken: Figures) -> str:
    """The machine, its software and the day, in words."""
    named = ("torch", "transformers", "trl", "tokenizers", "numpy")
    versions = ", ".join(f"{name} {taken['versions'][name]}" for name in named)
    cores = f"{taken['cpu_threads']} thread{'s' * (taken['cpu_threads'] != 1)}"
    took = f", in {taken['seconds']} s" if "seconds" in taken else ""
    return f"{taken['date']}{took}, {taken['device']}, {cores}, Python {taken['python']}, {versions}"


def plot(figures: Figures, path: Path) -> None:
    """Draw every curve of time by size, both axes logarithmic, beside a straight line; the same file each time."""
    curves = [curve for name, curve in figures.items() if name != "workers"]
    with rc_context({"svg.hashsalt": "scaling", "svg.fonttype": "none", "font.size": 9}):
        figure = Figure(figsize=(10, 5.5), layout="constrained")
        for axes, curve in zip(figure.subplots(2, 3).flat, curves, strict=False):
            sizes = [int(size) for size in curve["seconds"]]
            median, least, most = ([of[edge] for of in curve["seconds"].values()] for edge in ("median", "min", "max"))
            axes.fill_between(sizes, least, most, alpha=0.25)
            axes.plot(sizes, median, marker="o", label=f"measured, exponent {curve['exponent']:.2f}")
            linear = [median[-1] * size / sizes[-1] for size in sizes]
            axes.plot(sizes, linear, color="grey", linestyle="--", linewidth=1, label="linear")
            axes.set(xscale="log", yscale="log", xlabel=curve["of"], ylabel="seconds")
            axes.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


TABLES: dict[str, tuple[str, Callable[[Figures], Iterable[str]]]] = {
    "pictures": ("measured", benchmarks.pictures.lines),
    "zips": ("mantis-instruct", benchmarks.zips.lines),
    "likelihood": ("evaluation", benchmarks.likelihood.lines),
}
"""Results that a page of docs/ has a table of, which begins with its head and is as long as before."""


def renew(page: Path, table: Sequence[str]) -> None:
    """Write a table over the one with the same head."""
    lines = page.read_text().split("\n")
    at = lines.index(table[0])
    page.write_text("\n".join([*lines[:at], *table, *lines[at + len(table) :]]))


def main() -> None:
    found = read()
    PAGE.write_text("\n".join(page(found)) + "\n")
    for name, (doc, lines) in TABLES.items():
        if name in found:
            renew(PAGE.parents[1] / f"docs/{doc}.md", list(lines(found[name]["figures"])))
    if "scaling" in found:
        plot(found["scaling"]["figures"], PLOT)
    print(PAGE)


if __name__ == "__main__":
    main()
