"""What was trained goes to the hub whole or not at all, over nobody's else, and with nothing of this machine in it."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from select import select

import pytest
from fake_hub import COMMIT, FakeHub
from helpers import chat, picture, train, write_rows
from huggingface_hub import HfApi
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mantis_lite.chat import MantisChat
from mantis_lite.contract import read_contract
from mantis_lite.errors import MantisError, RecipeError
from mantis_lite.push import push
from mantis_lite.recipe_file import make_recipe

TOKEN, USER = "hf_" + "PushesToLoopback" * 2, "quetzalcoatl"
ROOT = Path(__file__).parents[1]
FILES = {
    *("README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "loss.png"),
    *("mantis_lite.json", "metrics.jsonl", "recipe.yaml"),
}


def settings(folder: Path, base: str | Path, **more) -> dict:
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,)) for i in range(6)]
    steps = {"max_steps": 2, "learning_rate": 3e-3, "samples_per_step": 3, "save_strategy": "no", "logging_steps": 1}
    data, run = write_rows(folder / "rows.jsonl", rows), str(folder / "run")
    return {"model": str(base), "data": data, "run_dir": run, "method": "lora", "train": steps} | more


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's home, named as the user is."""
    return tmp_path_factory.mktemp("homes") / USER


@pytest.fixture(scope="module")
def base(home, llava_folder):
    folder = shutil.copytree(llava_folder, home / "models/base")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\nlicense_link: https://x.org\n---\n")
    return folder


