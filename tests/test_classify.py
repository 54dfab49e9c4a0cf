"""Training a score head as a user runs it, its predictions, and what both leave behind."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips_made import make
from fake_hub import FakeHub
from helpers import SHARED, logs_of, losses, numbers_of, picture, recipe, train
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoImageProcessor
from typer.testing import CliRunner

from mantis_lite import predict as predict_api
from mantis_lite.cli import app
from mantis_lite.data.collate import collate
from mantis_lite.data.encode import IGNORE
from mantis_lite.data.prepare import read_rows
from mantis_lite.errors import DataError, RecipeError, ResumeError, SampleError
from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.head import classifier_of, with_head
from mantis_lite.recipe import PackingRecipe
from mantis_lite.recipe_file import make_recipe
from mantis_lite.report.check import check
from mantis_lite.scoring import predict
from mantis_lite.tiny import tasks
from mantis_lite.training.start import start

REAL = SHARED / "data/mantis-examples/classification/train.json"
GOLDEN = SHARED / "golden/checkpoints"
QUALITIES = "visual quality, dynamic degree, text-to-video alignment, factual consistency, temporal consistency"


def write(path: Path, labels: list, prompt="How is <image> beside <image>?", **more) -> str:
    """Rows of two pictures each; a label is written as it is."""
    rows = []
    for at, label in enumerate(labels):
        names = [f"{path.stem}-{at}-{number}.png" for number in (0, 1)]
        for number, name in enumerate(names):
            (path.parent / name).write_bytes(picture(2 * at + number))
        rows.append({"id": f"row {at}", "images": names, "prompt": f"{prompt} {'x' * at}", "labels": label} | more)
    path.write_text(json.dumps(rows))
    return str(path)


LABELS = {
    "regression": [{"good": at % 3, "fast": float(at)} for at in range(12)],
    "single_label": [("cat", "dog", "cow")[at % 3] for at in range(12)],
    "multi_label": [["a"] * (at % 2) + ["b"] * (at % 3 == 0) for at in range(12)],
}


def settings_of(model, data, run_dir, problem="regression", **more):
    own = {"num_train_epochs": 2, "learning_rate": 3e-3, "samples_per_step": 4, "save_strategy": "no"}
    return {
        "model": str(model),
        "data": data,
        "run_dir": str(run_dir),
        "task": "classify",
        "method": "lora",
        "head": {"problem": problem},
        "packing": {"max_length": 256},
        "train": own | more.pop("train", {}),
    } | more


@pytest.fixture
def settings(llava_folder, tmp_path):
    return settings_of(llava_folder, write(tmp_path / "rows.json", LABELS["regression"]), tmp_path / "run")


@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_a_head_trains_and_predicts_by_itself(llava_folder, tmp_path, problem, method):
    """Train, then score in packs from what the run left: the scores are those of the trained model in memory."""
    data = write(tmp_path / "rows.json", LABELS[problem])
    made = settings_of(llava_folder, {"sources": data, "eval": data}, tmp_path / "run", problem, method=method)
    run = start(make_recipe(made))
    folder = run.train()
    names = {"regression": ["good", "fast"], "single_label": ["cat", "cow", "dog"], "multi_label": ["a", "b"]}[problem]
    config = AutoConfig.from_pretrained(folder)
    assert list(config.id2label.values()) == names and config.problem_type.startswith(problem)
    size = next(size for size in run.sizes if size.part == "head")
    assert size.trainable == size.parameters == 33 * len(names)
    found = predict(tmp_path / "run", [f"data={data}"], metrics=True)
    lines = [json.loads(line) for line in (tmp_path / "run/predictions.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"row {at}" for at in range(12)]
    with torch.no_grad():
        model = run.trainer.model.eval()
        for at, sample in enumerate(run.prepared.held_out):
            batch = collate([run.encoder.encode(sample)], run.encoder.vision.batch)
            alone = model(**{key: value for key, value in batch.items() if key != "labels"}).logits[0]
            np.testing.assert_allclose(found.logits[at], alone, atol=2e-2 if method == "qlora" else 1e-5)
    last = [log for log in logs_of(tmp_path / "run") if "eval_loss" in log][-1]
    name = "mse" if problem == "regression" else "accuracy"
    if method != "qlora":
        assert last[f"eval_{name}"] == pytest.approx(found.metrics[name], abs=1e-4)
    if problem == "regression":
        assert last["eval_loss"] == pytest.approx(last["eval_mse"], rel=1e-5)
        assert set(lines[0]["scores"]) == {"good", "fast"}
    elif problem == "single_label":
        assert lines[0]["label"] == max(lines[0]["probabilities"], key=lines[0]["probabilities"].get)
    else:
        assert lines[0]["labels"] == [name for name, share in lines[0]["probabilities"].items() if share > 0.5]
    assert (tmp_path / "run/predictions.confusion.png").exists() == (problem != "regression")
    assert json.loads((tmp_path / "run/predictions.metrics.json").read_text()) == found.metrics


@pytest.mark.parametrize("problem", LABELS)
def test_a_step_of_several_packs_is_a_step_of_one(llava_folder, tmp_path, problem):
    """The same samples in one pack, in packs of some, and one by one: the same losses and the same head."""
    data, found = write(tmp_path / "rows.json", LABELS[problem]), []
    for name, length, enabled in (("one", 4000, True), ("some", 256, True), ("each", 4000, False)):
        packing = {"max_length": length, "enabled": enabled}
        own = {"samples_per_step": 12, "num_train_epochs": 3, "weight_decay": 0.0, "optim_args": None}
        made = settings_of(llava_folder, data, tmp_path / name, problem, packing=packing, train=own)
        folder = train(make_recipe(made))
        found.append((losses(tmp_path / name), load_file(folder / "adapter_model.safetensors")))
    (one, head), *others = found
    assert len(one) == 3
    for other, weights in others:
        np.testing.assert_allclose(other, one, rtol=1e-5)
        for key, value in head.items():
            torch.testing.assert_close(weights[key], value, rtol=1e-3, atol=1e-4)


def test_measure_is_the_length_of_encode(checkpoint_of, family, tmp_path):
    data = write(tmp_path / "rows.json", LABELS["regression"])
    for media in ({}, {"num_frames": 2, "frame_label": "{number}"}):
        encoder = checkpoint_of(family).encoder(recipe(task="classify", head={"problem": "regression"}, media=media))
        samples = read_rows(make_recipe(settings_of("m", data, "r")).data, PackingRecipe(), encoder, "classify").train
        for sample, (tokens, _), images in zip(samples, samples.lengths, samples.images, strict=True):
            encoded = encoder.encode(sample)
            assert (len(encoded), len(encoded.pixels)) == (tokens, images) and (encoded.labels == IGNORE).all()


def test_an_encoder_leaves_those_before_it_as_they_were(folder_of, tmp_path):
    """They share a tokenizer, which takes "<image>" for a token unless it is told not to."""
    checkpoint = open_checkpoint(recipe(folder_of("qwen2_vl")).model)
    first = checkpoint.encoder(recipe())
    ids = first.tokenizer.encode("<|image_pad|>", add_special_tokens=False).ids
    for head in ({"problem": "regression"}, {"problem": "regression", "labels": ["a"], "score": "special_tokens"}):
        checkpoint.encoder(recipe(task="classify", head=head))
        assert (
            first.tokenizer.encode("<|image_pad|>", add_special_tokens=False).ids
            == ids
            != [first.token_id("<|image_pad|>")]
        )


def test_what_trains_moves_and_nothing_else_does(settings, tmp_path):
    run = start(make_recipe(settings | {"trainable": {"projector": "full"}}))
    before = {name: weight.detach().clone() for name, weight in run.trainer.model.named_parameters()}
    run.train()
    moved = {name for name, weight in run.trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert moved == {name for name, weight in run.trainer.model.named_parameters() if weight.requires_grad}
    kinds = ("score", "projector", "lora_A", "lora_B")
    assert all(any(kind in name for name in moved) for kind in kinds)
    assert not [name for name in moved if not any(kind in name for kind in kinds)]


def test_every_family_trains_and_scores(folder_of, family, tmp_path):
    data = write(tmp_path / "rows.json", LABELS["single_label"], prompt="<image><image>?")
    made = settings_of(folder_of(family), data, tmp_path / "run", "single_label", packing={"max_length": 600})
    train(make_recipe(made))
    found = predict(tmp_path / "run", [f"data={data}"])
    alone = predict(tmp_path / "run", [f"data={data}", "packing=off"], output=tmp_path / "alone.jsonl")
    np.testing.assert_allclose(found.logits, alone.logits, atol=1e-5)
    assert np.ptp(found.logits, axis=0).min() > 1e-3


def test_an_adapter_and_its_head_load_with_plain_peft(settings, tmp_path):
    """In a process that knows the class alone, not the trainer; and the head is that of the run."""
    run = start(make_recipe(settings))
    folder = run.train()
    found = predict(tmp_path / "run", [f"data={settings['data']}"])
    batch = collate([run.encoder.encode(run.prepared.train[0])], run.encoder.vision.batch)
    del batch["labels"]
    processor = AutoImageProcessor.from_pretrained(settings["model"], backend="pil")
    batch["pixel_values"] = torch.from_numpy(numbers_of(batch["pixel_values"].numpy(), processor))
    torch.save(batch, tmp_path / "batch.pt")
    script = f"""
