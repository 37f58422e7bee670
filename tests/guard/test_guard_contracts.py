"""What every guard of the table keeps, those to come included."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from safegen import tables
from safegen.concept import load_concept
from safegen.errors import BadSetting, UnknownName
from safegen.guard import Guard, make_guard, read_guard
from safegen.guard.engine import Guarded
from safegen.models.seams import EVERY, FAMILIES

TEXT = "a red cube"
SETTINGS = {
    "sld": {"text": TEXT},
    "negative-prompt": {"text": TEXT},
    "judge-filter": {"judge": "mini"},
    "prompt-filter": {"words": ["skull"]},
    "safree": {"phrases": [TEXT]},
    "dual-latent": {"phrases": [TEXT]},
    "pno": {
        "weights": "mini",
        "unsafe": ["a skull"],
        "safe": ["a castle"],
        "judge": "mini",
        "restarts": 0,
        "iterations": 0,
        "limit": 0.999,
    },
    "crops": {"judge": "mini", "probes": 1, "steps": 1},
}
"""What each guard needs to run on the tiny model."""
NEED_WEIGHTS = {"safety-checker", "latent-guard"}
"""Guards that do not open without files of the user's; test_output_guards.py and test_latent_guard.py make some."""
ONLY_SD = {"safree", "dual-latent"}
"""Guards that read the text encoder of Stable Diffusion 1.x and 2.x alone."""
NO_MEMORY = {"dual-latent"}
"""Guards that need a scheduler which remembers nothing."""
RUN = sorted(set(tables.GUARDS) - NEED_WEIGHTS)
PROMPTS = ("a red cube on a white table", "a blue ball in the grass")


def kind(name) -> type[Guard]:
    return tables.resolve(tables.GUARDS, name, "guard")


@pytest.mark.parametrize("name", sorted(tables.GUARDS))
def test_every_guard_has_a_place_a_name_and_a_sentence_for_every_setting(name):
    guard = kind(name)
    assert guard.model_fields["name"].default == name
    assert guard.seams
    assert guard.seams <= EVERY
    fields = {key: field for key, field in guard.model_fields.items() if key != "name"}
    assert not [key for key, field in fields.items() if not (field.description or "").strip().endswith(".")]


@pytest.mark.parametrize("name", sorted(tables.GUARDS))
def test_every_guard_has_a_row_in_the_papers(name):
    rows = (Path(__file__).parents[2] / "docs" / "papers.md").read_text(encoding="utf-8").splitlines()
    (row,) = [row for row in rows if row.startswith(f"| `{name}` |")]
    assert f"guard/{kind(name).__module__.rpartition('.')[2]}.py" in row


@pytest.mark.parametrize(("name", "preset"), [(n, p) for n in RUN for p in ("default", *kind(n).PRESETS)])
def test_every_preset_is_written_to_json_and_read_again(name, preset):
    guard = make_guard(name, preset, **SETTINGS[name])
    assert read_guard(json.loads(guard.model_dump_json())) == guard
    assert json.loads(json.dumps(guard.facts()))["name"] == name
    if not SETTINGS[name] or preset == "default":
        return
    changed = {k for k, v in guard.model_dump().items() if v != make_guard(name, **SETTINGS[name]).model_dump()[k]}
    assert changed <= set(kind(name).PRESETS[preset])


@pytest.mark.parametrize("name", RUN)
def test_every_guard_draws_as_well_twice_and_leaves_the_pipeline_as_it_was(name, tiny_model, draw):
    guard, pipe = make_guard(name, **SETTINGS[name]), tiny_model.pipeline
    base, engine = draw(pipe, None, PROMPTS), Guarded(pipe, [guard])
    first, second = (draw(pipe, None, PROMPTS, engine=engine, output_type="pil") for _ in range(2))
    assert [d.image.tobytes() for d in first] == [d.image.tobytes() for d in second]  # nothing is left over from a call
    assert [d.trail.to_json(times=False) for d in first] == [d.trail.to_json(times=False) for d in second]
    assert np.array_equal(draw(pipe, None, PROMPTS), base)
    for drawn in first:
        (note,) = drawn.trail.guards
        assert note.guard == name
        assert note.calls >= 1
        json.dumps(drawn.trail.to_json())


