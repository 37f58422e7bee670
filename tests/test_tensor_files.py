"""Safetensors files: the library's bytes, one tensor in memory at a time, and remembered hashes."""

from __future__ import annotations

import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

from safegen.core import hashing
from safegen.core.errors import FileError
from safegen.core.hashing import CHECKSUM_BYTES, HashMemory, hash_tensors
from safegen.core.tensor_files import DTYPE_NAMES, LazyTensor, stream_tensors, write_tensors


@pytest.fixture
def values():
    """Return tensors of every type, an empty one, a scalar and names that JSON escapes."""
    torch.manual_seed(0)
    found = {str(dtype): torch.randint(0, 2, (3, 5)).to(dtype) for dtype in DTYPE_NAMES}
    return found | {
        "b.weight": torch.randn(7),
        "a.weight": torch.randn(2, 3, 4),
        "none": torch.zeros(0, 4),
        "scalar": torch.tensor(2.0, dtype=torch.bfloat16),
        'é "\\/\t': torch.randn(1).half(),
    }


@pytest.mark.parametrize("header", [{"format": "pt"}, {"title": 'é "\\\n'}])
def test_the_bytes_of_a_file_are_those_of_the_library(values, header, tmp_path):
    save_file(values, tmp_path / "theirs.safetensors", metadata=header)
    stream_tensors(tmp_path / "ours.safetensors", values, header)
    theirs, ours = ((tmp_path / f"{n}.safetensors").read_bytes() for n in ("theirs", "ours"))
    assert ours == theirs


def test_a_view_is_written_as_its_values(tmp_path):
    value = torch.arange(12.0).reshape(3, 4).T
    write_tensors(tmp_path / "a.safetensors", {"w": value, "half": value[1:, ::2]}, {})
    found = load_file(tmp_path / "a.safetensors")
    assert torch.equal(found["w"], value)
    assert torch.equal(found["half"], value[1:, ::2])


def test_lazy_tensors_are_written_one_after_the_other(tmp_path):
    alive, sources = [], {name: torch.randn(4, 3) for name in "abc"}

    def halve(tensors):
        result = tensors[0] / 2
        if not result.is_meta:
            assert all(earlier() is None for earlier in alive)
            alive.append(weakref.ref(result))
        return result

    lazy = {name: LazyTensor.of([value], halve) for name, value in sources.items()}
    assert not alive  # shapes and types are known before anything is computed
    assert (lazy["a"].shape, lazy["a"].dtype) == ((4, 3), torch.float32)
    write_tensors(tmp_path / "a.safetensors", lazy, {})
    assert len(alive) == 3
    found = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(found[name], value / 2) for name, value in sources.items())
    assert hash_tensors(lazy) == hash_tensors(found)


def test_a_tensor_that_fails_leaves_no_file(tmp_path):
    def fail():
        raise FileError("no")

    tensors = {"a": torch.zeros(3), "b": LazyTensor((3,), torch.float32, fail)}
    with pytest.raises(FileError, match="no"):
        write_tensors(tmp_path / "x.safetensors", tensors, {})
    with pytest.raises(FileError, match=r"c has the type torch\.complex64"):
        write_tensors(tmp_path / "x.safetensors", {"c": torch.zeros(2).to(torch.complex64)}, {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ remembered hashes


@pytest.fixture
def count(monkeypatch):
    """Return a list that grows by one with each hash that is taken."""
    taken = []

    def spy(tensors, **options):
        taken.append(1)
        return hash_tensors(tensors, **options)

    monkeypatch.setattr(hashing, "hash_tensors", spy)
    return taken


def test_a_hash_is_taken_once_for_equal_values(count):
    memory = HashMemory()
    state = {"w": torch.randn(300, 7), "b": torch.randn(5), "none": torch.zeros(0)}
    for dtype in (None, torch.float64, None, torch.float64):
        assert memory.hash(dict(state), dtype=dtype) == hash_tensors(state, dtype=dtype)
    assert len(count) == 2


CHANGES = {
    "a number": lambda w: w.add_(0).select(0, 3)[2:3].mul_(2),
    "a number behind torch's back": lambda w: w.data[5].mul_(1.5),
    "the last number behind torch's back": lambda w: w.data[-1, -1].add_(1e-6),
    "two rows that change places": lambda w: w.data.copy_(w.data[[1, 0, *range(2, len(w))]]),
    "pairs of numbers that change places": lambda w: w.data[0, :4].copy_(w.data[0, [2, 3, 0, 1]]),
    "rows that move": lambda w: w.data.copy_(w.data.roll(1, 0)),
    "other values in their place": lambda w: setattr(w, "data", w.data * 2),
    "another type": lambda w: setattr(w, "data", w.data.half()),
    "numbers written by numpy": lambda w: w.detach().numpy().__setitem__((0, 0), 9.0),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_never_missed(name, count):
    memory, w = HashMemory(), torch.nn.Parameter(torch.randn(64, CHECKSUM_BYTES // 4 + 3))
    w.requires_grad_(requires_grad=False)
    before = memory.hash({"w": w})
    CHANGES[name](w)
    assert memory.hash({"w": w}) == hash_tensors({"w": w}) != before
    assert len(count) == 2


def test_a_mapped_tensor_at_an_odd_place_is_hashed(tmp_path):
    whole = torch.arange(1000).half()
    memory, part = HashMemory(), whole[1:700]
    assert memory.hash({"w": part}) == hash_tensors({"w": part.clone()})
    with torch.inference_mode():
        assert memory.hash({"w": torch.ones(3)}) == hash_tensors({"w": torch.ones(3)})
