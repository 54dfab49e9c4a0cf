"""Run by test_kernels.py under TRITON_INTERPRET=1, which Triton reads when it is imported."""

import sys
from copy import deepcopy

import torch

from mantis_lite.models.checkpoint import open_checkpoint
from mantis_lite.models.kernels import fuse
from mantis_lite.models.load import load_model
from mantis_lite.recipe_file import make_recipe


def main(folder: str, kernel: str) -> int:
    """With and without a kernel of Liger's a model gives one output and one gradient; how many layers it computed."""
    recipe = make_recipe({"model": folder, "data": "-", "run_dir": "-", "method": "lora", "memory": {"kernels": "off"}})
    model = load_model(open_checkpoint(recipe.model), recipe)
    model.requires_grad_(True)
    other = deepcopy(model)
    fuse(other, [kernel])
    ids = torch.arange(20)[None] % 19 + 3
    where = {"position_ids": torch.arange(20)[None] % 12, "use_cache": False, "max_length_q": 12}
    where["cu_seq_lens_q"] = torch.tensor([0, 12, 20], dtype=torch.int32)
    found = []
    for each in (model, other):
        hidden = each.get_decoder()(inputs_embeds=each.get_input_embeddings()(ids), **where).last_hidden_state
        (hidden**2).sum().backward()
        found.append((hidden, torch.cat([p.grad.flatten() for p in each.parameters() if p.grad is not None])))
    (plain, gradient), (ours, theirs) = found
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs, gradient, rtol=1e-4, atol=1e-4)
    return sum(getattr(module, "computed_by", None) == kernel for module in other.modules())


if __name__ == "__main__":
    sys.stdout.write(f"{main(*sys.argv[1:])}\n")