@pytest.fixture(scope="module")
def trained(home, base):
    """A run of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANTIS_LITE_CACHE", str(home / "cache"))
        train(make_recipe(settings(home, base)))
    return home / "run"


@pytest.fixture
def run(trained, tmp_path):
    """A copy to break."""
    return shutil.copytree(trained, tmp_path / "copied/run")


@pytest.fixture
def merged(run, base, tmp_path):
    """A merged model in several files, but for the merging."""
    folder = shutil.copytree(base, tmp_path / "merged")
    (folder / "model.safetensors").unlink()
    (folder / "README.md").unlink()
    weights, places = sorted(load_file(base / "model.safetensors").items()), {}
    for at in range(6):
        name = f"model-{at + 1:05}-of-00006.safetensors"
        save_file(dict(weights[at::6]), folder / name, {"format": "pt"})
        places |= {key: name for key, _ in weights[at::6]}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    read_contract(run / "adapter").model_copy(update={"kind": "merged"}).write(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that this process takes for the real one, and the user's token."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with FakeHub(tmp_path / "hub") as hub:
        monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
        monkeypatch.setattr(
            f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        )
        yield hub


def on(hub, repo: str = "ann/adapter") -> dict[str, bytes]:
    """The files of a repository, or none; while no commit is being written."""
    folder = hub.folder / "models" / repo
    with hub.lock:
        return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def puts(hub) -> int:
    return sum(request.startswith("PUT ") for request in hub.requests)


def commits(hub, repo: str = "ann/adapter") -> int:
    return len(hub.history(hub.folder / "models" / repo)) - 1


def refused(call, *words: str, kind: type = RecipeError) -> str:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n  " in message and not [word for word in words if word not in message], message
    return message


def test_a_run_is_pushed_in_one_commit_and_private(hub, trained):
    found = push(trained, "ann/adapter")
    there = on(hub)
    assert there.keys() == found.files.keys() == FILES
    assert {name: len(content) for name, content in there.items()} == found.files
    assert hub.private == {"ann/adapter": True} and hub.tokens == {TOKEN}
    assert (commits(hub), puts(hub)) == (1, 2)  # the weights and the curve
    assert found.url == f"{hub.url}/ann/adapter" and found.commit.startswith(f"{hub.url}/ann/adapter/commit/")
    assert found.notices == []
    for name in ("adapter_config.json", "adapter_model.safetensors", "mantis_lite.json"):
        assert there[name] == (trained / "adapter" / name).read_bytes()
    for name in ("metrics.jsonl", "loss.png"):
        assert there[name] == (trained / name).read_bytes()
    # PEFT's own card is not the one.
    assert b"More Information Needed" not in there["README.md"]
    assert b"license: other\nlicense_name: llama3" in there["README.md"]


def test_nothing_of_the_machine_is_sent(hub, trained, home, monkeypatch):
    monkeypatch.setenv("HOME", str(home))
    push(trained, "ann/adapter")
    sent = b"\n".join(hub.received)
    assert len(hub.received) > 6 and b"base" in sent
    for secret in (TOKEN, USER, str(home), str(ROOT)):
        assert secret.encode() not in sent
    recipe = on(hub)["recipe.yaml"].decode()
    assert "name: base\n" in recipe and "path: rows.jsonl\n" in recipe and "run_dir" not in recipe
    assert json.loads(on(hub)["adapter_config.json"])["base_model_name_or_path"] == "base"
    assert b"base_model:" not in on(hub)["README.md"]


def test_a_dry_run_sends_nothing(hub, trained):
    found = push(trained, "ann/adapter", dry_run=True)
    assert found.files.keys() == FILES and found.commit is None and hub.requests == []


def test_the_adapters_own_folder_is_the_run(hub, trained):
    assert push(trained / "adapter", "ann/adapter", dry_run=True) == push(trained, "ann/adapter", dry_run=True)


def test_what_was_pushed_is_not_sent_again(hub, trained):
    push(trained, "ann/adapter")
    before = puts(hub)
    push(trained, "ann/adapter")
    assert (commits(hub), puts(hub)) == (1, before)


def test_public_where_asked(hub, trained):
    push(trained, "ann/adapter", public=True)
    assert hub.private == {"ann/adapter": False}
    refused(lambda: push(trained, "ann/adapter"), "is there already, for all to see", "--public")
    assert push(trained, "ann/adapter", public=True).notices == []


def test_a_merged_model_in_shards(hub, merged):
    (merged / "optimizer.pt").write_bytes(b"1")
    (merged / "model-old.safetensors").write_bytes(b"1")
    found = push(merged, "ann/merged", license="mit")
    there = on(hub, "ann/merged")
    shards = {f"model-{at + 1:05}-of-00006.safetensors" for at in range(6)}
    made = {"README.md", "chat_template.jinja", "recipe.yaml"}
    assert there.keys() == {f.name for f in merged.iterdir()} - {"optimizer.pt", "model-old.safetensors"} | made
    assert shards <= there.keys() and puts(hub) == 6
    assert all(there[name] == (merged / name).read_bytes() for name in there.keys() - made)
    assert b"license: mit" in there["README.md"]
    assert found.notices == ["stays here: model-old.safetensors, optimizer.pt"]


# What is there already.


def test_another_runs_repository_is_left_alone(hub, run):
    push(run, "ann/adapter")
    before, contract = on(hub), read_contract(run / "adapter")
    (run / "adapter/manifest.json").unlink()
    contract.model_copy(update={"run": "0" * 16}).write(run / "adapter")
    refused(lambda: push(run, "ann/adapter"), f"the adapter of run {contract.run}", "--create-pr", "--update")
    assert on(hub) == before and commits(hub) == 1
    asked = push(run, "ann/adapter", create_pr=True)
    assert asked.commit == f"{hub.url}/ann/adapter/discussions/1" and on(hub) == before
    proposed = hub.folder / "pulls/models/ann/adapter/1"
    assert b'"run": "0000000000000000"' in (proposed / "mantis_lite.json").read_bytes()
    push(run, "ann/adapter", update=True)
    assert b'"run": "0000000000000000"' in on(hub)["mantis_lite.json"]


@pytest.mark.parametrize("there", [{"notes.txt": "mine"}, {"mantis_lite.json": "{}"}, {"mantis_lite.json": "["}])
def test_what_no_run_made_is_left_alone(hub, trained, there):
    api = HfApi()
    api.create_repo("ann/adapter")
    for name, text in there.items():
        api.upload_file(path_or_fileobj=text.encode(), path_in_repo=name, repo_id="ann/adapter")
    refused(lambda: push(trained, "ann/adapter"), "is there already", "--create-pr", "--update")
    assert on(hub) == {name: text.encode() for name, text in there.items()}


def test_an_empty_repository_is_filled(hub, trained):
    api = HfApi()
    api.create_repo("ann/adapter", private=True)
    api.upload_file(path_or_fileobj=b"*", path_in_repo=".gitattributes", repo_id="ann/adapter")
    push(trained, "ann/adapter")
    assert on(hub).keys() == FILES | {".gitattributes"}


def test_an_update_takes_stale_files_away_and_leaves_others(hub, trained, merged):
    push(merged, "ann/mine", license="mit")
    HfApi().upload_file(path_or_fileobj=b"x", path_in_repo="notes.txt", repo_id="ann/mine")
    refused(lambda: push(trained, "ann/mine"), "the merged of run")
    push(trained, "ann/mine", update=True)
    assert on(hub, "ann/mine").keys() == FILES | {"notes.txt"} and commits(hub, "ann/mine") == 3


def test_a_commit_in_between_is_not_overwritten(hub, trained, monkeypatch):
    def meanwhile(api, *_):
        api.upload_file(path_or_fileobj=b"x", path_in_repo="theirs.txt", repo_id="ann/adapter")

    monkeypatch.setattr("mantis_lite.push._refuse_others", meanwhile)
    refused(lambda: push(trained, "ann/adapter"), "has changed since it was looked at")
    assert on(hub).keys() == {"theirs.txt"}


# What is not pushed.


def test_names(hub, trained, llava_folder):
    for repo in ("adapter", "ann/adapter/x", "../ann", "ann/a b", "/home/ann"):
        refused(lambda repo=repo: push(trained, repo), repo, "user/name")
    refused(lambda: push("ann/elsewhere", "ann/adapter"), "no such folder")
    refused(lambda: push(trained, "ann/adapter", create_pr=True, update=True), "Keep one of them")
    refused(lambda: push(trained, "ann/adapter", create_pr=True), "is not on the hub", "--create-pr")
    refused(lambda: push(llava_folder, "ann/base"), "has no mantis_lite.json", "Push a run")
    assert hub.folder.joinpath("models").exists() is False


def test_a_damaged_adapter(run):
    file = run / "adapter/adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    refused(lambda: push(run, "ann/adapter"), "adapter_model.safetensors is not as it was written")


def unsealed(run: Path) -> Path:
    (run / "adapter/manifest.json").unlink()
    return run / "adapter"


def changed(file: Path, **more) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def test_a_path_as_base(run):
    changed(unsealed(run) / "adapter_config.json", base_model_name_or_path="../models/base")
    message = refused(lambda: push(run, "ann/adapter"), "base_model_name_or_path is a path")
    assert "../models" not in message


def test_a_method_that_is_not_read(run):
    changed(unsealed(run) / "adapter_config.json", peft_type="VERA")
    refused(lambda: push(run, "ann/adapter"), "peft_type is VERA")


def test_tensors_that_do_not_fit(run):
    file = unsealed(run) / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors.pop(next(iter(tensors)))
    save_file(tensors, file)
    refused(lambda: push(run, "ann/adapter"), "has one half of a LoRA")


def test_a_link_out_of_the_folder(run, tmp_path):
    file = unsealed(run) / "adapter_model.safetensors"
    file.rename(tmp_path / "elsewhere.safetensors")
    file.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(lambda: push(run, "ann/adapter"), "adapter_model.safetensors: is a link out of the folder")


def test_weights_of_another_name(merged):
    index = merged / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "secrets-00001"))
    (merged / "model-00001-of-00006.safetensors").rename(merged / "secrets-00001-of-00006.safetensors")
    refused(lambda: push(merged, "ann/merged"), "secrets-00001-of-00006.safetensors: is not pushed under this name")


@pytest.mark.parametrize("secret", [TOKEN, "https://ann:hunter2@example.com", "fedcba9876543210" * 2 + "fedcba98"])
def test_a_token_in_a_file(run, secret):
    contract = read_contract(unsealed(run))
    prompt = contract.recipe["train"] | {"run_name": secret}
    contract.model_copy(update={"recipe": contract.recipe | {"train": prompt}}).write(run / "adapter")
    message = refused(lambda: push(run, "ann/adapter"), "mantis_lite.json: a token or password does not belong here")
    assert secret not in message


def test_a_token_in_what_is_said_of_weights(run):
    file = unsealed(run) / "adapter_model.safetensors"
    save_file(load_file(file), file, {"by": TOKEN})
    with safe_open(file, framework="pt") as opened:
        assert opened.metadata() == {"by": TOKEN}
    refused(lambda: push(run, "ann/adapter"), "adapter_model.safetensors: a token or password does not belong here")


def test_a_commit_is_no_token(hub, run):
    contract = read_contract(unsealed(run))
    contract.model_copy(update={"base": contract.base.model_copy(update={"revision": COMMIT})}).write(run / "adapter")
    assert push(run, "ann/adapter", dry_run=True).files


@pytest.mark.parametrize("where", ["home", "run", "base"])
def test_a_path_in_a_file(run, home, base, where, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    path = {"home": "/home/ann/notes", "run": str(run.resolve() / "x"), "base": str(base)}[where]
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1, "note": path}) + "\n")
    refused(lambda: push(run, "ann/adapter"), "metrics.jsonl: holds a path of this machine")


def test_a_word_that_ends_in_the_homes_name_is_no_path(run, monkeypatch):
    monkeypatch.setenv("HOME", "/root")
    (run / "metrics.jsonl").write_text('{"step": 1, "note": "x/root"}\n')
    assert push(run, "ann/adapter", dry_run=True)


def test_json_that_is_none(merged):
    (merged / "special_tokens_map.json").write_text("[" * 100_000)
    refused(lambda: push(merged, "ann/merged"), "special_tokens_map.json: is no JSON")


# Licenses are never guessed.


def test_no_license_is_said(trained, base, monkeypatch):
    readme = base / "README.md"
    text = readme.read_text()
    try:
        readme.write_text("---\nlicense: [\n---\n# no YAML")
        (notice,) = push(trained, "ann/adapter", dry_run=True).notices
        assert "no license is stated" in notice and "--license" in notice
        assert push(trained, "ann/adapter", dry_run=True, license="mit").notices == []
    finally:
        readme.write_text(text)


def test_a_license_beside_the_bases(trained):
    (notice,) = push(trained, "ann/adapter", dry_run=True, license="mit").notices
    assert notice.startswith("--license=mit, and the base is under [llama3](https://x.org)")


# What the hub answers.


def test_without_a_token(hub, trained, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr("huggingface_hub.constants.HF_STORED_TOKENS_PATH", "/nowhere")
    refused(lambda: push(trained, "ann/adapter"), "ann/adapter: the hub does not let you write", "hf auth login")


@pytest.mark.parametrize(
    ("part", "status", "kind", "words"),
    [
        ("/api/models/ann/adapter", 403, RecipeError, ["does not let you write there (403", "hf auth login"]),
        ("/commit/", 404, RecipeError, ["does not let you write there (404"]),
        ("/commit/", 413, RecipeError, ["has no room for it (413: It fails with 413)"]),
        ("/commit/", 418, MantisError, ["answers 418: It fails with 418", "Run the same command again"]),
        ("/lfs/", 403, RecipeError, ["does not let you write there (403"]),
    ],
)
def test_what_the_hub_refuses(hub, trained, part, status, kind, words):
    hub.failing[part] = status
    refused(lambda: push(trained, "ann/adapter"), *words, kind=kind)
    assert on(hub) == {}
    hub.failing.clear()
    push(trained, "ann/adapter")
    assert on(hub).keys() == FILES


def test_a_hub_that_is_not_there(trained, monkeypatch):
    refused(lambda: push(trained, "ann/adapter"), "the hub cannot be reached", kind=MantisError)  # HF_HUB_OFFLINE
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused(lambda: push(trained, "ann/adapter"), "the hub cannot be reached", "again", kind=MantisError)


def test_an_upload_that_breaks_off(hub, trained, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("Error while uploading") from OSError("reset by peer")

    monkeypatch.setattr(HfApi, "create_commit", broken)
    refused(lambda: push(trained, "ann/adapter"), "a file could not be sent: reset by peer", "again", kind=MantisError)


def test_a_card_that_the_hub_calls_invalid(hub, trained, monkeypatch):
    def invalid(*_, **__):
        raise ValueError("Invalid metadata in README.md.\n- license must be one of")

    monkeypatch.setattr(HfApi, "_validate_yaml", invalid)
    found = "the hub does not take it: Invalid metadata in README.md. - license must be one of"
    refused(lambda: push(trained, "ann/adapter", license="mine"), found)


# Killed, whenever that is.

PUSHES = f"""
import os, signal, sys, time; sys.path.insert(0, {str(ROOT)!r})
from mantis_lite.push import push
import torch
torch.set_num_threads(1)
print("ready", flush=True)
for line in sys.stdin:
    source, repo, end = line.split()
    child, done = os.fork(), 0
    if not child:
        push(source, repo, license="mit")
        os._exit(0)
    while not done and not os.path.exists(end):
        time.sleep(0.002)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
