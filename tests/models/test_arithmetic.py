"""Arithmetic on patches: merge and compare."""

from __future__ import annotations

import json

import pytest
import torch
from torch.testing import assert_close

from safegen.core.errors import ConfigError, PatchError
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.selectors import select_parameters
from safegen.patches.arithmetic import compare, merge, overlapping, warn_of_overlap
from safegen.patches.patch import Patch, PatchOverlapWarning
from safegen.workflows.export import export


@pytest.fixture
def parts(tiny_model):
    """Return two patches of self-attention that share a weight, and one of cross-attention."""
    own = dict(tiny_model.denoiser.named_parameters())
    one, two, three = select_parameters(tiny_model.denoiser, "attn1")[:3]
    other = select_parameters(tiny_model.denoiser, "kv2")[0]
    base = {"base": tiny_model.hash}
    first = Patch({one: own[one] + 1, two: own[two] + 1}, PatchMetadata(**base, method="safegen"))
    second = Patch({two: own[two] + 2, three: own[three] + 2}, PatchMetadata(**base))
    return first, second, Patch({other: own[other] * 2}, PatchMetadata(**base, method="uce"))


def state(model):
    return {k: v.detach().clone() for k, v in model.denoiser.state_dict().items()}


def test_a_merged_patch_equals_its_parts_in_order(make_model, parts):
    first, _, text = parts
    model = make_model()
    first.apply(model)
    text.apply(model)
    want = state(model)
    other = make_model()
    merged = merge([first, text])
    merged.apply(other)
    assert all(torch.equal(v, want[k]) for k, v in state(other).items())
    metadata = json.loads(json.dumps(merged.metadata.to_json()))
    assert metadata["base"] == model.hash
    assert [p["metadata"].get("method") for p in metadata["parts"]] == ["safegen", "uce"]


def test_overlapping_weights_are_refused_by_name(parts):
    first, second, text = parts
    assert overlapping(parts) == sorted(first.tensors.keys() & second.tensors.keys())
    with pytest.raises(
        ConfigError,
        match=rf"1 weights are changed by more than one patch, first {overlapping(parts)[0]}",
    ):
        merge([first, second, text])


def test_overlapping_weights_are_added_or_overwritten(tiny_model, parts):
    first, second, _ = parts
    (name,) = overlapping(parts)
    own = dict(tiny_model.denoiser.named_parameters())
    assert_close(
        merge([first, second], overlap="add", model=tiny_model).tensors[name], own[name] + 3
    )
    assert torch.equal(merge([first, second], overlap="last").tensors[name], second.tensors[name])
    assert torch.equal(merge([second, first], overlap="last").tensors[name], first.tensors[name])


def test_the_order_of_added_changes_does_not_matter(tiny_model, parts):
    a, b = (
        merge(parts, overlap="add", model=tiny_model),
        merge(parts[::-1], overlap="add", model=tiny_model),
    )
    assert a.hash == b.hash


@pytest.fixture
def stacked(tiny_model, parts):
    """Return a patch, its child, an unrelated patch, and the weight that all change.

    The child was made on a model with the first patch.
    """
    own, (first, second, _) = dict(tiny_model.denoiser.named_parameters()), parts
    (name,) = overlapping(parts)
    under = {"parents": [{"method": "safegen", "hash": first.hash}]}
    above = Patch(
        second.tensors | {name: first.tensors[name] + 5},
        PatchMetadata(**second.metadata.to_json() | under),
    )
    return (
        first,
        above,
        Patch({name: own[name] + 7}, PatchMetadata(base=tiny_model.hash, method="uce")),
        name,
    )


def test_a_parents_change_counts_once(make_model, tiny_model, stacked):
    """A child contains its parent's change, so that the two do not conflict."""
    first, above, _, name = stacked
    warn_of_overlap([first, above])  # warnings are errors
    model = make_model()
    first.apply(model)
    above.apply(model)
    want = state(model)
    for overlap in ("refuse", "last", "add"):
        merged = merge([first, above], overlap=overlap, model=tiny_model)
        assert torch.equal(merged.tensors[name], want[name])
        assert merged.metadata.overlap is None
    with pytest.warns(PatchOverlapWarning):
        warn_of_overlap([above, first])  # the child first


def test_changes_are_added_relative_to_their_parents(tiny_model, stacked):
    first, above, other, name = stacked
    own = dict(tiny_model.denoiser.named_parameters())[name]
    for order in ([first, above, other], [other, first, above], [above, first, other]):
        assert_close(merge(order, overlap="add", model=tiny_model).tensors[name], own + 1 + 5 + 7)
    with pytest.raises(
        ConfigError,
        match=rf"must include the parents of each, got None without safegen \({first.hash[:12]}\)",
    ):
        merge([above, other], overlap="add", model=tiny_model)


def test_incompatible_patches_are_refused(make_model, parts):
    first, second, _ = parts
    with pytest.raises(ConfigError, match="must be >= 2, got 1"):
        merge([first])
    with pytest.raises(ConfigError, match="needs the base model"):
        merge([first, second], overlap="add")
    with pytest.raises(PatchError, match="base weights of patches to merge must be the same"):
        merge([first, Patch(second.tensors, PatchMetadata(base="0" * 64))])
    with pytest.raises(PatchError, match="does not fit"):
        merge([first, second], overlap="add", model=make_model(channels=24))
    with pytest.raises(PatchError, match="does not fit"):  # even without overlap
        merge([first, parts[2]], overlap="add", model=make_model(channels=24))
    with pytest.raises(PatchError, match="family of patches to merge must be the same"):
        merge(
            [
                Patch(p.tensors, PatchMetadata(family=name))
                for p, name in ((first, "one"), (second, "two"))
            ],
            overlap="last",
        )


def test_a_merged_patch_states_its_family(parts):
    of_families = [Patch(p.tensors, p.metadata.model_copy(update={"family": "one"})) for p in parts]
    assert merge([of_families[0], of_families[2]]).metadata.family == "one"


def test_a_conflict_with_an_applied_patch_is_warned_about(make_model, parts, tmp_path):
    first, second, _ = parts
    model = make_model()
    with (
        first.apply(model),
        pytest.warns(PatchOverlapWarning, match="1 weights are changed by more than one patch"),
    ):
        export(model, tmp_path / "out", format="diffusers", patches=[second])


def test_conflicting_patches_are_warned_about(parts):
    first, second, text = parts
    warn_of_overlap([first, text])  # warnings are errors
    with pytest.warns(
        PatchOverlapWarning,
        match=rf"1 weights are .* one patch, first {overlapping(parts)[0]}, and the last",
    ):
        warn_of_overlap([first, second])


def test_compare_counts_and_measures_differences(parts):
    first, second, _ = parts
    assert compare(first, first)["same"]
    found = compare(first, second)
    assert (
        found["same"],
        found["only_first"],
        found["only_second"],
        found["both"],
        found["unequal"],
    ) == (False, 1, 1, 1, 1)
    assert found["base"]
    (name,) = overlapping(parts)
    want = float((first.tensors[name] - second.tensors[name]).norm() / first.tensors[name].norm())
    assert found["distance"] == pytest.approx(want, rel=1e-5)
    assert compare(first, parts[2])["distance"] is None
    other = Patch({name: torch.zeros(2)})
    assert (compare(first, other)["shapes"], compare(first, other)["base"]) == ([name], None)
