"""Adapters trained with the original code load today, tensor for tensor, or say why they do not."""

import json
import os
import pickle
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Params4bit
from families import FAMILIES
from helpers import SHARED, chat, golden_pictures, recipe
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

from mantis_lite.data.collate import collate
from mantis_lite.data.paths import MediaFolder
from mantis_lite.data.sample import Image, Turn
from mantis_lite.data.schema import parse
from mantis_lite.errors import RecipeError
from mantis_lite.models.adapters import make_trainable
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.load import load_model
from mantis_lite.models.upstream import convert, is_upstream

GOLDEN = SHARED / "golden"
ROW = chat("What is <image> beside <image>?", "small red circle", images=(1, 2))
WEIGHTS, WHOLE = "adapter_model.safetensors", "non_lora_trainables.bin"
CLOSE = {"atol": 1e-5, "rtol": 0}

ORIGINAL = {
    "llava": {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
        "model.vision_tower.": "vision_tower.vision_model.",
    },
    "fuyu": {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.vision_embed_tokens.": "vision_embed_tokens.",
    },
    "qwen2_vl": {"model.language_model.": "model.", "model.visual.": "visual."},
    "idefics2": {},
}
"""Today's names of parts, and those they had in transformers 4.45."""

TARGETS = {
    "llava": r"lm_head|model\.language_model\..*\.(q_proj|down_proj)|.*vision_tower.*\.[01]\..*fc1|.*\.linear_1",
    "fuyu": r"lm_head|.*query_key_value|model\.vision_embed_tokens",
    "qwen2_vl": r"model\.language_model\..*\.(q_proj|down_proj)|model\.visual\..*\.fc1",
    "idefics2": r"lm_head|.*text_model.*\.(q_proj|down_proj)|.*vision_model.*fc1|.*connector.*\.q_proj",
}


@pytest.fixture(scope="module")
def load(checkpoint_of):
    """A family's tiny model, afresh."""
    return lambda name: load_model(checkpoint_of(name), recipe(checkpoint_of(name).name)).eval()


@pytest.fixture(scope="module")
def batch_of(encoder_of):
    def batch(name):
        encoder = encoder_of(name)
        return collate([encoder.encode(parse(ROW, "rows:1", None))], encoder.vision.batch)

    return cache(batch)


@pytest.fixture(scope="module")
def saved(load, batch_of, tmp_path_factory):
    """The folder of an adapter with every tensor at random, as PEFT saves it today, and its logits."""

    def save(name, dora):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], use_dora=dora, task_type="CAUSAL_LM")
        model = get_peft_model(load(name), config).eval()
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp(f"today_{name}")
        model.save_pretrained(folder, save_embedding_layers=False)  # or an adapted lm_head comes whole as well
        return folder, logits(model, batch_of(name))

    return cache(save)


@pytest.fixture
def original(saved, tmp_path):
    """The same adapter as the original code saved it: old names, and bare suffixes as target_modules."""

    def make(name="llava", dora=False):
        today, _ = saved(name, dora)
        tensors = {old(key, name): value for key, value in load_file(today / WEIGHTS).items()}
        suffixes = sorted({key.partition(".lora_")[0].rpartition(".")[2] for key in tensors})
        return write(tmp_path / "original", tensors, json.loads((today / "adapter_config.json").read_text()), suffixes)

    return make


def old(key, name):
    bare = key.removeprefix("base_model.model.")
    for today, then in ORIGINAL[name].items():
        if bare.startswith(today):
            return "base_model.model." + bare.replace(today, then, 1)
    return key


def write(folder, tensors, config, targets):
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS)
    (folder / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets, "gone_since": None}))
    return folder


def logits(model, batch):
    with torch.no_grad():
        return model(**batch).logits


def adapted(model):
    return {name for name, module in model.named_modules() if isinstance(module, LoraLayer)}


