"""Training as a user runs it, on the real rows and to the end; what a run leaves behind."""

import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import SHARED, chat, losses, picture, train, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.errors import OutOfMemory, RecipeError, ResumeError, SampleError
from mantis_lite.models.attention import chosen_attention
from mantis_lite.recipe_file import load_recipe, make_recipe
from mantis_lite.training.start import start

REAL = SHARED / "data/mantis-examples/chat/train.json"
GOLDEN = SHARED / "golden/checkpoints"
EACH_FAMILY = [
    ("chat-siglip-llama3-lora", "mllava_siglip_llama3", []),
    ("chat-idefics2-lora", "idefics2", []),
    ("chat-fuyu-lora", "mfuyu", ["media.max_image_size=null"]),
    ("chat-idefics3-lora", "idefics3", ["media.max_image_size=56"]),
    ("chat-smolvlm-lora", "smolvlm", []),
    ("chat-qwen2vl-lora", "qwen2_vl", ["media.max_image_size=280"]),
    ("chat-qwen25vl-lora", "qwen2_5_vl", ["media.max_image_size=280"]),
    ("chat-qwen3vl-lora", "qwen3_vl", ["media.max_image_size=320"]),
]
"""A recipe, the golden checkpoint of its family or else the tiny one's name, and what a picture's tiny patches want."""


class StopAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real rows are not beside this checkout")
@pytest.mark.parametrize(
    ("name", "model", "media"), EACH_FAMILY, ids=lambda value: value if str(value) == value else ""
)
def test_the_real_chat_data_trains_end_to_end(folder_of, tmp_path, name, model, media):
    """The one-line command of a recipe, on a tiny checkpoint of its family."""
    tiny = {"mllava_siglip_llama3": "llava", "mfuyu": "fuyu"}.get(model, model)
    checkpoint = GOLDEN / model if (GOLDEN / model).exists() else folder_of(tiny)
    settings = [f"data={REAL}", f"model={checkpoint}", f"run_dir={tmp_path / 'run'}", "train.save_strategy=no"]
    step = ["train.samples_per_step=12", "train.learning_rate=3e-3"]
    done = CliRunner().invoke(app, ["train", name, *settings, *step, *media])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "70 rows read, 70 to train on, 0 rejected, 0 dropped as larger than a pack" in done.output
    falling = losses(tmp_path / "run")
    assert falling[-1] < falling[0] - 0.05
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


@pytest.fixture
def settings(llava_folder, tmp_path):
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,)) for i in range(12)]
    return {
        "model": str(llava_folder),
        "data": write_rows(tmp_path / "rows.jsonl", rows),
        "run_dir": str(tmp_path / "run"),
        "method": "lora",
        "packing": {"max_length": 256},
        "train": {"num_train_epochs": 2, "learning_rate": 3e-3, "samples_per_step": 4, "save_strategy": "no"},
    }


def test_a_run_leaves_what_it_was_and_what_it_did(settings, tmp_path):
    folder = train(make_recipe(settings))
    assert folder == tmp_path / "run/adapter"
    found = {"launch": {"strategy": "single"}, "packing": settings["packing"] | {"balance": 1}}
    assert load_recipe(tmp_path / "run/recipe.yaml") == make_recipe(settings | found)
    assert (tmp_path / "run/loss.png").read_bytes().startswith(b"\x89PNG")
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert logs[-1]["epoch"] == 2
    assert not list((tmp_path / "run").rglob("training_args.bin")), "a pickle was left behind"


def test_the_same_recipe_gives_the_same_losses(settings, tmp_path):
    train(make_recipe(settings))
    train(make_recipe(settings | {"run_dir": str(tmp_path / "again")}))
    assert losses(tmp_path / "run") == losses(tmp_path / "again")


def test_a_run_stopped_at_a_checkpoint_goes_on_as_if_it_had_not(settings, tmp_path):
    train(make_recipe(settings))
    saving = settings["train"] | {"save_strategy": "steps", "save_steps": 3}
    recipe = make_recipe(settings | {"run_dir": str(tmp_path / "resumed"), "train": saving})
    stopped(recipe, 3)
    train(recipe)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "resumed"), rtol=1e-6)


def stopped(recipe, step: int) -> None:
    run = start(recipe)
    run.trainer.add_callback(StopAt(step))
    run.trainer.train()


def test_steps_done_again_are_logged_once(settings, tmp_path):
    recipe = make_recipe(settings | {"train": settings["train"] | {"save_strategy": "steps", "save_steps": 3}})
    stopped(recipe, 5)
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        if checkpoint.name != "checkpoint-3":  # as if the run had been killed before it could save again
            shutil.rmtree(checkpoint)
    train(recipe)
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "loss" in log] == list(range(1, logs[-1]["step"] + 1))


