"""Runs of several processes are started by one command, join where others have started them, and end with its code."""

import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers import chat, losses, recipe, write_rows

from mantis_lite.errors import RecipeError
from mantis_lite.recipe_file import deepspeed_config
from mantis_lite.training.checkpoints import saved
from mantis_lite.training.launch import launch_config
from mantis_lite.training.ranks import world
from mantis_lite.training.strategy import require_strategy, settled_launch, strategy_arguments


def launched(**launch):
    return recipe(launch=launch, train={"use_cpu": True})


def test_a_strategy_follows_from_what_several_gpus_have_to_share():
    assert launched().strategy == "single"
    assert launched(gpus=2).strategy == launched(nodes=2).strategy == "ddp"
    assert recipe(method="full", launch={"gpus": 2}).strategy == "zero3"
    assert launched(gpus=2, strategy="zero2").strategy == "zero2"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"launch": {"gpus": 2, "strategy": "single"}}, "launch.strategy: single, but 2 GPUs are asked for"),
        (
            {"launch": {"gpus": 2, "strategy": "zero3"}, "method": "qlora"},
            "launch.strategy: zero3 would part weights that are in 4 bits",
        ),
        (
            {"launch": {"gpus": 2, "strategy": "zero2"}, "memory": {"optimizer": "adamw_bnb_8bit"}},
            "memory.optimizer: adamw_bnb_8bit, but launch.strategy=zero2 keeps AdamW's moments in parts",
        ),
        (
            {"launch": {"gpus": 2, "strategy": "zero3"}, "memory": {"vision_cache": "disk"}},
            "memory.vision_cache: disk, but launch.strategy=zero3 parts the tower",
        ),
        (
            {"launch": {"gpus": 2}, "memory": {"vision_cache": "disk"}, "trainable": {"projector": "full"}},
            "memory.vision_cache: disk, but several GPUs train a projector with it",
        ),
    ],
)
def test_what_several_gpus_cannot_do_is_refused(settings, said):
    with pytest.raises(RecipeError, match=said):
        recipe(**settings)


def test_fsdp2_is_refused_where_it_would_be_plain_ddp():
    with pytest.raises(RecipeError, match="fsdp2 would be plain DDP without a GPU"):
        require_strategy(launched(strategy="fsdp2"))


def test_zero_is_refused_where_deepspeed_is_not_installed(monkeypatch):
    monkeypatch.setattr("mantis_lite.training.strategy.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"launch\.strategy: zero3 needs DeepSpeed, which is not installed"):
        require_strategy(launched(strategy="zero3"))


def test_a_process_that_no_launcher_started_is_not_several():
    for settings, said in [
        ({"gpus": 2}, "launch.gpus: 2 GPUs are asked for, and this process was started by no launcher"),
        ({"strategy": "fsdp2"}, "launch.strategy: fsdp2, and this process was started by no launcher"),
    ]:
        with pytest.raises(RecipeError, match=said):
            settled_launch(launched(**settings))
    assert settled_launch(launched()).launch.strategy == "single"


@pytest.mark.parametrize(
    ("variables", "size"),
    [
        ({"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}, 4),
        ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1"}, 4),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, 1),  # the script of a job, which starts no tasks itself
    ],
)
def test_processes_join_where_a_scheduler_has_started_them(monkeypatch, variables, size):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert world()[:2] == ((1, 4) if size > 1 else (0, 1))
    settled = settled_launch(launched())
    assert (settled.strategy, settled.launch.gpus) == (("ddp", 4) if size > 1 else ("single", None))
    if size > 1:
        with pytest.raises(RecipeError, match=r"launch\.strategy: single, and 4 processes were started"):
            settled_launch(launched(strategy="single"))


def test_machines_find_each_other_by_the_usual_variables():
    found = launch_config(
        launched(gpus=4, nodes=2).launch, environ={"MASTER_ADDR": "first", "NODE_RANK": "1", "MASTER_PORT": "1234"}
    )
    assert (found.min_nodes, found.max_nodes, found.nproc_per_node) == (2, 2, 4)
    assert (found.rdzv_endpoint, found.rdzv_configs["rank"]) == ("first:1234", 1)
    slurm = launch_config(launched(gpus=4, nodes=2).launch, environ={"MASTER_ADDR": "first", "SLURM_NODEID": "1"})
    assert (slurm.rdzv_endpoint, slurm.rdzv_configs["rank"]) == ("first:29500", 1)
    with pytest.raises(RecipeError, match=r"launch\.nodes: 2, but which machine this is and where the first one is"):
        launch_config(launched(gpus=4, nodes=2).launch, environ={"MASTER_ADDR": "first"})
    with pytest.raises(RecipeError, match="NODE_RANK: 2, of 2 machines"):
        launch_config(launched(gpus=4, nodes=2).launch, environ={"MASTER_ADDR": "first", "NODE_RANK": "2"})


def test_no_more_gpus_are_asked_for_than_there_are(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"launch\.gpus: 3, and this machine shows 2"):
        launch_config(recipe(launch={"gpus": 3}).launch)
    assert launch_config(recipe(launch={"strategy": "ddp"}).launch).nproc_per_node == 2, "all there are"


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_is_told_by_files_that_leave_to_the_recipe_what_is_its(strategy):
    config = deepspeed_config(strategy)
    assert config["zero_optimization"]["stage"] == int(strategy[4])
    assert ("offload_param" in config["zero_optimization"]) == strategy.endswith("offload")
    for key in ("train_batch_size", "gradient_accumulation_steps", "gradient_clipping"):
        assert config[key] == "auto"
    assert strategy_arguments(launched(strategy=strategy))["deepspeed"] == config


@pytest.fixture(scope="module")
def command(llava_folder, tmp_path_factory) -> list[str]:
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,), id=f"n{i}") for i in range(12)]
    data = write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    settings = [f"model={llava_folder}", f"data={data}", "method=lora", "memory.kernels=off", "packing.max_length=200"]
    settings += ["train.learning_rate=0.01", "train.gradient_accumulation_steps=1", "train.save_steps=1"]
    return [sys.executable, "-m", "mantis_lite", "train", "chat", *settings, "--gpus", "2"]


@pytest.mark.slow
def test_one_command_starts_all_processes_and_ends_with_their_code(command, tmp_path):
    """A signal to it stops them with a checkpoint; it goes on; and a mistake of theirs is told once."""
    run = [*command, f"run_dir={tmp_path}/run", "train.max_steps=60"]
    process = subprocess.Popen(run, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    while not saved(tmp_path / "run"):
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "stopped by SIGTERM: saved" in said
    at = int(saved(tmp_path / "run")[0].name.rpartition("-")[2])
    assert 0 < at < 60

    done = subprocess.run([*run[:-1], f"train.max_steps={at + 1}", "--accept-changes"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"goes on from checkpoint-{at}" in done.stdout and done.stdout.count("saved ") == 1
    assert len(losses(tmp_path / "run")) == at + 1

    wrong = subprocess.run([*run, "packing.max_length=20", "--from-scratch"], capture_output=True, text=True)
    assert wrong.returncode == 3
    assert wrong.stderr.count("FitError: rows.jsonl:1") == 1


@pytest.mark.slow
def test_processes_of_torchrun_join(command, tmp_path):
    run = [*command[2:-2], f"run_dir={tmp_path}/run", "train.max_steps=2"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    done = subprocess.run([*torchrun, *run], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "strategy: ddp" in (tmp_path / "run/recipe.yaml").read_text()
    assert len(losses(tmp_path / "run")) == 2
