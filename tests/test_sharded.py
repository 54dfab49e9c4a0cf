"""FSDP2 by torch's own fully_shard, on CPUs: as one process, and on with as many or fewer from slices by name."""

import os
import socket
from pathlib import Path

import pytest
import torch
from families import save
from helpers import chat, recipe, write_rows
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from mantis_lite.data.dataset import collate_packs
from mantis_lite.training.ranks import Ranks, join
from mantis_lite.training.run import Run
from mantis_lite.training.slices import begin_moments, load_slices, save_slices, slices_of, trained, whole_weights
from mantis_lite.training.start import start
from mantis_lite.training.strategy import layer_class

pytestmark = pytest.mark.slow
STEPS, SAVED, RANKS = 5, 3, 2


def run_of(model: Path, data: str, run_dir: Path) -> Run:
    settings = {"method": "full", "packing": {"max_length": 160, "balance": RANKS}}
    return start(recipe(model, data=data, run_dir=str(run_dir), **settings))


def train(run: Run, ranks: Ranks, model: nn.Module, optimizer: torch.optim.Optimizer, first: int) -> list[float]:
    """The losses of steps of two packs, one for each process, or both for one; the mean over the tokens of both."""
    dataset, vision = run.trainer.train_dataset, run.encoder.vision
    losses = []
    for step in range(first, STEPS):
        if step == SAVED and first == 0 and ranks.size > 1:
            save_slices(run.recipe.run_dir.parent, slices_of(model, optimizer), ranks)
        batches = [collate_packs([dataset[RANKS * step + at]], vision) for at in range(RANKS)]
        count = sum(int((batch["labels"] != -100).sum()) for batch in batches)
        total = torch.zeros(())
        for batch in batches[ranks.rank :: ranks.size]:
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / count
            (loss * ranks.size).backward()  # gradients come as a mean over processes
            total += loss.detach()
        if ranks.group:
            distributed.all_reduce(total, group=ranks.group)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.item())
    return losses


def in_parts(rank: int, size: int, port: int, first: int, settings: tuple, results: Path) -> None:
    """What one process of several does; of steps from `first` on, with what was saved before."""
    each = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    model_folder, data, run_dir = settings
    run = run_of(model_folder, data, run_dir / f"{first}-{size}-{rank}")
    os.environ.update({name: str(value) for name, value in each.items()})
    ranks = join()
    model = run.trainer.model
    mesh = init_device_mesh("cpu", (size,))
    for module in model.modules():
        if isinstance(module, layer_class(model)):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    optimizer = torch.optim.AdamW([parameter for _, parameter in trained(model)], lr=0.01, eps=1e-3)
    if first:
        for _, parameter in trained(model):
            parameter.to_local().data.zero_()  # what is loaded is all there is
        begin_moments(model, optimizer, first)
        load_slices(run_dir, slices_of(model, optimizer))
    losses = train(run, ranks, model, optimizer, first)
    weights = whole_weights(model, ranks)
    if ranks.is_first:
        torch.save({"losses": losses, "weights": weights}, results)
    distributed.destroy_process_group()


def together(size: int, first: int, settings: tuple, results: Path) -> dict:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(in_parts, (size, port, first, settings, results), nprocs=size)
    return torch.load(results)


def test_parts_train_as_the_whole_and_go_on_from_slices(tmp_path):
    rows = [chat(f"what is number {i}?", f"number {i} is red", images=(i,) if i % 2 else ()) for i in range(24)]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    folder = save("llava", tmp_path / "llava")
    run = run_of(folder, data, tmp_path / "alone")
    whole = run.trainer.model
    optimizer = torch.optim.AdamW([parameter for _, parameter in trained(whole)], lr=0.01, eps=1e-3)
    losses = train(run, Ranks(), whole, optimizer, 0)
    assert losses[-1] < losses[0]

    settings = folder, data, tmp_path / "parts"
    found = together(RANKS, 0, settings, tmp_path / "found.pt")
    files = sorted(path.name for path in (tmp_path / "parts").glob("slices-*"))
    assert files == ["slices-00000.safetensors", "slices-00001.safetensors"]
    for size in (RANKS, 1):
        again = together(size, SAVED, settings, tmp_path / f"again-{size}.pt")
        assert again["losses"] == pytest.approx(losses[SAVED:], rel=1e-5)
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    expected = dict(whole.named_parameters())
    assert found["weights"].keys() == expected.keys()
    for name, tensor in found["weights"].items():
        torch.testing.assert_close(tensor, expected[name].detach(), rtol=1e-4, atol=1e-5)