import torch
from peft import PeftModel
from transformers import AutoConfig
from mantis_lite.models.head import LlavaForSequenceClassification
config = AutoConfig.from_pretrained({str(folder)!r})
model = LlavaForSequenceClassification.from_pretrained({settings["model"]!r}, config=config)
model = PeftModel.from_pretrained(model, {str(folder)!r}).eval()
batch = torch.load({str(tmp_path / "batch.pt")!r})
print(model(**batch).logits[0].tolist())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout.splitlines()[-1]), found.logits[0], atol=1e-4)


def test_clips_and_pictures_are_scored(llava_folder, tmp_path):
    clip = make(tmp_path / "clip.mp4", frames=20)
    rows = [{"prompt": "Fast? <video>", "video": clip.name, "labels": {"fast": at % 2}} for at in range(4)]
    rows += [{"prompt": "Fast?", "videos": [clip.name], "labels": {"fast": at}} for at in range(2)]
    rows += [{"prompt": "Fast?", "images": ["still.png"], "labels": {"fast": 2}}]
    (tmp_path / "still.png").write_bytes(picture(1))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    made = settings_of(llava_folder, str(tmp_path / "rows.json"), tmp_path / "run", media={"num_frames": 3})
    run = start(make_recipe(made))
    assert run.prepared.train.images.tolist() == [3, 3, 3, 3, 3, 3, 1]
    run.train()
    found = predict(tmp_path / "run", [f"data={tmp_path / 'rows.json'}"])
    assert len(found.samples) == 7 and np.allclose(found.logits[0], found.logits[1], atol=1e-5)


