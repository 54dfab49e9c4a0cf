"""Memory known beforehand: parameters to the number, peaks of steps that were measured, and what a user is told."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from families import tiny
from helpers import chat, recipe, write_rows
from torch import nn

from mantis_lite.errors import RecipeError
from mantis_lite.memory.bases import FOLDER, find_base
from mantis_lite.memory.estimate import bare, counts, estimate, most, nf4_bytes, walk
from mantis_lite.memory.packs import assumed
from mantis_lite.memory.shapes import Shape, Shapes
from mantis_lite.memory.step import Machine, Pack, machine_of
from mantis_lite.models.adapters import part_of
from mantis_lite.recipe_file import load_recipe, recipes_dir
from mantis_lite.report.fit import fit, read
from mantis_lite.report.probe import probe

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import gpu_estimates, gpu_step, memory

RESULTS = json.loads((Path(memory.__file__).parent / "results" / "memory.json").read_text())["figures"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Data, and the folder of a random model of a family."""
    folder = tmp_path_factory.mktemp("memory")
    return memory.make_rows(folder / "data"), lambda family: memory.make_model(family, folder / family)


def test_parameters_of_a_config_are_those_of_its_model(family, checkpoint_of):
    checkpoint, found = checkpoint_of(family), Counter()
    for name, parameter in tiny(family).named_parameters():
        found[part_of(name, checkpoint.family)] += parameter.numel()
    assert counts(bare(checkpoint.config, torch.float32, checkpoint.family), checkpoint.family) == found


@pytest.mark.parametrize(
    "name, part, millions",
    [
        ("TIGER-Lab/Mantis-8B-siglip-llama3", "language_model", 6_979 + 2 * 525.3),
        ("TIGER-Lab/Mantis-8B-siglip-llama3", "vision_tower", 428),
        ("TIGER-Lab/Mantis-8B-clip-llama3", "language_model", 6_979 + 2 * 525.3),
        ("TIGER-Lab/Mantis-8B-Idefics2", "projector", 743),
        ("TIGER-Lab/Mantis-8B-Idefics2", "vision_tower", 418),
        ("TIGER-Lab/Mantis-8B-Fuyu", "language_model", 9_397),
        ("TIGER-Lab/Mantis-llava-7b", "all", 7_063.4),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "all", 8_292.2),
        ("Qwen/Qwen3-VL-2B-Instruct", "all", 2_127.5),
    ],
)
def test_bases_have_the_published_parameters(name, part, millions):
    base = find_base(name)
    found = counts(bare(base.config, torch.bfloat16, base.family), base.family)
    assert (found.total() if part == "all" else found[part]) / 1e6 == pytest.approx(millions, rel=0.002)


def test_every_recipe_has_a_base_that_says_where_it_is_from():
    for file in FOLDER.glob("*.json"):
        assert json.loads(file.read_text())["_source"]
    for path in recipes_dir().glob("*.yaml"):
        model = load_recipe(path, ["data=x.json"]).model.called
        assert model == "tiny" or find_base(model)


def test_a_base_that_does_not_come_with_the_package_is_named():
    with pytest.raises(RecipeError, match="fit: the config of someone/model does not come with the package\n  Connect"):
        find_base("someone/model")