def test_a_stopped_run_goes_on_only_under_its_own_recipe(settings, tmp_path):
    train_settings = settings["train"] | {"save_strategy": "steps", "save_steps": 2}
    stopped(make_recipe(settings | {"train": train_settings}), 2)
    found = r"holds a run with\n  another packing.max_length: 256 before, 200 now\n  Add --accept-changes"
    with pytest.raises(ResumeError, match=found):
        train(make_recipe(settings | {"train": train_settings, "packing": {"max_length": 200}}))


def test_a_value_the_trainer_cannot_use_is_found_before_the_weights(settings, monkeypatch):
    monkeypatch.setattr("mantis_lite.training.start.load_model", None)
    with pytest.raises(RecipeError, match="train: "):
        train(make_recipe(settings | {"train": settings["train"] | {"lr_scheduler_type": "cosin"}}))


def test_an_adapter_is_trained_on_where_it_was_left(settings, tmp_path):
    """Its weights and its own settings, whatever the recipe says of rank; a held-out loss is the same before a step."""
    held_out = {"data": {"sources": settings["data"], "eval": settings["data"]}}
    first = make_recipe(settings | held_out | {"lora": {"r": 4, "dora": True}, "trainable": {"projector": "full"}})
    run = start(first)
    folder = run.train()
    again = {"model": {"name": settings["model"], "adapter": str(folder)}, "run_dir": str(tmp_path / "again")}
    went_on = start(make_recipe(settings | held_out | again))
    assert went_on.notices == [
        f"attention: {chosen_attention('auto')}",
        *went_on.notices[1:3],
        f"going on with {folder} by its own settings: the recipe's lora and trainable are not used, but for rates",
    ]
    assert went_on.trainer.model.peft_config["default"].r == 4
    assert {size.part for size in went_on.sizes if size.trainable} == {"language_model", "projector"}
    before, after = (made.trainer.evaluate()["eval_loss"] for made in (run, went_on))
    assert after == pytest.approx(before, abs=1e-6)
    went_on.train()
    assert losses(tmp_path / "again")[-1] < losses(tmp_path / "run")[0] * 0.9


def test_an_adapter_of_another_model_is_refused(settings, folder_of, tmp_path):
    folder = train(make_recipe(settings))
    another = {"name": str(folder_of("idefics2")), "adapter": str(folder)}
    other = {"model": another, "run_dir": str(tmp_path / "other")}
    with pytest.raises(RecipeError, match=r"model.adapter: .* was trained on llava\d*, and model is idefics2\d*\n"):
        start(make_recipe(settings | other))
    other["model"] = another | {"any_base": True}
    with pytest.raises(RecipeError, match=rf"model.adapter: {folder} does not fit this idefics2: .*\n  Set model"):
        start(make_recipe(settings | other))


def settings_of(folder, **changed):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def infinite(folder):
    file = folder / "adapter_model.safetensors"
    save_file({key: value + torch.inf for key, value in load_file(file).items()}, file)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda folder: (folder / "adapter_config.json").unlink(), r"adapter_config.json: cannot be read: "),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), r"adapter_config.json: cannot be read: "),
        (lambda folder: settings_of(folder, peft_type="IA3"), r"peft_type is IA3\n  Only LORA is taken"),
        (lambda folder: settings_of(folder, r=3), r"model.safetensors: .* is of rank \d+, by its settings \[3\]"),
        (infinite, r"model.adapter: \d+ tensors of .* are not finite, first .*\n  Its training diverged"),
    ],
    ids=["weights", "settings", "broken", "kind", "rank", "infinite"],
)
def test_a_damaged_adapter_is_named(settings, tmp_path, spoil, message):
    folder = train(make_recipe(settings))
    spoil(folder)
    again = {"model": {"name": settings["model"], "adapter": str(folder)}, "run_dir": str(tmp_path / "again")}
    with pytest.raises(RecipeError, match=message):
        start(make_recipe(settings | again))


def test_a_run_is_moved_aside_only_once_nothing_stands_in_the_way(settings, tmp_path):
    train(make_recipe(settings))
    (tmp_path / "empty").mkdir()
    for more in (
        {"model": {"name": settings["model"], "adapter": str(tmp_path / "empty")}},
        {"memory": {"attention": "flash2"}},
    ):
        with pytest.raises(RecipeError):
            start(make_recipe(settings | more), from_scratch=True)
        assert (tmp_path / "run/adapter").is_dir() and not (tmp_path / "run.1").exists()


