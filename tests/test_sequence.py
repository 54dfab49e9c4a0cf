"""Processes that share each row train as one that has it whole."""

import math
import multiprocessing
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import save
from helpers import recipe, tiny_llava
from test_numbers import numbers
from test_ranks import BY_DEEPSPEED, assert_same, settings_of, trained
from torch import distributed

from mantis_lite.data.dataset import collate_packs, pack_dataset
from mantis_lite.data.encode import Encoded
from mantis_lite.data.packs import Packs
from mantis_lite.data.schedule import Schedule
from mantis_lite.errors import DataError, RecipeError
from mantis_lite.models.sequence import require_sharing, share_rows
from mantis_lite.report.fit import fit
from mantis_lite.training.jsonlines import lines_of
from mantis_lite.training.ranks import Ranks
from mantis_lite.training.strategy import require_strategy


@pytest.fixture(scope="module")
def alone(forks, tmp_path_factory):
    """One process that has each row whole, of each family and method."""
    runs = {}

    def run(family, method):
        if (family, method) not in runs:
            folder = tmp_path_factory.mktemp(family)
            packing = {"max_length": 640 if family == "fuyu" else 160, "balance": 2}  # whose tokens are letters
            settings = settings_of(save(family, folder / "model"), folder, method=method, packing=packing)
            answer = trained(forks, settings, folder / "run")
            assert answer["status"] == 0, answer["said"]
            runs[family, method] = settings, folder / "run"
        return runs[family, method]

    return run


def shared(forks, settings, run_dir, strategy="ddp", ranks=2, sequence=2, **job):
    launch = {"strategy": strategy, "gpus": ranks, "sequence": sequence}
    return forks(settings | {"run_dir": str(run_dir), "launch": launch}, ranks=ranks, **job)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model", ["llava", "qwen2_vl"])
def test_two_processes_that_share_rows_train_as_one(forks, alone, tmp_path, model, method):
    settings, one = alone(model, method)
    answer = shared(forks, settings, tmp_path / "run")
    assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "run", one)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", BY_DEEPSPEED)
def test_what_is_in_parts_trains_the_same_by_shared_rows(forks, alone, tmp_path, strategy):
    settings, one = alone("idefics2", "full")
    answer = shared(forks, settings, tmp_path / "run", strategy)
    assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "run", one)


@pytest.mark.slow
def test_four_processes_share_two_rows_at_once(forks, alone, tmp_path):
    settings, one = alone("qwen2_vl", "lora")
    answer = shared(forks, settings, tmp_path / "run", ranks=4)
    assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "run", one)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["idefics2", "idefics3", "smolvlm", "qwen2_5_vl", "qwen3_vl", "fuyu"])
def test_families_with_windows_or_layers_that_see_share_rows(forks, alone, tmp_path, model):
    """Idefics2's sliding window; Qwen3-VL's pictures, which its first layers see again; Fuyu, with no tower."""
    settings, one = alone(model, "lora")
    answer = shared(forks, settings, tmp_path / "run")
    assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "run", one)


@pytest.mark.slow
def test_what_is_computed_again_is_exchanged_again(forks, alone, tmp_path):
    settings, one = alone("llava", "lora")
    answer = shared(forks, settings | {"memory": {"kernels": "off", "checkpointing": "full"}}, tmp_path / "run")
    assert answer["status"] == 0, answer["said"]
    assert_same(tmp_path / "run", one)


@pytest.mark.slow
def test_a_row_without_pictures_has_something_to_see_by_itself(forks, alone, tmp_path):
    """One pack a step, which all processes share: each has a gradient of the projector, or DDP would not go on."""
    settings, _ = alone("llava", "full")
    settings = settings | {"packing": {"enabled": False, "balance": 1}}
    settings["train"] = settings["train"] | {"gradient_accumulation_steps": 1, "max_steps": 12}
    answer = shared(forks, settings, tmp_path / "run")
    assert answer["status"] == 0, answer["said"]


