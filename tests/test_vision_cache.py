"""Features kept of pictures: the same losses as with the pictures, computed once, and never those of something else."""

import json
import re
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from clips_made import make
from families import FAMILIES
from helpers import chat, losses, picture, recipe, train, write_rows
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.data.collate import collate
from mantis_lite.data.features import Features
from mantis_lite.data.lengths import cache_dir
from mantis_lite.data.sample import Frame, Image
from mantis_lite.data.schema import parse
from mantis_lite.errors import DiskError, RecipeError, SampleError
from mantis_lite.generate import answer
from mantis_lite.models.adapters import make_trainable
from mantis_lite.models.cacheable import trained_parts
from mantis_lite.models.load import load_model
from mantis_lite.models.vision_cache import VisionCache
from mantis_lite.recipe_file import make_recipe
from mantis_lite.report.check import check
from mantis_lite.training.callbacks import Aside
from mantis_lite.training.start import start

TOWERS = [family for family in FAMILIES if family != "fuyu"]
SPLIT = {"image_splitting": True}
EACH = [
    *((family, "frozen", {}) for family in TOWERS),
    *((family, "full", {}) for family in ("llava", "idefics2", "idefics3")),
    *((family, "adapter", {}) for family in ("llava", "idefics2")),
    *(("idefics2", how, SPLIT) for how in ("frozen", "full")),
]
ROWS = [
    chat("What is <image> beside <image><image>?", "small red circle", images=(1, 2, 3)),
    chat("Only words.", "No picture"),
    chat("<image> again, and <image>?", "a dog", images=(2, 6)),
]


def cache_of(checkpoint, settings):
    return VisionCache(checkpoint, settings, checkpoint.encoder(settings), trained_parts(settings))


def never(error: SampleError) -> None:
    raise error


def losses_of(model, encoder, vision, samples) -> list[float]:
    """A pack's losses while everything that trains learns from it."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    for _ in range(3):
        batch = collate([encoder.encode(sample) for sample in samples], vision.batch)
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize(("name", "projector", "media"), EACH, ids=str)
def test_learning_from_features_is_learning_from_pictures(checkpoint_of, name, projector, media):
    """For each family, with the projector's output kept or, where it trains, the tower's."""
    checkpoint = checkpoint_of(name)
    samples, found = [parse(row, "rows:1", None) for row in ROWS], {}
    for kind in ("off", "disk"):
        memory = {"vision_cache": kind, "checkpointing": "full"}
        settings = recipe(memory=memory, trainable={"projector": projector}, media=media)
        torch.manual_seed(0)
        model = make_trainable(load_model(checkpoint, settings), settings, checkpoint.family)
        encoder = checkpoint.encoder(settings)
        vision = encoder.vision
        if kind != "off":
            cache = cache_of(checkpoint, settings)
            cache.fill(model, [(samples, range(len(samples)))], never)
            for parameter in cache.unread(model):
                parameter.data.fill_(torch.nan)  # whatever stands there: it is not read
            encoder, vision = cache.encoder, cache.vision
        found[kind] = losses_of(model, encoder, vision, samples)
    assert found["off"][-1] < found["off"][0]
    np.testing.assert_allclose(found["disk"], found["off"], atol=1e-5)


@pytest.fixture
def settings(llava_folder, tmp_path):
    rows = [chat(f"what is <image><image> number {i}?", f"number {i} is red", images=(i % 5, i)) for i in range(6)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    return {
        "model": str(llava_folder),
        "data": {"sources": data, "eval": data},
        "run_dir": str(tmp_path / "run"),
        "method": "lora",
        "packing": {"max_length": 512},
        "memory": {"vision_cache": "disk"},
        "train": {"num_train_epochs": 2, "learning_rate": 3e-3, "samples_per_step": 4, "save_strategy": "no"},
    }


OFF = {"memory": {"vision_cache": "off"}}


def trained(made: dict):
    """A run that has trained."""
    run = start(make_recipe(made))
    run.trainer.train()
    return run


def kept_in() -> list[Path]:
    """The files of features that there are."""
    return sorted((cache_dir() / "features").glob("*/*.safetensors"))


class Tower:
    """Counts the pictures that a run's tower is given."""

    def __init__(self, monkeypatch) -> None:
        self.seen, own = 0, VisionCache._compute

        def counted(cache, *given):
            self.seen += 1
            return own(cache, *given)

        monkeypatch.setattr(VisionCache, "_compute", counted)


