"""Mantis' two stages: a projector on captions, then all but the tower; what captions are, and what is left of a run."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from halves import save_llm, save_tower
from helpers import chat, keeps_its_layout, losses, picture, recipe, train, write_rows
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.forks import Forks
from mantis_lite.chat import MantisChat
from mantis_lite.cli import app
from mantis_lite.contract import read_contract
from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.lengths import cache_dir
from mantis_lite.data.sample import Image
from mantis_lite.data.schema import parse
from mantis_lite.data.template import LLAMA_3
from mantis_lite.errors import RecipeError, SampleError
from mantis_lite.models.assemble import open_model
from mantis_lite.models.cacheable import trained_parts
from mantis_lite.models.joining import with_weights
from mantis_lite.models.load import load_model
from mantis_lite.models.precision import weights_dtype
from mantis_lite.recipe import ModelRecipe
from mantis_lite.recipe_file import load_recipe, make_recipe
from mantis_lite.report.check import check
from mantis_lite.report.fit import fit
from mantis_lite.tiny import pictures, tasks
from mantis_lite.trained import open_trained

PROJECTOR = {f"multi_modal_projector.linear_{at}.{kind}" for at in (1, 2) for kind in ("weight", "bias")}
SMALL = ["packing.max_length=512", "memory.kernels=off", "train.samples_per_step=4", "train.save_strategy=no"]
SMALL += ["train.num_train_epochs=3"]  # as the first step of all is one of a learning rate of 0


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("halves")
    return {
        "llm": save_llm(folder / "Tiny-Llama-3-Instruct"),
        "siglip": save_tower(folder / "tiny-siglip", "siglip"),
        "clip": save_tower(folder / "tiny-clip", "clip"),
    }


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Captions as LLaVA's own, and rows of chat, about pictures that are drawn for them; returns both files."""
    folder, rng = tmp_path_factory.mktemp("drawn"), random.Random(0)
    captions, turns = [], []
    for at in range(12):
        exercise = tasks.describe_each(rng) if at % 2 else tasks.describe_one(rng)
        names = [f"{at}-{number}.png" for number in range(len(exercise.things))]
        for name, thing in zip(names, exercise.things, strict=True):
            pictures.draw(thing, rng).save(folder / name)
        turns.append(tasks.row(f"chat_{at}", exercise, names))
        if len(names) == 1:
            asked = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": exercise.answer}]
            captions.append({"id": f"caption_{at}", "image": names[0], "conversations": asked})
    for name, rows in (("captions.json", captions), ("chat.json", turns)):
        (folder / name).write_text(json.dumps(rows))
    return folder / "captions.json", folder / "chat.json"


def told(*words) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def stage_1(halves, data, run_dir: Path, tower="siglip", *more) -> tuple[Path, str]:
    """The model that the first command makes, and what it says."""
    named = [f"model.llm={halves['llm']}", f"model.vision={halves[tower]}"]
    said = told("train", f"pretrain-{tower}-llama3", f"data={data}", f"run_dir={run_dir}", *named, *SMALL, *more)
    return run_dir / "model", said


@pytest.fixture(scope="module")
def pretrained(halves, drawn, tmp_path_factory):
    """What stage 1 makes."""
    home = tmp_path_factory.mktemp("stage1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANTIS_LITE_CACHE", str(home / "cache"))
        yield stage_1(halves, drawn[0], home / "run")[0]


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def moved(before: dict, after: dict) -> set[str]:
    assert before.keys() == after.keys()
    return {key for key in before if not torch.equal(before[key], after[key])}


def assembled(cache: Path) -> Path:
    (folder,) = {file.parent for file in cache.rglob("*.safetensors")}
    return folder


