"""The command line. Each command reads its words, makes one call and shows what came back."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from .cycles import no_cycle_collection
from .process import cores, leave, prepare_process
from .shown import (
    printable,
    show_check,
    show_comparison,
    show_evaluation,
    show_fit,
    show_metrics,
    show_probe,
    show_pushed,
    show_rows,
    show_saved,
    show_shards,
    train,
)

if TYPE_CHECKING:
    from .data.hub import Wanted
    from .recipe import Recipe
    from .repl import Repl

app = typer.Typer(
    help="Fine-tune Mantis multi-image vision-language models on one small GPU.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # half of the time that --help takes would go into boxes
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipes_app = typer.Typer(help="The recipes that come with the package.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(recipes_app, name="recipes")
data_app = typer.Typer(
    help="Data sets: getting them, and making them ready.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(data_app, name="data")


@app.callback()
def options(
    no_color: Annotated[bool, typer.Option("--no-color", help="Write no colours, as with NO_COLOR set.")] = False,
) -> None:
    """Fine-tune Mantis multi-image vision-language models on one small GPU."""
    if no_color:
        os.environ["NO_COLOR"] = "1"


RecipeArgument = Annotated[str, typer.Argument(help="A recipe's name or YAML file; `chat` is the default chat recipe.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, dots for nesting: data=my.json packing.max_length=4096")
]
ImportUpstream = Annotated[
    bool,
    typer.Option("--import-upstream", help="Read the pickles of a model.adapter trained by the original Mantis."),
]
Gpu = Annotated[float | None, typer.Option(min=1, help="The card's memory in GiB: 8, 12, 16, 24, 48, 80.")]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Go on with a stopped run although its recipe or data is another now.")
]
ModelArgument = Annotated[str, typer.Argument(help="A run, an adapter or a model: a folder, or a name on the hub.")]
Bits = Annotated[int | None, typer.Option(help="Of the frozen weights, 4 or 16; else as they were in training.")]
Template = Annotated[str | None, typer.Option(help="Of prompts; `hub`: the base's own. Else as in training.")]
FromScratch = Annotated[bool, typer.Option("--from-scratch", help="Move an old run in run_dir aside first.")]


@app.command("train")
def train_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    from_scratch: FromScratch = False,
    accept_changes: AcceptChanges = False,
    import_upstream: ImportUpstream = False,
    gpu: Gpu = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of this machine; else all, with a launch.strategy.")] = None,
    nodes: Annotated[int | None, typer.Option(min=1, help="Machines, each with MASTER_ADDR and NODE_RANK set.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show nothing but warnings and errors.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines: how it begins, every log, how it ends.")] = False,
) -> None:
    """Train a recipe; its adapter, metrics and page land in run_dir. Run it again to go on where it stopped."""
    from .errors import RecipeError
    from .recipe_file import load_recipe

    if quiet and as_json:
        raise RecipeError("--quiet: shows nothing, and --json every log\n  Leave one of them out.")
    asked = {"launch.gpus": gpus, "launch.nodes": nodes}
    words = [*(overrides or ()), *(f"{key}={count}" for key, count in asked.items() if count is not None)]
    loaded = load_recipe(recipe, words)
    _offer_download(loaded)
    prepare_process()
    from .errors import Stopped
    from .training.ranks import is_launched
    from .training.strategy import require_strategy

    require_strategy(loaded)
    if loaded.strategy != "single" and not is_launched():
        from .training.launch import launch

        raise typer.Exit(launch(loaded.launch, sys.argv[1:], bool(loaded.train.get("use_cpu"))))
    try:
        train(
            loaded,
            "quiet" if quiet else "json" if as_json else "auto",
            from_scratch,
            import_upstream,
            gpu,
            accept_changes,
        )
    except KeyboardInterrupt:
        raise Stopped(signal.SIGINT, None) from None


@app.command("watch")
def watch_command(
    run: Annotated[Path, typer.Argument(help="A run's folder: its run_dir.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Of the page; 0: any that is free.")] = 7870,
) -> None:
    """Show a run's page in the browser, on this machine alone, as it is now: while it trains, and afterwards."""
    from .watch import watch

    watch(run, port, typer.echo)


