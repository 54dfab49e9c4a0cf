"""What one GPU of several holds, beside what DeepSpeed, FSDP2 and DDP hold in two processes; and what is said of it."""

import gc
import json
import os
import socket
from dataclasses import replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from families import tiny
from helpers import recipe
from torch import distributed, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from typer.testing import CliRunner

from mantis_lite.cli import app
from mantis_lite.errors import RecipeError
from mantis_lite.memory.card import card_of
from mantis_lite.memory.estimate import Estimate, build, estimate, stood
from mantis_lite.memory.overrides import _candidates, changed, taken
from mantis_lite.memory.shares import gathered, on_host, stepping
from mantis_lite.memory.shortage import shortage
from mantis_lite.memory.step import Machine, Pack, machine_of
from mantis_lite.models.adapters import make_trainable
from mantis_lite.models.llava import LLAVA
from mantis_lite.recipe_file import deepspeed_config
from mantis_lite.report.fit import Fit, fit, read, work_of
from mantis_lite.report.probe import peak_on_cpu

RANKS = 2
ZERO = ("zero2", "zero3", "zero3_offload")
SMALL = 256
"""Bytes of step counts, losses and the like."""


def settings_of(strategy):
    """What sees is frozen, as words alone are shown."""
    launch = {"strategy": strategy, "gpus": RANKS}
    return recipe("tiny", method="full", launch=launch, trainable={"projector": "frozen"})


def model_of(strategy, dtype=torch.bfloat16) -> nn.Module:
    return make_trainable(tiny("llava").to(dtype), settings_of(strategy), LLAVA)


def machine(strategy) -> Machine:
    trained = torch.bfloat16 if strategy in ZERO else torch.float32
    return Machine(gpu=False, trained=trained, strategy=strategy, gpus=RANKS)


def alive() -> int:
    """Bytes of all tensors' storages, each once."""
    gc.collect()
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            local = each.to_local() if hasattr(each, "to_local") else each
            storage = local.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def by_deepspeed(strategy: str) -> tuple[int, int]:
    """Bytes alive after the last row's backward pass of a step, and after the step."""
    import deepspeed

    before, model = alive(), model_of(strategy)
    hidden = model.config.get_text_config().hidden_size
    batch = {"gradient_accumulation_steps": 2, "train_micro_batch_size_per_gpu": 1, "train_batch_size": 2 * RANKS}
    config = deepspeed_config(strategy) | batch
    config |= {"bf16": {"enabled": True}, "fp16": {"enabled": False}, "gradient_clipping": 1.0}
    config["zero_optimization"]["reduce_bucket_size"] = hidden * hidden
    if strategy != "zero2":
        buckets = {"stage3_prefetch_bucket_size": int(0.9 * hidden * hidden), "stage3_param_persistence_threshold": 0}
        config["zero_optimization"] |= buckets
    trains = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adam = torch.optim.AdamW(trains)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trains, optimizer=adam, config=config)
    del model, trains, adam, _
    for _ in range(4):
        words = torch.randint(0, 32, (1, 16))
        engine.backward(engine(input_ids=words, labels=words).loss)
        del words
        full = alive() - before
        engine.step()
    found = full, alive() - before
    engine.destroy()
    return found


def by_fsdp() -> tuple[int, int]:
    """The same of FSDP2, with gradients until they are let go."""
    before, model = alive(), model_of("fsdp2", torch.float32)
    half = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    for layer in model.get_decoder().layers:
        fully_shard(layer, mp_policy=half)
    fully_shard(model, mp_policy=half)
    adam = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad])
    for _ in range(2):
        words = torch.randint(0, 32, (1, 16))
        model(input_ids=words, labels=words).loss.backward()
        del words
        adam.step()
        full = alive() - before
        adam.zero_grad()
    return full, alive() - before


