"""Recipes: read, overridden, checked and written back; every mistake is named, with what was meant."""

import subprocess
import sys
from pathlib import Path

import pytest

from mantis_lite.errors import RecipeError
from mantis_lite.recipe import Recipe
from mantis_lite.recipe_file import load_recipe, make_recipe, recipes_dir, save_recipe
from mantis_lite.train_keys import REFUSED

RECIPES = sorted(recipes_dir().glob("*.yaml"))
BARE = {"model": "a/b", "data": "my.json", "run_dir": "runs/x"}


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(f"model: a/b\ndata: my.json\n{text}\n")
    return path


def chat(*overrides: str) -> Recipe:
    return load_recipe("chat", ["data=my.json", *overrides])


def refused(settings: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        make_recipe(BARE | settings)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_by_name_and_by_file(path):
    by_name = load_recipe(path.stem, ["data=my.json"])
    assert by_name == load_recipe(path, ["data=my.json"])
    assert by_name.run_dir == Path("runs", path.stem)
    if path.stem != "quickstart":
        assert path.stem.startswith(f"{by_name.task}-")
        assert path.stem.endswith(f"-{by_name.method}") or (by_name.task, by_name.method) == ("pretrain", "full")


def test_a_task_names_its_default_recipe():
    assert chat() == load_recipe("chat-siglip-llama3-qlora", ["data=my.json"])
    assert chat().model.name == "TIGER-Lab/Mantis-8B-siglip-llama3"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_saved_and_read_again_it_is_the_same(tmp_path, path):
    overrides = ["data=[my.json, {path: other.json, weight: 0.5}]", "trainable.projector=full"]
    overrides += [] if path.stem.startswith(("classify", "pretrain")) else ["prompt.system=off"]
    overrides += [] if path.stem.startswith("pretrain") else ["method=lora"]
    recipe = load_recipe(path, overrides)
    save_recipe(recipe, tmp_path / "saved.yaml")
    assert load_recipe(tmp_path / "saved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "get", "expected"),
    [
        ("packing.max_length=4096", lambda r: r.packing.max_length, 4096),
        ("train.learning_rate=1e-4", lambda r: r.train["learning_rate"], 1e-4),
        ("train.lr_scheduler_type=constant", lambda r: r.train["lr_scheduler_type"], "constant"),
        ("train.run_name=no", lambda r: r.train["run_name"], "no"),
        ("prompt.system=on", lambda r: r.prompt.system, "on"),
        ("prompt.system=[sic", lambda r: r.prompt.system, "[sic"),
        ("prompt.system=", lambda r: r.prompt.system, ""),
        ("prompt.system=Use item #1 only", lambda r: r.prompt.system, "Use item #1 only"),
        (
            "train.tokens_per_step=4096",
            lambda r: {"tokens_per_step", "samples_per_step"} & set(r.train),
            {"tokens_per_step"},
        ),
        ('prompt.system=""', lambda r: r.prompt.system, ""),
        ("lora.target_modules=[q_proj, v_proj]", lambda r: r.lora.target_modules, ["q_proj", "v_proj"]),
        ("lora.dora=true", lambda r: r.lora.dora, True),
        ("packing=off", lambda r: r.packing.enabled, False),
        ("packing=false", lambda r: r.packing.enabled, False),
        ("packing=on", lambda r: r.packing.enabled, True),
        ("memory.checkpointing=off", lambda r: r.memory.checkpointing, "off"),
        ("model=tiny", lambda r: (r.model.name, r.model.revision), ("tiny", None)),
        ("model.revision=abc", lambda r: r.model.name, "TIGER-Lab/Mantis-8B-siglip-llama3"),
        ("data=other.json", lambda r: [s.path for s in r.data.sources], ["other.json"]),
        ("data=[a.json, b/c]", lambda r: [s.path for s in r.data.sources], ["a.json", "b/c"]),
        ("data.eval=0.05", lambda r: (r.data.eval, r.data.sources[0].path), (0.05, "my.json")),
        ("data.sources=x.json", lambda r: r.data.sources[0].path, "x.json"),
        ("trainable.lr=null", lambda r: r.trainable.lr.given, {}),
        ("trainable.lr.language_model=null", lambda r: r.trainable.lr.given, {}),
        ("trainable={lr: null}", lambda r: r.trainable.lr.given, {}),
        ("lora=null", lambda r: (r.lora.r, r.lora.dropout, r.lora.model_fields_set), (16, 0.0, set())),
        ("train.samples_per_step=null", lambda r: "samples_per_step" in r.train, False),
        ("run_dir=elsewhere", lambda r: r.run_dir, Path("elsewhere")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_overrides(override, get, expected):
    assert get(chat(override)) == expected


def test_a_sentence_with_a_colon_stays_a_sentence():
    assert chat("prompt.system=Note: be brief").prompt.system == "Note: be brief"
    assert chat("lora={r: 4}").lora.r == 4


def test_the_last_override_wins_and_neighbours_stay():
    recipe = chat("lora.r=8", "packing.max_length=100", "lora.r=4")
    assert (recipe.lora.r, recipe.lora.dropout, recipe.packing.max_length) == (4, 0.05, 100)


@pytest.mark.parametrize("word", ["off", "on", "no", "yes"])
def test_yaml_words_stay_words(tmp_path, word):
    assert load_recipe(written(tmp_path, f"prompt: {{system: {word}}}")).prompt.system == word
    with pytest.raises(RecipeError, match=f"lora.dora: expected true or false, found '{word}'"):
        load_recipe(written(tmp_path, f"lora: {{dora: {word}}}"))


def test_a_file_of_ones_own(tmp_path):
    recipe = load_recipe(written(tmp_path, "packing: off\ntrain: {learning_rate: 1e-4}\nmethod: lora"))
    assert recipe.packing.enabled is False and recipe.train == {"learning_rate": 1e-4}
    assert recipe.run_dir == Path("runs/mine")


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lora", ("adapter", "frozen", "frozen", [])),
        ("qlora", ("adapter", "frozen", "frozen", ["language_model"])),
        ("full", ("full", "full", "frozen", [])),
    ],
)
def test_parts_a_method_trains(method, expected):
    recipe = make_recipe(BARE | {"method": method})
    assert (*recipe.parts.values(), recipe.quantized) == expected
    written_out = make_recipe(BARE | {"method": "lora", "trainable": {"projector": "full", "vision_tower": "adapter"}})
    assert written_out.parts == {"language_model": "adapter", "projector": "full", "vision_tower": "adapter"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": {"max_lenght": 1}}, "packing.max_lenght: no such key; did you mean packing.max_length?"),
        ({"max_length": 1}, "max_length: no such key; did you mean packing.max_length?"),
        ({"lora": {"rank": 8}}, "lora.rank: no such key"),
        ({"lora": 8}, "lora: expected its own keys, as lora.KEY=..., found 8"),
        ({"trainable": {"lr": {"projectr": 1}}}, "trainable.lr.projectr: no such key; did you mean trainable.lr.proj"),
        ({"trainable": {"lr": {"projector": 0}}}, "trainable.lr.projector: input should be greater than 0, found 0"),
        ({"task": "rank"}, "task: input should be 'chat', 'video', 'classify' or 'pretrain', found 'rank'"),
        ({"learning_rate": 1}, "learning_rate: no such key; did you mean train.learning_rate?"),
        ({"train": {"learning_rat": 1}}, "train.learning_rat: no such key; did you mean train.learning_rate?"),
        (
            {"data": [{"path": "a", "wieght": 2}]},
            "data.sources.0.wieght: no such key; did you mean data.sources.0.weight?",
        ),
        ({"packing": {"max_length": 0}}, "packing.max_length: input should be greater than 0, found 0"),
        ({"packing": {"max_length": "long"}}, "packing.max_length: input should be a valid integer"),
        ({"packing": "sometimes"}, "packing: expected on, off or its keys, found 'sometimes'"),
        ({"packing": {"enabled": "off"}}, "packing.enabled: expected true or false, found 'off'"),
        ({"method": "qloar"}, "method: input should be 'lora', 'qlora' or 'full', found 'qloar'"),
        ({"data": None}, "data: no data was given\n  Add data=my.json"),
        ({"data": []}, "data.sources: list should have at least 1 item"),
        ({"lora": {"dropout": 1}}, "lora.dropout: input should be less than 1, found 1"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value.partition(";")[0].partition("\n")[0],
)
def test_mistakes_are_named(settings, message):
    assert refused(settings).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train": {"per_device_train_batch_size": 4}},
            "train.per_device_train_batch_size: not set here: a pack is the batch",
        ),
        ({"train": {"output_dir": "x"}}, "train.output_dir: not set here: the run's folder is run_dir"),
        ({"train": {"optim": "sgd"}}, "train.optim: not set here: set memory.optimizer"),
        ({"train": {"gradient_checkpointing": True}}, "train.gradient_checkpointing: not set here: set memory.ch"),
        ({"train": {"deepspeed": "x"}}, "train.deepspeed: not set here: set launch.strategy"),
        ({"train": {"learning_rate": 0}}, "train.learning_rate: expected more than 0, found 0"),
        (
            {"train": {"samples_per_step": 8, "gradient_accumulation_steps": 2}},
            "train: samples_per_step and gradient_accumulation_steps each set the size of a step\n  Keep one of them.",
        ),
        ({"train": {"tokens_per_step": 0.5}}, "train.tokens_per_step: expected a positive whole number, found 0.5"),
        ({"train": {"learning_rate": "fast"}}, "train.learning_rate: expected a number, found 'fast'"),
        ({"train": {"max_steps": 1.5}}, "train.max_steps: expected a whole number, found 1.5"),
        ({"train": {"samples_per_step": 0}}, "train.samples_per_step: expected a positive whole number, found 0"),
    ],
    ids=lambda value: "+".join(value["train"]) if isinstance(value, dict) else "",
)
def test_train_keys_that_are_set_elsewhere(settings, message):
    assert refused(settings).startswith(message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"method": "qlora", "trainable": {"language_model": "full"}},
            "trainable.language_model: full, but the part is held in 4 bits, which cannot be trained\n"
            "  Set trainable.language_model=adapter, or method=lora.",
        ),
        (
            {"method": "full", "trainable": {"projector": "adapter"}},
            "trainable.projector: adapter, but method=full trains no adapter\n  Set method=lora.",
        ),
        (
            {"method": "lora", "trainable": {"language_model": "full"}},
            "trainable.language_model: full, but method=lora\n  Set method=full.",
        ),
        ({"method": "lora", "trainable": {"language_model": "frozen"}}, "trainable: every part is frozen"),
        (
            {"method": "lora", "trainable": {"language_model": "frozen", "projector": "full"}},
            "trainable: no part takes an adapter, but method=lora\n  Set method=full.",
        ),
        (
            {"method": "lora", "trainable": {"lr": {"projector": 1e-3}}},
            "trainable.lr.projector: the part is frozen\n  Set trainable.projector, or leave its rate out.",
        ),
        (
            {"method": "lora", "trainable": {"lr": {"head": 1e-3}}},
            "trainable.lr.head: has no effect with task=chat\n  Set task=classify, or leave it out.",
        ),
        (
            {"method": "lora", "trainable": {"lr": {"language_model": 1}}, "memory": {"optimizer": "adalomo"}},
            "trainable.lr: memory.optimizer=adalomo has one rate for all parts\n  Set another, or leave the rates out.",
        ),
        ({"method": "full", "lora": {"r": 8}}, "lora.r: has no effect with method=full"),
        (
            {"method": "lora", "memory": {"quantize": ["language_model"]}},
            "memory.quantize: ['language_model'], but meth",
        ),
        (
            {"method": "qlora", "memory": {"quantize": []}},
            "memory.quantize: [], but method=qlora holds something in 4 bits\n  Set method=lora.",
        ),
        (
            {"method": "qlora", "lora": {"init": "pissa"}},
            "lora.init: pissa takes its first values from weights that are not in 4 bits\n  Set method=lora, or",
        ),
        ({"data": {"sources": "a", "eval": 1.5}}, "data.eval: expected a share between 0 and 1, or a file, found 1.5"),
        ({"eval": {"every": 10}}, "eval.every: there is nothing to evaluate on\n  Set data.eval"),
    ],
    ids=[
        "4 bits",
        "full adapter",
        "lora full",
        "frozen",
        "no adapter",
        "frozen rate",
        "no head",
        "one rate",
        "lora unused",
        "quantize",
        "other part",
        "pissa",
        "share",
        "every",
    ],
)
def test_settings_that_contradict(settings, message):
    assert message in refused(settings).splitlines() or refused(settings).startswith(message)


