"""What every guard of the table keeps, those to come included."""

from __future__ import annotations

import json

import numpy as np
import pytest

from safegen.core import registry as tables
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, UnknownNameError, UnusedSettingWarning
from safegen.guards import GuardConfig, make_guard, read_guard
from safegen.guards.core.adapter import ALL_POINTS, PIPELINE_SPECS
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.core.result import ACTIONS

NO_MEMORY = {"dual-latent"}
"""Guards that need a scheduler which remembers nothing."""
NAMES = sorted(tables.GUARDS)
ABLE = {"xl": NAMES, "wan": ["negative-prompt", "prompt-filter", "sld"]}
"""Guards that run on a pipeline class."""
SMALL = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
PROMPTS = ("a red cube on a white table", "a blue ball in the grass")


def kind(name) -> type[GuardConfig]:
    return tables.resolve(tables.GUARDS, name, "guard")


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_has_a_place_a_name_and_a_sentence_for_every_setting(name):
    guard = kind(name)
    assert guard.model_fields["name"].default == name
    assert guard.hook_points
    assert guard.hook_points <= ALL_POINTS
    fields = {key: field for key, field in guard.model_fields.items() if key != "name"}
    assert not [
        key for key, field in fields.items() if not (field.description or "").strip().endswith(".")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_names_its_paper_and_deviations(name):
    guard = kind(name)
    assert guard.paper
    assert guard.code_url == "" or guard.code_url.startswith("https://")
    assert guard.paper == "ours" or guard.deviations.endswith(".")


@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n in NAMES for p in ("default", *kind(n).PRESETS)]
)
def test_every_preset_is_written_to_json_and_read_again(name, preset, quiet):
    plain = {
        k: v
        for k, v in quiet[name].items()
        if k not in kind(name).PRESETS.get(preset, {}) and k != "preset"
    }
    guard = make_guard(name, preset, **plain)
    assert read_guard(json.loads(guard.model_dump_json())) == guard
    assert json.loads(json.dumps(guard.fingerprint()))["name"] == name
    changed = {
        k for k, v in guard.model_dump().items() if v != make_guard(name, **plain).model_dump()[k]
    }
    assert changed <= set(kind(name).PRESETS.get(preset, {}))


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_draws_as_well_twice_and_leaves_the_pipeline_as_it_was(
    name, tiny_model, generate, quiet
):
    guard, pipe = make_guard(name, **quiet[name]), tiny_model.pipeline
    base, engine = generate(pipe, None, PROMPTS), GuardedPipeline(pipe, [guard])
    first, second = (
        generate(pipe, None, PROMPTS, engine=engine, output_type="pil") for _ in range(2)
    )
    assert [d.image.tobytes() for d in first] == [
        d.image.tobytes() for d in second
    ]  # nothing is left over from a call
    assert [d.trace.to_json(times=False) for d in first] == [
        d.trace.to_json(times=False) for d in second
    ]
    assert np.array_equal(generate(pipe, None, PROMPTS), base)


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_says_in_the_trail_what_it_did(name, tiny_model, generate, quiet):
    for drawn in generate(
        tiny_model.pipeline, [make_guard(name, **quiet[name])], PROMPTS, output_type="pil"
    ):
        (note,) = drawn.trace.guards
        assert note.guard == name
        assert note.calls >= 1
        assert note.ms > 0
        assert note.action in ACTIONS
        assert bool(note.reason) == (note.action != "none")
        assert all(np.isfinite(v) for v in (*note.scores.values(), *note.thresholds.values()))
        assert json.loads(json.dumps(drawn.trace.to_json())) == drawn.trace.to_json()


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_counts_a_scheduler_with_one_turn_more_than_asked_for_or_refuses_it(
    name, tiny_model, generate, quiet, monkeypatch
):
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler.from_config(tiny_model.pipeline.scheduler.config, skip_prk_steps=True)
    monkeypatch.setattr(tiny_model.pipeline, "scheduler", scheduler)
    guard = make_guard(name, **quiet[name])
    if name in NO_MEMORY:
        with pytest.raises(ConfigError, match=f"for the guard '{name}', got PNDMScheduler"):
            GuardedPipeline(tiny_model.pipeline, [guard])
        return
    (drawn,) = generate(tiny_model.pipeline, [guard], PROMPTS[1:], output_type="pil")
    assert drawn.image is not None