@pytest.mark.parametrize("name", RUN)
def test_every_guard_counts_a_scheduler_with_one_turn_more_than_asked_for_or_refuses_it(name, tiny_model, draw, monkeypatch):
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler.from_config(tiny_model.pipeline.scheduler.config, skip_prk_steps=True)
    monkeypatch.setattr(tiny_model.pipeline, "scheduler", scheduler)
    guard = make_guard(name, **SETTINGS[name])
    if name in NO_MEMORY:
        with pytest.raises(BadSetting, match=f"the guard '{name}' would leave stale what a PNDMScheduler remembers"):
            Guarded(tiny_model.pipeline, [guard])
        return
    (drawn,) = draw(tiny_model.pipeline, [guard], PROMPTS[1:], output_type="pil")
    assert drawn.image is not None


@pytest.mark.parametrize("name", RUN)
def test_every_guard_draws_on_the_families_it_says_or_refuses_in_a_line(name, tiny_xl, draw):
    guard = make_guard(name, **SETTINGS[name])
    if name in ONLY_SD:
        with pytest.raises(BadSetting, match=f"the guard '{name}' .* not that of a StableDiffusionXLPipeline; leave it out$"):
            Guarded(tiny_xl, [guard])
        return
    assert draw(tiny_xl, None, PROMPTS[1:], engine=Guarded(tiny_xl, [guard]), output_type="pil")[0].image is not None


@pytest.mark.parametrize("name", sorted(tables.GUARDS))
def test_what_a_concept_lends_is_a_setting_and_else_it_is_refused(name):
    skulls = load_concept("skulls")
    lent = kind(name).lent(skulls)
    assert set(lent) <= set(kind(name).model_fields)
    if not lent:
        with pytest.raises(BadSetting, match=f"'skulls' has no effect on the guard '{name}'"):
            make_guard(name, concept=skulls, **SETTINGS.get(name, {}))


def test_a_word_means_a_guard_and_its_preset():
    assert read_guard("sld-max") == make_guard("sld", "max")
    assert read_guard("sld-weak-diffusers") == make_guard("sld", "weak-diffusers")
    assert read_guard("negative-prompt", "skulls").text == "skulls, a skull"
    assert read_guard({"name": "sld", "text": "x"}, "skulls").text == "x"  # what is said goes before what is lent
    assert read_guard({"name": "sld", "concept": "fire"}, "skulls").text == "fire, flames, burning"


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ("sldd", UnknownName, "Did you mean 'sld'"),
        ("sld-mx", UnknownName, "Did you mean 'max'"),
        ({"preset": "max"}, BadSetting, "a guard needs a name"),
        ({"name": "sld", "scal": 1}, BadSetting, "Did you mean 'scale'"),
        ({"name": "sld", "scale": -1}, BadSetting, "greater than or equal to 0, got -1"),
        ({"name": "sld", "threshold": float("nan")}, BadSetting, "threshold: Input should be a finite number, got nan"),
        ({"name": "judge-filter", "judge": "mini", "threshold": float("nan")}, BadSetting, "finite number"),
        ({"name": "latent-guard", "weights": "x", "concepts": ["x"], "threshold": float("inf")}, BadSetting, "finite number"),
        ({"name": "sld", "concept": "skull"}, UnknownName, "Did you mean 'skulls'"),
        ({"name": "sld", "concept": "skulls", "text": "x"}, BadSetting, "no effect on the guard 'sld'"),
        ("negative-prompt", BadSetting, "text: Field required"),
    ],
)
def test_what_means_no_guard_is_refused_in_one_line(value, error, says):
    with pytest.raises(error, match=says) as caught:
        read_guard(value)
    assert "\n" not in str(caught.value)


def test_the_families_are_those_that_diffusers_has():
    import diffusers

    assert all(hasattr(diffusers, name) for name in FAMILIES)
