"""Weights are read from files without running code, and invalid files are refused in one line."""

from __future__ import annotations

import hashlib
import pickle

import pytest
import torch
from safetensors.torch import save_file

from safegen.core.errors import FileError
from safegen.features.weights import load_weights, read_weights

TENSORS = {"weight": torch.arange(6.0).reshape(2, 3), "bias": torch.zeros(2)}


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt", "w.bin"])
def test_every_format_gives_the_tensors_and_the_hash_of_the_bytes(tmp_path, name):
    path = tmp_path / name
    save_file(TENSORS, path) if name.endswith("safetensors") else torch.save(TENSORS, path)
    found, digest = read_weights(path)
    assert all(torch.equal(found[k], v) for k, v in TENSORS.items())
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


class _Runs:
    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path, capsys):
    path = tmp_path / "w.pth"
    torch.save({"weight": _Runs()}, path)
    with pytest.raises(FileError, match="cannot be read"):
        read_weights(path)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
@pytest.mark.parametrize("content", [b"", b"not weights", pickle.dumps([1, 2])])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FileError) as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileError, match="do not exist"):
        read_weights(tmp_path / "w.pth")
    (tmp_path / "w.txt").write_text("weights")
    with pytest.raises(FileError, match="must end in"):
        read_weights(tmp_path / "w.txt")
    torch.save({"model": TENSORS}, tmp_path / "nested.pth")
    with pytest.raises(FileError, match="state dict"):
        read_weights(tmp_path / "nested.pth")
    save_file({"weight": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(FileError, match="NaN or infinite values in weight"):
        read_weights(tmp_path / "nan.safetensors")


def test_a_network_is_loaded_completely_or_not_at_all(tmp_path):
    net = torch.nn.Linear(3, 2)
    load_weights(net, TENSORS, source=tmp_path, what="a layer")
    assert torch.equal(net.weight, TENSORS["weight"])
    assert not net.training
    for wrong in (
        {"weight": TENSORS["weight"]},
        TENSORS | {"more": torch.zeros(1)},
        TENSORS | {"bias": torch.zeros(3)},
    ):
        with pytest.raises(FileError, match="does not have the weights of a layer: ") as caught:
            load_weights(torch.nn.Linear(3, 2), wrong, source=tmp_path, what="a layer")
        assert "\n" not in str(caught.value)
