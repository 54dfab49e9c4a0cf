"""A run, an adapter or a merged model -> a repository on the hub: whole or not at all, and nothing of this machine."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo

from .card import CARD, License, card, is_on_hub, recipe_yaml, stated_license
from .contract import NAME, Contract, read_contract
from .data.hub import is_name
from .data.jinja import chat_template
from .errors import MantisError, RecipeError, one_line
from .models.adapter_config import check_tensors, read_settings
from .models.upstream import CONFIG, WEIGHTS
from .models.weights import INDEX, open_tensors, weight_files
from .plain_clients import TEMPLATE
from .secrets import refuse_secrets
from .trained import RECIPE, Trained, is_run, open_trained
from .training.checkpoints import MANIFEST, fault
from .training.run_files import CURVE, METRICS

MADE = (CARD, TEMPLATE, RECIPE)
"""What is written for the push; a file of the folder's own that is called so stays here."""

BESIDE = (
    *(NAME, "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model"),
)
"""Small files that lie beside weights."""
SHARDS = "model*.safetensors"
ALLOWED = (*MADE, *BESIDE, METRICS, CURVE, CONFIG, WEIGHTS, SHARDS, INDEX)
"""Whatever else is in a folder stays here, and whatever else is in a repository stays there."""

Content = Path | bytes


@dataclass(frozen=True)
class Pushed:
    """What was pushed, or would be; `commit` is the address of the commit or pull request, None of a dry run."""

    url: str
    files: dict[str, int]
    """Sizes in bytes, by name."""
    commit: str | None
    notices: list[str]


def push(
    source: str | Path,
    repo: str,
    create_pr: bool = False,
    update: bool = False,
    public: bool = False,
    license: str | None = None,
    dry_run: bool = False,
) -> Pushed:
    """Put a run, an adapter's folder or a merged model's on the hub as `repo`, in one commit; private unless `public`.

    A repository that holds another run is only written to with `update`, or asked to with `create_pr`. `license` is
    what it is given under, by default what its base says. Log in with `hf auth login`, or set HF_TOKEN. Raises
    RecipeError where something would be pushed that should not be, MantisError where the hub does not answer.
    """
    _refuse_names(source, repo, create_pr and update)
    trained = open_trained(source)
    if trained.contract is None:
        raise RecipeError(
            f"{source}: has no {NAME}, so nothing says how it was trained\n  Push a run, or what one has trained."
        )
    own, base = License(license) if license else None, _license_of_base(trained)
    files, left = _files(trained)
    files[CARD] = card(trained.contract, repo, own or base, base, CURVE in files).encode()
    _refuse_private(files, _paths_of(trained))
    notices = _notices(left, own, base)
    sizes = {name: len(c) if isinstance(c, bytes) else c.stat().st_size for name, c in sorted(files.items())}
    api = HfApi()
    found = Pushed(f"{api.endpoint}/{repo}", sizes, None, notices)
    if dry_run:
        return found
    with _explained(repo):
        head = _head(api, repo)
        if head is None and create_pr:
            raise RecipeError(f"{repo}: is not on the hub, so there is nothing to ask\n  Leave --create-pr out.")
        if head is None:
            api.create_repo(repo, private=not public)
            head = api.model_info(repo)
        elif head.private and public:
            notices.append(f"{repo} is private and stays so: its settings change that")
        if not (create_pr or update):
            _refuse_others(api, head, trained.contract)
        if not (head.private or public):
            raise RecipeError(f"{repo}: is there already, for all to see\n  Add --public, or name another.")
        done = _commit(api, head, files, trained.contract, create_pr)
    return replace(found, commit=done.pr_url or done.commit_url)


def _refuse_names(source: str | Path, repo: str, both: bool) -> None:
    if not is_name(repo):
        raise RecipeError(f"{repo}: is no name on the hub\n  Write user/name.")
    if both:
        raise RecipeError("--create-pr, --update: one asks, the other does not\n  Keep one of them.")
    if not Path(source).is_dir():
        raise RecipeError(f"{source}: no such folder\n  Name a run, an adapter's folder or a merged model's.")


