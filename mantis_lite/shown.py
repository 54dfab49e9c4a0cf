"""What commands show at a terminal."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from .errors import MantisError, SampleError, Stopped

if TYPE_CHECKING:
    from .data.prepare import Prepared
    from .evaluate.compare import Comparison
    from .evaluate.evaluation import Evaluation
    from .metrics import Metrics
    from .push import Pushed
    from .recipe import Recipe
    from .report.fit import Fit
    from .report.probe import Probe
    from .report.said import Said
    from .sharding import Sharded
    from .training.progress import How
    from .training.run import Run


def printable(text: str) -> str:
    """Text from a row, without what a terminal would take for a command, and without half characters."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def train(
    recipe: Recipe,
    how: How = "auto",
    from_scratch: bool = False,
    import_upstream: bool = False,
    gpu: float | None = None,
    accept_changes: bool = False,
) -> Path:
    """Train a recipe, and show what trains, how it goes and what was saved; returns the folder of it.

    The arguments are those of `start`, and so are the errors that are raised.
    """
    from .training.progress import progress
    from .training.start import start

    with progress(how, typer.echo) as callbacks:
        run = start(recipe, callbacks, from_scratch, import_upstream, gpu, accept_changes=accept_changes)
        if run.ranks.is_first:
            _begun(run, how)
        try:
            saved = run.train()
        except (MantisError, Stopped) as error:
            if run.ranks.is_first and how == "json":
                _say_end(None, str(error), run.facts["next"]["stopped"])
            raise
    if run.ranks.is_first:
        _ended(run, saved, how)
    return saved


def _begun(run: Run, how: How) -> None:
    if how == "json":
        facts = {key: value for key, value in run.facts.items() if key != "answered"}  # pictures, for the page
        typer.echo(json.dumps({"event": "start", "run_dir": str(run.recipe.run_dir), **facts}))
    elif how != "quiet":
        show_start(run)


def _ended(run: Run, saved: Path, how: How) -> None:
    following = run.facts["next"]["finished"]
    if how == "json":
        _say_end(str(saved), "finished", following)
    elif how != "quiet":
        show_saved(saved, following)


def _say_end(saved: str | None, how: str, following: Sequence[tuple[str, str]]) -> None:
    typer.echo(json.dumps({"event": "end", "saved": saved, "how": how, "next": following}))


def show_saved(saved: Path, following: Sequence[tuple[str, str]]) -> None:
    """What was saved where, and what to type next."""
    typer.echo(f"\nsaved {saved}; report.html, metrics.jsonl, recipe.yaml and loss.png lie beside it")
    width = max(len(command) for _, command in following)
    for what, command in following:
        typer.echo(f"  {command:<{width}}  # {what}")


def show_start(run: Run) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="what trains", title_justify="left")
    table.add_column("part")
    table.add_column("parameters", justify="right")
    table.add_column("trainable", justify="right")
    table.add_column("in 4 bits", justify="right")
    for part, *counts in run.sizes:
        table.add_row(part, *(f"{count:,}" for count in counts))
    Console(highlight=False).print(table)
    for notice in run.notices:
        typer.echo(f"notice: {notice}")
    show_rows(run.prepared)
    plan = run.schedule
    typer.echo(f"{len(plan.packs):,} packs, {plan.per_step} a step, {plan.steps:,} steps -> {run.recipe.run_dir}")
    if estimate := run.facts["estimate"]:
        typer.echo(f"memory: {estimate.get('why_not') or '{total:.2f} GiB estimated'.format_map(estimate)}")
    typer.echo(f"on {run.facts['machine']}; how it goes: mantis-lite watch {shlex.quote(str(run.recipe.run_dir))}")
    if run.trainer.args.eval_on_start and run.prepared.held_out is not None:
        typer.echo(f"{len(run.prepared.held_out):,} held-out rows are evaluated before the first step")


def show_metrics(metrics: Metrics) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="metrics", title_justify="left")
    table.add_column("what")
    table.add_column("value", justify="right")
    for name, value in metrics.items():
        table.add_row(name, "not defined" if value is None else f"{value:.4f}")
    Console(highlight=False).print(table)


def show_evaluation(found: Evaluation) -> None:
    from rich.console import Console
    from rich.table import Table

    summary = found.summary
    table = Table(title=f"{summary['benchmark']}: {summary['model']}", title_justify="left")
    for name in ("accuracy", "rows", "%", "95% interval"):
        table.add_column(name, justify="left" if name == "accuracy" else "right")

    def add(name: str, of: dict[str, Any]) -> None:
        low, high = of["interval"]
        table.add_row(printable(name), f"{of['count']:,}", f"{of['accuracy']:.1%}", f"{low:.1%} to {high:.1%}")

    add("all" if summary["overall"] == "rows" else "mean of the categories", summary)
    if "likelihood" in summary:
        add("by likelihood", summary["likelihood"])
    for category, of in summary.get("categories", {}).items():
        add(category or "(none)", of)
    console = Console(highlight=False)
    console.print(table)
    for name, value in summary["more"].items():
        typer.echo(f"{name}: not defined" if value is None else f"{name}: {value:.4f}")
    if found.found:
        typer.echo(f"{found.found:,} rows had been answered before")
    for reject in summary.get("rejects", [])[:SHOWN]:
        typer.echo(printable(f"left out: {reject}"))
    if left := len(summary.get("rejects", [])) + summary.get("oversize", 0):
        typer.echo(f"notice: {left:,} rows were left out, {summary.get('oversize', 0):,} as larger than a pack")
    if summary["unread"]:
        typer.echo(f"notice: in {summary['unread']:,} answers none could be read; they count as wrong")
    typer.echo(f"results.jsonl and summary.json in {found.folder}")