@pytest.mark.slow
def test_a_run_goes_on_with_whole_rows_where_they_were_shared(forks, alone, tmp_path):
    settings, one = alone("llava", "lora")
    killed = shared(forks, settings, tmp_path / "run", kill_at=3, saved=False, faulty=1)
    assert killed["status"] == -signal.SIGKILL
    answer = trained(forks, settings, tmp_path / "run")
    assert answer["status"] == 0, answer["said"]
    assert "goes on from checkpoint-2" in answer["said"]
    assert_same(tmp_path / "run", one)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"launch": {"sequence": 2}}, "launch.sequence: 2 GPUs are to share each row, and one trains"),
        ({"launch": {"strategy": "fsdp2"}}, "launch.sequence: it has not been tried with launch.strategy=fsdp2"),
        ({"task": "classify", "head": {"problem": "regression"}}, "launch.sequence: a score head reads tokens of the"),
        ({"memory": {"attention": "sdpa"}}, "memory.attention: sdpa, but GPUs that share a row exchange it in"),
        ({"memory": {"vision_cache": "disk"}}, "memory.vision_cache: disk, but it has not been tried with"),
        ({"memory": {"mlp_tile": 64}}, "memory.mlp_tile: 64, but it has not been tried with launch.sequence=2"),
        ({"memory": {"fit": "auto"}}, "memory.fit: auto counts whole rows"),
    ],
)
def test_what_does_not_go_with_shared_rows_is_refused(settings, said):
    launch = {"strategy": "ddp", "gpus": 2, "sequence": 2} if "sequence" not in settings.get("launch", {}) else {}
    with pytest.raises(RecipeError, match=re.escape(said)):
        recipe(**settings | {"launch": launch | settings.get("launch", {})})


def test_processes_that_cannot_be_divided_are_refused():
    with pytest.raises(RecipeError, match=r"launch\.sequence: 2 GPUs are to share each row, and there are 3"):
        require_strategy(recipe(launch={"strategy": "ddp", "gpus": 3, "sequence": 2}))


def test_heads_that_cannot_be_divided_are_refused():
    config = tiny_llava().config  # 4 heads, 2 of keys and values
    require_sharing(config, 2)
    with pytest.raises(RecipeError, match=r"launch\.sequence: 4 GPUs cannot share 4 heads and 2 of keys and values"):
        require_sharing(config, 4)
    config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    with pytest.raises(RecipeError, match="the model's dynamic positions depend on how long the whole row is"):
        require_sharing(config, 2)


def test_no_estimate_is_made_of_shared_rows():
    overrides = ["launch.sequence=2", "launch.gpus=2", "launch.strategy=ddp"]
    with pytest.raises(RecipeError, match=r"launch\.sequence: estimates are of a GPU that holds whole rows"):
        fit("chat-siglip-llama3-qlora", overrides, 12)


def _read_unlike(rank, folder, told):
    """A process of two that share a row; its row has 8 tokens, or 9."""
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = tiny_llava()
    share_rows(model, distributed.group.WORLD)
    ids = torch.zeros(1, 8 + rank, dtype=torch.int64)
    try:
        model(input_ids=ids, position_ids=ids)
    except DataError as error:
        told.put(str(error))


def test_processes_that_have_read_unlike_rows_do_not_wait_for_each_other(tmp_path):
    forked = multiprocessing.get_context("fork")
    told = forked.Queue()
    processes = [forked.Process(target=_read_unlike, args=(rank, tmp_path, told)) for rank in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert "GPUs that share a row have read 8, 9 tokens of it" in told.get(timeout=60)
    for process in processes:
        process.join()


def test_each_process_of_a_row_takes_the_same_pack():
    packs = Schedule(Packs.of([[0], [1], [2]]), [3], per_step=3)
    assert [list(pack) for pack in packs.laid_out(2, 2)] == [[0], [0], [1], [1], [2], [2], [], []]


def test_a_stretch_predicts_the_first_token_of_the_next(encoder):
    ids = np.arange(9)
    rows = [{"encoded": [encoder.nothing(), Encoded(ids, ids)]}]
    whole = collate_packs(rows, encoder.vision)["labels"]
    parts = [collate_packs(rows, encoder.vision, stretch, 2)["shift_labels"] for stretch in range(2)]
    assert torch.cat(parts, dim=1)[:, :-1].equal(whole[:, 1:])
    assert [part.shape[1] for part in parts] == [6, 5]


class Two(Ranks):
    """Two processes, of which the other's part of the second pack has no loss that is a number."""

    def gathered(self, value):
        return [value, [value[0], math.nan]]


def test_a_step_is_skipped_for_the_pack_of_which_any_part_is_no_number(tmp_path):
    found, state = numbers(tmp_path)
    optimizer = SimpleNamespace(optimizer=None, param_groups=[], scaler=None)
    found.named, found.ranks = lambda step: [["a.json:1"], ["a.json:2"]], Two(sequence=2)
    for _ in range(2):
        found.counted(torch.tensor(2.0))
    found.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
    (line,) = lines_of(tmp_path / "skipped.jsonl")
    assert (line["found"], line["samples"]) == ("the loss is not finite", ["a.json:2"])


def test_a_pack_has_a_token_for_each_process(encoder):
    rows = pack_dataset(Packs.of([[]]), [], encoder, broken=list, fewest=5)
    assert sum(map(len, rows[0]["encoded"])) == 6
