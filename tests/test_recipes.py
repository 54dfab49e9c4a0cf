"""The recipes: of chat one for each family and method; each says how it is run, what it permits and what upstream does.

Those of pretrain name no method, as there is one.
"""

import re
import shlex
from itertools import product
from pathlib import Path

import pytest

from mantis_lite.recipe import Recipe
from mantis_lite.recipe_file import DEFAULTS, load_recipe, recipes_dir

FAMILIES = (
    "siglip-llama3",
    "clip-llama3",
    "idefics2",
    "fuyu",
    "idefics3",
    "smolvlm",
    "qwen2vl",
    "qwen25vl",
    "qwen3vl",
)
METHODS = ("qlora", "lora", "full")
EVERY = sorted(recipes_dir().glob("*-*-*.yaml"))
INSTEAD = re.compile(r"( *)# (upstream|alternative): (\w+): .*")


def instead(text: str, number: int) -> str:
    """The recipe with the comment on a line in force, in place of its key and all below it."""
    lines = text.splitlines()
    match = INSTEAD.fullmatch(lines[number])
    assert match
    indent, source, key = match.groups()
    lines[number] = lines[number].replace(f"# {source}: ", "", 1)
    kept, inside = [], False
    for at, line in enumerate(lines):
        deeper = line.startswith(indent + " ")
        inside = at != number and (line.startswith(f"{indent}{key}:") or (inside and deeper))
        kept += [] if inside else [line]
    return "\n".join(kept) + "\n"


def comments(text: str, source: str = r"upstream|alternative") -> list[int]:
    """The numbers of the lines that hold what may stand in a key's place."""
    return [at for at, line in enumerate(text.splitlines()) if re.match(rf" *# ({source}): ", line)]


def load(tmp_path: Path, text: str) -> Recipe:
    path = tmp_path / "chat.yaml"
    path.write_text(text)
    return load_recipe(path, ["data=x"])


def test_every_family_has_every_method():
    chat = {path.stem for path in EVERY if path.stem.startswith("chat-")}
    assert chat == {f"chat-{family}-{method}" for family, method in product(FAMILIES, METHODS)}


@pytest.mark.parametrize("task", ["video", "classify"])
def test_a_task_has_recipes_of_several_families(task):
    named = [path.stem.removeprefix(f"{task}-").rpartition("-") for path in EVERY if path.stem.startswith(f"{task}-")]
    assert all(family in FAMILIES and method in METHODS for family, _, method in named)
    assert len({family for family, _, _ in named}) >= 4
    assert DEFAULTS[task] in {path.stem for path in EVERY}


def test_mantis_own_projectors_are_brought_up():
    """Both that were published, by upstream's settings of its first stage."""
    both = {path.stem: load_recipe(path, ["data=x"]) for path in EVERY if path.stem.startswith("pretrain-")}
    assert both.keys() == {"pretrain-siglip-llama3", "pretrain-clip-llama3"}
    upstream = {"learning_rate": 1e-3, "weight_decay": 0, "num_train_epochs": 1, "samples_per_step": 256}
    upstream |= {"warmup_steps": 0.03, "lr_scheduler_type": "cosine"}
    for recipe in both.values():
        assert upstream.items() <= recipe.train.items() and recipe.packing.max_length == 8192
        assert recipe.parts == {"language_model": "frozen", "projector": "full", "vision_tower": "frozen"}


# Rate, decay, samples a step, tokens and whether the tower trains, of upstream's scripts.
UPSTREAM = {
    "siglip-llama3": (1e-5, 0.0, 128, 8192, False),
    "clip-llama3": (1e-5, 0.0, 128, 8192, False),
    "fuyu": (1e-5, 0.01, 128, 8192, False),
    "idefics2": (5e-6, 0.01, 128, 8192, True),
    "idefics3": (5e-6, 0.01, 128, 16384, False),
}


@pytest.mark.parametrize("kind", UPSTREAM)
def test_a_full_fine_tune_is_upstreams(kind, tmp_path):
    path = recipes_dir() / f"chat-{kind}-full.yaml"
    text = path.read_text()
    for number in [at for at in comments(text, "upstream") if "max_length" in text.splitlines()[at]]:
        text = instead(text, number)
    recipe = load(tmp_path, text)
    train, tower = recipe.train, recipe.part("vision_tower") == "full"
    found = (train["learning_rate"], train["weight_decay"], train["samples_per_step"], recipe.packing.max_length, tower)
    assert found == UPSTREAM[kind] and train["num_train_epochs"] == 1
    assert (train["warmup_steps"], train["lr_scheduler_type"]) == (0.03, "cosine")


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_a_recipe_is_what_its_name_says(path):
    recipe = load_recipe(path, ["data=x"])
    task, _, rest = path.stem.partition("-")
    assert task == recipe.task and (rest.endswith(f"-{recipe.method}") or (task == "pretrain" and rest in FAMILIES))
    others = [other.read_text().splitlines()[0] for other in EVERY if other != path]
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ") and first.endswith(".") and first not in others
    assert all(name.partition("/")[2] in first for name in recipe.model.called.split(" + "))
    assert (recipe.method == "full") == ("lora:" not in path.read_text().splitlines())


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_its_commands_name_the_recipe_itself_and_load(path):
    name = next((task for task, default in DEFAULTS.items() if default == path.stem), path.stem)
    usage = re.findall(r"^# +mantis-lite (.*)$", path.read_text(), re.M)
    commands = [shlex.split(line.partition("   ")[0]) for line in usage]
    assert [command[0] for command in commands] == ["check", "train", "train"]
    for _, recipe, *overrides in commands:
        assert recipe == name
        load_recipe(recipe, overrides)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_it_states_the_license_of_the_weights(path):
    (line,) = re.findall(r"^# License of the weights: (.+)$", path.read_text(), re.M)
    name, _, permits = line.partition(": ")
    assert name and permits.endswith(".") and "://" not in line
    assert ("not for commercial use" in permits) == ("NC" in name or "Research" in name)


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_each_comment_in_a_key_s_place_makes_another_recipe(path, tmp_path):
    text = path.read_text()
    before = load(tmp_path, text)
    for number in comments(text):
        assert load(tmp_path, instead(text, number)) != before, text.splitlines()[number]


@pytest.mark.parametrize("path", EVERY, ids=lambda path: path.stem)
def test_all_of_upstream_at_once_loads(path, tmp_path):
    text = path.read_text()
    while numbers := comments(text, "upstream"):
        text = instead(text, numbers[0])
    load(tmp_path, text)


@pytest.mark.parametrize("kind", FAMILIES)
def test_adapters_learn_faster_than_a_full_fine_tune(kind):
    rates = {method: load_recipe(f"chat-{kind}-{method}", ["data=x"]).train["learning_rate"] for method in METHODS}
    assert rates["qlora"] == rates["lora"] >= 10 * rates["full"]