@pytest.mark.filterwarnings("error:Found missing")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ORIGINAL)
def test_an_adapter_in_old_names_is_the_same_adapter(load, saved, original, batch_of, tmp_path, name, dora):
    today, wanted = saved(name, dora)
    source, target, base = original(name, dora), tmp_path / "target", load(name)
    assert not is_upstream(today, base)
    assert is_upstream(source, base) == bool(ORIGINAL[name])
    convert(source, target, base)
    assert not is_upstream(target, base)
    model = PeftModel.from_pretrained(base, target).eval()
    torch.testing.assert_close(logits(model, batch_of(name)), wanted, **CLOSE)
    assert not torch.allclose(logits(load(name), batch_of(name)), wanted, atol=0.01)
    result = model.load_adapter(target, "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])
    assert load_file(target / WEIGHTS).keys() == load_file(today / WEIGHTS).keys()
    assert adapted(model) == adapted(PeftModel.from_pretrained(load(name), today))
    config, before = (LoraConfig.from_pretrained(folder).to_dict() for folder in (target, source))
    assert {key for key in config if config[key] != before[key]} == {"target_modules"}


@pytest.mark.parametrize("name", FAMILIES)
def test_todays_names_are_not_upstreams(load, tmp_path, name):
    model = load(name)
    linear = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)]
    save_file({f"base_model.model.{key}.lora_A.weight": torch.zeros(1) for key in linear}, tmp_path / WEIGHTS)
    assert not is_upstream(tmp_path, model)


# Parameters trained beside the adapter.

LINEAR_2 = "base_model.model.multi_modal_projector.linear_2."
NORM = "language_model.model.norm.weight"  # the prefix is PEFT's, and the original leaves it out where PEFT does


def test_parameters_trained_beside_the_adapter(load, saved, original, batch_of, tmp_path):
    source, target, base = original(), tmp_path / "target", load("llava")
    wanted = PeftModel.from_pretrained(load("llava"), saved("llava", False)[0]).eval()
    linear, norm = wanted.base_model.model.model.multi_modal_projector.linear_2, torch.linspace(0.5, 2, 32)
    weight = torch.randn_like(linear.weight)
    linear.weight.data.copy_(weight)
    wanted.base_model.model.model.language_model.norm.weight.data.copy_(norm)
    torch.save({LINEAR_2 + "weight": weight, NORM: norm}, source / WHOLE)
    convert(source, target, base, import_pickle=True)
    bias = "base_model.model.model.multi_modal_projector.linear_2.bias"
    assert torch.equal(load_file(target / WEIGHTS)[bias], linear.bias)  # not in the pickle, so from the base
    model = PeftModel.from_pretrained(base, target).eval()
    torch.testing.assert_close(logits(model, batch_of("llava")), logits(wanted, batch_of("llava")), **CLOSE)
    result = model.load_adapter(target, "again")
    assert (result.missing_keys, result.unexpected_keys) == ([], [])


