"""What a sample is said to cost is what torch counts, and what was reckoned by hand."""

from dataclasses import astuple

import pytest
import torch
from families import tiny
from helpers import chat, recipe
from torch.utils.flop_counter import FlopCounterMode

from mantis_lite.data.collate import collate
from mantis_lite.data.cost import Cost
from mantis_lite.data.schema import parse
from mantis_lite.memory.bases import find_base
from mantis_lite.models.cost import cost_of, forward_cost


def counted(model, **batch) -> int:
    """Eager attention takes each position with each, twice what causal attention takes."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(**batch)
    return counter.get_total_flops()


def test_text_costs_what_torch_counts(checkpoint_of, family):
    model = tiny(family)
    found = forward_cost(model.config, checkpoint_of(family).family)
    for length in (10, 40):
        wanted = found.per_token * length + 2 * found.per_token_squared * length**2
        assert counted(model, input_ids=torch.full((1, length), 5)) == wanted


@pytest.mark.parametrize("name", ["llava", "idefics3"])
def test_pictures_cost_about_what_torch_counts(checkpoint_of, encoder_of, name):
    """Beside it are the projector, and what cuts a picture into patches."""
    encoder, model = encoder_of(name), tiny(name)
    encoded = encoder.encode(parse(chat("<image>", "x", images=(5,)), "rows:1", None))
    batch = collate([encoded], encoder.vision.batch)
    text = counted(model, input_ids=torch.full((1, len(encoded)), 5))
    patches = encoder.vision.patches((56, 56))
    once = forward_cost(model.config, checkpoint_of(name).family)
    tower = model.get_submodule(checkpoint_of(name).family.parts["vision_tower"][0])
    cut = sum(m.weight.numel() for m in tower.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d))
    seen = counted(model, **batch) - text - 2 * cut * patches
    assert once.per_patch * patches == pytest.approx(seen, rel=0.3)


@pytest.mark.parametrize(
    ("settings", "passes"),
    [
        ({"method": "qlora"}, (3, 4.5, 1)),
        ({"method": "lora", "memory": {"checkpointing": "off"}}, (2, 3.5, 1)),
        ({"method": "lora", "trainable": {"vision_tower": "adapter"}}, (3, 4.5, 3)),
        ({"method": "full"}, (4, 4.5, 1)),
        ({"method": "full", "trainable": {"vision_tower": "full"}}, (4, 4.5, 4)),
    ],
    ids=str,
)
def test_a_step_takes_so_many_passes(settings, passes):
    base = find_base("TIGER-Lab/Mantis-8B-siglip-llama3")
    once = forward_cost(base.config, base.family)
    found = cost_of(base.config, base.family, recipe(**settings))
    assert astuple(found) == tuple(a * b for a, b in zip(astuple(once), passes, strict=True))


def test_the_defaults_are_those_of_siglip_and_llama_3():
    """By hand, of the published sizes; they have adapters besides, and not the head again."""
    base = find_base("TIGER-Lab/Mantis-8B-siglip-llama3")
    assert astuple(cost_of(base.config, base.family, recipe())) == pytest.approx(astuple(Cost()), rel=0.03)


def test_towers_that_take_pictures_in_their_own_shape_are_not_at_their_largest():
    """1.24 TFLOP for a picture of 1,005 patches with the connector, which is 0.28 of them."""
    base = find_base("TIGER-Lab/Mantis-8B-Idefics2")
    assert 1005 * forward_cost(base.config, base.family).per_patch == pytest.approx(0.96e12, rel=0.03)