def test_an_adapter_with_a_tensor_too_many_or_too_few_is_refused(settings, tmp_path):
    folder = train(make_recipe(settings))
    file = folder / "adapter_model.safetensors"
    tensors, again = load_file(file), {"model": {"name": settings["model"], "adapter": str(folder)}}
    again = make_recipe(settings | again | {"run_dir": str(tmp_path / "again")})
    first = next(iter(tensors)).partition(".lora_")[0]
    pair = {name: value for name, value in tensors.items() if name.startswith(f"{first}.")}
    more = {name.replace("layers.0", "layers.9"): value.clone() for name, value in pair.items()}
    save_file(tensors | more, file)
    with pytest.raises(
        RecipeError, match=rf"model.adapter: 2 tensors of {folder} have no place in this llava, first .*9"
    ):
        start(again)
    save_file({name: value for name, value in tensors.items() if name not in pair}, file)
    with pytest.raises(RecipeError, match=rf"model.adapter: 2 tensors of {folder} are missing for this llava, first "):
        start(again)
    with pytest.raises(RecipeError, match=r"model.adapter: has no effect with method=full"):
        make_recipe(settings | {"model": {"name": "tiny", "adapter": "x"}, "method": "full"})
    elsewhere = {"model": {"name": settings["model"], "adapter": "no/such"}, "run_dir": str(tmp_path / "elsewhere")}
    with pytest.raises(RecipeError, match=r"model.adapter: no/such is not in the cache, and the hub cannot be reached"):
        start(make_recipe(settings | elsewhere))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_whole_projector_trains_beside_an_adapter(settings, tmp_path, method):
    run = start(make_recipe(settings | {"method": method, "trainable": {"projector": "full"}}))
    trained = {p.dtype for p in run.trainer.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    run.train()
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_held_out_rows_are_evaluated_before_and_at_the_end_where_no_interval_is_given(settings, tmp_path):
    train(make_recipe(settings | {"data": {"sources": settings["data"], "eval": 0.25}}))
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "eval_loss" in log] == [0, logs[-1]["step"]]


@pytest.mark.parametrize("name", ["llava", "idefics2", "qwen2_vl"])
def test_tokens_are_counted_and_rows_held_out_whatever_the_layout(settings, folder_of, tmp_path, name):
    """TRL counts one token for a pack of M-RoPE rows; Idefics2's pictures are a list of groups."""
    held_out = {"sources": settings["data"], "eval": 0.25}
    more = {"model": str(folder_of(name)), "data": held_out, "eval": {"every": 2}}
    run = start(make_recipe(settings | more))
    run.train()
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    lengths = run.prepared.train.lengths[:, 0]
    assert [log["num_tokens"] for log in logs if "num_tokens" in log][-1] == 2 * lengths.sum()
    first = [lengths[pack].sum() for pack in run.schedule.packs[: run.schedule.per_step]]
    assert next(log["num_tokens"] for log in logs if "loss" in log) == sum(first)
    assert all(np.isfinite(log["eval_loss"]) for log in logs if "eval_loss" in log)


def test_held_out_rows_are_evaluated(settings, tmp_path):
    train(make_recipe(settings | {"data": {"sources": settings["data"], "eval": 0.25}, "eval": {"every": 2}}))
    logs = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [log["step"] for log in logs if "eval_loss" in log]


def test_a_full_fine_tune_is_saved_in_the_published_layout(settings, llava_folder, tmp_path):
    full = {"method": "full", "trainable": {"vision_tower": "frozen"}}
    folder = train(make_recipe({k: v for k, v in settings.items() if k != "method"} | full))
    with (
        safe_open(folder / "model.safetensors", "pt") as ours,
        safe_open(llava_folder / "model.safetensors", "pt") as base,
    ):
        assert set(ours.keys()) == set(base.keys())
        moved = {key for key in base.keys() if not torch.equal(ours.get_tensor(key), base.get_tensor(key))}
    assert moved == {key for key in moved if not key.startswith("vision_tower")}
    assert any("language_model" in key for key in moved) and any("projector" in key for key in moved)
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert (folder / name).read_bytes() == (llava_folder / name).read_bytes()


def _truncate(settings, number: int) -> None:
    """Cut a picture short behind its header: only decoding can tell."""
    picture = Path(settings["data"]).with_name(f"rows-{number}-0.png")
    picture.write_bytes(picture.read_bytes()[:-600])


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_breaks_when_decoded_stops_the_run_by_name(settings, workers):
    _truncate(settings, 5)
    train_settings = settings["train"] | {"dataloader_num_workers": workers}
    with pytest.raises(SampleError, match=r"^rows\.jsonl:6: "):
        train(make_recipe(settings | {"train": train_settings}))