def test_an_empty_pickle_adds_nothing(load, original, tmp_path):
    source, model = original(), load("llava")
    convert(source, tmp_path / "without", model)
    torch.save({}, source / WHOLE)
    convert(source, tmp_path / "with", model, import_pickle=True)
    for name in (WEIGHTS, "adapter_config.json"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_a_pickled_adapter(load, original, tmp_path):
    source, model = original(), load("llava")
    convert(source, tmp_path / "safe", model)
    tensors = load_file(source / WEIGHTS)
    (source / WEIGHTS).unlink()
    torch.save(tensors, source / "adapter_model.bin")
    assert is_upstream(source, model)
    with pytest.raises(RecipeError, match=r"adapter_model\.bin: is a pickle.*\n.*--import-upstream"):
        convert(source, tmp_path / "target", model)
    assert not (tmp_path / "target").exists()
    convert(source, tmp_path / "target", model, import_pickle=True)
    assert (tmp_path / "target" / WEIGHTS).read_bytes() == (tmp_path / "safe" / WEIGHTS).read_bytes()


def test_a_pickle_beside_the_adapter_is_not_read_unasked(load, saved, tmp_path):
    today, model = saved("idefics2", False)[0], load("idefics2")
    source = write(
        tmp_path / "source",
        load_file(today / WEIGHTS),
        json.loads((today / "adapter_config.json").read_text()),
        ["q_proj"],
    )
    (source / WHOLE).write_bytes(b"anything")
    assert is_upstream(source, model)  # though its names have not changed
    with pytest.raises(RecipeError, match=r"non_lora_trainables\.bin: is a pickle.*\n.*--import-upstream"):
        convert(source, tmp_path / "target", model)


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("dump", [torch.save, lambda found, file: file.write_bytes(pickle.dumps(found))])
def test_a_malicious_pickle_does_not_run(load, original, tmp_path, dump):
    source = original()
    dump({"key": Evil(tmp_path / "ran")}, source / WHOLE)
    with pytest.raises(RecipeError, match=r"holds more than tensors \(UnpicklingError\); nothing in it was run"):
        convert(source, tmp_path / "target", load("llava"), import_pickle=True)
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "target").exists()
    with suppress(RuntimeError):
        torch.load(source / WHOLE, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have run


@pytest.mark.parametrize("content", [b"", b"hello there, no pickle", b"PK\3\4 cut"])
def test_a_damaged_pickle(load, original, tmp_path, content):
    source = original()
    (source / WHOLE).write_bytes(content)
    with pytest.raises(RecipeError, match=r"non_lora_trainables\.bin: is damaged"):
        convert(source, tmp_path / "target", load("llava"), import_pickle=True)


@pytest.mark.parametrize("content", [[torch.ones(1)], {"step": 3}])
def test_a_pickle_of_something_else(load, original, tmp_path, content):
    source = original()
    torch.save(content, source / WHOLE)
    with pytest.raises(RecipeError, match="is no dict of tensors"):
        convert(source, tmp_path / "target", load("llava"), import_pickle=True)


def packed(model):
    linear = model.model.multi_modal_projector.linear_2
    linear.weight = Params4bit(linear.weight.data, requires_grad=False).to("cpu")


def tied(model):
    model.model.language_model.layers[0].input_layernorm.weight = model.model.language_model.norm.weight


@pytest.mark.parametrize(
    ("tensors", "spoil", "message"),
    [
        (
            {"language_model.model.nothing.weight": (1,), NORM: (32,)},
            None,
            "1 of 2 tensors have no place in this llava",
        ),
        ({NORM: (31,)}, None, rf"1 of 1 tensors have the wrong shape, first {NORM} \[31\] for \[32\]"),
        ({LINEAR_2 + "bias": (32,)}, packed, "1 of 1 tensors belong to modules loaded in 4 bits, .*\n.*unquantized"),
        ({NORM: (32,)}, tied, "1 of 1 tensors are tied to another module's"),
        (
            {"multi_modal_projector.linear_1.bias": (32,)},
            None,
            r"1 of \d+ layers adapted .* lie in .* whole, .*linear_1",
        ),
    ],
)
def test_parameters_that_cannot_be_taken_over(load, original, tmp_path, tensors, spoil, message):
    source, model = original(), load("llava")
    if spoil:
        spoil(model)
    torch.save({key: torch.ones(shape) for key, shape in tensors.items()}, source / WHOLE)
    with pytest.raises(RecipeError, match=message):
        convert(source, tmp_path / "target", model, import_pickle=True)


# Adapters that are not what they should be.

QUERY = "base_model.model.language_model.model.layers.0.self_attn.q_proj."


def changed(**values):
    return lambda tensors: tensors | {QUERY + name.replace("_weight", ".weight"): v for name, v in values.items()}


def without(*names):
    return lambda tensors: {key: value for key, value in tensors.items() if key not in {QUERY + name for name in names}}


def of_another_model(tensors):
    return {key.replace("model.language_model", "thinker"): value for key, value in tensors.items() if QUERY in key}


def in_both_names(tensors):
    key = QUERY + "lora_A.weight"
    return tensors | {key.replace("language_model.model", "model.language_model"): tensors[key].clone()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {}, "holds no tensors\n  Copy it again"),
        (of_another_model, r"3 of 3 tensors have no place in this llava model, first .*\n  Set model to .*llava"),
        (changed(lora_C_weight=torch.ones(1)), r"1 of \d+ tensors have no place .*q_proj\.lora_C\.weight\n"),
        (in_both_names, r"2 of \d+ tensors are there by old and by new name"),
        (
            changed(lora_A_weight=torch.ones(3, 32)),
            r"1 of \d+ tensors have the wrong shape, first .* \[3, 32\] for \[4, 32\]",
        ),
        (
            changed(lora_magnitude_vector=torch.ones(1, 32)),
            r"1 of \d+ tensors have the wrong shape, .* \[1, 32\] for \[32\]",
        ),
        (
            changed(lora_B_weight=torch.full((32, 4), torch.nan)),
            r"1 of \d+ tensors are not finite, .*\n  Its training div",
        ),
        (changed(lora_B_weight=torch.ones(32, 4, dtype=torch.int8)), r"1 of \d+ tensors are not finite"),
        (
            without("lora_B.weight"),
            r"1 of \d+ tensors are missing, first model\.language_model.*q_proj\.lora_B\.weight",
        ),
        (without("lora_magnitude_vector"), r"1 of \d+ tensors are missing, .*\.lora_magnitude_vector\n"),
    ],
)
def test_tensors_that_do_not_belong(load, original, tmp_path, change, message):
    source = original(dora=True)
    save_file(change(load_file(source / WEIGHTS)), source / WEIGHTS)
    with pytest.raises(RecipeError, match=message) as error:
        convert(source, tmp_path / "target", load("llava"))
    assert str(error.value).startswith(f"{source / WEIGHTS}: ")
    assert not (tmp_path / "target").exists()


