"""Settings of all edits: warnings about unused ones, sweeps over single ones, and metadata."""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from typing import Annotated

import pytest
from pydantic import TypeAdapter, ValidationError

from safegen.core import registry
from safegen.core.errors import UnusedSettingWarning
from safegen.edits.training.config import Training
from safegen.workflows.edit import make_edit

UNUSED = [
    ("uce", {"preserve": ("tree",), "preserve_scale": 0}, ["preserve"]),
    ("uce", {"preserve_scale": 0.5}, ["preserve_scale"]),
    ("uce", {"debias": {"a tree": 0.3}, "guide": "art"}, ["guide"]),
    ("uce", {"debias": {"a tree": 0.3, "grass": 0}}, ["debias['grass']"]),
    ("rece", {"captions": ("mini:benign",), "preserve_scale": 0}, ["captions"]),
    ("rece", {"preserve": (), "preserve_scale": 0.5}, ["preserve_scale"]),
    ("uce", {"debias": {"a tree": 0.3}, "expand": True}, ["expand"]),
    ("uce", {"debias": {"a tree": 0.3}, "concept_type": "art"}, ["concept_type"]),
    ("uce", {"concept_type": "art"}, []),
    ("uce", {"concept_type": "art", "guide": "a castle"}, ["concept_type"]),
    ("uce", {"concept_type": "art", "guide": "a castle", "expand": True}, []),
    ("rece", {"rounds": 0, "ridge": 0.2}, ["ridge"]),
    ("rece", {"rounds": 0, "lamb": 0.2}, []),
    ("rece", {"rounds": 0, "lamb": 0.2, "start": "uce"}, ["lamb"]),
    ("rece", {"preserve": (), "preserve_per_phrase": True}, ["preserve_per_phrase"]),
    ("safegen", {"caption_share": 0.5}, ["caption_share"]),
    ("safegen", {"validation_split": 0.2}, ["validation_split"]),
    ("safegen", {"adversary": 0, "adversary_moves": "both"}, ["adversary_moves"]),
    ("safegen", {"weight_preserve": 0, "adversary_moves": "unsafe"}, ["adversary_moves"]),
    ("safegen", {"weight_preserve": 0, "teacher": False}, ["teacher"]),
    ("safegen", {"weight_preserve": 0}, []),
    ("safegen", {"weight_mosaic": 0, "fade": 0.3, "target": "paper"}, ["target", "fade"]),
    ("safegen", {"alpha": 2.0}, ["alpha"]),
    ("safegen-plus", {"text": "none", "erase": ("cube",)}, ["erase"]),
    ("safegen-plus", {"text": "none", "first": "words"}, ["first"]),
    ("safegen-plus", {"caption_share": 0.5}, ["caption_share"]),
    ("esd", {"preset": "paper", "trajectories": 3}, ["trajectories"]),
    ("esd", {"weight_retain": 0, "captions": ("mini:benign",)}, ["captions"]),
    ("esd", {"weight_retain": 1.0}, ["weight_retain"]),
    ("sdd", {"preset": "paper", "trajectories": 3}, ["trajectories"]),
    ("concept_ablation", {"preset": "paper", "strength": 1.0}, ["strength"]),
    ("duo", {"loss_type": "kto", "share_timestep": True}, ["share_timestep"]),
    ("duo", {"labels": ("skulls",), "max_attempts": 3}, ["labels", "max_attempts"]),
    ("duo", {"alpha": 2.0, "rank": None}, ["alpha"]),
]


@pytest.mark.parametrize(("method", "settings", "names"), UNUSED, ids=str)
def test_settings_without_effect_are_listed(method, settings, names):
    assert [name for name, _ in make_edit(method, **settings).unused_settings()] == names


@pytest.mark.parametrize("method", sorted(registry.EDITS))
def test_presets_have_no_unused_setting(method, cubes):
    kind = registry.resolve(registry.EDITS, method, "edit")
    for preset in kind.PRESETS:
        assert list(kind.preset(preset, concept=cubes).unused_settings()) == []


@pytest.mark.parametrize(
    ("training", "name"),
    [
        ({"patience": 2}, "patience"),
        ({"validate_every": 2}, "validate_every"),
        ({"ema": 0, "ema_ramp": False}, "ema_ramp"),
        ({"checkpoint_every": 7}, "checkpoint_every"),
        ({"updates": 3, "warmup": 3}, "lr"),
        ({"updates": 3, "warmup": 3, "decay": "cosine"}, "lr"),
    ],
)
def test_unused_settings_of_the_training_are_listed(training, name):
    unused = Training(**training).unused_settings(checkpoints=False, validation=False)
    assert [setting for setting, _ in unused] == [name]


