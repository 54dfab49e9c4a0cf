"""What a user asks to be evaluated or compared, in words -> evaluations and comparisons, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import DiskError, RecipeError
from ..trained import open_trained
from .asking import Scoring, Watch
from .benchmark import Benchmark
from .benchmarks import BENCHMARKS, find
from .compare import Comparison, compare
from .evaluation import Evaluation, evaluate, folder_of, open_model
from .judge import Judge
from .labels import evaluate_labels
from .mementos import MEMENTOS, judged, read_synonyms
from .page import write_page
from .pictures import pictures_of
from .question import Protocol
from .rows import own_rows


def run(
    source: str,
    words: Sequence[str],
    protocol: Protocol = "own",
    scoring: Scoring = "generate",
    bits: int | None = None,
    to: Path | None = None,
    max_new_tokens: int | None = None,
    tokens: int = 4096,
    from_scratch: bool = False,
    judge: Judge | None = None,
    watch: Watch = lambda said, total: said,
) -> Iterator[Evaluation]:
    """Evaluate a run, an adapter or a model by benchmarks, and by rows of one's own.

    A word is a benchmark, `nlvr2`, or one with a local copy, `nlvr2=copies/nlvr2`; or key=value of the recipe, of which
    data=rows.json has those rows asked, or scored by a score head. A `judge` reads the answers to mementos. Raises
    RecipeError, DataError, SampleError, DiskError.
    """
    wanted, overrides = _read(words)
    gives_data = any(word.partition("=")[0] in ("data", "data.sources") for word in overrides)
    if not wanted and not gives_data:
        known = ", ".join(BENCHMARKS)
        raise RecipeError(f"evaluate: nothing to evaluate by\n  Name a benchmark, of {known}, or data=held_out.json.")
    if to is not None and len(wanted) + gives_data > 1:
        raise RecipeError("--to: one folder for several evaluations\n  Leave it out, or name one at a time.")
    if gives_data and open_trained(source, overrides, bits).head is not None:
        yield _labels(source, overrides, wanted, protocol, scoring, to)
        return
    opened = open_model(source, protocol, bits, overrides)
    asked: list[tuple[Benchmark, str | None]] = list(wanted)
    if gives_data:
        if protocol == "upstream":
            raise RecipeError("--protocol: upstream has none for rows of one's own\n  Leave it out.")
        asked.append((own_rows(opened.trained.recipe, opened.encoder, opened.model), None))
    if judge is not None and not any(benchmark is MEMENTOS for benchmark, _ in asked):
        raise RecipeError("--judge: only mementos is judged\n  Name it, or leave --judge out.")
    for benchmark, rows in asked:
        if judge is not None and benchmark is MEMENTOS:
            benchmark = judged(judge, read_synonyms(rows or "."))
        yield evaluate(opened, benchmark, rows, protocol, scoring, to, max_new_tokens, tokens, from_scratch, watch)


def compared(
    a: str,
    b: str,
    words: Sequence[str] = (),
    scoring: Scoring = "generate",
    html: Path | None = None,
    watch: Watch = lambda said, total: said,
) -> Iterator[Comparison]:
    """Compare two folders of results, or two models by what words name, which evaluates them first.

    `html` is a page of it. Raises RecipeError, DataError, SampleError, DiskError.
    """
    if html is not None and len(words) > 1 and not words[0].startswith("data="):
        raise RecipeError("--html: one page for several comparisons\n  Leave it out, or name one benchmark at a time.")
    if words:
        both = [[found.folder for found in run(model, words, scoring=scoring, watch=watch)] for model in (a, b)]
        pairs = list(zip(*both, strict=True))
    else:
        pairs = [(Path(a), Path(b))]
    for pair in pairs:
        found = compare(*pair)
        if html is not None:
            try:
                write_page(found, pictures_of(found.summary), html)
            except OSError as error:
                raise DiskError(f"--html: {html} cannot be written: {error.strerror}\n  Name another file.") from error
        yield found


def _labels(
    source: str,
    overrides: Sequence[str],
    wanted: Sequence[object],
    protocol: Protocol,
    scoring: Scoring,
    to: Path | None,
) -> Evaluation:
    if wanted or protocol != "own" or scoring != "generate":
        found = "has a score head, which answers no benchmark's questions"
        raise RecipeError(f"{source}: {found}\n  Give data=held_out.json alone.")
    return evaluate_labels(source, overrides, to or folder_of(source, "labels", "own", "generate"))


def _read(words: Sequence[str]) -> tuple[list[tuple[Benchmark, str | None]], list[str]]:
    """The benchmarks that words name, each with its local copy if one is given; and overrides."""
    wanted, overrides = list[tuple[Benchmark, str | None]](), []
    for word in words:
        name, given, value = word.partition("=")
        if given and name not in BENCHMARKS:
            overrides.append(word)
        else:
            wanted.append((find(name), value or None))
    return wanted, overrides