@pytest.mark.parametrize("tower", ["siglip", pytest.param("clip", marks=pytest.mark.slow)])
def test_two_stages_by_two_commands(halves, drawn, tmp_path, tower):
    """The projector alone moves in the first, everything but the tower in the second: new tokens' rows as well."""
    first, said = stage_1(halves, drawn[0], tmp_path / "one", tower)
    assert f"model: Tiny-Llama-3-Instruct + tiny-{tower}, put together in {cache_dir()}" in said.replace("\n", "")
    start, one = tensors_of(assembled(cache_dir() / "assembled")), tensors_of(first)
    assert moved(start, one) == PROJECTOR
    words = ["data=" + str(drawn[1]), f"run_dir={tmp_path / 'two'}", f"model={first}", *SMALL]
    told("train", f"chat-{tower}-llama3-full", *words, "train.learning_rate=1e-3", "launch.strategy=single")
    two = tensors_of(tmp_path / "two/model")
    assert moved(one, two) == {key for key in one if not key.startswith("vision_tower.")}
    for key in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        # What goes in is never a new token; what comes out is always weighed against them.
        assert torch.equal(one[key][-2:], two[key][-2:]) == ("embed" in key)
    for folder in (first, tmp_path / "two/model"):
        wanted = recipe(folder, method="full")
        keeps_its_layout(open_model(wanted.model), load_model(open_model(wanted.model), wanted), tmp_path / "again")
        assert json.loads((folder / "config.json").read_text())["architectures"] == ["LlavaForConditionalGeneration"]


def test_what_stage_1_made_is_chatted_with_in_turns(pretrained, tmp_path):
    """By the language model's own template, as the published -pretraind models are; by the run or by the model."""
    folder = pretrained
    contract = read_contract(folder)
    assert contract.task == contract.recipe["task"] == "pretrain" and contract.facts.template == "llama_3"
    assert contract.base.names == ["Tiny-Llama-3-Instruct", "tiny-siglip"]
    assert contract.recipe["model"]["llm"] == "Tiny-Llama-3-Instruct" and not contract.recipe["model"]["name"]
    make_recipe(contract.recipe | {"run_dir": "x"})
    (tmp_path / "1.png").write_bytes(picture(1))
    asked = {"images": [tmp_path / "1.png"], "max_new_tokens": 6}
    answers = [MantisChat(name)("What is it?", **asked) for name in (folder, folder.parent)]
    assert answers[0] == answers[1]
    assert open_trained(folder).encoder.template is LLAMA_3
    changed = open_trained(folder.parent, ["memory.attention=eager"]).recipe
    assert changed.memory.attention == "eager" and changed.task == "chat"


def test_its_card_says_what_it_is(pretrained):
    text = (pretrained / "README.md").read_text()
    assert "Put together from `Tiny-Llama-3-Instruct`, which is not on the hub and `tiny-siglip`" in text
    assert "by training its projector alone, on captions" in text and "full-fine-tune" not in text
    assert "<|eot_id|>" in text


def test_stage_1_goes_on_from_a_model(pretrained, drawn, tmp_path):
    """In the recipe that names two halves, one model takes their place."""
    words = [f"model={pretrained}", f"data={drawn[0]}", f"run_dir={tmp_path / 'run'}", *SMALL]
    told("train", "pretrain-siglip-llama3", *words)
    assert moved(tensors_of(pretrained), tensors_of(tmp_path / "run/model")) == PROJECTOR


def test_the_frozen_tower_runs_once_where_it_is_asked_to(halves, drawn, tmp_path):
    """What is kept of pictures brings the projector to the same numbers."""
    for cache in ("off", "memory"):
        stage_1(halves, drawn[0], tmp_path / cache, "siglip", f"memory.vision_cache={cache}")
    one, two = (tensors_of(tmp_path / f"{cache}/model") for cache in ("off", "memory"))
    assert losses(tmp_path / "off") == pytest.approx(losses(tmp_path / "memory"), abs=1e-5)
    for key in PROJECTOR:
        torch.testing.assert_close(one[key], two[key], rtol=0, atol=1e-5)


def test_the_seed_is_the_projectors(halves, drawn, tmp_path):
    for seed in (1, 2):
        stage_1(halves, drawn[0], tmp_path / f"{seed}", "siglip", f"train.seed={seed}", "train.num_train_epochs=1")
    one, two = (tensors_of(tmp_path / f"{seed}/model") for seed in (1, 2))
    assert moved(one, two) == {key for key in PROJECTOR if key.endswith("weight")}  # before it has learned, or biases


