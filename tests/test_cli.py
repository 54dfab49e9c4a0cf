"""Commands as a user types them: exit codes, what is printed, and what stays unimported."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import chat, write_rows

from mantis_lite.models.checkpoint import FAMILIES
from mantis_lite.process import prepare_process

ROOT = Path(__file__).parents[1]


def run(*words, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "mantis_lite", *words], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("words", [["--help"], ["recipes", "list"], ["train", "--help"]], ids=" ".join)
def test_help_imports_no_torch(words):
    script = (
        "import sys; sys.argv[1:] = {!r}\ntry:\n    from mantis_lite.cli import main; main()\n"
        "finally:\n    print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script.format(words)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False False"


TRAINS = {"peft", "bitsandbytes", "trl", "datasets", "mantis_lite.models.load", "mantis_lite.training"}
"""What loads or trains a model, and what a data set of the hub is read by: seconds to import."""


@pytest.mark.parametrize("more", [[], ["train.num_train_epochs=2"]], ids=["one epoch", "two epochs"])
def test_check_imports_nothing_that_trains_and_no_model(tmp_path, more):
    """With two epochs it says what a vision cache would take, too."""
    rows = [chat("<image>what is it?", f"number {at}", images=(at,)) for at in range(3)]
    script = (
        "import atexit, sys; sys.argv[1:] = {!r}\n@atexit.register\ndef told():\n"
        "    print([name for name in sys.modules if name in {!r} or name.split('.')[-1] in {!r}])\n"
        "from mantis_lite.cli import main; main()"
    )
    models = [f"modeling_{kind}" for family in FAMILIES for kind in family.model_types]
    words = ["check", "chat", f"data={write_rows(tmp_path / 'rows.jsonl', rows)}", "model=tiny", *more]
    done = subprocess.run([sys.executable, "-c", script.format(words, TRAINS, models)], capture_output=True, text=True)
    assert "3 rows read, 3 to train on" in done.stdout and ("vision cache: " in done.stdout) == bool(more), done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_misspelt_key_ends_in_2_and_names_the_right_one():
    done = run("train", "chat", "data=x.json", "packing.max_lenght=4096")
    assert done.returncode == 2
    assert done.stderr == "RecipeError: packing.max_lenght: no such key; did you mean packing.max_length?\n"


@pytest.mark.parametrize(
    "words, seconds",
    [(["--help"], 0.5), (["train", "chat", "data=x.json", "packing.max_lenght=4096"], 1.0)],
    ids=["help", "misspelt"],
)
def test_an_answer_that_needs_no_model_is_quick(words, seconds):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run(*words)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Seconds of work rather than of the clock: the machine may be busy with something else.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < seconds


@pytest.mark.parametrize("words, code", [(["nonsense"], 2), (["train"], 2), (["recipes", "show", "nonsense"], 2)])
def test_usage_errors_end_in_2(words, code):
    assert run(*words).returncode == code


def test_recipes_are_listed_shown_and_copied(tmp_path):
    assert "chat-siglip-llama3-qlora (also: chat)" in run("recipes", "list").stdout
    shown = run("recipes", "show", "chat").stdout
    assert shown.startswith("# Mantis-8B-siglip-llama3")
    assert run("recipes", "copy", "chat", cwd=tmp_path).returncode == 0
    assert (tmp_path / "chat-siglip-llama3-qlora.yaml").read_text() == shown
    again = run("recipes", "copy", "chat", cwd=tmp_path)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    rows = [chat("<image>what is it?", f"number {i}", images=(i,)) for i in range(6)]
    return write_rows(folder / "rows.jsonl", rows)


def test_check_shows_rows_packs_and_what_is_trained(data, llava_folder, tmp_path):
    done = run("check", "chat", f"data={data}", f"model={llava_folder}", "packing.max_length=256", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 rows read, 6 to train on, 0 rejected" in done.stdout
    assert "images: 1 to 1, median 1" in done.stdout
    assert "⟦number 0<|eot_id|>⟧" in done.stdout
    assert list(tmp_path.iterdir()) == []  # nothing is written


def test_a_bad_row_ends_in_3(data, llava_folder, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"id": "a", "images": ["gone.png"], "messages": []}\n')
    done = run("train", "chat", f"data={bad}", f"model={llava_folder}", cwd=tmp_path)
    assert done.returncode == 3
    assert done.stderr.startswith('SampleError: bad.jsonl:1 (id "a"): "messages" is empty')


@pytest.mark.parametrize("bad", [False, True], ids=["sound", "bad"])
def test_check_ends_as_ever_though_it_leaves_its_memory(data, llava_folder, tmp_path, bad):
    """All is printed, what was registered is called, and the exit code is right."""
    rows = Path(data).read_text() + bad * '{"id": "a", "images": ["gone.png"], "messages": []}\n'
    (Path(data).parent / "some.jsonl").write_text(rows)
    words = ["check", "chat", f"data={Path(data).parent / 'some.jsonl'}", f"model={llava_folder}"]
    script = f"import atexit, sys; sys.argv[1:] = {words}; atexit.register(print, 'called', end='')\n"
    script += "from mantis_lite.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3 * bad, "") and f"{6 + bad} rows read" in done.stdout
    assert done.stdout.endswith("called")


@pytest.mark.slow
def test_train_leaves_everything_in_the_run_directory(data, llava_folder, tmp_path):
    settings = [f"data={data}", f"model={llava_folder}", "method=lora", "packing.max_length=256", "run_dir=run"]
    steps = ["train.max_steps=2", "train.save_strategy=no", "train.samples_per_step=2"]
    done = run("train", "chat", *settings, *steps, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter", "recipe.yaml", "metrics.jsonl", "loss.png", "rejects.jsonl"} <= left
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "loss" in log] == [1, 2]
    assert "language_model" in done.stdout
    again = run("train", "chat", *settings, *steps, cwd=tmp_path)
    assert (again.returncode, "--from-scratch" in again.stderr) == (7, True)
    assert run("train", "chat", *settings, *steps, "--from-scratch", cwd=tmp_path).returncode == 0
    assert (tmp_path / "run.1/adapter").is_dir()


@pytest.mark.slow
def test_the_wheel_holds_recipes_and_the_tiny_checkpoint(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(tmp_path / "site")], check=True)
    listed = run("recipes", "list", cwd=tmp_path / "site", env=os.environ | {"PYTHONPATH": str(tmp_path / "site")})
    assert "chat-siglip-llama3-qlora (also: chat)" in listed.stdout
    assert (tmp_path / "site/mantis_lite/tiny/checkpoint/model.safetensors").is_file()
    where = "import mantis_lite.recipe_file as r; print(r.recipes_dir())"
    shown = subprocess.run([sys.executable, "-c", where], cwd=tmp_path / "site", capture_output=True, text=True)
    assert shown.stdout.strip() == str(tmp_path / "site/mantis_lite/recipes")


@pytest.mark.parametrize("stated", [None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_how_a_cards_memory_is_given_out_is_the_users_to_say(monkeypatch, stated):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    if stated:
        monkeypatch.setenv(stated, "backend:native")
    prepare_process()
    expected = {stated: "backend:native"} if stated else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert {name: value for name, value in os.environ.items() if name.endswith("_ALLOC_CONF")} == expected
    os.environ.pop("PYTORCH_ALLOC_CONF", None)  # what the command set, no test after this one is to see