def test_a_token_of_its_own_for_each_label(folder_of, tmp_path):
    """Upstream's for Qwen2-VL: their embeddings learn, where no other does, and are kept with the adapter."""
    data = write(tmp_path / "rows.json", LABELS["regression"], prompt="<image><image>?")
    head = {"problem": "regression", "labels": ["good", "fast"], "score": "special_tokens"}
    made = settings_of(folder_of("qwen2_vl"), data, tmp_path / "run", head=head, packing={"max_length": 600})
    run = start(make_recipe(made))
    text = run.encoder.tokenizer.decode(run.encoder.encode(run.prepared.train[0]).input_ids.tolist(), False)
    assert text.count("The score for good is <|LABEL_1|>. The score for fast is <|LABEL_2|>. ") == 1
    ids = run.head.score_token_ids
    embeddings = run.trainer.model.get_input_embeddings()
    folder = run.train()
    weights = load_file(folder / "adapter_model.safetensors")
    (rows,) = (value for key, value in weights.items() if "trainable_tokens" in key)
    assert len(rows) == len(ids) == 2
    found = predict(tmp_path / "run", [f"data={data}"])
    alone = predict(tmp_path / "run", [f"data={data}", "packing=off"], output=tmp_path / "alone.jsonl")
    np.testing.assert_allclose(found.logits, alone.logits, atol=1e-5)
    assert embeddings is not None and losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]
    other = made | {"model": {"name": made["model"], "adapter": str(folder)}, "run_dir": str(tmp_path / "other")}
    with pytest.raises(RecipeError, match=r"head.score: last_token, and the head of .* reads its labels otherwise"):
        start(make_recipe(other | {"head": head | {"score": "last_token"}}))
    full = {"method": "full", "run_dir": str(tmp_path / "full")}
    train(make_recipe(made | full))
    run, model = (
        predict(tmp_path / name, [f"data={data}"], output=tmp_path / "p.jsonl") for name in ("full", "full/model")
    )
    np.testing.assert_allclose(run.logits, model.logits, atol=1e-6)