@app.command("check")
def check_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    quick: Annotated[bool, typer.Option("--quick", help="Read only the headers of pictures and clips.")] = False,
    output: Annotated[Path | None, typer.Option(help="A file for every row that is rejected, one on a line.")] = None,
    html: Annotated[Path | None, typer.Option(help="A page of samples, with what of them trains, and packs.")] = None,
) -> None:
    """Find every row that cannot be trained on, and show what the others come to. Needs no GPU and no weights."""
    from .errors import RecipeError
    from .recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if output is not None and output.exists():
        raise RecipeError(f"--output: {output} exists already\n  Name another file.")
    from .report.said import remember, remembered, said_of

    if output is html is None and (said := remembered(loaded, quick)):
        show_check(said)
        typer.echo(f"As of {said.on}: no file that was read then has changed since.")
        return
    _offer_download(loaded)
    with no_cycle_collection():
        prepare_process()
        from .data.prepare import write_rejects
        from .report.check import check

    found = check(loaded, not quick, _watched("decoding"))
    if output is not None:
        write_rejects(found.prepared.rejects, output)
    said = said_of(found)
    show_check(said, found.prepared.rejects, output)
    remember(loaded, quick, found, said)
    if html is not None:
        from .report.page import write_check_page

        write_check_page(found, loaded, html)
        typer.echo(f"samples, packs and what was rejected: {html}")
    if found.prepared.rejects:
        raise typer.Exit(3)


@app.command("fit")
def fit_command(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    gpu: Gpu = None,
    probe: Annotated[
        bool, typer.Option("--probe", help="Also load the model and run the largest pack, and compare.")
    ] = False,
) -> None:
    """Say beforehand whether a recipe fits a card, and what would help. Needs no GPU, weights or network."""
    from .recipe_file import find_recipe

    find_recipe(recipe)
    prepare_process()
    from .report.fit import fit

    found = fit(recipe, overrides or (), gpu)
    show_fit(found)
    if probe:
        from .report.probe import probe as run_probe

        show_probe(run_probe(found.recipe))
    if not any(found.cards.values()):
        raise typer.Exit(4)


@app.command("predict")
def predict_command(
    model: Annotated[str, typer.Argument(help="A run of task=classify, or a model with a score head.")],
    overrides: Overrides = None,
    metrics: Annotated[bool, typer.Option("--metrics", help="Compare with the rows' own labels.")] = False,
    output: Annotated[Path | None, typer.Option(help="The file of predictions; its neighbours take its name.")] = None,
) -> None:
    """Score the rows of data=... with a trained head; writes a JSON line for each."""
    prepare_process()
    from .scoring import predict

    found = predict(model, overrides or (), metrics, output)
    show_rows(found.prepared, "to score")
    for reject in found.prepared.rejects[:10]:
        typer.echo(f"  rejected {reject}")
    if found.metrics is not None:
        show_metrics(found.metrics)
    typer.echo(f"{len(found.samples):,} predictions in {found.file}")