@pytest.fixture
def tower(monkeypatch):
    return Tower(monkeypatch)


def test_a_run_without_packing_is_the_same(settings, tmp_path):
    """Evaluation and accumulation included; and the tower is not read in it."""
    made = settings | {"packing": "off"}
    plain = trained(made | OFF)
    run = start(make_recipe(made | {"run_dir": str(tmp_path / "cached"), "train": made["train"] | WORKERS}))
    assert re.fullmatch(
        r"vision cache: 6 pictures, 6 of them new, 0\.0 MB in .*/features/[0-9a-f]{32}", run.notices[-1]
    )
    reads = Reads(run)
    run.trainer.add_callback(reads)
    run.trainer.train()
    assert reads.tower == 0
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "run"), atol=1e-5)
    evaluated = [
        [log["eval_loss"] for log in run.trainer.state.log_history if "eval_loss" in log] for run in (plain, run)
    ]
    assert len(evaluated[0]) == 2
    np.testing.assert_allclose(*evaluated, atol=1e-5)
    with torch.no_grad():  # with pixels, as before: what generation and predictions give the model
        batch = collate([run.encoder.encode(run.prepared.train[0])], run.encoder.vision.batch)
        plain_loss, loss = (of.trainer.model(**batch).loss for of in (plain, run))
    torch.testing.assert_close(loss, plain_loss, rtol=0, atol=1e-5)
    question = replace(run.prepared.train[0], turns=run.prepared.train[0].turns[:1])
    said = [answer(of.trainer.model, of.encoder, question, max_new_tokens=4) for of in (plain, run)]
    assert said[0] == said[1]


WORKERS = {"dataloader_num_workers": 1}


class Reads(TrainerCallback):
    """Counts the vision tower's forward passes from the first step to the last."""

    def __init__(self, run) -> None:
        self.tower = 0
        self.module = run.trainer.model.get_base_model().model.vision_tower

    def on_train_begin(self, args, state, control, **kwargs):
        self.hook = self.module.register_forward_pre_hook(lambda *_: setattr(self, "tower", self.tower + 1))

    def on_train_end(self, args, state, control, **kwargs):
        self.hook.remove()


def test_what_leaves_the_gpu_is_what_no_step_reads(settings):
    run = start(make_recipe(settings))
    (aside,) = [callback for callback in run.trainer.callback_handler.callbacks if isinstance(callback, Aside)]
    moved = {id(parameter) for parameter in aside.parameters}
    names = [name for name, parameter in run.trainer.model.named_parameters() if id(parameter) in moved]
    assert all("vision_tower" in name or "multi_modal_projector" in name for name in names)
    left = {name for name, parameter in run.trainer.model.named_parameters() if id(parameter) not in moved}
    (first,) = [name for name in left if "vision_tower" in name or "multi_modal_projector" in name]
    assert first == next(name for name, _ in run.trainer.model.named_parameters())


def test_a_second_run_computes_nothing(settings, tmp_path, tower, monkeypatch):
    start(make_recipe(settings))
    assert tower.seen == 6
    monkeypatch.setattr("mantis_lite.data.media.open_image", None)  # no picture is decoded either
    run = trained(settings | {"run_dir": str(tmp_path / "second")})
    assert tower.seen == 6 and "6 pictures, 0 of them new" in run.kept


