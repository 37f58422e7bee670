"""Presets of the edits by the size of the model."""

from __future__ import annotations

import pytest
import torch
from pydantic import BaseModel

import safegen
from safegen.cli.options import read_settings
from safegen.core import registry
from safegen.core.errors import UnknownNameError
from safegen.edits.safegen import SafeGen
from safegen.edits.training import presets
from safegen.edits.training.presets import FULL_SIZE, MiniatureSettingsWarning, default_preset
from safegen.models.checkpoint.configs import UNET
from safegen.workflows.edit import make_edit, prepare_edit
from tests.tiny import build_model

BRIEF = {"updates": 2, "batch": 2, "accumulation": 1, "warmup": 0}


def fields(edit):
    """Return the settings of an edit by name."""
    return {name: getattr(edit, name) for name in type(edit).model_fields}


@pytest.fixture
def treat_tiny_models_as_full_size(monkeypatch):
    """Lower the number of parameters from which on a model is full-size."""
    monkeypatch.setattr(presets, "FULL_SIZE", 1000)


@pytest.mark.parametrize("method", sorted(registry.EDITS))
def test_every_edit_has_settings_for_both_sizes(method, cubes):
    kind = registry.resolve(registry.EDITS, method, "edit")
    mini, full = (kind.preset(name, concept=cubes) for name in presets.PRESET_NAMES)
    with pytest.raises(UnknownNameError, match=r"no preset of .* named 'default'. .*full, .*mini"):
        kind.preset("default")
    if not kind.is_trained:
        assert mini == full
        return
    for name, value in fields(full).items():
        if isinstance(value, BaseModel) and name != "training":  # --set GROUP.NAME needs no model
            assert value == getattr(mini, name), name
    assert full.training.lr < mini.training.lr
    if "paper" in kind.PRESETS:  # the published schedule
        paper, ours = kind.preset("paper", concept=cubes).training, full.training
        passes = {"accumulation": paper.accumulation} if method == "shielddiff" else {}
        assert ours.model_copy(update={"precision": paper.precision, **passes}) == paper


@pytest.mark.parametrize("architecture", sorted(UNET))
def test_published_models_are_full_size(architecture, make_model):
    from diffusers import UNet2DConditionModel

    model = make_model()
    with torch.device("meta"):
        model.pipeline.unet = UNet2DConditionModel(**UNET[architecture])
    assert model.num_parameters > 8 * FULL_SIZE
    assert default_preset(model) == "full"


def test_the_preset_follows_the_size_of_the_model(make_model):
    mini = safegen.load("mini")
    assert mini.num_parameters < FULL_SIZE / 10
    edit = prepare_edit("safegen", triplets="mini:skulls", concept="skulls")
    assert (edit.preset_for(mini), edit.for_model(mini)) == (
        "mini",
        make_edit("safegen", concept="skulls"),
    )
    given = prepare_edit("safegen", "paper", triplets="mini:skulls", concept="skulls")
    assert given.for_model(mini) == make_edit("safegen", "paper", concept="skulls")


def test_a_model_with_flow_matching_gets_the_preset_for_it():
    flow = build_model("sd3")
    arguments = {"triplets": "mini:skulls", "concept": "skulls"}
    assert prepare_edit("safegen", **arguments).preset_for(flow) == "mini-flow"
    assert prepare_edit("safegen", **arguments).for_model(flow).selector == "noxattn"
    assert prepare_edit("safegen", "mini", **arguments).for_model(flow).selector == "attn1"
    assert prepare_edit("esd", concept="skulls").preset_for(flow) == "mini"
    shielddiff = prepare_edit("shielddiff", concept="skulls").for_model(flow)
    assert shielddiff.algorithm.name == "nft"


@pytest.mark.filterwarnings("ignore::safegen.workflows.edit.FewTripletsWarning")
def test_a_full_size_model_gets_the_published_schedule(
    make_model, triplets, treat_tiny_models_as_full_size
):
    patch = safegen.edit(make_model(), triplets=triplets, training=BRIEF)
    training = patch.metadata.to_json()["settings"]["training"]
    assert (training["lr"], training["ema"], training["updates"]) == (1e-5, 0.9999, 2)


@pytest.mark.parametrize("preset", ["mini", None])
def test_settings_of_the_miniature_warn_at_full_size(
    preset, make_model, triplets, treat_tiny_models_as_full_size
):
    edit = SafeGen(training=SafeGen().training.model_copy(update=BRIEF))  # those of the miniature
    if preset:
        edit = SafeGen.preset(preset, training=BRIEF)
    with pytest.warns(MiniatureSettingsWarning, match=r"0\.0021 is 210 times that of preset full"):
        edit.apply(make_model(), triplets)


@pytest.mark.filterwarnings("ignore::safegen.workflows.edit.FewTripletsWarning")
@pytest.mark.parametrize("preset", ["full", "paper"])
def test_settings_of_full_size_are_allowed_on_a_small_model(preset, make_model, triplets):
    safegen.edit(make_model(), triplets=triplets, preset=preset, training=BRIEF)


def test_a_changed_training_keeps_the_preset_of_the_size():
    changes = read_settings("safegen", None, ["training.updates=7", "training.seed=3"])
    edits = prepare_edit("safegen", triplets="mini:skulls", **changes).by_preset
    assert {e.training.updates for e in edits.values()} == {7}
    assert (edits["mini"].training.lr, edits["full"].training.lr) == (2.1e-3, 1e-5)


def test_captions_of_the_miniature_warn_at_full_size(make_model, treat_tiny_models_as_full_size):
    with pytest.warns(MiniatureSettingsWarning, match="mini:benign-train, mini:ghosts-train"):
        safegen.edit(make_model(), "uce", concept="skulls")


def test_captions_of_the_miniature_do_not_warn_on_a_small_model(make_model):
    safegen.edit(make_model(), "uce", concept="skulls")