CLIP = {"task": "video", "media": {"num_frames": 8}}
SCORED = {"task": "classify", "head": {"problem": "single_label"}}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"media": {"num_frames": 8}}, "media.num_frames: has no effect with task=chat, which has pictures only"),
        (
            {"task": "video"},
            "media.num_frames: task=video needs to know how many frames of a clip to take\n  Set media",
        ),
        (CLIP | {"media": {"num_frames": 8, "fps": 1.0, "max_frames": 9}}, "media.fps: beside media.num_frames"),
        (CLIP | {"media": {"fps": 1.0}}, "media.fps: it and media.max_frames, the most frames of a clip, go together"),
        (CLIP | {"media": {"num_frames": 8, "max_frames": 9}}, "media.fps: it and media.max_frames"),
        (CLIP | {"media": {"num_frames": 8, "start": 2, "end": 1.5}}, "media.end: 1.5 s is no later than the start"),
        (
            CLIP | {"media": {"num_frames": 8, "start": 2, "sampling": "upstream"}},
            "media.start: media.sampling=upstream takes whole clips",
        ),
        (
            CLIP | {"media": {"num_frames": 8, "frame_label": "{second}"}},
            "media.frame_label: '{second}' has a field that is neither time nor number\n  Write it as {time:.1f}s",
        ),
        (
            CLIP | {"media": {"num_frames": 8, "frame_label": "{time:q}"}},
            "media.frame_label: '{time:q}' is not a format",
        ),
        ({"head": {"labels": ["a"]}}, "head.labels: has no effect with task=chat\n  Set task=classify."),
        ({"task": "classify"}, "head.problem: missing\n  Set it to regression, single_label or multi_label."),
        (
            {"task": "classify", "head": {"problem": "regression", "class_weights": "balanced"}},
            "head.class_weights: numbers have no classes",
        ),
        ({"task": "classify", "head": {"problem": "single_label", "labels": ["a", "a"]}}, "head.labels: a name is"),
        (
            {"task": "classify", "head": {"problem": "single_label", "labels": ["a", "b"], "class_weights": [1.0]}},
            "head.class_weights: 1 weights for 2 labels\n  Give one a label.",
        ),
        (
            {"task": "classify", "head": {"problem": "single_label", "class_weights": [1.0]}},
            "head.class_weights: which is whose, is known where head.labels gives the order",
        ),
        (
            {"task": "classify", "head": {"problem": "regression", "score": "special_tokens"}},
            "head.labels: special_tokens writes the labels' names into the prompt\n  State head.labels.",
        ),
        (
            SCORED | {"train": {"batch_eval_metrics": True}},
            "train.batch_eval_metrics: has a wrong effect on a score head\n  Leave it out.",
        ),
        (
            SCORED | {"prompt": {"system": "x"}},
            "prompt.system: has no effect with task=classify, head.score=last_token",
        ),
    ],
    ids=lambda value: value.partition(":")[0] if isinstance(value, str) else "",
)
def test_settings_of_clips_and_heads_that_contradict(settings, message):
    assert refused(settings).startswith(message)