def in_process(rank: int, port: int, results: Path) -> None:
    each = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in each.items()})
    distributed.init_process_group("gloo")
    found: dict[str, object] = {"fsdp2": by_fsdp()}
    model = model_of("ddp", torch.float32)
    own = sum(tensor.untyped_storage().nbytes() for tensor in [*model.parameters(), *model.buffers()])
    found["ddp"] = peak_on_cpu(model, partial(DistributedDataParallel, model, init_sync=False)) - own
    del model
    if find_spec("deepspeed"):
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        found |= {strategy: by_deepspeed(strategy) for strategy in ZERO}
    (results / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def measured(tmp_path_factory) -> list[dict]:
    """What each process has counted."""
    results = tmp_path_factory.mktemp("shares")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.multiprocessing.spawn(in_process, (port, results), nprocs=RANKS)
    return [json.loads((results / f"{rank}.json").read_text()) for rank in range(RANKS)]


def counted(strategy: str):
    model = model_of(strategy, torch.bfloat16 if strategy in ZERO else torch.float32)
    return model, stood(model, settings_of(strategy), machine(strategy), LLAVA)


def always(terms: dict[str, int]) -> int:
    """What stands without gradients and what they are exchanged by."""
    return sum(size for term, size in terms.items() if not term.startswith("gradients"))


@pytest.mark.slow
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="make test-slow installs DeepSpeed")
def test_what_stands_under_zero_is_what_deepspeed_holds(measured):
    for found in measured:
        model, terms = counted("zero2")
        full, stepped = found["zero2"]
        assert 0 <= stepped - always(terms) < SMALL
        # Of the two rows' gradients, one is alive between them; a weight at a border is whole with both processes.
        border = 2 * max(parameter.numel() for parameter in model.parameters())
        assert 0 <= full - stepped - terms["gradients"] / 2 < border

        model, terms = counted("zero3")
        assert 0 <= found["zero3"][1] - (sum(terms.values()) - terms["gradients: buckets"] / 2) < SMALL

        model, terms = counted("zero3_offload")  # here the card and the host are one
        both = terms["gradients: buckets"] / 2 + on_host(model, machine("zero3_offload"))
        assert 0 <= found["zero3_offload"][1] - both < SMALL


@pytest.mark.slow
def test_what_stands_under_fsdp2_and_ddp_is_what_torch_holds(measured):
    _, terms = counted("fsdp2")
    for found in measured:  # the rows of a tensor are not always as many for each
        full, stepped = found["fsdp2"]
        assert stepped == pytest.approx(always(terms), rel=0.005)
        assert full - stepped == pytest.approx(terms["gradients"], rel=0.005)
        assert found["ddp"] == pytest.approx(counted("ddp")[1]["gradients: DDP's buckets"], rel=0.005)


LLM, HEAD, LAYER, TOWER, PROJECTOR = 8_030_261_248, 525_336_576, 218_112_000, 428_225_600, 21_000_000
"""Numbers of Llama 3 8B, of its embeddings and of a layer; and about those of Mantis' SigLIP and projector."""


@cache
def of_siglip(*words) -> Estimate:
    settings = read("chat-siglip-llama3-full", ["packing.max_length=2048", *words])
    return taken(work_of(settings), settings)[0].estimate


def gib(count: float, each: int) -> float:
    return each * count / 2**30


def test_the_full_recipe_fits_eight_cards_and_four_and_not_one():
    """By hand, from what is published of its parts."""
    totals = {}
    for gpus in (8, 4, 1):
        found = of_siglip(f"launch.gpus={gpus}")
        terms = {term: size / 2**30 for term, size in found.terms.items()}
        trained = (LLM + PROJECTOR) / gpus
        assert terms["weights: language model, 16 bits"] == pytest.approx(gib(LLM / gpus, 2), rel=0.01)
        assert terms["optimizer"] == pytest.approx(gib(trained, 8), rel=0.01)
        assert terms["optimizer: weights in float32"] == pytest.approx(gib(trained, 4), rel=0.01)
        assert terms["gradients"] >= gib(trained, 2) * 0.99
        totals[gpus] = found
    assert [each.total <= card_of(80).usable for each in totals.values()] == [True, True, False]
    assert "whole weights for a while" in totals[8].terms