def test_a_tokenizer_without_tokens_to_spare_is_refused(llava_folder, tmp_path):
    head = {"problem": "regression", "labels": ["good", "fast"], "score": "special_tokens"}
    data = write(tmp_path / "rows.json", LABELS["regression"])
    message = (
        r"head.score: special_tokens needs 2 tokens more .*, and the model has \d+ embeddings, all in use\n  Set head"
    )
    with pytest.raises(RecipeError, match=message):
        start(make_recipe(settings_of(llava_folder, data, tmp_path / "run", head=head)))


def test_class_weights_are_those_of_the_classes(llava_folder, tmp_path):
    data = write(tmp_path / "rows.json", ["cat"] * 9 + ["dog"] * 3)
    head = {"problem": "single_label", "class_weights": "balanced"}
    run = start(make_recipe(settings_of(llava_folder, data, tmp_path / "run", head=head)))
    assert run.trainer.model.config.class_weights == pytest.approx([12 / 18, 2.0])
    weighted = [{"path": data}, {"path": write(tmp_path / "dogs.json", ["dog"] * 3), "weight": 2.0}]
    run = start(make_recipe(settings_of(llava_folder, weighted, tmp_path / "weighted", head=head)))
    assert run.trainer.model.config.class_weights == pytest.approx([18 / 18, 18 / 18])
    several = write(tmp_path / "several.json", [["a"] * (at < 3) + ["b"] * (at < 6) + ["c"] for at in range(12)])
    head = {"problem": "multi_label", "class_weights": "balanced"}
    run = start(make_recipe(settings_of(llava_folder, several, tmp_path / "other", head=head)))
    assert run.trainer.model.config.class_weights == pytest.approx([3.0, 1.0, 1.0])


