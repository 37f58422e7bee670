"""Compression: rounding and pruning of weights, and the stacks with them."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from safegen.attacks.compression import Compression, compress, quantize
from safegen.patches.patch import Patch
from safegen.stack import Stack


def test_rounding_is_the_nearest_value_of_a_symmetric_grid():
    weight = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    weight[4] = 0
    rounded = quantize(weight, 4)
    largest = weight.flatten(1).abs().amax(1)
    step = (largest / 7).view(-1, 1, 1, 1)
    assert bool(((rounded - weight).abs() <= step / 2 + 1e-6).all())
    assert_close(rounded.flatten(1).abs().amax(1), largest)
    assert all(len(row.unique()) <= 15 for row in rounded)
    assert_close(quantize(rounded, 4), rounded)
    assert_close(quantize(weight, 16), weight, rtol=0, atol=float(largest.max()) / 2**15)


def test_pruning_zeroes_the_smallest_share_of_each_matrix(tiny_model):
    patch = compress(tiny_model, "attention", "pruning", 0.25)
    parameters = dict(tiny_model.denoiser.named_parameters())
    assert patch.names
    for name, value in patch.tensors.items():
        old, kept = parameters[name], value != 0
        assert int((~kept).sum()) == round(0.25 * old.numel())
        assert torch.equal(value[kept], old[kept])
        assert float(old[~kept].abs().max()) <= float(old[kept].abs().min())


def test_the_attacked_stacks_have_the_patches_in_order(attack_mini, benign_samples, tmp_path):
    attack = Compression(bits=(8, 3), prune=(0.125,), selector="kv2")
    records = attack_mini(attack, benign_samples)
    assert [record.prompt for record in records] == [sample.prompt for sample in benign_samples]
    stack = Stack(name="mini", model="mini")
    stacks = attack.attacked_stacks(stack, tmp_path / "files")
    assert [s.name for s in stacks] == ["quantized-8", "quantized-3", "pruned-12.5"]
    values = [max(len(v.unique()) for v in _tensors(s)) for s in stacks[:2]]
    assert values[0] > values[1]


def _tensors(stack):
    return Patch.load(stack.patches[-1]).tensors.values()


def test_settings_name_at_least_one_stack_and_each_once():
    for settings in ({"bits": (), "prune": ()}, {"bits": (4, 4)}, {"prune": (0.1, 0.1)}):
        with pytest.raises(ValidationError, match="at least one stack, each once"):
            Compression(**settings)