def test_check_and_fit_take_no_weights(halves, drawn, tmp_path):
    for half in ("llm", "siglip"):
        shutil.copytree(halves[half], tmp_path / half, ignore=shutil.ignore_patterns("*.safetensors"))
    named = [f"data={drawn[0]}", f"model.llm={tmp_path / 'llm'}", f"model.vision={tmp_path / 'siglip'}"]
    found = check(load_recipe("pretrain-siglip-llama3", named))
    assert found.outlook.template == "plain" and not found.prepared.rejects
    assert fit("pretrain-siglip-llama3", named, 24).known == "the largest of the data's 1 packs"
    with pytest.raises(RecipeError, match=r"model\.llm: .*/llm has no model\.safetensors"):
        train(load_recipe("pretrain-siglip-llama3", [*named, f"run_dir={tmp_path / 'run'}"]))


@pytest.mark.parametrize("kind", ["siglip", "clip"])
def test_fit_knows_the_halves_that_recipes_name(kind):
    """Offline, by configs that come with the package; what is frozen takes 2 bytes, and what trains 16."""
    terms = fit(f"pretrain-{kind}-llama3", gpu=24).estimate.terms
    full = fit(f"chat-{kind}-llama3-full", ["launch.strategy=single"], gpu=24).estimate.terms
    assert terms["weights: language model, 16 bits"] * 2 == full["weights: language model, float32"]
    assert terms["weights: projector, float32"] == full["weights: projector, float32"]
    assert terms["optimizer"] == 2 * terms["weights: projector, float32"]


def test_only_what_trains_is_in_float32(monkeypatch):
    monkeypatch.setattr("mantis_lite.models.precision.working_dtype", lambda: torch.bfloat16)
    assert weights_dtype(recipe(task="pretrain", method="full")) == torch.bfloat16
    for trainable in ({"vision_tower": "full"}, {"language_model": "full"}):  # whose own numbers would be rounded
        assert weights_dtype(recipe(task="pretrain", method="full", trainable=trainable)) == torch.float32
    assert weights_dtype(recipe(method="full")) == torch.float32
    assert trained_parts(recipe(task="pretrain", method="full")) == {"projector"}


@pytest.mark.slow
def test_a_killed_stage_1_is_the_one_that_was_not(halves, drawn, tmp_path):
    """Also where the cache has gone meanwhile, and it is put together again."""
    settings = {
        "model": {"llm": str(halves["llm"]), "vision": str(halves["siglip"])},
        "task": "pretrain",
        "method": "full",
        "data": str(drawn[0]),
        "packing": {"max_length": 160},
        "memory": {"kernels": "off"},
        "train": {"learning_rate": 0.01, "samples_per_step": 2, "save_steps": 1, "num_train_epochs": 2},
    }
    with Forks() as forks:
        straight = forks(settings | {"run_dir": str(tmp_path / "straight")})
        assert straight["status"] == 0, straight["said"]
        killed = forks(settings | {"run_dir": str(tmp_path / "killed")}, kill_at=2, saved=True)
        assert killed["status"] == -signal.SIGKILL, killed["said"]
        shutil.rmtree(cache_dir() / "assembled")
        resumed = forks(settings | {"run_dir": str(tmp_path / "killed")})
        assert resumed["status"] == 0 and "goes on from checkpoint-2" in resumed["said"], resumed["said"]
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight") and len(losses(tmp_path / "killed")) >= 4
    one, other = (tensors_of(tmp_path / name / "model") for name in ("killed", "straight"))
    assert not moved(one, other)


# Captions