@app.command("evaluate")
def evaluate_command(
    model: ModelArgument,
    what: Annotated[
        list[str],
        typer.Argument(help="Benchmarks, as nlvr2, or nlvr2=FOLDER for a copy here; or data=held_out.json; key=value."),
    ],
    protocol: Annotated[Literal["own", "upstream"], typer.Option(help="upstream: as Mantis, to the letter.")] = "own",
    scoring: Annotated[
        Literal["generate", "likelihood", "both"], typer.Option(help="How choices are made: written, or the likeliest.")
    ] = "generate",
    bits: Bits = None,
    to: Annotated[Path | None, typer.Option(help="The folder of results; else one in the run, or here.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="The longest answer; else the benchmark's.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Of prompts that are read at once.")] = 4096,
    gpus: Annotated[int | None, typer.Option(min=1, help="Of this machine, each with a share of the rows.")] = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Ask again what has answers there.")] = False,
    judge: Annotated[
        str | None, typer.Option(help="Of mementos: an endpoint of OpenAI's API; its key in MANTIS_LITE_JUDGE_KEY.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The model that is asked there.")] = None,
) -> None:
    """Ask a model a benchmark's questions, or your own rows', and say how right it is. Run it again to go on."""
    prepare_process()
    from .training.ranks import is_launched, world

    if gpus and gpus > 1 and not is_launched():
        from .recipe import LaunchRecipe
        from .training.launch import launch

        raise typer.Exit(launch(LaunchRecipe(gpus=gpus), sys.argv[1:]))
    from .evaluate.judge import judge_of
    from .evaluate.run import run

    asked = judge_of(judge, judge_model)
    watch = _watched("answering")
    for found in run(model, what, protocol, scoring, bits, to, max_new_tokens, tokens, from_scratch, asked, watch):
        if world()[0] == 0:
            show_evaluation(found)


@app.command("compare")
def compare_command(
    a: Annotated[str, typer.Argument(help="What was before: results, or a model.")],
    b: Annotated[str, typer.Argument(help="What is now: results, or a model.")],
    what: Annotated[
        list[str] | None, typer.Argument(help="Of two models: benchmarks and data=... that they are evaluated by.")
    ] = None,
    scoring: Annotated[
        Literal["generate", "likelihood", "both"], typer.Option(help="How choices are made: written, or the likeliest.")
    ] = "generate",
    html: Annotated[Path | None, typer.Option(help="A page of the rows that flipped, with their pictures.")] = None,
    protocol: Annotated[Literal["own", "upstream"], typer.Option(help="upstream: as Mantis, to the letter.")] = "own",
    bits: Bits = None,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Ask again what has answers there.")] = False,
) -> None:
    """Say whether B is better than A, with an interval, and which rows flipped; of results, or of models."""
    prepare_process()
    from .evaluate.run import compared

    watch = _watched("answering")
    for found in compared(a, b, what or (), html, protocol, scoring, bits, from_scratch, watch):
        show_comparison(found)
    if html is not None:
        typer.echo(f"the rows that flipped: {html}")


@app.command("chat")
def chat_command(
    model: ModelArgument,
    overrides: Overrides = None,
    image: Annotated[list[str] | None, typer.Option(help="A picture for the first turn; again for more.")] = None,
    video: Annotated[list[str] | None, typer.Option(help="A clip for the first turn; again for more.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Ask this one thing, and end.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON line for each answer.")] = False,
    bits: Bits = None,
    template: Template = None,
    system: Annotated[str | None, typer.Option(help="Say this first, in place of the template's own words.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 512,
    temperature: Annotated[float | None, typer.Option(help="Draw answers, 0.01 to 2; 0: the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from so much of the likeliest, up to 1.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same draws each time.")] = None,
    web: Annotated[bool, typer.Option("--web", help="A page in the browser, on this machine alone.")] = False,
    port: Annotated[int, typer.Option(min=1, max=65535, help="Of the page.")] = 7860,
) -> None:
    """Ask a run, an adapter or a model about pictures and clips; /help lists what else can be typed."""
    prepare_process()
    if web:
        from .web import require_gradio

        require_gradio()
    from .chat import MantisChat
    from .generate import checked
    from .repl import Repl

    given = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
    settings = checked(given)  # before the weights are loaded, not after
    chat = MantisChat(model, bits, template, system, overrides or ())
    if web:
        from .web import show_page

        return show_page(chat, port, typer.echo, **settings)

    def show(text: str) -> None:
        typer.echo(text if as_json else printable(text), nl=False)

    repl = Repl(chat, show, settings, list(image or ()), list(video or ()), as_json)
    if prompt is not None:
        return repl.ask(prompt)
    if sys.stdin.isatty() and not as_json:
        typer.echo(f"{model} in template {chat.encoder.template.name}; /help lists what can be typed")
    code = repl.read(_typed_lines(repl))
    if code and not sys.stdin.isatty():
        raise typer.Exit(code)


@app.command("merge")
def merge_command(
    model: ModelArgument,
    overrides: Overrides = None,
    to: Annotated[Path | None, typer.Option(help="The merged model's folder; else merged/ beside the adapter.")] = None,
    base: Annotated[
        Literal["full", "dequantized"] | None,
        typer.Option(help="What to add to: the base's weights, or what they are once in 4 bits (QLoRA's default)."),
    ] = None,
    others: Annotated[
        list[str] | None, typer.Option("--with", help="Another adapter and its weight, FOLDER=0.5; again for more.")
    ] = None,
    weight: Annotated[float, typer.Option(help="The weight of the adapter itself.")] = 1.0,
    combine: Annotated[
        str, typer.Option(help="How several are combined, by PEFT: linear, cat, svd, ties, ...")
    ] = "linear",
    least: Annotated[float, typer.Option(min=0, max=1, help="At how many positions the two must agree.")] = 0.995,
    no_check: Annotated[bool, typer.Option("--no-check", help="Do not run the two to compare them.")] = False,
) -> None:
    """Merge an adapter into its base, a tensor at a time, and check that the two say the same."""
    prepare_process()
    from .merge import merge

    def watch(files: list[Path]) -> Iterable[Path]:
        return _watched("merging")(files, len(files))

    more = [_weighed(word) for word in others or ()]
    found = merge(model, to, base, overrides or (), more, weight, combine, None if no_check else least, watch)
    if found.agreement:
        agreed = found.agreement
        typer.echo(
            f"the merged model chooses as the adapter does at {agreed.share:.2%} of {agreed.positions:,} positions of "
            f"{agreed.rows}; KL {agreed.kl:.2e}, logits apart by {agreed.largest:.2e} at most"
        )
    typer.echo(f"merged into {found.folder}, with the base's weights {WEIGHTS_OF[found.base]}")


WEIGHTS_OF = {"full": "as published", "dequantized": "as they are once in 4 bits, where training had them so"}


@app.command("push")
def push_command(
    source: Annotated[str, typer.Argument(help="A run, or the folder of an adapter or a merged model.")],
    repo: Annotated[str, typer.Argument(help="Where to on the hub: user/name.")],
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose it there, in a pull request.")] = False,
    update: Annotated[bool, typer.Option("--update", help="Put it in the place of what is there.")] = False,
    public: Annotated[bool, typer.Option("--public", help="For all to see; a new repository is private else.")] = False,
    license: Annotated[str | None, typer.Option(help="What it is given under; else what its base is.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be pushed, and send nothing.")] = False,
) -> None:
    """Put what was trained on the hub, with a card, privately. Run it again to go on where it was cut off."""
    prepare_process()
    from .push import push

    show_pushed(push(source, repo, create_pr, update, public, license, dry_run))


@app.command("serve")
def serve_command(
    model: ModelArgument,
    overrides: Overrides = None,
    host: Annotated[str, typer.Option(help="Others than loopback need a key in MANTIS_LITE_API_KEY.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    bits: Bits = None,
    template: Template = None,
    system: Annotated[str | None, typer.Option(help="Say this first, in place of the template's own words.")] = None,
    max_bytes: Annotated[int, typer.Option(min=1, help="Of a request, its pictures in base64.")] = 32 << 20,
    max_pictures: Annotated[int, typer.Option(min=0, help="Pictures and clips of a request.")] = 16,
    max_tokens: Annotated[int, typer.Option(min=1, help="The longest answer that may be asked for.")] = 1024,
    max_waiting: Annotated[int, typer.Option(min=0, help="Requests that may wait for one that is answered.")] = 8,
) -> None:
    """Answer OpenAI's chat API, pictures as data URLs; on this machine alone, or with a key."""
    prepare_process()
    from .chat_request import Limits
    from .serve import serve

    limits = Limits(body=max_bytes, pictures=max_pictures, tokens=max_tokens, waiting=max_waiting)
    serve(model, overrides or (), host, port, limits, bits, template, system, typer.echo)


@app.command("export")
def export_command(
    model: ModelArgument,
    llama_cpp: Annotated[Path, typer.Option("--llama-cpp", help="A checkout of llama.cpp, whose converter is run.")],
    overrides: Overrides = None,
    to: Annotated[
        Path | None, typer.Option(help="The folder of the GGUF files; else NAME-gguf beside what was trained.")
    ] = None,
    outtype: Annotated[
        Literal["f32", "f16", "bf16", "q8_0"], typer.Option(help="What the weights are written in.")
    ] = "f16",
    python: Annotated[
        Path | None, typer.Option(help="The python of an environment with llama.cpp's requirements; else this one.")
    ] = None,
    no_check: Annotated[bool, typer.Option("--no-check", help="Merge without comparing, in less memory.")] = False,
) -> None:
    """Write Idefics3, SmolVLM and Qwen-VL as GGUF for llama.cpp, by its own converter; an adapter is merged first."""
    prepare_process()
    from .export import export
    from .merge import LEAST

    found = export(model, to, llama_cpp, outtype, overrides or (), python, None if no_check else LEAST)
    if found.agreement:
        agreed = found.agreement
        typer.echo(f"merged: the same choice at {agreed.share:.2%} of {agreed.positions:,} positions of {agreed.rows}")
    for notice in found.notices:
        typer.echo(f"notice: {notice}")
    typer.echo(f"exported; run it by: llama-server -m {found.model} --mmproj {found.projector} --jinja")


@app.command("quickstart")
def quickstart_command(overrides: Overrides = None, from_scratch: FromScratch = False) -> None:
    """Fine-tune the built-in Tiny Mantis on odd-one-out among four pictures: minutes, on a CPU."""
    prepare_process()
    from .quickstart import quickstart
    from .training.progress import progress

    with progress("auto", typer.echo) as callbacks:
        outcome = quickstart(overrides or (), callbacks, from_scratch, typer.echo)
    typer.echo(f"\nheld-out accuracy: {outcome.before:.1%} before, {outcome.after:.1%} after")
    show_saved(outcome.adapter, outcome.following)


@app.command("doctor")
def doctor_command(
    no_test: Annotated[bool, typer.Option("--no-test", help="Only look: train nothing.")] = False,
) -> None:
    """Say what this machine has, and try on it, in seconds, that Tiny Mantis trains, resumes, merges and packs."""
    prepare_process()
    from .doctor import doctor, lines
    from .errors import CheckError

    found = doctor(not no_test)
    typer.echo("\n".join(lines(found)))
    if found.failed:
        raise typer.Exit(CheckError.exit_code)


@app.command("init")
def init_command(
    data: Annotated[str | None, typer.Argument(help="A file or folder of rows, or user/name on the hub.")] = None,
    to: Annotated[Path, typer.Option(help="The recipe's file, a new one.")] = Path("recipe.yaml"),
    task: Annotated[Literal["chat", "video", "classify", "pretrain"] | None, typer.Option(help="Else guessed.")] = None,
    gpu: Gpu = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: take what is given and guessed.")] = False,
) -> None:
    """Look at your data and write a first recipe for it and your card; says what to run next."""
    prepare_process()
    from .init import answers, draft, require_new, write

    def ask(question: str, guess: str | None) -> str:
        return str(typer.prompt(question, default=guess))

    require_new(to)
    found = draft(*answers(data, task, gpu, None if yes else ask))
    write(found.text, to)
    for notice in found.notices:
        typer.echo(notice)
    file = shlex.quote(str(to))
    typer.echo(f"wrote {to}; next: mantis-lite check {file}, then mantis-lite train {file}")


@app.command("schema")
def schema_command() -> None:
    """Print the JSON Schema of recipes, by which editors complete and check them."""
    from .recipe_schema import recipe_schema

    typer.echo(json.dumps(recipe_schema(), indent=2))


@data_app.command("download")
def download_command(
    dataset: Annotated[str, typer.Argument(help="user/name on the hub; mantis-instruct is TIGER-Lab/Mantis-Instruct.")],
    subsets: Annotated[str | None, typer.Option(help="Some of its subsets: nlvr2,iconqa. Else all.")] = None,
    to: Annotated[Path | None, typer.Option(help="The folder, which recipes find again; else the cache.")] = None,
    split: Annotated[str, typer.Option(help="The splits: train, or train,val.")] = "train",
    revision: Annotated[str | None, typer.Option(help="A branch or commit; else main as it is now.")] = None,
    max_workers: Annotated[int, typer.Option(min=1, help="Files that are fetched at once.")] = 8,
    verify: Annotated[bool, typer.Option("--verify", help="Read again what is here, every byte.")] = False,
) -> None:
    """Download a dataset of Parquet and zips of pictures, verified. Run it again to go on where it was cut off."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from .data.hub import find

    wanted = find(dataset, _words(subsets), to, _words(split) or (), revision)
    _fetch(wanted, max_workers, verify)


@data_app.command("prepare")
def prepare_data(
    recipe: RecipeArgument,
    to: Annotated[str, typer.Option(help="The folder of the shards, or its URL: s3://bucket/name.")],
    overrides: Overrides = None,
    engine: Annotated[Literal["plain", "ray"], typer.Option(help="Processes here, or Ray on any machines.")] = "plain",
    layout: Annotated[Literal["webdataset", "parquet"], typer.Option("--format", help="Of the shards.")] = "webdataset",
    shard_size: Annotated[str, typer.Option(help="About how large a shard is to be.")] = "512MB",
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; else one for each CPU.")] = None,
) -> None:
    """Write what a recipe trains on as shards, to be read from a disk or a URL. Run it again to go on."""
    from .errors import RecipeError
    from .recipe import size_of
    from .recipe_file import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    try:
        size = size_of(shard_size)
    except ValueError as error:
        raise RecipeError(f"--shard-size: {error}, found {shard_size}") from None
    prepare_process()
    from .sharding import shard

    done = shard(loaded, to, engine, layout, size, workers or cores(), _watched("writing shards"))
    show_shards(done)


@recipes_app.command("list")
def list_recipes() -> None:
    """Name every recipe and what it is."""
    from .recipe_file import DEFAULTS, recipes_dir

    names = {name: task for task, name in DEFAULTS.items()}
    for path in sorted(recipes_dir().glob("*.yaml")):
        first = path.read_text().splitlines()[0].lstrip("# ")
        also = f" (also: {names[path.stem]})" if path.stem in names else ""
        typer.echo(f"{path.stem}{also}\n    {first}")


@recipes_app.command("show")
def show_recipe(recipe: RecipeArgument) -> None:
    """Print a recipe's file."""
    from .recipe_file import find_recipe

    typer.echo(find_recipe(recipe).read_text(), nl=False)


@recipes_app.command("copy")
def copy_recipe(
    recipe: RecipeArgument, to: Annotated[Path | None, typer.Argument(help="A file or folder.")] = None
) -> None:
    """Copy a recipe's file here, to change it."""
    from .errors import RecipeError
    from .recipe_file import find_recipe

    source = find_recipe(recipe)
    target = (to or Path()) / source.name if to is None or to.is_dir() else to
    if target.exists():
        raise RecipeError(f"{target}: exists already\n  Name another file.")
    target.write_text(source.read_text())
    typer.echo(f"{target}")


def main() -> None:
    """Run the command line; a user's mistake ends in one message and its own exit code."""
    from .errors import MantisError, Stopped
    from .secrets import refuse_secrets

    try:
        for at, word in enumerate(sys.argv):
            refuse_secrets(word, f"word {at} of the command line")
        app()
    except (MantisError, Stopped) as error:
        if _is_mine_to_say(error):
            typer.echo(printable(f"{type(error).__name__}: {error}"), err=True)
        sys.exit(error.exit_code)
    except SystemExit as ended:
        if "mantis_lite.report.check" in sys.modules and isinstance(ended.code, int):  # it has closed what it opened
            leave(ended.code)
        raise


def _is_mine_to_say(error: Exception) -> bool:
    """Of a run's processes the first says what all have come to, another what it may have come to alone."""
    from .errors import DataError, OutOfMemory

    return os.environ.get("RANK", "0") == "0" or isinstance(error, DataError | OutOfMemory)


def _watched(does: str) -> Callable[[Iterable[Any], int], Iterable[Any]]:
    """Shows at a terminal how much is done of what is handed on."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal or os.environ.get("RANK", "0") != "0"
    return lambda found, total: track(found, does, total, console=console, transient=True, disable=hidden)


def _words(text: str | None) -> list[str] | None:
    """a,b -> both."""
    return None if text is None else [word for word in text.split(",") if word]


def _offer_download(recipe: Recipe) -> None:
    """Ask whether to download what a recipe names and is not here; only of someone at a terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return
    from .data.mixture import sources_of_all
    from .data.subsets import absent_of

    absent = absent_of(sources_of_all(recipe.data, recipe.task, recipe.media, recipe.packing))
    if not absent:
        return
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from .data.hub import find

    for each in absent:
        wanted = find(each.repo, each.subsets or None, each.folder, each.splits)
        size, names = f"{wanted.size / 1e9:,.1f} GB", ", ".join(wanted.subsets)
        if typer.confirm(f"{each.repo} is not here: download {names}, {size}, to {each.folder}?"):
            _fetch(wanted)


def _fetch(wanted: Wanted, max_workers: int = 8, verify: bool = False) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    from .data.hub import fetch
    from .data.repository import place_of

    for notice in wanted.notices:
        typer.echo(f"notice: {notice}")
    for subset in wanted.subsets:
        typer.echo(f"{wanted.size_of(subset) / 1e9:>10,.3f} GB  {subset}")
    held = wanted.repository
    typer.echo(f"{held.repo} at {held.revision} -> {held.folder}")
    console = Console(stderr=True)
    columns = BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=wanted.size)
        came = fetch(wanted, max_workers, verify, lambda done: bar.advance(task, done))
    typer.echo(f"{len(wanted.names):,} files are here and verified, {len(came):,} of them came now")
    remembered = place_of(held.repo).resolve() == held.folder.resolve()
    typer.echo(f"recipes read it with data={held.repo if remembered else held.folder}")


def _weighed(word: str) -> tuple[str, float]:
    """FOLDER=0.5 -> both. Raises RecipeError."""
    from .errors import RecipeError

    folder, _, number = word.rpartition("=")
    try:
        return folder, float(number)
    except ValueError:
        raise RecipeError(
            f"--with: {word}\n  Write an adapter's folder and its weight: runs/other/adapter=0.5."
        ) from None


def _typed_lines(repl: Repl) -> Iterator[str]:
    """What is typed, line by line, to the end of the input; Ctrl-C forgets a line."""
    if isinstance(sys.stdin, TextIOWrapper):  # what is no UTF-8 comes to halves of characters, which a turn refuses
        sys.stdin.reconfigure(errors="surrogateescape")
    tty = sys.stdin.isatty()
    while True:
        try:
            yield input(repl.prompt if tty else "")
        except KeyboardInterrupt:
            typer.echo()
        except EOFError:
            return