def test_a_head_alone_may_train():
    frozen = dict.fromkeys(("language_model", "projector", "vision_tower"), "frozen")
    settings = {"model": "m", "data": "d", "run_dir": "r", "method": "full", "trainable": frozen}
    assert make_recipe(settings | SCORED).parts == frozen
    assert "every part is frozen" in refused(settings)


@pytest.mark.parametrize("key", REFUSED)
def test_every_key_that_is_set_elsewhere_says_where(key):
    assert refused({"train": {key: "x"}}) == f"train.{key}: not set here: {REFUSED[key]}"


def test_all_mistakes_at_once():
    message = refused({"train": {"optim": "sgd", "nothing_like_it": 1}, "trainable": {"lr": {"projector": 1e-3}}})
    assert len(message.splitlines()) == 4


def test_a_recipe_of_before_there_were_rates_is_read():
    settings = {"model": "m", "data": "d", "run_dir": "r", "trainable": {"language_model": None, "lr": None}}
    assert make_recipe(settings).trainable.lr.given == {}


def test_a_full_recipe_reads_back(tmp_path):
    recipe = make_recipe({"model": "m", "data": "d", "run_dir": "r", "method": "full"})
    save_recipe(recipe, tmp_path / "recipe.yaml")
    assert load_recipe(tmp_path / "recipe.yaml") == recipe


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        (
            "chat-siglip-llama3-qlorra",
            [],
            "chat-siglip-llama3-qlorra: no such recipe; did you mean chat-siglip-llama3-qlora?",
        ),
        ("missing.yaml", [], "missing.yaml: no such file\n  `mantis-lite recipes list`"),
        ("chat", ["packing.max_length"], "packing.max_length: not an override\n  Write key=value"),
        ("chat", ["=3"], "=3: not an override"),
        ("chat", ["packing=maybe"], "packing: expected on, off or its keys, found 'maybe' in packing=maybe"),
        ("chat", [], "data: no data was given"),
    ],
    ids=["name", "file", "no equals", "no key", "word", "no data"],
)
def test_what_cannot_be_loaded(name, overrides, message):
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, overrides)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "a recipe is a mapping of keys to values, found"), ("a: [", "not YAML")]
)
def test_a_file_that_is_no_recipe(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        chat().task = "video"


def test_reading_recipes_rows_and_plans_imports_no_torch(tmp_path):
    code = """
import sys
from mantis_lite import load_recipe
import mantis_lite.data.packing, mantis_lite.data.schema, mantis_lite.data.template
load_recipe("chat", ["data=my.json", "train.learning_rate=1e-4"])
sys.exit(str({"torch", "transformers", "datasets", "peft", "trl"} & set(sys.modules) or ""))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.stderr.strip() == ""