def test_zero_2_holds_the_weights_whole_and_fsdp2_parts_float32():
    terms = {name: of_siglip(f"launch.strategy={name}", "launch.gpus=8").terms for name in ("zero2", "fsdp2")}
    gibs = {name: {term: size / 2**30 for term, size in each.items()} for name, each in terms.items()}
    assert gibs["zero2"]["weights: language model, 16 bits"] == pytest.approx(gib(LLM, 2), rel=0.01)
    assert "whole weights for a while" not in gibs["zero2"]
    assert gibs["fsdp2"]["weights: language model, float32"] == pytest.approx(gib(LLM / 8, 4), rel=0.01)
    assert "optimizer: weights in float32" not in gibs["fsdp2"]


def whole_siglip(strategy):
    settings = read("chat-siglip-llama3-full", [f"launch.strategy={strategy}", "launch.gpus=8"])
    work = work_of(settings)
    machine = machine_of(settings, True)
    return build(work.config, settings, machine, work.family), machine, work.family


def test_what_is_whole_for_a_while_is_what_may_be_fetched():
    """ZeRO-3 keeps what is used again within so many weights, and one more; FSDP2 gathers three layers at most."""
    live = deepspeed_config("zero3")["zero_optimization"]["stage3_max_live_parameters"]
    sees = TOWER + PROJECTOR
    assert gathered(*whole_siglip("zero3")) == pytest.approx(2 * (sees + live + HEAD), rel=0.02)
    assert gathered(*whole_siglip("fsdp2")) == pytest.approx(2 * (sees + 2 * HEAD + 3 * LAYER), rel=0.02)
    assert gathered(*whole_siglip("zero2")) == 0


def test_the_optimizer_is_handed_gradients_laid_flat_and_in_float32():
    model, machine, _ = whole_siglip("zero3")
    assert stepping(model, machine) == pytest.approx(6 * (LLM + PROJECTOR) / 8, rel=0.01)
    few = replace(machine, gpus=2)  # a sub-group of a billion at a time
    assert stepping(model, few) == pytest.approx(6 * (1e9 + HEAD / 2), rel=0.01)
    assert stepping(model, replace(few, strategy="zero2")) == pytest.approx(6 * (LLM + PROJECTOR) / 2, rel=0.01)
    assert stepping(model, replace(few, strategy="fsdp2")) == 0


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "fsdp2"])
def test_a_deep_model_in_parts_is_told_of_by_shallow_ones(strategy, monkeypatch):
    settings = read("chat-siglip-llama3-full", [f"launch.strategy={strategy}", "launch.gpus=8"])
    work, pack = work_of(settings), Pack(512, 512, 100)
    told = estimate(work.config, settings, pack, machine_of(settings, True), work.family)
    monkeypatch.setattr("mantis_lite.memory.estimate.SHALLOW", 99)
    assert estimate(work.config, settings, pack, machine_of(settings, True), work.family) == told


def test_ddp_adds_buckets_as_large_as_the_gradients():
    settings = read("chat", ["packing.max_length=1024"])
    work = work_of(settings)
    both = settings, changed(settings, "launch.gpus=2")
    one, several = (dict(taken(work, each)[0].estimate.terms) for each in both)
    assert several.pop("gradients: DDP's buckets") == pytest.approx(one["gradients"], rel=0.001)
    assert several.keys() == one.keys()
    assert all(several[term] == one[term] for term in one if term != "pixels")  # fewer packs wait beside


def test_offloading_takes_to_the_host_what_it_takes_off_the_card():
    found = of_siglip("launch.strategy=zero3_offload", "launch.gpus=8")
    assert not any(term.startswith(("weights", "optimizer")) for term in found.terms)
    each = gib((LLM + PROJECTOR) / 8, 20) + gib(TOWER / 8, 2)
    assert found.host / 2**30 == pytest.approx(each, rel=0.01)


def test_a_row_before_has_its_gradients_apart_under_zero_2_alone():
    settings = settings_of("zero2")
    for strategy, times in (("zero2", 2), ("zero3", 1)):
        several, alone = (
            stood(model_of(strategy), settings, replace(machine(strategy), accumulates=accumulates), LLAVA)
            for accumulates in (True, False)
        )
        assert several["gradients"] == times * alone["gradients"]