"""Each push in a process of its own, which begins with everything imported and is killed when a file is there."""


def environment(hub, folder: Path) -> dict[str, str]:
    """Of a process elsewhere, where the hub is all that there is."""
    kept = {key: os.environ[key] for key in ("PATH", "OMP_NUM_THREADS") if key in os.environ}
    own = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return kept | own | {"HOME": str(folder), "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}


class Pusher:
    """A process that pushes, one push after another, and says how each ended."""

    def __init__(self, hub, folder: Path) -> None:
        words = [sys.executable, "-c", PUSHES]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
        self.process = subprocess.Popen(words, env=environment(hub, folder), **pipes)
        self.hub, self.end = hub, folder / "end"
        assert self.process.stdout.readline() == "ready\n"

    def push(self, source: Path, repo: str, until: int | None = None, more: float = 0) -> int:
        """How it ended: 0, or -9 where it was killed some seconds after so many requests."""
        self.end.unlink(missing_ok=True)
        self.process.stdin.write(f"{source} {repo} {self.end}\n")
        self.process.stdin.flush()
        if until is not None:
            begun = len(self.hub.requests)
            while len(self.hub.requests) < begun + until and not select([self.process.stdout], [], [], 0.002)[0]:
                pass
            time.sleep(more)
            self.end.touch()
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_killed_twenty_times(hub, trained, merged, tmp_path, kind):
    """At each of its requests: a repository is absent, empty or complete, and the same command finishes it."""
    source = {"adapter": trained, "merged": merged}[kind]
    hub.delay = 0.1
    pusher = Pusher(hub, tmp_path)
    assert pusher.push(source, "ann/whole") == 0
    requests, whole = len(hub.requests), on(hub, "ann/whole")
    ends = {"cut": 0, "resumed": 0, "whole": 0}
    for number in range(20):
        shutil.rmtree(hub.folder / "lfs")  # a hub that has none of it yet
        repo, more = f"ann/mine-{number}", hub.delay * (number % 4) / 3  # while it waits, and once it is answered
        killed = pusher.push(source, repo, 1 + number * requests // 20, more) == -9
        time.sleep(2 * hub.delay)  # what had come whole is done
        state, came = on(hub, repo), {path.name for path in (hub.folder / "lfs").glob("*")}
        assert state.keys() in (set(), whole.keys()), (number, sorted(state))
        ends["whole" if state else "resumed" if came else "cut"] += killed
        before = len(hub.requests)
        assert pusher.push(source, repo) == 0
        sent = {r.rpartition("/")[2] for r in hub.requests[before:] if r.startswith("PUT ")}
        assert not sent & came
        renamed = {name: data.replace(repo.encode(), b"ann/whole") for name, data in on(hub, repo).items()}
        renamed["README.md"] = renamed["README.md"].replace(f"# mine-{number}".encode(), b"# whole")
        assert renamed == whole
    pusher.close()
    assert sum(ends.values()) >= 18 and ends["cut"] >= 5 and ends["resumed"] >= 2, ends


# From training to a chat elsewhere.

TRAIN_AND_PUSH = """
import json, sys
import mantis_lite
from mantis_lite.push import push
for name, settings in json.loads(sys.argv[1]).items():
    mantis_lite.train(mantis_lite.recipe_file.make_recipe(settings))
    push(settings["run_dir"], name)
"""
ASK = """
import json, sys
from mantis_lite.chat import MantisChat
found = {}
for name, overrides in json.loads(sys.argv[1]).items():
    chat = MantisChat(name, overrides=overrides)
    found[name] = [chat("what is number 3?", images=["first.png"], max_new_tokens=12)]
    found[name].append(chat("and now?", max_new_tokens=12))
print(json.dumps(found))
"""


def in_process(code: str, words: object, hub, folder: Path) -> str:
    folder.mkdir(exist_ok=True)
    where = {"cwd": folder, "env": environment(hub, folder)}
    done = subprocess.run([sys.executable, "-c", code, json.dumps(words)], capture_output=True, text=True, **where)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_trained_pushed_and_pulled_elsewhere_it_says_the_same(tmp_path, base):
    """On a base of a folder, which who pulls has elsewhere; and on one of the hub, where nothing else is needed."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "first.png").write_bytes(picture(3))
    with FakeHub(tmp_path / "hub") as hub:
        shutil.copytree(base, hub.folder / "models/ann/base")
        own = shutil.copytree(base, there / "my-copy")
        steps = {"max_steps": 20, "learning_rate": 1e-2, "samples_per_step": 6, "save_strategy": "no"}
        runs = {
            name: settings(here, model, run_dir=str(here / name.rpartition("/")[2]), train=steps)
            for name, model in {"ann/local": base, "ann/named": "ann/base"}.items()
        }
        in_process(TRAIN_AND_PUSH, runs, hub, here)
        mine = json.loads(in_process(ASK, {"local": [], "named": []}, hub, here))
        theirs = json.loads(in_process(ASK, {"ann/local": [f"model={own}"], "ann/named": []}, hub, there))
        cards = {name: on(hub, name)["README.md"].decode() for name in runs}
    assert [mine["local"], mine["named"]] == [theirs["ann/local"], theirs["ann/named"]]
    assert "".join(itertools.chain(*mine.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        plain = MantisChat(base)
    assert plain("what is number 3?", images=[here / "first.png"], max_new_tokens=12) != mine["local"][0]
    assert "\nbase_model: ann/base\n" in cards["ann/named"] and "\nbase_model_relation: adapter\n" in cards["ann/named"]
    assert f"at revision `{COMMIT}`" in cards["ann/named"] and "license_name: llama3" in cards["ann/named"]
    assert "base_model" not in cards["ann/local"].partition("# ")[0]
