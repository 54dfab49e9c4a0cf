"""What a user asks to be evaluated or compared, in words -> evaluations and comparisons, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..errors import DiskError, RecipeError
from ..trained import open_trained
from ..training.ranks import world
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
    wanted, overrides, gives_data = _read(words)
    if to is not None and len(wanted) + gives_data > 1:
        raise RecipeError("--to: one folder for several evaluations\n  Leave it out, or name one at a time.")
    if gives_data and protocol == "upstream":
        raise RecipeError("--protocol: upstream has none for rows of one's own\n  Leave it out.")
    if judge is not None and not any(benchmark is MEMENTOS for benchmark, _ in wanted):
        raise RecipeError("--judge: only mementos is judged\n  Name it, or leave --judge out.")
    if gives_data and open_trained(source, overrides, bits).head is not None:
        if wanted or scoring != "generate" or bits or max_new_tokens or world()[1] > 1:
            found = "has a score head, whose scores no benchmark, --scoring, --bits, --max-new-tokens or --gpus is for"
            raise RecipeError(f"{source}: {found}\n  Give data=held_out.json alone.")
        folder = to or folder_of(source, "labels", "own", "generate")
        yield evaluate_labels(source, overrides, folder, from_scratch)
        return
    opened = open_model(source, protocol, bits, overrides)
    asked: list[tuple[Benchmark, str | None]] = list(wanted)
    if gives_data:
        asked.append((own_rows(opened.trained.recipe, opened.encoder, opened.model), None))
    for benchmark, rows in asked:
        if judge is not None and benchmark is MEMENTOS:
            benchmark = judged(judge, read_synonyms(rows) if rows else {"objects": {}, "actions": {}})
        yield evaluate(opened, benchmark, rows, protocol, scoring, to, max_new_tokens, tokens, from_scratch, watch)


def compared(
    a: str,
    b: str,
    words: Sequence[str] = (),
    html: Path | None = None,
    protocol: Protocol = "own",
    scoring: Scoring = "generate",
    bits: int | None = None,
    from_scratch: bool = False,
    watch: Watch = lambda said, total: said,
) -> Iterator[Comparison]:
    """Compare two folders of results, or two models by what words name, which evaluates them first.

    `html` is a page of it. Raises RecipeError, DataError, SampleError, DiskError.
    """
    pairs: list[tuple[Path, ...]] = [(Path(a), Path(b))]
    if words:
        wanted, _, gives_data = _read(words)
        if html is not None and len(wanted) + gives_data > 1:
            raise RecipeError("--html: one page for several comparisons\n  Leave it out, or compare by one at a time.")
        more: dict[str, Any] = {"protocol": protocol, "scoring": scoring, "bits": bits, "from_scratch": from_scratch}
        both = [[found.folder for found in run(model, words, **more, watch=watch)] for model in (a, b)]
        pairs = list(zip(*both, strict=True))
    for one, other in pairs:
        found = compare(one, other)
        if html is not None:
            try:
                write_page(found, pictures_of(found.summary), html)
            except OSError as error:
                raise DiskError(f"--html: {html} cannot be written: {error.strerror}\n  Name another file.") from error
        yield found


def _read(words: Sequence[str]) -> tuple[list[tuple[Benchmark, str | None]], list[str], bool]:
    """The benchmarks that words name, each with its local copy if one is given; overrides; whether these give rows.

    Raises RecipeError.
    """
    wanted, overrides = list[tuple[Benchmark, str | None]](), list[str]()
    for word in words:
        name, given, value = word.partition("=")
        if given and name not in BENCHMARKS:
            overrides.append(word)
            continue
        if value and not Path(value).exists():
            raise RecipeError(f"{word}: there is no such file or folder\n  Name the copy; {name} alone is the hub's.")
        wanted.append((find(name), value or None))
    sources = [word for word in overrides if word.partition("=")[0] in ("data", "data.sources")]
    if len(sources) > 1:
        raise RecipeError(f"data: given {len(sources)} times\n  Write data='[a.json, b.json]' for several.")
    if not wanted and not sources:
        known = ", ".join(BENCHMARKS)
        raise RecipeError(f"evaluate: nothing to evaluate by\n  Name a benchmark, of {known}, or data=held_out.json.")
    return wanted, overrides, bool(sources)
