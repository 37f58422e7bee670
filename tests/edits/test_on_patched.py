"""An edit of a model that has patches on it: the new patch says which, and whoever puts it elsewhere is told."""

from __future__ import annotations

import warnings

import pytest

from safegen.core.errors import FileError
from safegen.edits.safegen import SafeGen
from safegen.edits.safegen_plus import SafeGenPlus
from safegen.edits.uce import UCE
from safegen.evaluation.report.model_card import CardSubject, card
from safegen.patches.arithmetic import merge
from safegen.patches.patch import BaseMismatchWarning

BRIEF = {"updates": 2, "batch": 2, "accumulation": 1, "lr": 1e-3, "warmup": 0, "precision": "fp32"}


@pytest.fixture(scope="module")
def two(make_model, triplets):
    """Return a patch, and another that was trained on the model with it."""
    model = make_model()
    below = UCE(erase=("red cube",)).apply(model)
    with below.apply(model):
        above = SafeGen(training=BRIEF).apply(model, triplets)
    return below, above


def test_a_patch_says_which_patches_lay_under_it_and_its_base_is_the_model_without_them(
    two, make_model
):
    below, above = two
    assert above.metadata.base == below.metadata.base == make_model().hash
    assert above.metadata.to_json()["parents"] == [{"method": "uce", "hash": below.hash}]
    assert not below.metadata.parents


def test_it_is_warned_about_where_they_are_missing_or_on_too_late_and_only_there(two, make_model):
    below, above = two
    model = make_model()
    with pytest.warns(
        BaseMismatchWarning,
        match=rf"with another patch on it \(uce, hash {below.hash[:12]}\), which is not on 'tiny': put that one",
    ):
        above.apply(model).undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with below.apply(model), above.apply(model):
            assert [patch.hash for patch in model.patches] == [below.hash, above.hash]
    assert model.patches == []
    with below.apply(model):
        pass
    with pytest.warns(BaseMismatchWarning, match="put that one on first"):
        above.apply(model).undo()  # it was on, and is off again


def test_a_base_is_the_untouched_model_though_nobody_asked_for_its_hash_before(two, make_model):
    below, _ = two
    model = make_model()
    type(below)(below.tensors).apply(
        model
    )  # a patch that names no base, so that nothing is compared
    assert UCE(erase=("ball",)).apply(model).metadata.base == make_model().hash


def test_merging_both_leaves_nothing_to_be_asked_for_and_merging_one_does(two, make_model):
    below, above = two
    other = UCE(erase=("ball",)).apply(make_model())
    assert not merge([below, above]).metadata.parents
    assert merge([other, above]).metadata.parents == above.metadata.parents


def test_the_composed_edit_does_not_ask_for_its_own_words(two, make_model, triplets):
    model, (below, _) = make_model(), two
    plain = SafeGenPlus(erase=("ball",), training=BRIEF).apply(model, triplets)
    assert not plain.metadata.parents
    assert model.patches == []
    with below.apply(model):
        assert SafeGenPlus(erase=("ball",), training=BRIEF).apply(model, triplets).metadata.to_json()[
            "parents"
        ] == [{"method": "uce", "hash": below.hash}]


def test_a_checkpoint_of_the_patched_model_is_not_gone_on_with_on_the_plain_one(
    two, make_model, triplets, tmp_path
):
    below, above = two
    model = make_model()
    with below.apply(model):
        SafeGen(training=BRIEF).apply(model, triplets, folder=tmp_path)
        assert (
            SafeGen(training=BRIEF).apply(model, triplets, folder=tmp_path, resume=True).hash
            == above.hash
        )
    with pytest.raises(FileError, match="of other settings, data or weights"):
        SafeGen(training=BRIEF).apply(model, triplets, folder=tmp_path, resume=True)


def test_its_card_says_so(two):
    below, above = two
    assert f"other patches on it: uce `{below.hash[:12]}`" in card(
        CardSubject.of_patch(above, "p.safetensors")
    )
    assert "other patches on it" not in card(CardSubject.of_patch(below, "p.safetensors"))
