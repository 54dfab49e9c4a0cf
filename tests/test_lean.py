"""What a step does not do: wait in each layer, hold the square of a pack, or compute anything for what is frozen."""

from collections import Counter

import pytest
import torch
from helpers import chat, recipe, write_rows
from torch.utils._python_dispatch import TorchDispatchMode

from mantis_lite.models.activations import decoder_layers
from mantis_lite.training.start import start

ROWS = [chat("What? <image>", f"A thing, number {at}.", images=(at + 4,)) for at in range(6)]
READS = ("tolist", "item", "__bool__", "__int__", "__float__", "__index__")
"""What a tensor on a GPU can only say when all that was asked of the GPU before is done."""


@pytest.fixture(scope="module")
def run(tmp_path_factory, folder_of, family):
    """One pack of six samples, LoRA on the language model alone."""
    folder = tmp_path_factory.mktemp("lean")
    train = {"max_steps": 1, "gradient_accumulation_steps": 1, "save_strategy": "no", "dataloader_num_workers": 0}
    settings = {"data": write_rows(folder / "rows.jsonl", ROWS), "run_dir": str(folder / "run")}
    return start(recipe(folder_of(family), method="lora", train=train, packing={"max_length": 4096}, **settings))


@pytest.fixture(scope="module")
def batch(run):
    (found,) = run.trainer.get_train_dataloader()
    assert len(found["cu_seq_lens_q"]) == 1 + len(ROWS)
    return found


def step(run, batch) -> None:
    run.trainer.model.train()
    run.trainer.compute_loss(run.trainer.model, dict(batch), num_items_in_batch=torch.tensor(10)).backward()


@pytest.fixture
def reads(monkeypatch):
    """How often each number was read out of a tensor."""
    found: Counter[str] = Counter()

    def counted(name, read):
        def reading(self, *args, **kwargs):
            found[name] += 1
            return read(self, *args, **kwargs)

        return reading

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name, getattr(torch.Tensor, name)))
    return found


def test_no_layer_waits_for_numbers(run, batch, reads):
    """Half of the language model's layers read as many numbers as all of them."""
    decoder = run.trainer.model.get_decoder()
    whole, found = decoder.layers, []
    for layers in (whole[:1], whole):
        decoder.layers = layers
        reads.clear()
        step(run, {**batch, "cu_seq_lens_q": batch["cu_seq_lens_q"].clone()})
        found.append(reads.copy())
    assert found[0] == found[1] and found[0]["tolist"] >= 1


class Squares(TorchDispatchMode):
    """Notes tensors that are made with two sizes of so many or more."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens, self.found = tokens, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and sum(size >= self.tokens for size in tensor.shape) > 1:
                self.found.append((function, tuple(tensor.shape)))
        return made


def test_nothing_grows_with_the_square_of_a_pack(run, batch):
    """No mask or scores of a pack by itself, and no logits of all its tokens."""
    words = len(run.trainer.model.get_output_embeddings().weight)
    with Squares(min(batch["input_ids"].shape[1], words)) as squares:
        step(run, batch)
    assert not squares.found


def test_frozen_inputs_have_no_gradient_and_frozen_weights_no_optimizer(run, batch):
    """The first layer's input, pictures included, takes none; the optimizer holds what trains and no more."""
    seen = []
    first = decoder_layers(run.trainer.model)[0]
    first.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args or tuple(kwargs.values()))[0].requires_grad), with_kwargs=True
    )
    step(run, batch)
    assert seen == [False]
    trains = [p for p in run.trainer.model.parameters() if p.requires_grad]
    assert all(p.grad is not None for p in trains)
    assert all(p.grad is None for p in run.trainer.model.parameters() if not p.requires_grad)
    run.trainer.create_optimizer()
    held = [p for group in run.trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in held} == {id(p) for p in trains} and len(held) == len(trains)