def _files(trained: Trained) -> tuple[dict[str, Content], list[str]]:
    """What is pushed by name, but for the card, and the names of what stays here. Raises RecipeError."""
    contract, folder = trained.contract, trained.folder
    assert contract is not None
    if (folder / MANIFEST).exists() and (found := fault(folder)):
        raise RecipeError(f"{folder}: {found}\n  Train it again, or copy it again from where it was trained.")
    if trained.adapter:
        settings = read_settings(folder / CONFIG)
        _refuse_path(folder / CONFIG, settings.get("base_model_name_or_path"))
        check_tensors(folder / WEIGHTS, settings)
        weights = [CONFIG, WEIGHTS]
    else:
        weights = [file.name for file in weight_files(trained.checkpoint)]
        weights += [INDEX] if (folder / INDEX).exists() else []
    there = {path.name: path for path in folder.iterdir()}
    files: dict[str, Content] = {name: there[name] for name in (*BESIDE, *weights) if name in there}
    left = sorted(there.keys() - files.keys() - {*MADE, MANIFEST})
    if is_run(folder.parent):
        files |= {name: folder.parent / name for name in (METRICS, CURVE) if (folder.parent / name).is_file()}
    for name, path in files.items():
        assert isinstance(path, Path)
        if not any(fnmatch(name, pattern) for pattern in ALLOWED) or not path.is_file():
            raise RecipeError(f"{path}: is not pushed under this name\n  Weights are {SHARDS}, each a plain file.")
        if not path.resolve().is_relative_to(path.parent.resolve()):
            raise RecipeError(f"{path}: is a link out of the folder\n  Put the file itself there.")
    files[RECIPE] = recipe_yaml(contract).encode()
    if contract.task != "classify":
        encoder = trained.encoder
        files[TEMPLATE] = chat_template(encoder.template, encoder.vision, encoder.system).encode()
    return files, left


def _refuse_path(file: Path, base: str | None) -> None:
    """An adapter names its base as others know it: user/name, or one name without a slash."""
    if base and not is_on_hub(base) and not re.fullmatch(r"\w[\w.-]*", base):
        raise RecipeError(
            f"{file}: base_model_name_or_path is a path of this machine\n"
            "  Put the base's name on the hub there, or the last name of its folder."
        )


def _paths_of(trained: Trained) -> set[str]:
    """What would tell of this machine: the home folder, where it lies, and every path of the recipe it was made by."""
    folder = trained.folder.resolve()
    settings = _texts(trained.recipe.model_dump(mode="json", include={"model", "data"}))
    run = [folder.parent] if is_run(folder.parent) else []
    known = [folder, *run, *(Path(text) for _, text in settings)]
    long = {str(path).rstrip("/") for path in known if path.is_absolute() and len(path.parts) > 2}
    home = str(Path.home()).rstrip("/")
    return long | ({f"{home}/"} if home else set())  # /root alone is a word of many vocabularies


def _refuse_private(files: Mapping[str, Content], paths: Iterable[str]) -> None:
    """Raise RecipeError for a token, or a path of this machine, in what is pushed; of weights, what is said of them."""
    for name, content in files.items():
        where = name if isinstance(content, bytes) else str(content)
        if name.endswith(".safetensors"):
            assert isinstance(content, Path)
            with open_tensors(content) as opened:
                text = json.dumps(opened.metadata() or {})
        else:
            text = (content if isinstance(content, bytes) else content.read_bytes()).decode(errors="replace")
        for path in paths:
            if path in text:
                raise RecipeError(
                    f"{where}: holds a path of this machine, {path}\n  Take it out, or push the run anew."
                )
        for key, value in _said(name, text):
            refuse_secrets({key: value} if key == "revision" else value, where)  # a commit looks like a secret


def _said(name: str, text: str) -> Iterator[tuple[str, str]]:
    """The texts of a file, each with its key: those of JSON, whose own marks would make a secret of a vocabulary."""
    if name.endswith((".png", ".model")):
        return
    if not name.endswith((".json", ".safetensors")):
        yield from (("", line) for line in text.splitlines())
        return
    try:
        yield from _texts(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise RecipeError(f"{name}: is no JSON: {one_line(error)}\n  Copy it again from where it was saved.") from None


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in mappings and lists, with the key that it is at; keys are texts too."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield "", str(name)
            yield from _texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)
    elif isinstance(value, str):
        yield key, value


def _license_of_base(trained: Trained) -> License | None:
    """What the base's own card states; None where it has none, says nothing, or cannot be read from here."""
    assert trained.contract is not None
    base = trained.contract.base
    beside = trained.checkpoint.folder / CARD
    try:
        if trained.adapter and beside.is_file():
            return stated_license(beside.read_text())
        if is_on_hub(base.name):
            found = HfApi().hf_hub_download(base.name, CARD, revision=base.revision)
            return stated_license(Path(found).read_text())
    except (OSError, UnicodeDecodeError, EntryNotFoundError, HTTPError):
        return None
    return None


