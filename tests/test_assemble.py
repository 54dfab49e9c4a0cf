"""A language model and a vision tower are put together to the published layout, tensor by tensor, once."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fake_hub import COMMIT, FakeHub
from halves import TOWERS, save_llm, save_tower
from helpers import SHARED, recipe
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from mantis_lite.data.lengths import cache_dir
from mantis_lite.errors import DiskError, RecipeError
from mantis_lite.models import joining
from mantis_lite.models.assemble import open_model
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.joining import with_weights
from mantis_lite.models.load import load_model
from mantis_lite.recipe import ModelRecipe

LLMS = {
    "plain": {},
    "spare rows": {"spare": 5},
    "one spare row": {"spare": 1},
    "tied": {"tie_word_embeddings": True},
    "mistral": {"kind": "mistral"},
    "shards": {"shard": "20KB"},
}
WORDS, OUT = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """The folders of a language model and of a SigLIP."""
    folder = tmp_path_factory.mktemp("halves")
    return save_llm(folder / "Tiny-Llama-3-Instruct"), save_tower(folder / "tiny-siglip")


@pytest.fixture
def copied(halves, tmp_path):
    return tuple(shutil.copytree(half, tmp_path / half.name) for half in halves)


def model(llm, vision) -> ModelRecipe:
    return ModelRecipe(llm=str(llm), vision=str(vision))


def put_together(halves, seed=42):
    return with_weights(open_model(model(*halves)), seed)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for file in sorted(folder.glob("*.safetensors")) for key, tensor in load_file(file).items()}


def rewrite(half: Path, change: Callable[[dict], dict]) -> None:
    file = half / "model.safetensors"
    save_file(change({key: tensor.clone() for key, tensor in load_file(file).items()}), file)  # which maps the file


@pytest.mark.parametrize("kind", LLMS)
def test_a_language_model_keeps_its_weights(halves, tmp_path, kind):
    llm = save_llm(tmp_path / "llm", **LLMS[kind])
    found = put_together((llm, halves[1]))
    weights, own = tensors_of(found.folder), tensors_of(llm)
    known = Tokenizer.from_file(str(llm / "tokenizer.json")).get_vocab_size()
    grown = {WORDS} if kind == "tied" else {WORDS, OUT}
    assert {key for key in weights if key.startswith("language_model.")} == {f"language_model.{key}" for key in own}
    for key, tensor in own.items():
        if f"language_model.{key}" not in grown:
            assert torch.equal(weights[f"language_model.{key}"], tensor), key
    for key in grown:
        before, now = own[key.removeprefix("language_model.")], weights[key]
        assert torch.equal(now[:known], before[:known])
        assert torch.equal(now[known + 2 :], before[known + 2 :])
        torch.testing.assert_close(now[known : known + 2], before[:known].mean(0).expand(2, -1))
        assert len(now) == found.config.text_config.vocab_size == max(known + 2, len(before))
    assert found.config.image_token_id == known and found.published["pad_token_id"] == known + 1
    load_model(found, recipe(found.name))  # with no weight missing or left over


@pytest.mark.parametrize("kind", TOWERS)
@pytest.mark.parametrize("shard", ["1GB", "8KB"], ids=["whole", "shards"])
def test_a_tower_is_taken_from_what_there_is(halves, tmp_path, kind, shard):
    tower = save_tower(tmp_path / "tower", kind, shard)
    found = put_together((halves[0], tower))
    weights, own = tensors_of(found.folder), tensors_of(tower)
    name = "" if kind.endswith("_model") else "vision_model."
    own = {key.removeprefix(name): tensor for key, tensor in own.items() if key.startswith(name)}
    taken = {key: tensor for key, tensor in weights.items() if key.startswith("vision_tower.")}
    assert taken.keys() == {f"vision_tower.vision_model.{key}" for key in own}
    assert all(torch.equal(taken[f"vision_tower.vision_model.{key}"], tensor) for key, tensor in own.items())
    assert found.published["vision_config"]["model_type"] == f"{kind.partition('_')[0]}_vision_model"
    processor = (found.folder / "preprocessor_config.json").read_text()
    assert processor == (tower / "preprocessor_config.json").read_text()
    load_model(found, recipe(found.name))


def test_it_says_what_its_language_model_says(halves):
    """Of text alone: all logits but those of the new tokens, which have the mean of the others."""
    found = put_together(halves)
    ours = load_model(found, recipe(found.name, memory={"attention": "sdpa"})).eval()
    alone = LlamaForCausalLM.from_pretrained(halves[0]).eval()
    ids = torch.arange(40)[None] * 7 % 300
    with torch.no_grad():
        logits, expected = ours(input_ids=ids).logits, alone(input_ids=ids).logits
    torch.testing.assert_close(logits[..., :-2], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits[..., -2:], expected.mean(-1, keepdim=True).expand(1, 40, 2), rtol=0, atol=1e-5)


def test_a_projector_is_fresh_and_its_seeds(halves, monkeypatch, tmp_path):
    """The same files from the same seed, in another cache; from another seed the projector alone is another."""
    before = torch.get_rng_state()
    first, other = put_together(halves), put_together(halves, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path))
    again = put_together(halves)
    assert again.folder != first.folder and again.folder.name == first.folder.name != other.folder.name
    for file in first.folder.iterdir():
        assert (again.folder / file.name).read_bytes() == file.read_bytes()
    weights, others = tensors_of(first.folder), tensors_of(other.folder)
    moved = {key for key in weights if not torch.equal(weights[key], others[key])}
    assert moved == {f"multi_modal_projector.linear_{at}.weight" for at in (1, 2)}  # biases begin at 0
    for key in moved:
        assert weights[key].std().item() == pytest.approx(0.2, rel=0.2)  # the language model's own spread
        assert not weights[key.replace("weight", "bias")].any()


def test_it_has_the_published_layout(halves):
    found = put_together(halves)
    published, text = found.published, found.published["text_config"]
    wanted = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default", "projector_hidden_act": "gelu"}
    assert wanted.items() <= published.items() and published["ignore_index"] == -100
    assert text["_name_or_path"] == "Tiny-Llama-3-Instruct"  # by which the original code tells the template
    assert published["vocab_size"] == text["vocab_size"] == published["pad_token_id"] + 1
    assert found.config.text_config.rope_parameters["rope_theta"] == 5e5
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    for token, number in (("<image>", published["image_token_index"]), ("<|pad|>", published["pad_token_id"])):
        assert tokenizer.convert_tokens_to_ids(token) == found.tokenizer.token_to_id(token) == number
        assert tokenizer(f"a{token}b", add_special_tokens=False).input_ids[1] == number
    assert found.public_name == "Tiny-Llama-3-Instruct + tiny-siglip"
    assert found.encoder(recipe(found.name)).template.name == "llama_3"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the golden fixtures are not beside this checkout")
def test_its_config_and_tensors_are_called_as_upstreams(halves):
    golden = open_checkpoint(ModelRecipe(name=str(SHARED / "golden/checkpoints/mllava_siglip_llama3")))
    found = put_together(halves)
    aside = {"_name_or_path", "transformers_version", "tie_word_embeddings"}
    assert found.published.keys() ^ golden.published.keys() <= aside
    assert golden.published["text_config"].keys() <= found.published["text_config"].keys()
    pooled = "vision_tower.vision_model.head."  # which these tiny ones were made without
    names = {key for key in tensors_of(found.folder) if not key.startswith(pooled)}
    assert names == {key for key in tensors_of(golden.folder) if not key.startswith(pooled)}


def test_a_tokenizers_settings_name_what_is_added(copied):
    llm, _ = copied
    (llm / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": ["<a>", "<image>"]}))
    (llm / "added_tokens.json").write_text(json.dumps({"<a>": 3}))
    settings = json.loads((llm / "tokenizer_config.json").read_text()) | {"added_tokens_decoder": {}}
    (llm / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = open_model(model(*copied)).folder
    image, pad = (open_model(model(*copied)).tokenizer.token_to_id(token) for token in ("<image>", "<|pad|>"))
    named = {"additional_special_tokens": ["<a>", "<image>", "<|pad|>"]}
    assert json.loads((folder / "special_tokens_map.json").read_text()) == named
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<a>": 3, "<image>": image, "<|pad|>": pad}
    decoder = json.loads((folder / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert {int(number): entry["content"] for number, entry in decoder.items()} == {image: "<image>", pad: "<|pad|>"}


def test_buffers_that_old_checkpoints_hold_are_left_out(copied):
    for folder, key in zip(copied, ("model.rotary_emb.inv_freq", "vision_model.embeddings.position_ids"), strict=True):
        rewrite(folder, lambda own, key=key: own | {key: torch.zeros(3)})
    assert not [key for key in tensors_of(put_together(copied).folder) if "inv_freq" in key or "position_ids" in key]


def child(work) -> multiprocessing.Process:
    return multiprocessing.get_context("fork").Process(target=work)


def test_killed_before_its_end_it_is_made_anew(halves):
    def killed():
        joining.sync = lambda file: os.kill(os.getpid(), signal.SIGKILL)  # all is written, and nothing renamed
        put_together(halves)

    process = child(killed)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    left = sorted(path.suffix for path in (cache_dir() / "assembled").iterdir() if path.is_dir())
    assert left == ["", ".part"]  # small files, and what the killed one wrote
    found = put_together(halves)
    assert not list((cache_dir() / "assembled").glob("*.part"))
    load_model(found, recipe(found.name))


def test_of_several_at_once_one_writes_and_the_others_wait(halves, tmp_path):
    context = multiprocessing.get_context("fork")
    together, write = context.Barrier(4), joining._write

    def told(*given):
        (tmp_path / f"wrote-{os.getpid()}").touch()
        write(*given)

    def work():
        joining._write = told
        together.wait()
        (tmp_path / f"found-{os.getpid()}").write_text(str(load_model(put_together(halves), recipe()).dtype))

    processes = [context.Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert len(list(tmp_path.glob("wrote-*"))) == 1
    assert [file.read_text() for file in tmp_path.glob("found-*")] == ["torch.float32"] * 4


def test_it_is_made_once_and_opened_without_weights(copied):
    found = put_together(copied)
    for half in copied:
        before = open_model(model(*copied))
        (half / "model.safetensors").rename(half / "elsewhere")
        assert open_model(model(*copied)).folder == before.folder != found.folder
        with pytest.raises(RecipeError, match=r"model\.(llm|vision): .* has no model\.safetensors\n  Only safetensors"):
            put_together(copied)
        (half / "elsewhere").rename(half / "model.safetensors")
    times = {file: file.stat().st_mtime_ns for file in found.folder.iterdir()}
    assert put_together(copied).folder == found.folder
    assert {file: file.stat().st_mtime_ns for file in found.folder.iterdir()} == times


def test_other_weights_are_another_model(copied):
    first = put_together(copied)
    rewrite(copied[0], lambda own: {key: tensor + 1 for key, tensor in own.items()})
    assert put_together(copied).folder != first.folder


def settings(half: Path, **more) -> None:
    file = half / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def without(half: Path, key: str) -> None:
    rewrite(half, lambda own: {name: tensor for name, tensor in own.items() if name != key})


FAULTS = {
    "another llm": (lambda llm, _: settings(llm, model_type="gpt2"), r"model\.llm: .* is of type gpt2\n  Name one of"),
    "another tower": (
        lambda _, tower: settings(tower, model_type="dinov2"),
        r"model\.vision: .* is of type dinov2\n  Name one of these: clip, clip_vision_model, siglip",
    ),
    "in few bits": (
        lambda llm, _: settings(llm, quantization_config={"bits": 4}),
        r"model\.llm: .* is saved in few bits\n  Name the original in 16 bits",
    ),
    "no processor": (
        lambda _, tower: (tower / "preprocessor_config.json").unlink(),
        r"model\.vision: .* has no preprocessor_config\.json",
    ),
    "code of its own": (
        lambda llm, _: settings(llm, auto_map={"AutoModel": "x.y"}),
        r"auto_map: the checkpoint brings",
    ),
    "few embeddings": (
        lambda llm, _: settings(llm, vocab_size=300),
        r"has 300 embeddings, and its tokenizer an id 318",
    ),
    "other shapes": (
        lambda llm, _: settings(llm, intermediate_size=40),
        r"weights that do not fit its config: 6, first model\.language_model\.layers\.0\.mlp\.down_proj\.weight is "
        r"\[32, 48\], and should be \[32, 40\]",
    ),
    "a missing weight": (
        lambda _, tower: without(tower, "vision_model.post_layernorm.bias"),
        r"model\.vision: .* 1, first model\.vision_tower\.post_layernorm\.bias is missing, and should be \[24\]",
    ),
    "a deeper tower": (
        lambda llm, _: settings(llm, num_hidden_layers=1),
        r"first model\.language_model\.layers\.1\.input_layernorm\.weight is \[32\], and should be absent",
    ),
    "damage": (
        lambda llm, _: (llm / "model.safetensors").write_bytes(b"x" * 100),
        r"model\.safetensors: is damaged",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_refused(copied, fault):
    spoil, message = FAULTS[fault]
    spoil(*copied)
    with pytest.raises(RecipeError, match=message):
        put_together(copied)
    made = [path for path in (cache_dir() / "assembled").glob("*") if list(path.glob("*.safetensors"))]
    assert not made


PULLS = """
import json
from mantis_lite.errors import RecipeError
from mantis_lite.models.assemble import open_model
from mantis_lite.models.joining import with_weights
from mantis_lite.recipe import ModelRecipe
found = open_model(ModelRecipe(llm="ann/Llama-3-tiny@main", vision="ann/tower"))
input()
whole = with_weights(found, 42)
lost = ""
try:
    open_model(ModelRecipe(llm="ann/Llama-3-tiny@lost", vision="ann/tower"))