def test_a_picture_that_breaks_later_leaves_a_pack_without_a_target(settings, tmp_path, llava_folder):
    """Alone in its pack: a stand-in without target takes its place, and the step's loss is the others'."""
    data = write(tmp_path / "rows.json", [{"a": at} for at in range(4)])
    whole = (tmp_path / "rows-2-0.png").read_bytes()
    (tmp_path / "rows-2-0.png").write_bytes(whole[: len(whole) // 2])
    packing = {"enabled": False}
    own = {"max_steps": 1, "samples_per_step": 4, "num_train_epochs": 1}
    skipping = {"sources": data, "on_bad_row": "skip"}
    train(make_recipe(settings_of(llava_folder, skipping, tmp_path / "run", packing=packing, train=own)))
    rejects = (tmp_path / "run/rejects.jsonl").read_text().splitlines()
    assert [json.loads(line)["where"] for line in rejects] == ["rows.json:3"]
    kept = write(tmp_path / "kept.json", [{"a": at} for at in range(4)])
    rows = [row for at, row in enumerate(json.loads(Path(kept).read_text())) if at != 2]
    Path(kept).write_text(json.dumps(rows))
    own |= {"samples_per_step": 3}
    train(make_recipe(settings_of(llava_folder, kept, tmp_path / "other", packing=packing, train=own)))
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "other"), rel=1e-5)
    with pytest.raises(SampleError, match=r'rows.json:3 \(id "row 2"\)'):
        predict(tmp_path / "run", [f"data={data}", "data.on_bad_row=error"])
    found = predict(tmp_path / "run", [f"data={data}"])
    assert found.samples == [0, 1, 3] and [error.where for error in found.prepared.rejects] == ["rows.json:3"]
    assert json.loads((tmp_path / "run/predictions.rejects.jsonl").read_text())["where"] == "rows.json:3"
    rows = json.loads(Path(data).read_text())
    Path(data).write_text(json.dumps([rows[2], rows[2], rows[0]]))
    with pytest.raises(DataError, match="2 of 3 rows cannot be used"):
        predict(tmp_path / "run", [f"data={data}"])
    Path(data).write_text(json.dumps([rows[2]]))
    with pytest.raises(DataError, match=r"no row could be scored; the first is\n  rows.json:1"):
        predict(tmp_path / "run", [f"data={data}"])


def test_a_run_stopped_at_a_checkpoint_goes_on_as_if_it_had_not(settings, tmp_path):
    from test_train import stopped

    train(make_recipe(settings))
    saving = settings["train"] | {"save_strategy": "steps", "save_steps": 3}
    recipe = make_recipe(settings | {"run_dir": str(tmp_path / "resumed"), "train": saving})
    stopped(recipe, 3)
    train(recipe)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "resumed"), rtol=1e-6)


def test_a_run_goes_on_with_the_labels_it_was_started_with(llava_folder, tmp_path):
    from test_train import stopped

    saving = {"save_strategy": "steps", "save_steps": 2}
    data = write(tmp_path / "rows.json", ["cat", "dog", "cow"] * 4)
    made = make_recipe(settings_of(llava_folder, data, tmp_path / "run", "single_label", train=saving))
    stopped(made, 2)
    assert json.loads((tmp_path / "run/labels.json").read_text())["names"] == ["cat", "cow", "dog"]
    write(tmp_path / "rows.json", ["cat", "dog", "ant"] * 4)
    with pytest.raises(
        ResumeError, match=r"holds a run that scores cat, cow, dog, and the data has ant, cat, dog\n  State"
    ):
        train(made)
    train(made, from_scratch=True)


def test_scores_that_are_not_finite_are_no_predictions(settings, tmp_path):
    folder = train(make_recipe(settings))
    weights = load_file(folder / "adapter_model.safetensors")
    (bias,) = (key for key in weights if key.endswith("score.bias"))
    weights[bias] = weights[bias].clone().fill_(torch.inf)
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match="not finite"):
        predict(tmp_path / "run", [f"data={settings['data']}"])


def test_an_adapter_without_a_head_scores_nothing(settings, tmp_path):
    chat = tmp_path / "chat.json"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat.write_text(json.dumps([{"messages": turns}] * 4))
    made = settings | {"task": "chat", "head": {}, "data": str(chat), "run_dir": str(tmp_path / "chat")}
    folder = train(make_recipe(made))
    again = settings | {"model": {"name": settings["model"], "adapter": str(folder)}}
    with pytest.raises(
        RecipeError, match=r"model.adapter: .*adapter has no score head, so it is not one of task=classify"
    ):
        start(make_recipe(again))


# A head that is there already.