def test_a_stopped_run_goes_on_with_what_is_kept(settings, tmp_path, tower):
    trained(settings)
    saving = settings["train"] | {"save_strategy": "steps", "save_steps": 2}
    made = make_recipe(settings | {"run_dir": str(tmp_path / "resumed"), "train": saving})
    stopped = start(made)
    stopped.trainer.add_callback(StopAt2())
    stopped.trainer.train()
    train(made)
    assert tower.seen == 6
    np.testing.assert_allclose(losses(tmp_path / "resumed"), losses(tmp_path / "run"), rtol=1e-6)


class StopAt2(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 2


def test_full_fine_tuning_keeps_the_tower_that_it_saves(settings, tmp_path, llava_folder):
    """With its projector trained on what the tower gave."""
    made = settings | {"method": "full"}
    trained(made | OFF)
    folder = train(make_recipe(made | {"run_dir": str(tmp_path / "cached")}))
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "run"), atol=1e-5)
    before, after = load_file(llava_folder / "model.safetensors"), load_file(folder / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before if "vision_tower" in key)


def test_parts_in_4_bits_are_kept_as_they_compute(settings, tmp_path):
    for kind in ("off", "memory"):
        memory = {"vision_cache": kind, "quantize": ["language_model", "projector", "vision_tower"]}
        trained(settings | {"method": "qlora", "memory": memory, "run_dir": str(tmp_path / kind)})
    np.testing.assert_allclose(losses(tmp_path / "memory"), losses(tmp_path / "off"), atol=1e-4)