except RecipeError as error:
    lost = str(error)
print(json.dumps([str(whole.folder), whole.public_name, whole.public_model, lost]))
"""


@pytest.mark.slow
def test_halves_of_the_hub(halves, tmp_path):
    """By revision, and known by their commits; no weight is fetched before there is a use for it."""
    for half, name in zip(halves, ("Llama-3-tiny", "tower"), strict=True):
        shutil.copytree(half, tmp_path / "hub/models/ann" / name)
    with FakeHub(tmp_path / "hub") as hub:
        own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", PULLS], env=os.environ | own, **pipes) as process:
            while not any("preprocessor_config" in asked for asked in hub.requests):
                assert process.poll() is None
                time.sleep(0.1)
            assert not any("model.safetensors" in asked and "GET" in asked for asked in hub.requests)
            said, _ = process.communicate("go on\n")
        assert any("model.safetensors" in asked for asked in hub.requests)
    folder, name, public, lost = json.loads(said.splitlines()[-1])
    weights, here = tensors_of(Path(folder)), tensors_of(put_together(halves).folder)
    assert weights.keys() == here.keys() and all(torch.equal(weights[key], here[key]) for key in here)
    assert name == "ann/Llama-3-tiny + ann/tower"
    assert public["llm"] == f"ann/Llama-3-tiny@{COMMIT}" and public["vision"] == f"ann/tower@{COMMIT}"
    assert lost.startswith("model.llm: ann/Llama-3-tiny has no revision lost")


@pytest.mark.parametrize("half", ["llm", "vision"])
def test_a_half_that_is_not_there(halves, half):
    names = dict(zip(("llm", "vision"), map(str, halves), strict=True)) | {half: "nobody/nothing@main"}
    with pytest.raises(RecipeError, match=rf"model\.{half}: nobody/nothing is not in the cache, and the hub cannot be"):
        open_model(ModelRecipe(**names))


def test_a_disk_without_room(halves, monkeypatch):
    found = open_model(model(*halves))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(DiskError, match=r"model: .* it takes about 0\.0 GB, more than is free\n  Make room there"):
        with_weights(found, 42)
    assert not list((cache_dir() / "assembled").glob("*.part"))