def _notices(left: list[str], license: License | None, base: License | None) -> list[str]:
    notices = [f"stays here: {', '.join(left)}"] if left else []
    if license is None and base is None:
        notices.append("no license is stated: the base's card has none that could be read; --license=apache-2.0 would")
    elif license and base and license.word != base.word:
        notices.append(f"--license={license.word}, and the base is under {base}, whose terms go on to hold")
    return notices


def _head(api: HfApi, repo: str) -> ModelInfo | None:
    """What a repository holds now, if it is there."""
    try:
        return api.model_info(repo)
    except RepositoryNotFoundError:
        return None


def _names(head: ModelInfo) -> list[str]:
    return [file.rfilename for file in head.siblings or () if file.rfilename != ".gitattributes"]


def _refuse_others(api: HfApi, head: ModelInfo, contract: Contract) -> None:
    """Raise RecipeError where a repository holds something that this run did not make."""
    names, there = _names(head), None
    if not names:
        return
    if NAME in names:
        file = api.hf_hub_download(head.id, NAME, revision=head.sha)
        try:
            there = read_contract(Path(file).parent)
        except RecipeError:  # of another version, or none of ours
            there = None
    if there is None or there.made != contract.made:
        holds = f"the {there.kind} of run {there.run}" if there else f"{len(names)} files that no run of yours made"
        raise RecipeError(
            f"{head.id}: is there already, with {holds}\n"
            "  Name another, add --create-pr to propose this one there, or --update to put it in its place."
        )


def _commit(
    api: HfApi, head: ModelInfo, files: Mapping[str, Content], contract: Contract, create_pr: bool
) -> CommitInfo:
    """All files in one commit on the head that was looked at, and what they take the place of is gone with it.

    Large files come first, and those that came before a push was cut off are not sent again.
    """
    stale = [n for n in _names(head) if n not in files and any(fnmatch(n, pattern) for pattern in ALLOWED)]
    added = [CommitOperationAdd(n, c if isinstance(c, bytes) else str(c)) for n, c in sorted(files.items())]
    return api.create_commit(
        head.id,
        [*added, *(CommitOperationDelete(name) for name in stale)],
        commit_message=f"The {contract.kind} of run {contract.run}",
        parent_commit=head.sha,
        create_pr=create_pr,
    )


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """What the hub refuses, in words that say what to do."""
    again = "Run the same command again: what has come is not sent again."
    try:
        yield
    except MantisError:
        raise
    except HfHubHTTPError as error:
        raise _refused(repo, error, again) from None
    except (HTTPError, OSError) as error:
        raise MantisError(f"{repo}: the hub cannot be reached: {one_line(error)}\n  {again}") from None
    except ValueError as error:  # a card that the hub calls invalid, or files that it gives no place to
        remedy = "Mend that, and run the same command again: what has come is not sent again."
        raise RecipeError(f"{repo}: the hub does not take it: {one_line(error)}\n  {remedy}") from None
    except RuntimeError as error:  # of an upload, of which the client's own words say only that
        if isinstance(error.__cause__, HfHubHTTPError):
            raise _refused(repo, error.__cause__, again) from None
        found = one_line(Exception(error.__cause__ or error))
        raise MantisError(f"{repo}: a file could not be sent: {found}\n  {again}") from None


def _refused(repo: str, error: HfHubHTTPError, again: str) -> MantisError:
    status = error.response.status_code
    words = one_line(Exception(error.server_message or "")) or error.response.reason_phrase
    if status in (401, 403, 404):
        remedy = "Log in with `hf auth login` and a token that may write there, or name a repository of your own."
        return RecipeError(f"{repo}: the hub does not let you write there ({status}: {words})\n  {remedy}")
    if status == 412:
        return RecipeError(f"{repo}: has changed since it was looked at, and nothing was pushed\n  {again}")
    if status in (402, 413):
        remedy = "Free some room on the hub, or see https://huggingface.co/settings/billing."
        return RecipeError(f"{repo}: the hub has no room for it ({status}: {words})\n  {remedy}")
    return MantisError(f"{repo}: the hub answers {status}: {words}\n  {again}")