def show_comparison(found: Comparison) -> None:
    from rich.console import Console
    from rich.table import Table

    from .data.columns import short

    typer.echo(printable(f"A: {found.sources[0]}\nB: {found.sources[1]}"))
    table = Table(title=f"{found.name}, {found.count:,} rows", title_justify="left")
    for name in ("accuracy", "A", "B", "points", "95% interval", "p"):
        table.add_column(name, justify="left" if name == "accuracy" else "right")
    lines = {"all": found.accuracy, "by likelihood": found.likelihood, **found.categories}
    for name, of in lines.items():
        if of is not None:
            bounds = f"{100 * of.low:+.1f} to {100 * of.high:+.1f}"
            p = "" if of.p is None else f"{of.p:.2g}"
            table.add_row(printable(name or "(none)"), f"{of.a:.1%}", f"{of.b:.1%}", f"{100 * of.gain:+.1f}", bounds, p)
    Console(highlight=False).print(table)
    typer.echo(f"{found.accuracy.verdict}; {len(found.fixed):,} rows fixed, {len(found.broken):,} broken")
    for way, pairs in (("broken", found.broken), ("fixed", found.fixed)):
        for before, after in pairs[:FLIPPED]:
            said = [short(result.parsed) for result in (before, after)]
            typer.echo(printable(f"  {way} {before.id}: {said[0]} -> {said[1]}, right is {short(before.answer)}"))
        if len(pairs) > FLIPPED:
            typer.echo(f"  and {len(pairs) - FLIPPED:,} more {way}; --html=page.html shows them")
    for name, (one, two) in found.otherwise.items():
        typer.echo(f"notice: {name} is {one} for A, and {two} for B")
    if any(found.alone):
        typer.echo(f"notice: rows that only A has, {found.alone[0]:,}; that only B has, {found.alone[1]:,}: left out")


FLIPPED = 5
"""How many rows that broke, and that were fixed, the terminal shows."""


def show_rows(prepared: Prepared, purpose: str = "to train on") -> None:
    from .report.said import rows_said

    for line in rows_said(prepared, purpose):
        typer.echo(line)


def show_shards(found: Sharded) -> None:
    made = found.manifest
    counts = f"{made['rows']:,} rows, {made['tokens']:,} tokens, {made['bytes'] / 1e6:,.1f} MB"
    typer.echo(f"{counts} in {len(made['shards']):,} shards: data={found.place.url}")
    for notice, count in made["notices"].items():
        typer.echo(f"  notice, {count:,} times: {notice}")
    for reject in found.rejects[:SHOWN]:
        typer.echo(printable(f"rejected {reject}"))


def show_pushed(found: Pushed) -> None:
    for notice in found.notices:
        typer.echo(f"notice: {notice}")
    for name, size in found.files.items():
        typer.echo(f"{size:>15,}  {name}")
    count = f"{len(found.files)} files, {sum(found.files.values()) / 1e6:,.1f} MB"
    typer.echo(f"{count}: pushed, {found.commit}" if found.commit else f"{count}: would be pushed to {found.url}")


SHOWN = 20
"""How many rejected rows the terminal shows."""


def show_check(said: Said, rejects: Sequence[SampleError] = (), output: Path | None = None) -> None:
    if said.notice:
        typer.echo(f"notice: {said.notice}")
    for line in said.rows:
        typer.echo(line)
    if said.sample:
        _show_sample(said)
    for reject in rejects[:SHOWN]:
        typer.echo(printable(f"rejected {reject}"))
    if len(rejects) > SHOWN:
        typer.echo(f"and {len(rejects) - SHOWN:,} more; --output=rejects.jsonl writes all of them down")
    if output:
        typer.echo(f"{len(rejects):,} rejected rows in {output}")


def _show_sample(said: Said) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    for line in said.packs:
        console.print(line)
    console.print(f"\n{said.sample}:", markup=False)
    text = Text()
    for stretch in said.rendered:
        if stretch.trained and (console.no_color or not console.is_terminal):
            text.append(f"⟦{stretch.text}⟧")
        else:
            text.append(stretch.text, style="black on green" if stretch.trained else "dim")
    console.print(text)


def show_fit(found: Fit) -> None:
    from rich.console import Console
    from rich.table import Table

    from .memory.shortage import saving

    table = Table(title="memory at the peak of a step", title_justify="left")
    table.add_column("what")
    table.add_column("GiB", justify="right")
    terms = {**found.estimate.terms, **found.estimate.overhead}
    for what, size in terms.items():
        if size >= 1 << 20:
            table.add_row(what, f"{size / (1 << 30):.2f}")
    table.add_section()
    table.add_row("in all", f"{found.estimate.total / (1 << 30):.2f}")
    if found.choice is not None:
        for notice in found.choice.notices:
            typer.echo(notice)
    typer.echo(found.known)
    Console(highlight=False).print(table)
    typer.echo("fits a card of  " + "  ".join(f"{n:g} GiB: {'yes' if ok else 'no'}" for n, ok in found.cards.items()))
    for other in found.overrides:
        typer.echo(f"  {saving(other, found.estimate.total)}")


def show_probe(found: Probe) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="memory at the peak of two steps that were run", title_justify="left")
    for name in ("what", "estimated, GiB", "measured, GiB", "off by"):
        table.add_column(name, justify="left" if name == "what" else "right")
    for what, estimated, measured in found.figures:
        sizes = (f"{size / (1 << 30):.3f}" for size in (estimated, measured))
        table.add_row(what, *sizes, f"{estimated / measured - 1:+.1%}")
    typer.echo(f"ran a pack of {found.pack.tokens:,} tokens and {found.pack.patches:,} patches on {found.machine}")
    Console(highlight=False).print(table)
