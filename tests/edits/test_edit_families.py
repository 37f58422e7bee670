"""Every edit on every family of models: a patch of the selected weights, applied and undone."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from safegen.core import registry
from safegen.core.errors import ConfigError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.functional.closed_form import projections
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from tests.edits.families import EDITS_ON_FAMILIES
from tests.tiny import FAMILIES, PROMPTS, build_model

BRIEF = {"updates": 1, "batch": 1, "accumulation": 1, "lr": 1e-2, "warmup": 0, "decay": "constant"}
"""One update of one sample."""
tiny = lru_cache(build_model)
"""Models of this file's tests; each test checks that it left its model as it was."""
QUICK = {
    *(("safegen", family) for family in FAMILIES),
    *(("esd", family) for family in ("sdxl-v", "sd3", "flux")),
    ("concept_ablation", "sd35"),
    ("duo", "sd35"),
    ("sdd", "sd35"),
    ("shielddiff", "sd35"),
    ("uce", "flux"),
    ("rece", "sd35"),
    ("safegen-plus", "sdxl"),
}
"""Cells that are checked in every run; the others are slow tests."""
CELLS = [
    pytest.param(edit, family, marks=() if (edit, family) in QUICK else pytest.mark.slow)
    for edit in sorted(registry.EDITS)
    for family in FAMILIES
]


@pytest.fixture(scope="module")
def two(triplets):
    return Triplets(triplets.folder, triplets.rows[:2])


@pytest.fixture(scope="module")
def small(cubes, tmp_path_factory):
    """Return a function that builds an edit with its smallest settings and one update."""
    lines = tmp_path_factory.mktemp("captions") / "calm.txt"
    lines.write_text("a blue ball\na green cone\n")

    def build(name, **changes):
        kind = registry.resolve(registry.EDITS, name, "edit")
        captions = {"captions": (str(lines),)} if "captions" in kind.model_fields else {}
        training = {"training": BRIEF} if kind.is_trained else {}
        settings = {**kind.TINY, **captions, **training, **changes}
        return kind.preset("mini", concept=cubes, **settings)

    return build


def selected(edit, model):
    """Return the names of the weights that an edit changes."""
    names = set()
    if edit.is_trained:
        names |= set(select_parameters(edit.network(model), edit.selector))
        if edit.rank is not None:  # a LoRA has no bias
            names = {name for name in names if name.endswith(".weight")}
    if not edit.is_trained or edit.method() == "safegen-plus":
        names |= {name for part in projections(model).values() for name in part}
    return names


@torch.no_grad()
def prediction(model):
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    t = model.noise_schedule.timesteps[[300, 800]]
    return predict(model.denoiser, x, t, model.encode_text(["red cube", PROMPTS[1]]))


def state_of(model):
    return {
        f"{part}.{name}": value.clone()
        for part in model.components
        for name, value in getattr(model.pipeline, part).state_dict().items()
    }


def check(edit, model, triplets):
    """Check that an edit makes a patch that changes predictions, and leaves the model as it was."""
    before, plain = state_of(model), prediction(model)
    patch = edit.apply(model, triplets if edit.inputs != "words" else None)
    after = state_of(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    if edit.method() == "des":  # leaves out what the denoiser does not read
        assert set(patch.tensors) <= selected(edit, model)
    else:
        assert set(patch.tensors) == selected(edit, model)
    assert all(bool(value.isfinite().all()) for value in patch.tensors.values())
    applied = patch.apply(model)
    assert not torch.equal(prediction(model), plain)
    applied.undo()
    assert torch.equal(prediction(model), plain)
    after = state_of(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_the_table_has_every_edit_and_every_family():
    assert tuple(EDITS_ON_FAMILIES) == FAMILIES
    assert all(row.keys() == registry.EDITS.keys() for row in EDITS_ON_FAMILIES.values())


@pytest.mark.parametrize(("name", "family"), CELLS)
def test_an_edit_works_or_is_refused_for_the_stated_reason(name, family, two, small):
    edit, reason = small(name), EDITS_ON_FAMILIES[family][name]
    if not reason:
        check(edit, tiny(family), two)
        return
    with pytest.raises(ConfigError) as caught:
        edit.apply(tiny(family), two if edit.inputs != "words" else None)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["sd35", "flux"])
def test_safegen_trains_loras_of_transformers(family, two, small):
    check(small("safegen", rank=4), tiny(family), two)