@pytest.fixture(scope="module")
def encoder(halves, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MANTIS_LITE_CACHE", str(tmp_path_factory.mktemp("cache")))
        settings = recipe({"llm": str(halves["llm"]), "vision": str(halves["siglip"])}, task="pretrain", method="full")
        return open_model(settings.model).encoder(settings)


def caption(row: dict):
    return parse(row, "rows:1", None, "pretrain")


def written(encoder, row: dict) -> str:
    """The text that is tokenised, its pictures as marks."""
    pieces = [piece.content for piece in encoder.render(caption(row))]
    assert pieces[0] == "<|begin_of_text|>"
    return "".join("<image>" if isinstance(piece, Image) else piece for piece in pieces[1:])


ONE, TWO = "(image 1: <Image><image></Image>)", "(image 2: <Image><image></Image>)"


def typed(*parts) -> list[dict]:
    return [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]


SHOWN = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
ROWS = {
    "LLaVA's own": (
        {
            "image": {"bytes": picture(1)},
            "conversations": [
                {"from": "human", "value": "Render it.\n<image>"},
                {"from": "gpt", "value": "a red dog"},
            ],
        },
        f"{ONE} a red dog\n",
    ),
    "no mark at all": (chat("What?", "a dog", images=(1, 2)), f"{ONE} {TWO} a dog\n"),
    "marks in the caption": (chat("What?", "a <image> dog <image>", images=(1, 2)), f"a {ONE} dog {TWO}\n"),
    "one mark in either": (chat("<image>", "a dog <image>", images=(1, 2)), f"{ONE} a dog {TWO}\n"),
    "turns behind": (chat("What?", "a dog", "And?", "a cat", images=(1,)), f"{ONE} a dog\n"),
    "a system turn": (
        {
            "images": [{"bytes": picture(1)}],
            "messages": [{"role": "system", "content": "Be brief."}, *chat("?", "x")["messages"]],
        },
        f"{ONE} x\n",
    ),
    "typed parts": (
        {
            "images": [{"bytes": picture(1)}],
            "messages": [
                {"role": "user", "content": typed({"type": "image"}, "What?")},
                {"role": "assistant", "content": typed("a ", "dog")},
            ],
        },
        f"{ONE} a dog\n",
    ),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_caption_is_written_plain(encoder, kind):
    row, text = ROWS[kind]
    assert written(encoder, row) == text


def test_ids_and_labels_of_a_caption(encoder):
    """A start token, then all of the text has loss but for what stands for a picture."""
    encoded = encoder.encode(caption(chat("What?", "a small red circle", images=(1,))))
    tokens = encoder.tokenizer

    def ids(text: str) -> list[int]:
        return tokens.encode(text, add_special_tokens=False).ids

    before, after = ids("(image 1: <Image>"), ids("</Image>) a small red circle\n")
    places = encoder.vision.tokens((28, 28))[0][1]
    start, image = tokens.token_to_id("<|begin_of_text|>"), tokens.token_to_id("<image>")
    assert encoded.input_ids.tolist() == [start, *before, *[image] * places, *after]
    assert encoded.labels.tolist() == [IGNORE, *before, *[IGNORE] * places, *after]
    (length,) = encoder.measure([caption(chat("What?", "a small red circle", images=(1,)))])
    assert length.tokens == len(encoded)


def test_a_pack_of_captions_is_its_captions(halves, encoder):
    settings = recipe({"llm": str(halves["llm"]), "vision": str(halves["siglip"])}, task="pretrain", method="full")
    model = load_model(with_weights(open_model(settings.model), 0), settings)
    rows = [chat("?", "a small red circle", images=(1,)), chat("?", "the second a dog", images=(2, 3))]
    each = [encoder.encode(caption(row)) for row in rows]
    counts = [int((one.labels != IGNORE).sum()) for one in each]

    def loss_and_gradient(samples):
        model.zero_grad()
        loss = model(**collate(samples, encoder.vision.batch)).loss
        loss.backward()
        return loss.item(), model.model.multi_modal_projector.linear_1.weight.grad.clone()

    packed, gradient = loss_and_gradient(each)
    (one, first), (two, second) = (loss_and_gradient([sample]) for sample in each)
    shares = [count / sum(counts) for count in counts]
    assert packed == pytest.approx(one * shares[0] + two * shares[1], abs=1e-5)
    torch.testing.assert_close(gradient, first * shares[0] + second * shares[1], rtol=1e-4, atol=1e-6)


def test_what_of_a_row_is_left_out_is_said():
    assert caption(chat("?", "a dog", "And?", "a cat", images=(1,))).notices == (
        "turns behind the first answer were left out: it is read as the caption",
    )
    assert caption(chat("?", "a dog", images=(1,))).notices == ()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (chat("What?", "a dog"), 'no picture\n  A caption is of one: give "image" or "images", or drop the row.'),
        (chat("<image>", "a dog"), "no picture"),
        (chat("<image> <image>", "a dog", images=(1,)), "1 image but 2 <image> marks in the turns"),
        (chat("?", images=(1,)), "no assistant turn after a user turn"),
        ({"prompt": "x", "labels": {"a": 1}}, "this is a classification row"),
    ],
)
def test_rows_that_have_no_caption(row, message):
    with pytest.raises(SampleError) as caught:
        caption(row)
    assert message in str(caught.value)