@pytest.fixture(scope="session")
def scored_folder(folder_of, tmp_path_factory):
    """A published model with a head of two labels that it does not name, as VideoScore is."""
    folder = shutil.copytree(folder_of("idefics2"), tmp_path_factory.mktemp("scored") / "model")
    checkpoint = open_checkpoint(recipe(folder).model)
    from mantis_lite.data.labels import Labels

    config = with_head(checkpoint.config, Labels("regression", ("LABEL_0", "LABEL_1")))
    torch.manual_seed(1)
    classifier_of(config)(config).save_pretrained(folder)
    return folder


def test_a_published_head_scores(scored_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = write(tmp_path / "rows.json", LABELS["regression"])
    found = predict(scored_folder, [f"data={data}"])
    assert found.file == Path("predictions.jsonl") and found.labels.names == ("LABEL_0", "LABEL_1")
    named = predict_api(str(scored_folder), [f"data={data}", "head.labels=[good, fast]"], metrics=True)
    assert named.labels.names == ("good", "fast") and named.metrics["mse/good"] > 0
    with pytest.raises(SampleError, match="the label 'good' is none of LABEL_0, LABEL_1"):
        predict(scored_folder, [f"data={data}"], metrics=True)


def test_a_head_is_pushed_and_loaded_from_the_hub(scored_folder, tmp_path):
    """As any model of transformers is; the hub is one on this machine, and the process one of its own."""
    (tmp_path / "hub").mkdir()
    script = f"""
import torch
from mantis_lite.models.head import Idefics2ForSequenceClassification as Model
model = Model.from_pretrained({str(scored_folder)!r})
model.push_to_hub("user/scores")
again = Model.from_pretrained("user/scores")
assert all(torch.equal(weight, again.state_dict()[name]) for name, weight in model.state_dict().items())
assert again.config.id2label == model.config.id2label
"""
    with FakeHub(tmp_path / "hub") as hub:
        away = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_x",
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=os.environ | away)
    assert done.returncode == 0, done.stderr
    pushed = load_file(tmp_path / "hub/models/user/scores/model.safetensors")
    assert {"score.weight", "score.bias"} <= pushed.keys()


def test_a_published_head_is_trained_on(scored_folder, tmp_path):
    data = write(tmp_path / "rows.json", LABELS["regression"])
    base = settings_of(scored_folder, data, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"head.labels: the head of .* has 2 labels and does not name them\n  State"):
        start(make_recipe(base))
    with pytest.raises(RecipeError, match=r"head.labels: a, b, c, and the head of .* scores LABEL_0, LABEL_1"):
        start(make_recipe(base | {"head": {"problem": "regression", "labels": ["a", "b", "c"]}}))
    with pytest.raises(RecipeError, match=r"head.problem: multi_label, and the head of .* was trained for regression"):
        start(make_recipe(base | {"head": {"problem": "multi_label", "labels": ["good", "fast"]}}))
    own = {"max_steps": 1, "learning_rate": 1e-30}
    head = {"problem": "regression", "labels": ["fast", "good"]}
    run = start(make_recipe(base | {"head": head, "train": base["train"] | own}))
    before = load_file(scored_folder / "model.safetensors")["score.weight"]
    assert torch.equal(run.trainer.model.get_base_model().score.weight, before)
    folder = run.train()
    again = {"model": {"name": str(scored_folder), "adapter": str(folder)}, "run_dir": str(tmp_path / "again")}
    went_on = start(make_recipe(base | again))  # the adapter names them
    assert went_on.prepared.labels.names == ("fast", "good")
    with pytest.raises(RecipeError, match=r"head.labels: good, fast, and the head of .*adapter scores fast, good"):
        start(
            make_recipe(base | again | {"head": head | {"labels": ["good", "fast"]}, "run_dir": str(tmp_path / "no")})
        )