@pytest.mark.parametrize("family", ["xl", "wan"])
@pytest.mark.parametrize("name", NAMES)
def test_every_guard_draws_on_a_family_or_names_in_a_line_those_that_can(
    name, family, tiny_xl, tiny_wan, generate, quiet
):
    pipe, options = (tiny_xl, {"output_type": "pil"}) if family == "xl" else (tiny_wan, SMALL)
    guard, able = make_guard(name, **quiet[name]), ABLE[family]
    if name in able:
        (drawn,) = generate(pipe, [guard], PROMPTS[1:], **options)
        assert drawn.image is not None
        assert drawn.trace.guards[0].calls >= 1
        return
    with pytest.raises(ConfigError) as caught:
        GuardedPipeline(pipe, [guard])
    words = str(caught.value)
    assert words.startswith(f"the guard '{name}' cannot run on a WanPipeline: it ")
    assert words.endswith(f". Guards that can: {', '.join(able)}.")
    assert "\n" not in words


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_gives_defaults_or_warns(name, quiet):
    skulls = load_concept("skulls")
    defaults = kind(name).defaults_from(skulls)
    assert set(defaults) <= set(kind(name).model_fields)
    if not defaults:
        with pytest.warns(
            UnusedSettingWarning, match=f"'skulls' has no effect on the guard '{name}'"
        ):
            make_guard(name, concept=skulls, **quiet[name])


def test_a_concept_whose_defaults_are_all_overridden_warns():
    with pytest.warns(UnusedSettingWarning, match="'skulls' has no effect on the guard 'sld'"):
        assert read_guard({"name": "sld", "concept": "skulls", "text": "x"}).text == "x"


def test_a_word_means_a_guard_and_its_preset():
    assert read_guard("sld-max") == make_guard("sld", "max")
    assert read_guard("sld-weak-diffusers") == make_guard("sld", "weak-diffusers")
    assert read_guard("negative-prompt", "skulls").text == "skulls, a skull"
    assert (
        read_guard({"name": "sld", "text": "x"}, "skulls").text == "x"
    )  # what is said goes before what is lent
    assert read_guard({"name": "sld", "concept": "fire"}, "skulls").text == "fire, flames, burning"


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        ("sldd", UnknownNameError, "Did you mean 'sld'"),
        ("sld-mx", UnknownNameError, "Did you mean 'max'"),
        ({"preset": "max"}, ConfigError, "a guard must have a name"),
        ({"name": "sld", "scal": 1}, ConfigError, "Did you mean 'scale'"),
        ({"name": "sld", "scale": -1}, ConfigError, "greater than or equal to 0, got -1"),
        (
            {"name": "sld", "threshold": float("nan")},
            ConfigError,
            "threshold must be a finite number, got nan",
        ),
        (
            {"name": "judge-filter", "judge": "mini", "threshold": float("nan")},
            ConfigError,
            "finite number",
        ),
        (
            {"name": "latent-guard", "weights": "x", "concepts": ["x"], "threshold": float("inf")},
            ConfigError,
            "finite number",
        ),
        ({"name": "sld", "concept": "skull"}, UnknownNameError, "Did you mean 'skulls'"),
        ("negative-prompt", ConfigError, "text is required"),
        ("sld-", UnknownNameError, "no preset of the guard 'sld' named ''"),
        ({"name": "sld", "preset": 3}, ConfigError, "guard 'sld': preset must be a name, got 3"),
        ({"name": "sld", "preset": ["max"]}, ConfigError, "preset must be a name"),
        ({"name": "sld", "concept": 3}, ConfigError, "guard 'sld': concept must be a name, got 3"),
        ({"name": "sld", "concept": ["skulls"]}, ConfigError, "concept must be a name"),
    ],
)
def test_what_means_no_guard_is_refused_in_one_line(value, error, says):
    with pytest.raises(error, match=says) as caught:
        read_guard(value)
    assert "\n" not in str(caught.value)


def test_the_families_are_those_that_diffusers_has():
    import diffusers

    assert all(hasattr(diffusers, name) for name in PIPELINE_SPECS)