@pytest.mark.parametrize("rows, columns", [(256, 688), (96, 256), (4096, 128)])
def test_a_weight_in_4_bits_takes_what_bitsandbytes_stores(rows, columns):
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(rows, columns), compress_statistics=True, quant_type="nf4")
    parts = [packed, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    assert nf4_bytes(rows * columns) == sum(part.numel() * part.element_size() for part in parts)


@pytest.mark.parametrize(
    "case",
    [
        "llava, lora, 512",
        "llava, qlora, 1024",
        "idefics2, lora, 1024",
        "fuyu, full, checkpointing, 1024",
        "qwen2_vl, lora, 1024",
    ],
)
def test_a_step_takes_what_was_estimated(case, made):
    data, model = made
    family, tokens, overrides = memory.CASES[case]
    assert abs(memory.on_cpu(model(family), data, tokens, overrides)["error"]) < 0.02


@pytest.mark.parametrize(
    "name, overrides",
    [
        ("chat", ["trainable.vision_tower=adapter", "memory.checkpointing=off"]),
        ("chat-idefics2-full", ["trainable.vision_tower=full", "launch.strategy=single"]),
        pytest.param("chat-fuyu-qlora", ["memory.mlp_tile=512"], marks=pytest.mark.slow),
        pytest.param(
            "chat-smolvlm-lora", ["lora.dora=true", "memory.offload_activations=true"], marks=pytest.mark.slow
        ),
        ("chat-qwen25vl-qlora", ["memory.attention=sdpa"]),
        pytest.param("chat-qwen3vl-lora", [], marks=pytest.mark.slow),
    ],
)
def test_a_deep_model_is_told_of_by_shallow_ones(name, overrides):
    """To the byte, of every term."""
    settings = load_recipe(name, ["data=none.json", "packing.max_length=1024", *overrides])
    base, machine = find_base(settings.model.name), machine_of(settings, True)
    pack, _ = assumed(settings, base.vision(settings.media))
    told = estimate(base.config, settings, pack, machine, base.family).terms
    assert told == most(walk(base.config, settings, pack, machine, base.family))


def test_shapes_are_those_of_tensors_with_numbers():
    """What operations give, and what shares storage with what, beside real ones; twice, as the second is remembered."""

    def walked():
        x = torch.ones(4, 6)
        view, sliced = x.view(6, 4).t(), x[1:, ::2]
        again = x.add_(1)
        results = [x + 1, x + 1.0, x > 0, (x > 0) + 1, (x > 0) + 1.0, x.sum(0), torch.cat([x, view.t().view(4, 6)])]
        results += [
            *x.split(2),
            *x.max(1),
            nn.functional.layer_norm(x, (6,)),
            x.to(torch.bfloat16) + 1,
            x.masked_fill(x > 1, 0),
        ]
        assert again is x
        storages = [
            (t.on_meta if isinstance(t, Shape) else t).untyped_storage()._cdata for t in (x, view, sliced, *results)
        ]
        return [(t.shape, t.stride(), t.dtype) for t in results], [key == storages[0] for key in storages]

    real = walked()
    for _ in range(2):
        with Shapes():
            assert walked() == real


@pytest.mark.slow
def test_a_step_on_a_gpu_took_what_was_estimated(tmp_path):
    kind, case = "llava", "qlora, packs of 8192"
    data = gpu_step.make_data(tmp_path / "data", 200)
    taken = json.loads((Path(memory.__file__).parent / "results" / f"gpu_step_{kind}.json").read_text())["figures"]
    model = memory.step_checkpoint(kind, tmp_path / "model")
    assert abs(memory.on_gpu(kind, case, taken[case]["peak_gib"], model, data)["error"]) < 0.03


@pytest.mark.parametrize(
    "case, length", [("llava r64, mlp_tile", 32768), ("llava r8, mlp_tile, offloaded", 8192)], ids=["long", "offloaded"]
)
def test_rows_on_a_gpu_took_what_was_estimated(tmp_path, case, length):
    """Of a long row in tiles most is alive in attention's backward pass; with offloading the layer before is, too."""
    file = Path(memory.__file__).parent / "results" / "gpu.json"
    found = json.loads(file.read_text())["figures"]["G7"][case]
    peak = found["by_length"][str(length)]["peak_gib"]
    said = gpu_estimates.estimated(found["setting"], [Pack(length, length, length)], peak, tmp_path)
    assert abs(said["error"]) < 0.01


def test_a_peer_took_what_was_estimated():
    assert all(-0.08 <= figure["error"] <= 0.15 for figure in memory.torchtune().values())


def test_the_measurements_that_are_written_down_hold_to_their_bounds():
    assert len(RESULTS["cpu"]["cases"]) >= 12 and RESULTS["cpu"]["mean_absolute_error"] <= 0.05
    assert RESULTS["gpu"]["largest"] <= 0.03
    for name, point in RESULTS["published"]["points"].items():
        assert -0.08 <= point["error"] <= 0.15, name


def test_settings_take_less_in_the_order_one_expects():
    # With three layers offloading would save nothing: what comes back is let go a layer later.
    config, lora = memory.of_llama("lora", {"r": 8}, layers=6, hidden_size=256, num_attention_heads=8, vocab_size=512)
    pack = Pack(2048, 1024, 500)

    def total(**settings):
        return estimate(config, lora, pack, Machine(**settings)).total

    kept, again = total(checkpointed=0), total()
    assert kept > total(checkpointed=1) > again
    assert again > total(offload=True)
    assert again > total(mlp_tile=256, kernels=frozenset({"rms_norm", "swiglu"}))
    assert total(attention="eager") > total(attention="sdpa") > again


def test_a_run_with_data_is_estimated_by_its_own_plan(llava_folder, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [chat("What is it?", "A dog.", images=(n, n + 1)) for n in range(4)])
    found = fit("chat", [f"model={llava_folder}", f"data={rows}", "packing.max_length=256"], 8)
    assert found.known.startswith("the largest of the data's ") and found.pack.grids
    assert found.cards == {8: True} and found.pack.tokens <= 256
    assert all(other.total < found.estimate.total for other in found.overrides)


def test_without_data_a_full_pack_is_assumed_and_said_so(folder_of):
    found = fit("chat", [f"model={folder_of('idefics2')}", "packing.max_length=128"], 8)
    assert found.known.startswith("assumed: a full pack of 128 tokens with ") and found.pack.tokens == 128


def test_a_recipe_is_a_machine():
    kernels = ["rms_norm", "swiglu"]
    machine = machine_of(recipe(memory={"checkpointing": 3, "mlp_tile": 64, "kernels": kernels}, task="chat"), True)
    assert (machine.checkpointed, machine.mlp_tile, machine.kernels, machine.head) == (3, 64, set(kernels), "fused")
    plain = machine_of(recipe(memory={"checkpointing": "off"}), True)
    assert plain.checkpointed == 0 and not plain.kernels and not plain.cached
    assert machine_of(recipe(memory={"kernels": "auto"}), True, gpu=False).kernels == {"lora"}
    assert machine_of(recipe(memory={"vision_cache": "disk"}), True).cached == {"vision_tower", "projector"}
    trains = recipe(memory={"vision_cache": "disk"}, trainable={"projector": "full"})
    assert machine_of(trains, True).cached == {"vision_tower"}


def test_the_command_ends_in_4_where_it_does_not_fit(llava_folder):
    from typer.testing import CliRunner

    from mantis_lite.cli import app

    words = ["fit", "chat", f"model={llava_folder}", "packing.max_length=256"]
    fits = CliRunner().invoke(app, [*words, "--gpu", "8", "memory.offload_activations=true", "lora.r=8"])
    assert fits.exit_code == 0 and "fits a card of  8 GiB: yes" in fits.stdout and "CUDA context" in fits.stdout
    small = CliRunner().invoke(app, [*words, "--gpu", "1", "packing.max_length=8192", "memory.attention=eager"])
    assert small.exit_code == 4 and "1 GiB: no" in small.stdout and "saves" in small.stdout


def test_a_probe_takes_what_was_estimated(made):
    data, model = made
    words = [f"model={model('llava')}", f"data={data}", "packing.max_length=1024", "train.samples_per_step=64"]
    found = probe(load_recipe("chat", words))
    assert found.machine.startswith("this CPU") and 900 < found.pack.tokens <= 1024
    ((what, estimated, measured),) = found.figures
    assert what == "tensors" and abs(estimated / measured - 1) < 0.02


def test_a_probe_evaluates_nothing(made, monkeypatch):
    data, model = made
    monkeypatch.setattr("transformers.Trainer.evaluate", lambda *args, **kwargs: pytest.fail("evaluated"))
    words = [f"model={model('llava')}", f"data={data}", "packing.max_length=1024", "data.eval=0.2"]
    assert probe(load_recipe("chat", words)).figures


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("chat-fuyu-qlora", [], "memory.vision_cache: fuyu has no vision tower"),
        ("chat-qwen2vl-qlora", ["trainable.projector=adapter"], "memory.vision_cache: the projector trains, and that"),
    ],
)
def test_fit_refuses_what_training_would(name, words, message):
    with pytest.raises(RecipeError, match=message):
        fit(name, ["memory.vision_cache=disk", *words], 12)


def test_the_vision_cache_takes_the_tower_off_the_card():
    plain, cached = (fit("chat", [f"memory.vision_cache={kept}"], 12).estimate for kept in ("off", "disk"))
    assert any("vision tower" in term for term in plain.terms) and "kept features of pictures" in cached.terms
    assert not any(term.startswith(("weights: vision", "weights: projector")) for term in cached.terms)
    assert cached.total < plain.total


def test_a_probe_needs_data(llava_folder):
    with pytest.raises(RecipeError, match=r"fit --probe: runs a pack of the data, and none was given\n  Add data="):
        probe(read("chat", [f"model={llava_folder}"]))