def test_magnitudes_without_dora(load, original, tmp_path):
    source = original(dora=True)
    file = source / "adapter_config.json"
    file.write_text(file.read_text().replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(RecipeError, match=r"tensors have no place .*lora_magnitude_vector"):
        convert(source, tmp_path / "target", load("llava"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "adapter_config.json: cannot be read: Expecting property"),
        ("[]", "it is a list, and no object\n  Name a folder"),
        ('{"peft_type": "IA3"}', "peft_type is IA3\n  Only LORA"),
        ('{"peft_type": "LORA", "rank_pattern": {"q_proj": 2}}', "rank_pattern is {'q_proj': 2}; .*\n  Merge it"),
        (None, "adapter_config.json: cannot be read: no such file.*\n  Name a folder"),
    ],
)
def test_settings_that_cannot_be_taken_over(load, original, tmp_path, content, message):
    source = original()
    (source / "adapter_config.json").unlink()
    if content is not None:
        (source / "adapter_config.json").write_text(content)
    with pytest.raises(RecipeError, match=message):
        convert(source, tmp_path / "target", load("llava"))


def test_no_weights_or_damaged_ones(load, original, tmp_path):
    source, model = original(), load("llava")
    (source / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(RecipeError, match=r"adapter_model\.safetensors: is damaged.*\n  Copy it again"):
        convert(source, tmp_path / "target", model)
    (source / WEIGHTS).unlink()
    with pytest.raises(RecipeError, match=r"original: has no adapter_model\.safetensors\n  Name a folder"):
        is_upstream(source, model)


# What the original trained.


def test_training_goes_on_from_an_adapter_of_the_original(load, original, batch_of, checkpoint_of, tmp_path):
    """The recipe's model.adapter; pickles only where the command line allows them."""
    folder, checkpoint = original(dora=True), checkpoint_of("llava")
    convert(folder, tmp_path / "today", load("llava"))
    expected = logits(PeftModel.from_pretrained(load("llava"), tmp_path / "today"), batch_of("llava"))
    wanted = recipe(model={"name": checkpoint.name, "adapter": str(folder)})
    model = make_trainable(load("llava"), wanted, checkpoint.family)
    assert any(parameter.requires_grad for parameter in model.parameters())
    torch.testing.assert_close(logits(model.eval(), batch_of("llava")), expected, **CLOSE)
    torch.save({}, folder / WHOLE)
    with pytest.raises(RecipeError, match=r"is a pickle, as the original code writes them\n  Pass --import-upstream"):
        make_trainable(load("llava"), wanted, checkpoint.family)
    model = make_trainable(load("llava"), wanted, checkpoint.family, import_upstream=True)
    torch.testing.assert_close(logits(model.eval(), batch_of("llava")), expected, **CLOSE)


golden = pytest.mark.skipif(not GOLDEN.is_dir(), reason="the golden fixtures are not beside this checkout")


@pytest.fixture(scope="module")
def trace():
    return json.loads((GOLDEN / "lora" / "trace.json").read_text())


@pytest.fixture(scope="module")
def base():
    """The trace's checkpoint, opened, and its model afresh."""
    settings = recipe(GOLDEN / "checkpoints" / "mllava_siglip_llama3", method="full", prompt={"labels": "upstream"})
    checkpoint = open_checkpoint(settings.model)
    return checkpoint.encoder(settings), lambda: load_model(checkpoint, settings)


@pytest.fixture(scope="module")
def batches(base, trace):
    """The samples of the five steps; upstream cut the last of them at 200 tokens, its pictures counting one each."""
    records = json.loads((GOLDEN / "forward" / "mllava_siglip_llama3.json").read_text())["cases"]
    pictures = golden_pictures()

    def part(found):
        return Image(pictures[found.source.name]) if isinstance(found, Image) else found

    def batch(record):
        sample = parse(record["sample"], "golden:1", MediaFolder(Path()))
        turns = tuple(Turn(turn.role, tuple(map(part, turn.content))) for turn in sample.turns)
        encoded, end = base[0].encode(replace(sample, turns=turns)), record["seq_len_expanded"]
        return collate([replace(encoded, input_ids=encoded.input_ids[:end], labels=encoded.labels[:end])])

    return [batch(records[case]) for case, _ in trace["lora"]["order"]]


@golden
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_saved_adapter_gives_the_originals_losses(base, batches, trace, tmp_path, kind):
    source, model = GOLDEN / "lora" / f"{kind}_adapter_saved", base[1]()
    assert is_upstream(source, model)
    convert(source, tmp_path, model)
    loaded = PeftModel.from_pretrained(model, tmp_path).eval()
    assert len(get_peft_model_state_dict(loaded)) == trace[kind]["n_trainable_tensors"]
    with torch.no_grad():
        losses = [loaded(**batch).loss.item() for batch in batches]
    assert losses == pytest.approx(trace[kind]["eval_losses_after"], abs=1e-5)


@golden
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_training_on_from_the_originals_start(base, batches, trace, tmp_path, kind):
    def converted(state):
        tensors = load_file(GOLDEN / "lora" / f"{kind}_{state}.safetensors")
        config = json.loads((GOLDEN / "lora" / f"{kind}_adapter_saved" / "adapter_config.json").read_text())
        # As PEFT saves what is in memory.
        named = {key.replace(".default", "").replace("vector.weight", "vector"): v for key, v in tensors.items()}
        convert(write(tmp_path / state, named, config, ["q_proj"]), tmp_path / f"{state}_today", base[1]())
        return tmp_path / f"{state}_today"

    model = PeftModel.from_pretrained(base[1](), converted("init"), is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=trace[kind]["optimizer"]["lr"], weight_decay=0.0), []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses == pytest.approx(trace[kind]["losses"], abs=1e-4)
    after, wanted = get_peft_model_state_dict(model), load_file(converted("after5") / WEIGHTS)
    assert after.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(after[key], wanted[key], atol=1e-4, rtol=0)