def test_rows_without_a_picture_can_be_skipped(halves, drawn, tmp_path):
    rows = [chat("?", f"a dog {at}", images=(at,) if at else ()) for at in range(3)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    named = [f"model.llm={halves['llm']}", f"model.vision={halves['siglip']}"]
    found = check(load_recipe("pretrain-siglip-llama3", [f"data.sources={data}", "data.on_bad_row=skip", *named]))
    assert len(found.prepared.train) == 2 and "no picture" in str(found.prepared.rejects[0])


def test_captions_of_a_data_config(halves, drawn, tmp_path):
    """The original lists them as chat, and tells them by its template."""
    listed = f"data:\n- {{path: {drawn[0]}, name: x, type: json, format: chat, split: train}}\n"
    (tmp_path / "data_config.yaml").write_text(listed)
    named = [f"model.llm={halves['llm']}", f"model.vision={halves['siglip']}"]
    found = check(load_recipe("pretrain-siglip-llama3", [f"data={tmp_path / 'data_config.yaml'}", *named]))
    assert len(found.prepared.train) == 6


# Recipes

BOTH = {"llm": "a/b", "vision": "c/d"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method: lora, but task=pretrain trains the projector's own weights\n  Set method=full."),
        (
            {"task": "chat"},
            "model.llm: puts a new model together, whose projector knows nothing yet\n  Set task=pretrain;",
        ),
        ({"model": {"llm": "a/b"}}, "model.vision: missing beside model.llm"),
        ({"model": {"vision": "a/b"}}, "model.llm: missing beside model.vision"),
        ({"model": BOTH | {"name": "e/f"}}, "model.name: beside model.llm, a model to put together\n  Name either."),
        ({"model": BOTH | {"revision": "main"}}, "model.revision: has no effect with model.llm\n  Write it behind"),
        ({"model": {}}, "model.name: missing\n  Add model.name=..., or the key to the recipe."),
        ({"prompt": {"system": "x"}}, "prompt.system: has no effect with task=pretrain, which has no turns"),
        ({"prompt": {"labels": "upstream"}}, "prompt.labels: has no effect with task=pretrain"),
        ({"prompt": {"template": "llama_3"}}, "prompt.template: llama_3, but captions are written plain"),
        ({"head": {"labels": ["a"]}}, "head.labels: has no effect with task=pretrain"),
        ({"media": {"num_frames": 8}}, "media.num_frames: has no effect with task=pretrain, which has pictures only"),
        ({"trainable": {"projector": "frozen"}}, "trainable: every part is frozen"),
        (
            {"task": "chat", "model": "x", "prompt": {"template": "plain"}},
            "prompt.template: plain writes captions, and this is task=chat\n  Leave it out.",
        ),
    ],
)
def test_what_contradicts_is_said(changes, message):
    settings = {"model": BOTH, "data": "x", "run_dir": "x", "task": "pretrain", "method": "full"} | changes
    with pytest.raises(RecipeError) as caught:
        make_recipe(settings)
    assert message in str(caught.value)


def test_a_model_takes_the_place_of_halves_and_they_of_it():
    def load(*words):
        return load_recipe("pretrain-siglip-llama3", ["data=x", *words]).model

    assert load("model=a/b") == load("model.name=a/b") == ModelRecipe(name="a/b")
    assert load("model.llm=a/b@main").called == "a/b + google/siglip-so400m-patch14-384"
    assert load("model=a/b", "model.llm=c/d", "model.vision=e/f") == ModelRecipe(llm="c/d", vision="e/f")
    assert load_recipe(
        "chat", ["data=x", "task=pretrain", "method=full", "lora=null", "model.llm=c/d", "model.vision=e/f"]
    )


@pytest.mark.parametrize("other", ["idefics2", "qwen2_vl", "fuyu"])
def test_it_is_a_llavas(checkpoint_of, other):
    kind = checkpoint_of(other).config.model_type
    with pytest.raises(RecipeError, match=rf"task: pretrain brings up the projector of a LLaVA, and this is {kind}"):
        checkpoint_of(other).encoder(recipe(task="pretrain", method="full"))