def test_a_gpu_has_its_part_of_a_steps_packs():
    settings = read("chat-siglip-llama3-full", ["train.samples_per_step=32", "launch.gpus=1"])
    work = work_of(settings)
    assert work.rows.packs(settings)[1]
    assert not work.rows.packs(changed(settings, "launch.gpus=8"))[1]


def fit_tiny(model, *words, gpu=8.0) -> Fit:
    return fit("chat", [f"model={model}", "method=full", "lora=null", "packing.max_length=512", *words], gpu)


def test_how_many_gpus_were_taken_is_said(llava_folder, monkeypatch):
    said = fit_tiny(llava_folder, "launch.strategy=zero3").known.splitlines()
    assert said[0].endswith(" on each of 8 GPUs")
    assert said[1] == (
        "one of 8 GPUs, by launch.strategy=zero3, a number that launch.gpus=N changes; reckoned, and not measured"
    )
    said = fit_tiny(llava_folder, "launch.gpus=4", "launch.nodes=2").known.splitlines()
    assert said[1] == "one of 8 GPUs, by launch.strategy=zero3; reckoned, and not measured"
    found = fit_tiny(llava_folder, "launch.strategy=zero3_offload", "launch.gpus=4", "launch.nodes=2")
    each = found.estimate.host / 2**30
    assert found.known.splitlines()[2] == (
        f"on the host, beside: {each:.1f} GiB for each GPU, {4 * each:.1f} GiB on a machine of 4"
    )
    assert "GPUs" not in fit_tiny(llava_folder).known
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert "one of 4 GPUs" in fit_tiny(llava_folder, "launch.strategy=zero3", gpu=None).known


def launches(*words, name="chat-siglip-llama3-full") -> list[str]:
    settings = read(name, words)
    return [words for words in _candidates(work_of(settings), settings) if "launch" in words]


def test_what_may_help_several_gpus_is_tried():
    qlora = "method=qlora trainable=null launch.strategy=ddp"
    assert launches("launch.gpus=2") == [qlora, "launch.strategy=zero3_offload", "launch.gpus=4"]
    assert launches("launch.strategy=zero3_offload") == [qlora, "launch.gpus=2"]
    whole = ["launch.strategy=zero3 launch.gpus=8", "launch.strategy=zero3_offload"]
    assert launches("launch.strategy=single") == whole
    assert launches("launch.strategy=ddp", "launch.gpus=4") == ["launch.strategy=zero3", whole[1]]
    assert launches(name="chat") == []


def test_what_is_parted_is_not_put_in_4_bits(llava_folder):
    words = [f"model={llava_folder}", "launch.strategy=zero3", "launch.gpus=2", "memory.fit=auto"]
    with pytest.raises(RecipeError, match=r"memory\.fit: nothing fits a card of 0\.5 GiB") as caught:
        fit("chat-siglip-llama3-lora", words, 0.5)
    assert "qlora" not in str(caught.value)


def test_fit_picks_for_one_of_several(llava_folder):
    found = fit_tiny(llava_folder, "memory.fit=auto", "launch.gpus=4", "launch.strategy=zero2")
    assert found.recipe.launch.gpus == 4 and found.recipe.memory.fit == "off"
    assert found.estimate.terms["gradients: buckets"]


def test_a_shortage_says_which_share_it_is_of():
    settings = read("chat-siglip-llama3-full", ["packing.max_length=2048", "launch.gpus=2"])
    said = str(shortage("in step 1", work_of(settings), settings, torch.OutOfMemoryError("none left")))
    total = taken(work_of(settings), settings)[0].estimate.total / 2**30
    assert f"is estimated at {total:.2f} GiB of each of 2 GPUs, by launch.strategy=zero3; most of it" in said
    assert "launch.strategy=zero3_offload" in said and "launch.gpus=4" in said


@pytest.mark.slow
def test_the_command_fits_the_full_recipe_to_eight_cards():
    done = CliRunner().invoke(app, ["fit", "chat-siglip-llama3-full", "--gpu", "80", "launch.gpus=8", "data=x"])
    assert done.exit_code == 0, done.output
    assert "fits a card of  80 GiB: yes" in done.output and "one of 8 GPUs" in done.output