def test_a_full_run_is_a_model_to_go_on_with(llava_folder, tmp_path):
    data = write(tmp_path / "rows.json", LABELS["single_label"])
    train(make_recipe(settings_of(llava_folder, data, tmp_path / "run", "single_label", method="full")))
    folder = tmp_path / "run/model"
    again = start(make_recipe(settings_of(folder, data, tmp_path / "again", "single_label")))
    assert again.prepared.labels.names == ("cat", "cow", "dog")
    ours, run = (
        predict(folder, [f"data={data}"], output=tmp_path / "p.jsonl"),
        predict(tmp_path / "run", [f"data={data}"]),
    )
    np.testing.assert_allclose(ours.logits, run.logits, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "unfinished",
            "the run is not finished\n  Train it to its end, `mantis-lite train`, or name one of its checkpoints.",
        ),
        ("model", "has no score head\n  Name a run of task=classify, or a model that has one."),
    ],
)
def test_what_has_no_scores(llava_folder, tmp_path, source, message, monkeypatch):
    from mantis_lite.recipe_file import save_recipe

    data = write(tmp_path / "rows.json", LABELS["regression"])
    folder = llava_folder if source == "model" else tmp_path / source
    if source != "model":
        folder.mkdir()
        save_recipe(make_recipe(settings_of(llava_folder, data, folder)), folder / "recipe.yaml")
    with pytest.raises(RecipeError) as caught:
        predict(folder, [f"data={data}"], output=tmp_path / "p.jsonl")
    assert str(caught.value) == f"{folder}: {message}"


def test_predictions_go_where_there_is_a_folder(scored_folder, tmp_path):
    data = write(tmp_path / "rows.json", LABELS["regression"])
    with pytest.raises(RecipeError, match=r"--output: .*rows.json holds the rows to score\n  Name another file."):
        predict(scored_folder, [f"data={data}"], output=tmp_path / "rows.json")
    with pytest.raises(RecipeError, match=r"--output: there is no folder .*no\n  Make it, or name another."):
        predict(scored_folder, [f"data={data}"], output=tmp_path / "no/p.jsonl")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "data: no rows to score were given\n  Add data=new.json."),
        (
            ["data=x", "lora.r=8"],
            "lora.r: has no effect on predictions\n  Set only data, packing, media, memory, head.lab",
        ),
        (["data=x", "model.name=y"], "model.name: has no effect on predictions"),
    ],
)
def test_what_predictions_do_not_depend_on_is_refused(scored_folder, words, message):
    with pytest.raises(RecipeError) as caught:
        predict(scored_folder, words)
    assert str(caught.value).startswith(message)


def test_an_adapter_s_folder_scores_as_its_run(settings, tmp_path):
    folder = train(make_recipe(settings))
    words = [f"data={settings['data']}"]
    expected = predict(tmp_path / "run", words)
    np.testing.assert_array_equal(predict(folder, words, output=tmp_path / "p.jsonl").logits, expected.logits)
    alone = shutil.copytree(folder, tmp_path / "alone")
    found = predict(alone, [*words, f"model={settings['model']}"], output=tmp_path / "p.jsonl")
    np.testing.assert_array_equal(found.logits, expected.logits)


def test_rows_need_no_labels_to_be_scored(scored_folder, tmp_path):
    data = write(tmp_path / "rows.json", [None] * 3)
    assert len(predict(scored_folder, [f"data={data}"], output=tmp_path / "p.jsonl").samples) == 3
    with pytest.raises(DataError, match="the row has no labels"):
        predict(scored_folder, [f"data={data}", "head.labels=[a, b]"], metrics=True, output=tmp_path / "p.jsonl")
    broken = json.dumps([{"prompt": 3}, {"prompt": 4}])
    (tmp_path / "broken.json").write_text(broken)
    with pytest.raises(DataError, match="2 of 2 rows cannot be used"):
        predict(
            scored_folder, [f"data={tmp_path / 'broken.json'}", "data.on_bad_row=skip"], output=tmp_path / "p.jsonl"
        )


