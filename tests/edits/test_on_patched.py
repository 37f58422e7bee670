"""Edits of a patched model: provenance, warnings and checkpoints."""

from __future__ import annotations

import warnings

import pytest

from safegen.core.errors import FileError
from safegen.edits.safegen import SafeGen
from safegen.edits.safegen_plus import SafeGenPlus
from safegen.edits.uce import UCE
from safegen.evaluation.report.model_card import CardSubject, model_card
from safegen.patches.arithmetic import merge
from safegen.patches.patch import BaseMismatchWarning

BRIEF = {"updates": 2, "batch": 2, "accumulation": 1, "lr": 1e-3, "warmup": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def two(make_model, triplets):
    """Return a patch and another patch that was trained on the patched model."""
    model = make_model()
    below = UCE(erase=("red cube",)).apply(model)
    with below.apply(model):
        above = SafeGen(training=BRIEF).apply(model, triplets)
    return below, above


def test_a_patch_lists_its_parents_and_its_base_is_the_unpatched_model(two, make_model):
    below, above = two
    assert above.metadata.base == below.metadata.base == make_model().hash
    assert above.metadata.to_json()["parents"] == [{"method": "uce", "hash": below.hash}]
    assert not below.metadata.parents


def test_applying_a_patch_without_its_parents_warns(two, make_model):
    below, above = two
    model = make_model()
    with pytest.warns(
        BaseMismatchWarning,
        match=rf"with the patch uce \({below.hash[:12]}\), which is not on 'tiny'. Apply that one",
    ):
        above.apply(model).undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with below.apply(model), above.apply(model):
            assert [patch.hash for patch in model.patches] == [below.hash, above.hash]
    assert model.patches == []
    with below.apply(model):
        pass
    with pytest.warns(BaseMismatchWarning, match="Apply that one first"):
        above.apply(model).undo()  # it was applied and removed


def test_the_base_is_the_unpatched_model_if_its_hash_was_not_computed_before(two, make_model):
    below, _ = two
    model = make_model()
    type(below)(below.tensors).apply(model)  # a patch without a base, so no hash is compared
    assert UCE(erase=("ball",)).apply(model).metadata.base == make_model().hash


def test_merging_with_the_parent_drops_it(two, make_model):
    below, above = two
    other = UCE(erase=("ball",)).apply(make_model())
    assert not merge([below, above]).metadata.parents
    assert merge([other, above]).metadata.parents == above.metadata.parents


def test_safegen_plus_has_no_parent_of_its_own(two, make_model, triplets):
    model, (below, _) = make_model(), two
    plain = SafeGenPlus(erase=("ball",), training=BRIEF).apply(model, triplets)
    assert not plain.metadata.parents
    assert model.patches == []
    with below.apply(model):
        assert SafeGenPlus(erase=("ball",), training=BRIEF).apply(
            model, triplets
        ).metadata.to_json()["parents"] == [{"method": "uce", "hash": below.hash}]


def test_a_checkpoint_of_a_patched_model_does_not_resume_on_the_plain_one(
    two, make_model, triplets, tmp_path
):
    below, above = two
    model = make_model()
    with below.apply(model):
        SafeGen(training=BRIEF).apply(model, triplets, checkpoint_dir=tmp_path)
        assert (
            SafeGen(training=BRIEF)
            .apply(model, triplets, checkpoint_dir=tmp_path, resume=True)
            .hash
            == above.hash
        )
    with pytest.raises(FileError, match="has other settings, data or weights"):
        SafeGen(training=BRIEF).apply(model, triplets, checkpoint_dir=tmp_path, resume=True)


def test_the_card_lists_parents(two):
    below, above = two
    assert f"other patches: uce `{below.hash[:12]}`" in model_card(
        CardSubject.of_patch(above, "p.safetensors")
    )
    assert "with other patches" not in model_card(CardSubject.of_patch(below, "p.safetensors"))