def test_an_edit_warns_of_unused_settings_once(tiny_model):
    edit = make_edit("rece", erase=("red cube",), rounds=0, ridge=0.2)
    with pytest.warns(UnusedSettingWarning, match="ridge has no effect with rounds 0") as caught:
        edit.apply(tiny_model)
    assert len(caught) == 1


def test_a_training_warns_of_unused_settings(tiny_model, triplets):
    training = {"updates": 1, "batch": 2, "warmup": 2, "patience": 1}
    with pytest.warns(UnusedSettingWarning) as caught:
        make_edit("safegen", training=training, alpha=2.0).apply(tiny_model, triplets)
    assert sorted(str(w.message).partition(" ")[0] for w in caught) == ["alpha", "lr", "patience"]


# ------------------------------------------------------------ sweeps


def legal_values(kind):
    """Return legal values of each numeric field, the smallest first."""
    values = {}
    for name, field in kind.model_fields.items():
        if not re.fullmatch(r"(<class ')?(int|float)('>)?( \| None)?", str(field.annotation)):
            continue
        adapter = TypeAdapter(Annotated[field.annotation, *(field.metadata or [None])])
        legal = []
        for value in (0, 0.3, 1, 2):
            with suppress(ValidationError):
                legal.append(adapter.validate_python(value))
        values[name] = list(dict.fromkeys(legal))
    return values


def sweep(method):
    """Return settings with one legal change of a number in the edit, its target or its training."""
    kind = registry.resolve(registry.EDITS, method, "edit")
    changes = [{name: v} for name, legal in legal_values(kind).items() for v in legal]
    if "adversary" in kind.model_fields:
        changes += [{"adversary": radius} for radius in (0, 0.3, 1, 2)]
    if kind.is_trained:
        numbers = legal_values(Training).items()
        changes += [{"training": {name: v}} for name, legal in numbers for v in legal]
    if method == "shielddiff":  # rules of two settings: few benign prompts, no distance
        few = {"allow_few_benign": True}
        changes = [{"kl": 0.1} | (few if "benign_share" in c else {}) | c for c in changes]
    if method == "safegen":
        changes += [{"target": {"name": "x0", "clamp": clamp}} for clamp in (0.3, 1, 2)]
    return changes


@pytest.mark.parametrize("method", sorted(registry.EDITS))
@pytest.mark.parametrize("preset", ["mini", "full", "paper"])
def test_a_legal_change_of_one_number_never_raises(method, preset, cubes):
    kind = registry.resolve(registry.EDITS, method, "edit")
    assert len(sweep("safegen")) > 20
    for change in sweep(method) if preset in kind.PRESETS else ():
        edit = make_edit(method, preset, concept=cubes, **change)
        assert all(len(pair) == 2 for pair in edit.unused_settings())


SLOW = {"shielddiff", "safegen-plus", "duo", "sdd", "esd", "concept_ablation", "des"}
"""Edits that train longest with the smallest values."""


@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW))
        for name in sorted(registry.EDITS)
    ],
)
def test_an_edit_runs_with_the_smallest_legal_value_of_each_number(
    method, tiny_model, triplets, cubes
):
    kind = registry.resolve(registry.EDITS, method, "edit")
    data = triplets if kind.inputs != "words" else None
    applied = set()
    for change in sweep(method):
        name = str([*change, *change.get("training", ())])
        if name in applied:
            continue
        applied.add(name)
        settings = {**kind.TINY, **change}
        if kind.is_trained:
            settings["training"] = {"updates": 1, "batch": 2} | change.get("training", {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UnusedSettingWarning)
            make_edit(method, concept=cubes, **settings).apply(tiny_model, data)


@pytest.mark.parametrize("method", sorted(registry.EDITS))
def test_every_edit_names_its_paper_its_code_and_its_deviations(method):
    kind = registry.resolve(registry.EDITS, method, "edit")
    assert re.match(r"arXiv:\d{4}\.\d{5}$|ours", kind.paper)
    assert kind.code_url.startswith("https://") or kind.paper.startswith("ours")
    assert kind.deviations.endswith(".")
    assert kind.method() == method
    if kind.code_url:
        assert re.fullmatch(r"[0-9a-f]{7,40}", kind.code_commit)
        assert kind.parity.endswith(".")
