"""memory.fit=auto: what is picked for a card, and that a run keeps to it."""

import pytest
from helpers import chat, write_rows
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.errors import RecipeError, ResumeError
from mantis_lite.memory.card import Card, card_at_hand, card_of
from mantis_lite.memory.choose import SPARE, choose
from mantis_lite.memory.estimate import CONTEXT, GIB
from mantis_lite.memory.overrides import changed, taken
from mantis_lite.recipe_file import load_recipe, make_recipe
from mantis_lite.report.fit import fit, work_of
from mantis_lite.training import picked
from mantis_lite.training.start import start


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    made = [chat("What is it? " * 20, "A dog. " * 2, images=(n, n + 1)) for n in range(12)]
    return write_rows(tmp_path_factory.mktemp("picked") / "rows.jsonl", made)


@pytest.fixture
def asked(rows, llava_folder, tmp_path):
    """A run that keeps everything, in packs longer than its samples."""
    train = {"max_steps": 3, "save_steps": 1, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    return {
        "model": str(llava_folder),
        "data": rows,
        "run_dir": str(tmp_path / "run"),
        "method": "lora",
        "packing": {"max_length": 2048},
        "memory": {"fit": "auto", "checkpointing": "off"},
        "train": train,
    }


def either(work, before) -> int:
    """What a step takes with layers checkpointed, or in packs half as long, whichever is less."""
    others = (changed(before, words) for words in ("memory.checkpointing=full", "packing.max_length=1024"))
    return min(taken(work, other)[0].estimate.total for other in others)


def test_what_fits_is_left_as_it_is(asked):
    before = make_recipe(asked)
    choice = choose(work_of(before), before, card_of(8))
    assert choice.picked == [] and choice.recipe == changed(before, "memory.fit=off")
    assert list(choice.notices)[-1] == "memory.fit picks nothing: it fits"


def test_the_mildest_is_picked_and_no_more_than_is_needed(asked):
    before = make_recipe(asked)
    work = work_of(before)
    total, steps = taken(work, before)[0].estimate.total, []
    for less in (1, total - either(work, before) + 1):
        choice = choose(work, before, Card(1, total - less))
        assert choice.picked[0].before == total
        assert choice.total == choice.picked[-1].after == taken(work, choice.recipe)[0].estimate.total <= total - less
        for at in range(len(choice.picked)):
            others = [each.words for each in choice.picked if each is not choice.picked[at]]
            without = changed(before, " ".join(["memory.fit=off", *others]))
            assert taken(work, without)[0].estimate.total > total - less
        steps.append([each.words for each in choice.picked])
    assert steps == [["memory.checkpointing=full"], ["memory.checkpointing=full", "packing.max_length=1024"]]


def test_no_more_layers_are_computed_again_than_the_card_asks_for(asked):
    """Where the recipe leaves it open: all that a layer less would not fit, and none on a large card."""
    before = make_recipe(asked, ["memory.checkpointing=auto"])
    work, sizes = work_of(before), {}
    depth = work.config.get_text_config().num_hidden_layers
    for count in range(depth + 1):
        words = f"memory.fit=off memory.checkpointing={count or 'off'}"
        sizes[count] = taken(work, changed(before, words))[0].estimate.total
    assert sorted(sizes.values(), reverse=True) == list(sizes.values()) and sizes[depth] < sizes[0]
    assert choose(work, before, card_of(8)).recipe.memory.checkpointing == "off"
    for count in range(1, depth):
        choice = choose(work, before, Card(1, int(sizes[count] / (1 - SPARE)) + 1))
        assert choice.recipe.memory.checkpointing == count and choice.total == sizes[count]
        assert ", for speed: " in list(choice.notices)[1]
    small = choose(work, before, Card(1, sizes[depth]))
    assert small.recipe.memory.checkpointing == "auto" and not small.picked


@pytest.mark.parametrize("quantize", [None, []])
@pytest.mark.parametrize("share", [0.9, 0.75, 0.6, 0.5])
def test_whatever_a_card_holds_something_is_picked_or_nothing_fits(asked, share, quantize):
    """QLoRA is not given back beneath the parts that it holds in 4 bits."""
    before = make_recipe(asked | {"memory": {"fit": "auto", "checkpointing": "off", "quantize": quantize}})
    work = work_of(before)
    usable = int(taken(work, before)[0].estimate.total * share)
    try:
        assert choose(work, before, Card(1, usable)).total <= usable
    except RecipeError as error:
        assert str(error).startswith("memory.fit: nothing fits ")


def test_packs_are_not_made_shorter_than_the_longest_sample(asked):
    before = make_recipe(asked)
    work = work_of(before)
    with pytest.raises(RecipeError) as caught:
        choose(work, before, Card(0.5, GIB // 2))
    said = str(caught.value)
    assert said.startswith(
        "memory.fit: nothing fits a card of 0.5 GiB, of which a process can have 0.50: the largest step"
    )
    assert f"packing.max_length={work.rows.longest}\n" in said and "memory.offload_activations=true" in said
    assert f"A pack must hold the longest sample, of {work.rows.longest:,} tokens" in said


def test_without_a_card_there_is_nothing_to_pick_for(llava_folder):
    with pytest.raises(
        RecipeError, match=r"memory.fit: auto picks for a card, and there is none here\n  Name one: --gpu"
    ):
        fit("chat", [f"model={llava_folder}", "memory.fit=auto"])


def test_a_card_is_named_in_vain_where_nothing_is_picked(asked):
    with pytest.raises(RecipeError, match=r"--gpu: has no effect with memory.fit=off\n  Add memory.fit=auto"):
        start(make_recipe(asked, ["memory.fit=off"]), gpu=8)


def test_a_run_without_a_card_says_so_and_changes_nothing(asked):
    run = start(make_recipe(asked))
    assert run.notices[0].startswith("memory.fit: there is no GPU here, so nothing was picked")
    assert run.recipe == make_recipe(asked, ["memory.fit=off", "launch.strategy=single", "packing.balance=1"])


def test_a_run_that_goes_on_keeps_to_what_was_picked(asked, tmp_path, monkeypatch):
    before = make_recipe(asked)
    least = either(work_of(before), before)
    monkeypatch.setattr(picked, "card_of", lambda gib: Card(gib, least - 1))
    run = start(before, gpu=8)
    assert (run.recipe.memory.checkpointing, run.recipe.packing.max_length) == ("full", 1024)
    assert max(run.prepared.train.lengths[pack, 0].sum() for pack in run.schedule.packs) <= 1024
    assert "memory.fit picks memory.checkpointing=full: " in run.notices[1]
    assert load_recipe(tmp_path / "run" / "recipe.yaml") == run.recipe
    run.trainer.args.max_steps = 1
    run.trainer.train()
    monkeypatch.setattr(picked, "choose", None)  # it is not asked again
    again = start(make_recipe(asked))
    assert again.recipe == run.recipe
    assert again.notices[:2] == [
        "goes on from checkpoint-1",
        "memory.fit: this run goes on as it was picked when it was started",
    ]
    with pytest.raises(
        ResumeError, match=r"holds a run with\n  another packing.max_length: 1024 before, 512 now\n  Add"
    ):
        start(make_recipe(asked, ["packing.max_length=512"]))
    (tmp_path / "run" / "fit.json").write_text("{")
    with pytest.raises(
        RecipeError, match=r"fit.json is damaged, so what was picked for the run is not known: .*\n  Add"
    ):
        start(make_recipe(asked))


def test_the_command_shows_what_it_would_pick(llava_folder):
    words = ["fit", "chat", f"model={llava_folder}", "packing.max_length=8192", "memory.attention=eager"]
    done = CliRunner().invoke(app, [*words, "memory.fit=auto", "--gpu", "2"])
    assert done.exit_code == 0, done.output
    assert "memory.fit picks packing.max_length=4096: " in done.output and "2 GiB: yes" in done.output


def test_a_card_at_hand_is_what_others_leave_of_it(monkeypatch):
    total = int(79.18 * GIB)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda: 0)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (total - CONTEXT, total))  # nobody else is there
    assert card_at_hand() == Card(80, total)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (total - CONTEXT - GIB, total))
    assert card_at_hand() == Card(80, total - GIB)


def test_train_shows_what_is_picked(asked):
    words = [f"{key}={asked[key]}" for key in ("model", "data", "run_dir", "method")]
    steps = ["train.max_steps=1", "train.save_strategy=no", "train.samples_per_step=2"]
    done = CliRunner().invoke(
        app, ["train", "chat", *words, *steps, "packing.max_length=512", "memory.fit=auto", "--gpu", "8"]
    )
    assert done.exit_code == 0, done.output
    assert "notice: memory.fit picks memory.checkpointing=off, for speed: " in done.output
