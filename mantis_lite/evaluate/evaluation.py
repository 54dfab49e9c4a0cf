"""A model and a benchmark -> a folder of results, row by row, by one process or several, gone on with after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from ..chat import for_chat
from ..data.encode import Encoder
from ..errors import DataError, DiskError, RecipeError
from ..files import write_whole
from ..models.precision import working_dtype
from ..models.upstream import WEIGHTS
from ..models.weights import fingerprint, weight_files
from ..trained import Trained, is_run, open_trained
from ..training.jsonlines import keep_whole_lines, lines_of
from ..training.lock import Lock
from ..training.ranks import Ranks, join
from .asking import Asking, Said, Scoring, Watch, as_upstream, ask, batches, named, shown
from .benchmark import Benchmark
from .question import Protocol, Question, Result
from .results import RESULTS, SUMMARY, likeliest, line_of, summarise

ASKED = "asked.json"
PART = "part-{}.jsonl"
"""The rows that a process has answered so far, until all are."""


@dataclass(frozen=True)
class Evaluation:
    """What a model's answers come to, and the folder of them; `found` of its rows were there from before."""

    folder: Path
    summary: dict[str, Any]
    found: int = 0


@dataclass(frozen=True)
class Opened:
    """A model that is asked, as it was named, and how prompts are written for it."""

    name: str
    trained: Trained
    encoder: Encoder
    model: PreTrainedModel
    ranks: Ranks


def open_model(source: str, protocol: Protocol, bits: int | None, overrides: Sequence[str] = ()) -> Opened:
    """Open and load what is to be asked. Raises RecipeError for what has a score head."""
    trained = open_trained(source, overrides, bits)
    if protocol == "upstream" and trained.checkpoint.config.model_type == "idefics2":
        trained = open_trained(source, [*overrides, "prompt.template=hub"], bits)  # as its wrapper writes prompts
    if trained.head is not None:
        raise RecipeError(f"{source}: scores, and does not answer\n  mantis-lite evaluate {source} data=held_out.json")
    ranks = join()
    return Opened(source, trained, for_chat(trained.encoder), trained.load(), ranks)


def evaluate(
    opened: Opened,
    benchmark: Benchmark,
    rows: str | None = None,
    protocol: Protocol = "own",
    scoring: Scoring = "generate",
    to: Path | None = None,
    max_new_tokens: int | None = None,
    tokens: int = 4096,
    from_scratch: bool = False,
    watch: Watch = lambda said, total: said,
) -> Evaluation:
    """Ask a model a benchmark's questions; run again, it goes on with those that have no answer yet.

    `rows` are a local copy's, else the hub's; `to` is the folder of results, else one in the run or here. Raises
    DataError, SampleError, RecipeError, DiskError.
    """
    questions = benchmark.read(rows or benchmark.source, protocol)
    _refuse_alike(questions, benchmark.name)
    if protocol == "upstream":
        model_type = opened.trained.checkpoint.config.model_type
        questions = [replace(each, sample=as_upstream(each.sample, model_type)) for each in questions]
    usual = benchmark.upstream_new_tokens if protocol == "upstream" else benchmark.max_new_tokens
    asking = Asking(scoring, max_new_tokens or usual, tokens)
    folder = to or folder_of(opened.name, benchmark.name, protocol, scoring)
    if scoring == "likelihood" and not any(map(asking.weighs, questions)):
        raise RecipeError(f"--scoring: likelihood, but no row of {benchmark.name} has options\n  Leave it out.")
    asked = _asked(opened, benchmark, questions, protocol, asking)
    asked["rows"] = str(Path(rows).resolve()) if rows else benchmark.source
    work = _Work(opened, benchmark, questions, protocol, asking, folder)
    with _held(folder, asked, from_scratch, opened.ranks):
        found = len(work.done())
        work.go_on(watch)
        opened.ranks.wait()
        if opened.ranks.is_first:
            work.finish(asked)
        opened.ranks.wait()
    return Evaluation(folder, json.loads((folder / SUMMARY).read_text()), found)


def folder_of(source: str, name: str, protocol: Protocol, scoring: Scoring) -> Path:
    """Where results go: into a run, else beside others here, by the model's name."""
    what = "-".join([name, *([protocol] if protocol != "own" else []), *([scoring] if scoring != "generate" else [])])
    base = Path(source) if is_run(source) else Path("evaluations") / source.strip("./").replace("/", "--")
    return base / "evaluate" / what if is_run(source) else base / what


