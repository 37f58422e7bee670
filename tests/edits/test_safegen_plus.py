"""SafeGen-plus: two parts in one patch."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.edits.rece import RECE
from safegen.edits.safegen import SafeGen
from safegen.edits.safegen_plus import SafeGenPlus
from safegen.edits.uce import UCE
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

BRIEF = {"updates": 2, "batch": 2, "accumulation": 1, "lr": 1e-3, "warmup": 0, "precision": "fp32"}
LIGHTER = {"weight_mosaic": 0.25, "weight_preserve": 0.75}
"""Settings in which its part of SafeGen differs from SafeGen."""
SIDES = {"rece": RECE, "uce": UCE}


@pytest.mark.parametrize("first", ["images", "words"])
@pytest.mark.parametrize("side", sorted(SIDES))
def test_it_is_safegen_on_top_of_the_closed_form(make_model, triplets, side, first):
    found = SafeGenPlus(text=side, first=first, erase=("red cube",), training=BRIEF).apply(
        make_model(), triplets
    )

    model, words, pictures = (
        make_model(),
        SIDES[side](erase=("red cube",)),
        SafeGen(**LIGHTER, training=BRIEF),
    )
    alone = pictures.apply(model, triplets)
    if first == "words":
        text = words.apply(model)
        text.apply(model)
        seen = pictures.apply(model, triplets)
        assert alone.hash != seen.hash  # the training depends on the erased phrases
    else:
        alone.apply(model)
        seen, text = alone, words.apply(model)
        assert all(
            torch.equal(v, words.apply(make_model()).tensors[k]) for k, v in text.tensors.items()
        )  # they share no weight

    assert found.tensors.keys() == text.tensors.keys() | seen.tensors.keys()
    for name, value in {**text.tensors, **seen.tensors}.items():
        assert torch.equal(found.tensors[name], value), name
    assert found.metadata.base == make_model().hash  # of the unpatched model
    assert found.metadata.text["method"] == side
    assert not found.metadata.parents


def test_without_phrases_it_is_safegen(make_model, triplets):
    plain = SafeGen(**LIGHTER, training=BRIEF).apply(make_model(), triplets)
    found = SafeGenPlus(text="none", training=BRIEF).apply(make_model(), triplets)
    assert found.hash == plain.hash
    assert "text" not in found.metadata.to_json()


@pytest.mark.parametrize("first", ["images", "words"])
@pytest.mark.parametrize("rank", [None, 1])
def test_weights_of_both_parts_have_the_values_of_the_second(make_model, triplets, rank, first):
    """A training of the weights of the closed form with a tiny learning rate."""
    model = make_model()
    training = BRIEF | {"updates": 1, "lr": 1e-12}
    found = SafeGenPlus(
        erase=("red cube",), first=first, selector="kv2", rank=rank, training=training
    ).apply(model, triplets)
    text = RECE(erase=("red cube",)).apply(model)
    assert (
        found.tensors.keys() == text.tensors.keys() == set(select_parameters(model.denoiser, "kv2"))
    )
    for name, value in text.tensors.items():
        assert_close(found.tensors[name], value, rtol=0, atol=1e-6)
        assert (value - model.denoiser.get_parameter(name)).abs().max() > 1e-3


def test_a_failed_training_removes_the_closed_form(make_model, triplets):
    model = make_model()
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}

    def fail(done, of, row):
        assert not torch.equal(
            model.denoiser.get_parameter(name), before[name]
        )  # it is applied while SafeGen trains
        raise ConnectionError("pulled the plug")

    name = select_parameters(model.denoiser, "kv2")[0]
    with pytest.raises(ConnectionError):
        SafeGenPlus(erase=("red cube",), first="words", training=BRIEF).apply(
            model, triplets, callback=fail
        )
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())


def test_a_checkpoint_of_other_phrases_raises(make_model, triplets, tmp_path):
    def plus(**changes):
        return SafeGenPlus(
            **{"erase": ("red cube",), "first": "words", "training": BRIEF} | changes
        )

    plus().apply(make_model(), triplets, checkpoint_dir=tmp_path)
    for other in (
        plus(erase=("ball",)),
        plus(text="uce"),
        SafeGenPlus(text="none", training=BRIEF),
        plus().build_safegen(),
    ):
        with pytest.raises(FileError, match="has other settings, data or weights"):
            other.apply(make_model(), triplets, checkpoint_dir=tmp_path, resume=True)


def test_a_concept_provides_phrases_for_the_closed_form_and_captions_for_both_parts():
    skulls = load_concept("skulls")
    plus, seen, bare = (
        make_edit("safegen-plus", concept="skulls", **more)
        for more in ({}, {"text": "none"}, {"captions": ()})
    )
    assert plus.build_closed_form() == make_edit("rece", concept="skulls")
    assert make_edit("safegen-plus", concept="skulls", text="uce").build_closed_form() == make_edit(
        "uce", concept="skulls"
    )
    assert plus.build_safegen().captions == skulls.captions
    assert (seen.erase, seen.captions, seen.build_closed_form()) == ((), skulls.captions, None)
    assert bare.build_closed_form() == make_edit("rece", concept="skulls", captions=())


def test_the_default_is_safegen_with_a_smaller_weight_mosaic():
    assert SafeGenPlus().build_safegen() == SafeGen(**LIGHTER)


REFUSED = {
    "phrases must not be blank": {"erase": ("",)},
    "timesteps must be 0 <= first < last": {"timesteps": (5, 5)},
    "weight_mosaic must be greater than 0, got 0": {"weight_mosaic": 0},
    "text must be 'rece', 'uce' or 'none', got 'mace'": {"text": "mace"},
    "Did you mean 'weight_mosaic'": {"weight_mosiac": 0.3},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_an_invalid_setting_raises_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("safegen-plus", **REFUSED[words])
    assert "\n" not in str(caught.value)