def test_a_score_head_learns_the_same(folder_of, tmp_path):
    names = [f"{at}.png" for at in range(6)]
    for at, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(at))
    rows = [{"images": [names[at % 6], names[at // 2]], "prompt": "How?", "label": "ab"[at % 2]} for at in range(8)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = {}
    for kind in ("off", "memory"):
        made = {
            "data": {"sources": str(tmp_path / "rows.json"), "eval": str(tmp_path / "rows.json")},
            "run_dir": str(tmp_path / kind),
            "task": "classify",
            "head": {"problem": "single_label"},
            "trainable": {"projector": "adapter"},
            "memory": {"vision_cache": kind},
            "train": {"num_train_epochs": 2, "learning_rate": 3e-3, "samples_per_step": 4, "save_strategy": "no"},
        }
        run = start(recipe(folder_of("idefics2"), **made))
        run.trainer.train()
        found[kind] = (
            losses(tmp_path / kind),
            [h["eval_loss"] for h in run.trainer.state.log_history if "eval_loss" in h],
        )
    for cached, plain in zip(found["memory"], found["off"], strict=True):
        np.testing.assert_allclose(cached, plain, atol=1e-5)


def test_frames_of_clips_are_kept_by_their_place(folder_of, tmp_path, tower):
    make(tmp_path / "a.mp4")
    shutil.copy(tmp_path / "a.mp4", tmp_path / "same.mp4")
    turns = [{"role": "user", "content": "<video>What happens?"}, {"role": "assistant", "content": "It moves"}]
    clips = ["a.mp4", {"path": "same.mp4"}, {"path": "a.mp4", "start": 0.6}]
    (tmp_path / "rows.json").write_text(json.dumps([{"video": clip, "messages": turns} for clip in clips]))
    found = {}
    for kind in ("off", "disk"):
        made = {"data": str(tmp_path / "rows.json"), "run_dir": str(tmp_path / kind), "memory": {"vision_cache": kind}}
        own = {"num_train_epochs": 2, "learning_rate": 3e-3, "samples_per_step": 3, "save_strategy": "no"}
        start(recipe(folder_of("llava"), task="video", media={"num_frames": 3}, train=own, **made)).trainer.train()
        found[kind] = losses(tmp_path / kind)
    np.testing.assert_allclose(found["disk"], found["off"], atol=1e-5)
    assert tower.seen == 6, "three frames of the clip, whatever its name, and three of its end"


def refill(checkpoint, settings, samples, change=lambda model: None) -> VisionCache:
    cache, model = cache_of(checkpoint, settings), load_model(checkpoint, settings)
    change(model)
    cache.fill(model, [(samples, range(len(samples)))], never)
    return cache


DISK = {"vision_cache": "disk"}


def test_what_made_features_is_part_of_their_name(checkpoint_of, folder_of, tower):
    """Other bytes, processor settings, sizes, weights or precision: nothing of before is taken."""
    checkpoint, samples = checkpoint_of("idefics2"), [parse(row, "rows:1", None) for row in ROWS]
    steps = [
        (4, {}),
        (0, {}),
        (
            1,
            {
                "samples": [
                    parse(chat("<image>", "x", images=(1,)), "a:1", None),
                    parse(chat("x", "y", images=(9,)), "a:2", None),
                ]
            },
        ),
        (4, {"settings": recipe(memory=DISK, media={"max_image_size": 50})}),
        (4, {"settings": recipe(memory=DISK, media=SPLIT)}),
        *([(4, {"settings": recipe(memory=DISK, media={"backend": "fast"})})] if find_spec("simplejpeg") else ()),
        (4, {"settings": recipe(memory=DISK, trainable={"projector": "full"})}),
        (4, {"change": lambda model: nudge(model.model.vision_model)}),
        (4, {"change": lambda model: nudge(model.model.connector)}),
        (0, {"change": lambda model: nudge(model.model.text_model)}),
        (0, {"settings": recipe(memory=DISK, lora={"r": 4}, packing={"max_length": 99})}),
        (4, {"checkpoint": replace(checkpoint, image_processor=darker(folder_of("idefics2")))}),
    ]
    for number, (new, more) in enumerate(steps):
        before = tower.seen
        given = {"checkpoint": checkpoint, "settings": recipe(memory=DISK), "samples": samples} | more
        refill(**given)
        assert tower.seen - before == new, number


def nudge(module) -> None:
    parameter = list(module.parameters())[-1]
    parameter.data.view(-1)[0] += 1e-3


def darker(folder):
    from transformers import AutoImageProcessor

    return AutoImageProcessor.from_pretrained(folder, backend="pil", image_mean=[0.4] * 3)


def test_a_changed_picture_is_another(settings, tmp_path, tower):
    """Of the same name and shape."""
    start(make_recipe(settings))
    (tmp_path / "rows-3-0.png").write_bytes(picture(103, 90, 60))
    start(make_recipe(settings | {"run_dir": str(tmp_path / "second")}))
    assert tower.seen == 7


def test_a_picture_that_changes_in_the_run_is_an_error(settings, tmp_path):
    run = start(make_recipe(settings))
    (tmp_path / "rows-3-0.png").write_bytes(picture(103, 90, 60))
    with pytest.raises(SampleError, match=r"rows.jsonl:4: a picture, or what .* is not as it was when the run started"):
        run.train()


SPOILT = {
    "empty": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-4]),
    "a bit": lambda file: file.write_bytes(
        file.read_bytes()[:-9] + bytes([file.read_bytes()[-9] ^ 4]) + file.read_bytes()[-8:]
    ),
    "others": lambda file: save_file({"output": torch.zeros(4, 32), "size": torch.tensor([9, 9])}, file),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_damaged_file_is_never_read(checkpoint_of, tower, how):
    samples, checkpoint = [parse(row, "rows:1", None) for row in ROWS], checkpoint_of("llava")
    settings = recipe(memory=DISK)
    cache = refill(checkpoint, settings, samples)
    file = kept_in()[0]
    whole = file.read_bytes()
    SPOILT[how](file)
    with pytest.raises(SampleError, match="is not as it was when the run started"):
        for sample in samples:
            cache.encoder.encode(sample)
    refill(checkpoint, settings, samples)
    assert tower.seen == 4 + 1 and file.read_bytes() == whole


SIZES = [
    *((f, "frozen", {}) for f in ("smolvlm", "qwen2_vl", "qwen3_vl")),
    ("llava", "full", {}),
    ("idefics2", "full", SPLIT),
]


@pytest.mark.parametrize(("name", "projector", "media"), SIZES, ids=str)
def test_the_size_is_known_before_a_file_is_written(checkpoint_of, name, projector, media):
    checkpoint = checkpoint_of(name)
    settings = recipe(memory=DISK, trainable={"projector": projector}, media=media)
    samples = [parse(row, "rows:1", None) for row in ROWS]
    cache = refill(checkpoint, settings, samples)
    written = 0
    for file in kept_in():
        features = load_file(file)
        written += sum(v.nbytes for name, v in features.items() if name not in ("size", "image_grid_thw"))
        assert file.stat().st_size - sum(value.nbytes for value in features.values()) < 512
    sizes = {
        image.source: cache.pixels.frames.open(s, cache.pixels.max_image_size, [image])[0].size
        for s in samples
        for image in s.images
    }
    assert len(kept_in()) == 4
    assert written == sum(map(cache.bytes_of, sizes.values()))


def test_what_does_not_fit_is_not_begun(settings, monkeypatch):
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage._replace(free=1000))
    with pytest.raises(RecipeError) as caught:
        start(make_recipe(settings))
    assert re.fullmatch(
        r"memory.vision_cache: disk, and the features of 6 pictures take 0\.0 MB; /.* has 0\.0 MB free, of which 90% "
        r"may be filled\n  Leave it out, or let MANTIS_LITE_CACHE name a folder elsewhere\.",
        str(caught.value),
    )
    assert not kept_in()
    monkeypatch.setattr("psutil.virtual_memory", lambda: Free())
    with pytest.raises(RecipeError, match=r"the memory of this machine has .*\n  Leave it out, or set it to disk\.$"):
        start(make_recipe(settings | {"memory": {"vision_cache": "memory"}}))


class Free:
    available = 1000


def test_a_folder_that_cannot_be_written_is_named(settings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    features = Features()
    features.folder = tmp_path / "nowhere"
    message = r"memory.vision_cache: disk, and .* cannot be written: .*\n  Let MANTIS_LITE_CACHE name another folder"
    with pytest.raises(DiskError, match=message):
        features.put("x", {"size": torch.tensor([1, 2])})
    monkeypatch.setenv("MANTIS_LITE_CACHE", str(tmp_path / "file"))
    with pytest.raises(DiskError, match=message):
        features.keep_on_disk({})


def test_a_frame_is_not_the_clip_nor_another_frame(tmp_path):
    (tmp_path / "a").write_bytes(b"x")
    features = Features()
    clip = tmp_path / "a"
    images = [Image(clip), *(Frame(clip, at, (4, 4)) for at in (0, 0.0, 1, 0.25))]
    keys = [features.key(image) for image in images]
    assert len(set(keys)) == 5 and features.key(Image(b"x")) == keys[0]


def test_a_picture_that_breaks_is_a_bad_row_as_ever(settings, tmp_path, monkeypatch):
    """The others of its row are kept: another row shows one of them. Also where workers decode, as beside a GPU."""
    monkeypatch.setattr("mantis_lite.models.vision_cache.loader_workers", lambda: 1)
    file = tmp_path / "rows-4-0.png"
    file.write_bytes(file.read_bytes()[:-600])
    with pytest.raises(SampleError, match=r"^rows\.jsonl:5: "):
        start(make_recipe(settings))
    skip = settings | {"data": {"sources": settings["data"]["sources"], "on_bad_row": "skip"}}
    trained(skip | OFF | {"run_dir": str(tmp_path / "plain")})
    trained(skip | {"run_dir": str(tmp_path / "cached")})
    np.testing.assert_allclose(losses(tmp_path / "cached"), losses(tmp_path / "plain"), atol=1e-5)
    for run in ("plain", "cached"):
        rejects = [json.loads(line) for line in (tmp_path / run / "rejects.jsonl").read_text().splitlines()]
        assert [reject["where"] for reject in rejects] == ["rows.jsonl:5"]


def test_a_tower_that_trains_is_refused(settings, tmp_path):
    for how in ("adapter", "full"):
        with pytest.raises(RecipeError) as caught:
            make_recipe(settings | {"trainable": {"vision_tower": how}})
        assert str(caught.value) == (
            f"memory.vision_cache: disk, but trainable.vision_tower={how} changes what a picture's features are\n"
            "  Set trainable.vision_tower=frozen, or memory.vision_cache=off."
        )


def test_so_is_an_adapter_that_has_one(settings, tmp_path):
    """It says itself what trains, and whether the projector does."""
    for trainable, kept in (({"vision_tower": "adapter"}, None), ({"projector": "adapter"}, True), ({}, False)):
        folder = tmp_path / f"run-{kept}"
        adapter = start(make_recipe(settings | OFF | {"trainable": trainable, "run_dir": str(folder)})).save()
        again = {"model": {"name": settings["model"], "adapter": str(adapter)}, "run_dir": str(tmp_path / f"{kept}")}
        if kept is None:
            with pytest.raises(RecipeError, match=r"memory.vision_cache: the vision tower trains"):
                start(make_recipe(settings | again))
            continue
        run = start(make_recipe(settings | again))
        made = json.loads(max(cache_dir().glob("features/*/*.json"), key=lambda f: f.stat().st_mtime_ns).read_text())
        assert ("gives to the projector" in made["kept"]) == kept
        before = run.trainer.evaluate()["eval_loss"]
        assert before == pytest.approx(
            start(make_recipe(settings | again | OFF)).trainer.evaluate()["eval_loss"], abs=1e-5
        )


@pytest.mark.parametrize(
    ("name", "trainable", "message"),
    [
        ("fuyu", {}, r"memory.vision_cache: fuyu has no vision tower, so nothing to keep\n  Leave it out."),
        (
            "qwen2_vl",
            {"projector": "full"},
            r"memory.vision_cache: the projector trains, and that of qwen2_vl is one with",
        ),
    ],
)
def test_models_without_features_apart_are_refused_before_they_load(
    settings, folder_of, monkeypatch, name, trainable, message
):
    monkeypatch.setattr("mantis_lite.training.plan.prepare", None)
    with pytest.raises(RecipeError, match=message):
        start(make_recipe(settings | {"model": str(folder_of(name)), "trainable": trainable}))


@pytest.mark.parametrize(("found", "old"), [("5.22.1", True), ("5.9.0", True), ("5.23.0rc1", False), ("5.30.0", False)])
def test_an_older_transformers_is_refused_before_anything_is_loaded(settings, monkeypatch, found, old):
    monkeypatch.setattr("mantis_lite.models.vision_cache.version", lambda name: found)
    monkeypatch.setattr("mantis_lite.training.plan.open_model", None)
    message = rf"memory.vision_cache: needs transformers 5.23 or newer, and this is {found}\n  Install it: pip install"
    with pytest.raises(RecipeError if old else TypeError, match=message if old else "NoneType"):
        start(make_recipe(settings))


def test_check_says_when_it_would_pay(settings, tmp_path):
    made = settings | OFF
    kept = check(make_recipe(made)).outlook.kept
    assert (kept.pictures, kept.uses) == (12, 2)  # by their files: that some are alike is not looked up
    start(make_recipe(settings))
    assert kept.size / 12 == sum(load_file(file)["output"].nbytes for file in kept_in()) / 6
    assert check(make_recipe(made | {"train": {"num_train_epochs": 1}})).outlook.kept is None
    assert check(make_recipe(made | {"trainable": {"vision_tower": "adapter"}})).outlook.kept is None
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(made))
    said = CliRunner().invoke(app, ["check", str(path)]).output
    assert "vision cache: 12 pictures, each used 2.0 times: memory.vision_cache=disk (or memory)" in " ".join(
        said.split()
    )
