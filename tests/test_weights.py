"""Files of weights: what tells one set from another, and what is written is what safetensors reads."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mantis_lite.models.weights import KINDS, fingerprint, room_for_names, write_tensors


def test_what_is_written_one_at_a_time_is_read_by_safetensors(tmp_path):
    torch.manual_seed(0)
    tensors = {f"layer.{kind}": torch.randint(0, 2, (3, at + 1)).to(kind) for at, kind in enumerate(KINDS)}
    tensors |= {"one": torch.tensor(2.5), "none": torch.zeros(0, 4), "turned": torch.randn(4, 6).T}
    sizes = write_tensors(tmp_path / "ours.safetensors", tensors.items(), 4001)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / "theirs.safetensors")
    ours, theirs = load_file(tmp_path / "ours.safetensors"), load_file(tmp_path / "theirs.safetensors")
    assert ours.keys() == theirs.keys() == sizes.keys()
    for key, tensor in theirs.items():
        assert ours[key].dtype == tensor.dtype and ours[key].shape == tensor.shape, key
        assert torch.equal(ours[key].float(), tensor.float()) and sizes[key] == tensor.nbytes
    with safe_open(tmp_path / "ours.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert room_for_names(tmp_path / "ours.safetensors") == 4008
    with pytest.raises(RuntimeError, match="bytes of names and places, and room for 8"):
        write_tensors(tmp_path / "small.safetensors", tensors.items(), 8)


def test_names_of_many_tensors_have_room(tmp_path):
    """As many as a large model has in one file, which other writers name as briefly as can be."""
    tensors = {f"model.language_model.layers.{at}.self_attn.q_proj.weight": torch.zeros(1) for at in range(2000)}
    save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours.safetensors", tensors.items(), room_for_names(tmp_path / "theirs.safetensors"))
    assert load_file(tmp_path / "ours.safetensors").keys() == tensors.keys()


def test_a_fingerprint_is_of_the_numbers_and_not_of_the_files(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(9), "c": torch.tensor(1.0)}
    files = [tmp_path / f"{name}.safetensors" for name in ("whole", "one", "two")]
    save_file(tensors, files[0])
    save_file({"c": tensors["c"], "a": tensors["a"]}, files[1])
    save_file({"b": tensors["b"]}, files[2])
    found = fingerprint(files[:1])
    assert fingerprint(files[1:]) == fingerprint(files[:0:-1]) == found
    for key in tensors:
        save_file(tensors | {key: tensors[key] + 1e-3}, files[0])
        assert fingerprint(files[:1]) != found
    save_file(tensors | {"b": tensors["b"].half()}, files[0])
    assert fingerprint(files[:1]) != found