@dataclass(frozen=True)
class _Work:
    opened: Opened
    benchmark: Benchmark
    questions: list[Question]
    protocol: Protocol
    asking: Asking
    folder: Path

    @property
    def part(self) -> Path:
        return self.folder / PART.format(self.opened.ranks.rank)

    def done(self) -> dict[str, dict[str, Any]]:
        """The lines that there are, by whichever process, by their ids."""
        if (self.folder / RESULTS).is_file():
            return {line["id"]: line for line in lines_of(self.folder / RESULTS)}
        parts = sorted(self.folder.glob(PART.format("*")))
        return {line["id"]: line for part in parts for line in lines_of(part)}

    def go_on(self, watch: Watch) -> None:
        """Answer this process's share of the batches, but those all of whose rows have an answer."""
        ranks, done = self.opened.ranks, self.done()
        ranks.wait()  # until all have seen the same
        keep_whole_lines(self.part)
        left = [
            batch
            for batch in batches(self.opened.encoder, self.questions, self.asking.tokens)
            if any(self.questions[number].id not in done for number in batch)
        ][ranks.rank :: ranks.size]
        if not left:
            return
        said = ask(self.opened.model, self.opened.encoder, self.questions, left, self.asking)
        try:
            with self.part.open("ab", buffering=0) as file:
                for each in watch(said, sum(map(len, left))):
                    question = self.questions[each.number]
                    if question.id not in done:
                        file.write(line_of(result_of(self.benchmark, question, each, self.protocol)).encode())
        except OSError as error:
            found = f"{self.part} cannot be written: {error.strerror}"
            raise DiskError(f"{found}\n  Make room there, and run the same command again: it goes on.") from error

    def finish(self, asked: dict[str, Any]) -> None:
        """Put the rows in their order, and say what they come to."""
        if (self.folder / RESULTS).is_file():
            return
        done = self.done()
        results = [Result(**done[question.id]) for question in self.questions]
        summary = {**asked, **summarise(results, self.benchmark.overall)}
        summary["more"] = self.benchmark.more(results)
        if self.protocol == "own":
            summary["differences"] = list(self.benchmark.differences)
        write_whole(self.folder / SUMMARY, json.dumps(summary, indent=2).encode() + b"\n")
        write_whole(self.folder / RESULTS, (line_of(result).encode() for result in results))
        for part in self.folder.glob(PART.format("*")):
            part.unlink()


def result_of(benchmark: Benchmark, question: Question, said: Said, protocol: Protocol) -> Result:
    """What an answer is worth; where only likelihood was asked for, the likeliest letter is the answer."""
    parsed = likeliest(said.logprobs) if said.raw is None else benchmark.parse(said.raw, question, protocol)
    return Result(
        id=question.id,
        category=question.category,
        group=question.group,
        prompt=shown(question.sample),
        images=tuple(map(named, question.sample.images)),
        answer=question.answer,
        raw=said.raw,
        parsed=parsed,
        correct=benchmark.right(parsed, question, protocol),
        logprobs=said.logprobs,
        scores=benchmark.scores(said.raw, question, protocol),
    )


def _asked(
    opened: Opened, benchmark: Benchmark, questions: Sequence[Question], protocol: Protocol, asking: Asking
) -> dict[str, Any]:
    """Everything that an answer depends on, in short."""
    trained = opened.trained
    weights = fingerprint(weight_files(trained.checkpoint))
    adapter = fingerprint([trained.adapter / WEIGHTS]) if trained.adapter else None
    lines = [
        json.dumps(
            [
                *(each.id, shown(each.sample), *map(named, each.sample.images)),
                *(each.answer, each.options, each.category, each.group),
            ]
        )
        for each in questions
    ]
    return {
        "model": opened.name,
        "weights": weights,
        "adapter": adapter,
        "in_4_bits": list(trained.recipe.quantized),
        "precision": str(working_dtype()).removeprefix("torch."),
        "prompts": opened.encoder.fingerprint,
        "template": opened.encoder.template.name,
        "system": opened.encoder.template.system if opened.encoder.system is None else opened.encoder.system,
        "benchmark": benchmark.name,
        "questions": sha256("\n".join(lines).encode()).hexdigest()[:16],
        "protocol": protocol,
        **asdict(asking),
        **benchmark.told,
    }


def _refuse_alike(questions: Sequence[Question], name: str) -> None:
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            found = f"{question.sample.where} has the id {question.id} of a row before"
            raise DataError(f"{name}: {found}\n  Give each row an id of its own.")
        seen.add(question.id)


@contextmanager
def _held(folder: Path, asked: dict[str, Any], from_scratch: bool, ranks: Ranks) -> Iterator[None]:
    """Hold a folder that is for what is asked, and nothing else. Raises RecipeError, ResumeError, DiskError."""
    lock = Lock(folder, "--to")
    if ranks.is_first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"--to: {folder} cannot be made: {error.strerror}\n  Name another folder.") from error
        lock.take()
        if from_scratch:
            for name in (ASKED, SUMMARY, RESULTS, *(part.name for part in folder.glob(PART.format("*")))):
                (folder / name).unlink(missing_ok=True)
        _refuse_another(folder, asked)
        write_whole(folder / ASKED, json.dumps(asked, indent=2).encode() + b"\n")
    ranks.wait()
    try:
        yield
    finally:
        lock.release()


def _refuse_another(folder: Path, asked: dict[str, Any]) -> None:
    """Raise RecipeError where a folder has answers to something else."""
    if not (folder / ASKED).is_file():
        return
    try:
        before = json.loads((folder / ASKED).read_text())
    except ValueError:
        found = f"{folder / ASKED}: is damaged"
        raise DataError(f"{found}\n  Add --from-scratch to ask again, or name another folder.") from None
    if others := [key for key in asked if before.get(key) != asked[key]]:
        raise RecipeError(
            f"--to: {folder} has answers that were asked for otherwise: {', '.join(others)}\n"
            "  Add --from-scratch to ask again in their place, or name another folder."
        )
