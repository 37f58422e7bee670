"""Edits that start from a patch: one patch holds both, and says so."""

from __future__ import annotations

import warnings

import pytest
import torch

from safegen.core.errors import ConfigError, FileError
from safegen.edits.safegen import SafeGen
from safegen.edits.safegen_plus import SafeGenPlus
from safegen.edits.uce import UCE
from safegen.evaluation.report.model_card import CardSubject, model_card
from safegen.patches.arithmetic import include
from safegen.patches.lora import extract_lora
from safegen.patches.patch import BaseMismatchWarning, Patch
from safegen.workflows.edit import apply_edit, edit

BRIEF = {"updates": 2, "batch": 2, "accumulation": 1, "lr": 1e-3, "warmup": 0, "precision": "fp32"}
BOTH = "attention"
"""Selector of the weights that UCE changes, and of others."""


@pytest.fixture(scope="module")
def start(make_model):
    """Return a patch to start from."""
    return UCE(erase=("red cube",)).apply(make_model())


def values(model, names):
    parameters = dict(model.denoiser.named_parameters())
    return {name: parameters[name].detach().clone() for name in names}


@pytest.mark.parametrize(("selector", "rank"), [(BOTH, None), ("attn1", 2)])
def test_the_patch_gives_bit_for_bit_what_was_trained_on_the_patched_model(
    make_model, triplets, start, selector, rank
):
    model, config = make_model(), SafeGen(training=BRIEF, selector=selector, rank=rank)
    with start.apply(model):
        later = config.apply(model, triplets)
        with later.apply(model):
            expected = values(model, start.names | later.names)
    before = model.hash_denoiser()
    whole = apply_edit(config, model, triplets, from_patch=start)
    assert model.hash_denoiser() == before
    assert not model.applied_patches
    assert whole.names == start.names | later.names
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with whole.apply(model):
            got = values(model, whole.names)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    plain = config.apply(model, triplets)
    assert any(not torch.equal(whole.tensors[name], plain.tensors[name]) for name in plain.names)


@pytest.mark.filterwarnings("ignore::safegen.workflows.edit.FewTripletsWarning")
def test_the_metadata_name_both_steps_and_no_parent(make_model, triplets, start, tmp_path):
    whole = edit(make_model(), "safegen", triplets=triplets, from_patch=start, training=BRIEF)
    whole.save(tmp_path / "whole.safetensors")
    metadata = Patch.load(tmp_path / "whole.safetensors").metadata
    assert (metadata.method, metadata.updates, metadata.parents) == ("safegen", 2, ())
    assert metadata.base == start.metadata.base
    assert [(part.hash, part.metadata) for part in metadata.parts] == [(start.hash, start.metadata)]
    assert f"It starts from the patch uce {start.hash[:12]}" in metadata.description
    card = model_card(CardSubject.of_patch(whole, "whole.safetensors"))
    assert f"### safegen, patch `{whole.hash[:12]}`" in card
    assert f"### uce, patch `{start.hash[:12]}`" in card
    assert "It needs them" not in card


def test_a_file_is_read_and_a_closed_form_starts_from_a_patch_too(make_model, start, tmp_path):
    start.save(tmp_path / "start.safetensors")
    model, after = make_model(), UCE(erase=("ball",))
    with start.apply(model):
        expected = after.apply(model)
    whole = edit(model, "uce", erase=("ball",), from_patch=str(tmp_path / "start.safetensors"))
    assert all(torch.equal(whole.tensors[name], expected.tensors[name]) for name in expected.names)


def test_a_patch_that_is_on_the_model_stays_a_parent(make_model, triplets, start):
    model, other = make_model(), UCE(erase=("ball",))
    below = other.apply(model)
    with below.apply(model):
        whole = apply_edit(SafeGen(training=BRIEF), model, triplets, from_patch=start)
    assert [parent.hash for parent in whole.metadata.parents] == [below.hash]


def test_a_run_resumes_from_the_same_patch_only(make_model, triplets, start, tmp_path):
    model, config = make_model(), SafeGen(training=BRIEF)
    again = {"checkpoint_dir": tmp_path, "resume": True}
    whole = apply_edit(config, model, triplets, from_patch=start, checkpoint_dir=tmp_path)
    assert apply_edit(config, model, triplets, from_patch=start, **again).hash == whole.hash
    other = UCE(erase=("ball",)).apply(model)
    for wrong in (None, other):
        with pytest.raises(FileError, match="has other settings, data or weights"):
            apply_edit(config, model, triplets, from_patch=wrong, **again)
    assert not model.applied_patches


def test_a_patch_of_another_model_warns(make_model, triplets, start):
    with pytest.warns(BaseMismatchWarning, match="was made on weights"):
        apply_edit(SafeGen(training=BRIEF), make_model(seed=1), triplets, from_patch=start)


def test_only_a_patch_that_was_made_on_the_other_includes_it(make_model, start):
    with pytest.raises(ConfigError, match="got a model without patches"):
        include(start, UCE(erase=("ball",)).apply(make_model()))


def test_a_lora_of_the_whole_has_the_effect_of_both(make_model, triplets, start):
    """UCE changes keys and values by a full-rank matrix, the training by one of rank 2."""
    model = make_model()
    config = SafeGen(training=BRIEF, selector=BOTH, rank=2)
    plain, whole = (apply_edit(config, model, triplets, from_patch=p) for p in (None, start))
    assert extract_lora(plain, model, 2).retained_energy == pytest.approx(1, abs=1e-6)
    lora = extract_lora(whole, model, 64)
    assert lora.retained_energy == pytest.approx(1, abs=1e-6)
    assert start.names <= lora.factors.keys()


def test_an_edit_of_two_parts_starts_from_a_patch_too(make_model, triplets, start):
    model, config = make_model(), SafeGenPlus(erase=("ball",), training=BRIEF)
    with start.apply(model):
        expected = config.apply(model, triplets)
    whole = apply_edit(config, model, triplets, from_patch=start)
    assert all(torch.equal(whole.tensors[name], expected.tensors[name]) for name in expected.names)
    assert not whole.metadata.parents
    assert [part.hash for part in whole.metadata.parts] == [start.hash]