def test_or_is_counted_under_skip_up_to_a_bound(settings, tmp_path):
    _truncate(settings, 5)
    skip = settings | {"data": {"sources": settings["data"], "on_bad_row": "skip"}}
    train(make_recipe(skip))
    rejects = [json.loads(line) for line in (tmp_path / "run/rejects.jsonl").read_text().splitlines()]
    assert [reject["where"] for reject in rejects] == ["rows.jsonl:6"]
    _truncate(settings, 7)
    with pytest.raises(SampleError, match=r"one of more than 1 rows"):
        train(make_recipe(skip | {"run_dir": str(tmp_path / "second")}))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quickstart_learns_what_it_could_not_do(tmp_path, monkeypatch):
    """And a comparison with what it was before shows by how much."""
    from mantis_lite.evaluate.run import compared
    from mantis_lite.quickstart import quickstart

    said = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        outcome = quickstart([f"run_dir={tmp_path / 'run'}"], [], False, said.append)
    assert outcome.before < 0.5 and outcome.after >= 0.9
    assert (outcome.adapter / "adapter_model.safetensors").is_file()
    monkeypatch.chdir(tmp_path)
    held_out = [f"data={tmp_path / 'run-data/held_out.jsonl'}", "prompt.system="]  # as the recipe has it
    (found,) = compared("tiny", str(tmp_path / "run"), held_out, html=Path("page.html"))
    assert (found.accuracy.a, found.accuracy.b) == (outcome.before, outcome.after) and found.count == 200
    assert 0 < found.accuracy.low < found.accuracy.gain < found.accuracy.high
    assert 4 * len(found.fixed) >= Path("page.html").read_text().count('<img src="data:image/jpeg') > 40


def test_out_of_memory_says_where_and_what_to_do(settings, tmp_path):
    """A CPU has no such error of its own, so the second step raises it."""
    run = start(make_recipe(settings))

    class Full(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    run.trainer.add_callback(Full())
    with pytest.raises(OutOfMemory) as caught:
        run.train()
    packs = run.schedule.packs[run.schedule.per_step : 2 * run.schedule.per_step]
    tokens = max(int(run.prepared.train.lengths[pack, 0].sum()) for pack in packs)
    said = str(caught.value)
    assert said.startswith(
        "out of memory in step 2: CUDA out of memory. Tried to allocate 2 GiB\n  The largest pack, of "
    )
    assert f"of {tokens:,} tokens and " in said and "rows.jsonl:" in said and "GiB, is: CUDA context." in said
    assert "Add to the command:\n" in said and "memory.mlp_tile=1024" not in said.partition("Add")[0]
    assert caught.value.exit_code == 4


def test_out_of_memory_is_said_whatever_else_is_wrong(settings, tmp_path, monkeypatch):
    """Pictures that are gone by then: the packs cannot be looked at, and that is not what ended the run."""
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(picture(number))
    turns = chat("a <image>", "b")["messages"]
    rows = [json.dumps({"images": [str(tmp_path / f"{number}.png")], "messages": turns}) for number in range(2)]
    (tmp_path / "files.jsonl").write_text("\n".join(rows))
    run = start(make_recipe(settings | {"data": str(tmp_path / "files.jsonl")}))

    def full(*args, **kwargs):
        for number in range(2):
            (tmp_path / f"{number}.png").unlink()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(run.trainer, "train", full)
    with pytest.raises(OutOfMemory, match=r"^out of memory in step 1: CUDA out of memory") as caught:
        run.train()
    assert "What would help cannot be said, as the packs cannot be read: " in str(caught.value)


def test_out_of_memory_while_loading_says_so(settings, monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("mantis_lite.training.start.load_model", full)
    with pytest.raises(OutOfMemory, match=r"^out of memory while the model was loaded: CUDA out of memory") as caught:
        start(make_recipe(settings))
    assert "\n  Add to the command:\n    " in str(caught.value)


def test_out_of_memory_while_weights_are_put_into_4_bits_says_so(settings, monkeypatch):
    """transformers catches it there, and says that the weights cannot be converted."""

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("transformers.integrations.bitsandbytes.Bnb4bitQuantize.convert", full)
    with pytest.raises(OutOfMemory, match=r"^out of memory while the model was loaded: .*CUDA out of memory"):
        start(make_recipe(settings | {"method": "qlora"}))