def test_check_shows_a_prompt_and_its_target(llava_folder, tmp_path):
    for problem, shown in (("regression", "good 0, fast 0"), ("single_label", "cat")):
        data = write(tmp_path / f"{problem}.json", LABELS[problem])
        found = check(make_recipe(settings_of(llava_folder, data, tmp_path / "run", problem))).outlook
        assert found.target == shown and found.trained_tokens == 0
    words = [f"data={data}", f"model={llava_folder}", "head.problem=single_label", "media.image_splitting=null"]
    said = CliRunner().invoke(app, ["check", "classify", *words])
    assert said.exit_code == 0, said.exception
    assert "labels, single_label: cat, cow, dog" in said.output
    assert "single_label.json:1 to be scored cat:" in said.output


# On real rows, and learning.


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the real rows are not beside this checkout")
@pytest.mark.parametrize("name", ["classify", "classify-idefics2-qlora", "classify-idefics2-full"])
def test_the_real_rows_train_end_to_end(folder_of, tmp_path, name):
    model = GOLDEN / "idefics2" if GOLDEN.exists() else folder_of("idefics2")
    run = tmp_path / "run"
    words = [f"data={REAL}", f"model={model}", f"run_dir={run}", "train.save_strategy=no", "launch.strategy=single"]
    words += ["train.samples_per_step=12", "train.learning_rate=3e-3", "train.num_train_epochs=2"]
    done = CliRunner().invoke(app, ["train", name, *words])
    assert done.exit_code == 0, (done.output, done.exception)
    assert "60 rows read, 60 to train on, 0 rejected" in done.output
    assert f"labels, regression: {QUALITIES}" in done.output
    assert losses(run)[-1] < losses(run)[0] / 2
    said = CliRunner().invoke(app, ["predict", str(run), f"data={REAL}", "--metrics"])
    assert said.exit_code == 0, (said.output, said.exception)
    assert "60 predictions" in said.output and "not defined" in said.output  # every row has the same labels


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.exists(), reason="the golden fixtures are not beside this checkout")
def test_videoscores_layout_scores_as_recorded(tmp_path, monkeypatch):
    """The original's own rows through its own checkpoint, packed, by the command a user types."""
    monkeypatch.chdir(tmp_path)
    records = json.loads((GOLDEN.parent / "forward/idefics2_seqcls.json").read_text())["cases"]
    rows = [record["sample"] for record in records.values() if len(set(record["label_names"])) == 5]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data = f"[{{path: {tmp_path / 'rows.json'}, media_dir: {REAL.parent}}}]"
    found = predict(GOLDEN / "idefics2_seqcls", [f"data={data}"])
    expected = np.array([record["logits"] for record in records.values()])
    np.testing.assert_allclose(found.logits, expected, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("exercise", "as_row", "problem", "metric"),
    [
        (tasks.odd_one_out, tasks.class_row, "single_label", "accuracy"),
        (tasks.how_many_alike, tasks.number_row, "regression", "spearman"),
    ],
    ids=["classes", "numbers"],
)
def test_tiny_mantis_learns(tmp_path, exercise, as_row, problem, metric):
    """Four pictures and a question that it was not brought up to be scored on: right nine times in ten on new ones."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    tasks.write(tmp_path, rows=3000, held_out=200, seed=0, exercise=exercise, as_row=as_row)
    own = {"num_train_epochs": 3, "learning_rate": 2e-3, "warmup_steps": 20, "samples_per_step": 16}
    own |= {"lr_scheduler_type": "cosine", "logging_steps": 10}
    made = settings_of("tiny", str(tmp_path / "train.jsonl"), tmp_path / "run", problem, packing={"max_length": 2200})
    train(make_recipe(made | {"train": made["train"] | own}))
    found = predict(tmp_path / "run", [f"data={tmp_path / 'held_out.jsonl'}"], metrics=True)
    torch.set_num_threads(threads)
    assert found.metrics[metric] >= 0.9
