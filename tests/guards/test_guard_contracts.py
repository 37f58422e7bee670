"""Contract of every guard in the registry."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from safegen.core import registry as tables
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, UnknownNameError, UnusedSettingWarning
from safegen.guards import GuardConfig, make_guard, read_guard
from safegen.guards.core.adapter import ALL_POINTS, PipelineAdapter
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.core.result import ACTIONS
from safegen.models.families.pipeline_specs import PIPELINE_SPECS

NEEDS_MEMORYLESS_SCHEDULER = {"dual-latent"}
"""Guards that need a scheduler without state."""
NAMES = sorted(tables.GUARDS)
SMALL = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
PROMPTS = ("a red cube on a white table", "a blue ball in the grass")


def config_class(name) -> type[GuardConfig]:
    return tables.resolve(tables.GUARDS, name, "guard")


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_has_hook_points_and_documented_settings(name):
    guard = config_class(name)
    assert guard.model_fields["name"].default == name
    assert guard.hook_points
    assert guard.hook_points <= ALL_POINTS
    fields = {key: field for key, field in guard.model_fields.items() if key != "name"}
    assert not [
        key for key, field in fields.items() if not (field.description or "").strip().endswith(".")
    ]


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_names_its_paper_and_deviations(name):
    guard = config_class(name)
    assert guard.paper
    assert guard.code_url == "" or guard.code_url.startswith("https://")
    assert guard.paper == "ours" or guard.deviations.endswith(".")
    if guard.code_url.startswith("https://github.com/"):
        assert re.fullmatch(r"[0-9a-f]{7,40}", guard.code_commit)
        assert guard.parity.endswith(".")


@pytest.mark.parametrize(
    ("name", "preset"), [(n, p) for n in NAMES for p in ("default", *config_class(n).PRESETS)]
)
def test_every_preset_round_trips_through_json(name, preset, passing_settings):
    plain = {
        k: v
        for k, v in passing_settings[name].items()
        if k not in config_class(name).PRESETS.get(preset, {}) and k != "preset"
    }
    guard = make_guard(name, preset, **plain)
    assert read_guard(json.loads(guard.model_dump_json())) == guard
    assert json.loads(json.dumps(guard.fingerprint()))["name"] == name
    changed = {
        k for k, v in guard.model_dump().items() if v != make_guard(name, **plain).model_dump()[k]
    }
    assert changed <= set(config_class(name).PRESETS.get(preset, {}))


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_is_reproducible_and_restores_the_pipeline(
    name, tiny_model, generate, passing_settings
):
    guard, pipe = make_guard(name, **passing_settings[name]), tiny_model.pipeline
    base, engine = generate(pipe, None, PROMPTS), GuardedPipeline(pipe, [guard])
    first, second = (
        generate(pipe, None, PROMPTS, engine=engine, output_type="pil") for _ in range(2)
    )
    assert [o.image.tobytes() for o in first] == [
        o.image.tobytes() for o in second
    ]  # no state remains after a call
    assert [o.trace.to_json(times=False) for o in first] == [
        o.trace.to_json(times=False) for o in second
    ]
    assert np.array_equal(generate(pipe, None, PROMPTS), base)


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_writes_a_complete_record(name, tiny_model, generate, passing_settings):
    for output in generate(
        tiny_model.pipeline,
        [make_guard(name, **passing_settings[name])],
        PROMPTS,
        output_type="pil",
    ):
        (record,) = output.trace.guards
        assert record.guard == name
        assert record.calls >= 1
        assert record.ms > 0
        assert record.action in ACTIONS
        assert bool(record.reason) == (record.action != "none")
        assert all(np.isfinite(v) for v in (*record.scores.values(), *record.thresholds.values()))
        assert json.loads(json.dumps(output.trace.to_json())) == output.trace.to_json()


@pytest.mark.parametrize("name", NAMES)
def test_every_guard_works_with_an_extra_scheduler_step_or_refuses_it(
    name, tiny_model, generate, passing_settings, monkeypatch
):
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler.from_config(tiny_model.pipeline.scheduler.config, skip_prk_steps=True)
    monkeypatch.setattr(tiny_model.pipeline, "scheduler", scheduler)
    guard = make_guard(name, **passing_settings[name])
    if name in NEEDS_MEMORYLESS_SCHEDULER:
        with pytest.raises(ConfigError, match=f"for the guard '{name}', got PNDMScheduler"):
            GuardedPipeline(tiny_model.pipeline, [guard])
        return
    (output,) = generate(tiny_model.pipeline, [guard], PROMPTS[1:], output_type="pil")
    assert output.image is not None


@pytest.mark.parametrize("family", ["xl", "wan"])
@pytest.mark.parametrize("name", NAMES)
def test_every_guard_runs_on_a_pipeline_class_or_names_those_that_can(
    name, family, tiny_xl, tiny_wan, generate, passing_settings
):
    pipe, options = (tiny_xl, {"output_type": "pil"}) if family == "xl" else (tiny_wan, SMALL)
    guard, adapter = make_guard(name, **passing_settings[name]), PipelineAdapter(pipe)
    supported = [n for n in NAMES if not config_class(n).unsupported_reason(adapter)]
    if name in supported:
        (output,) = generate(pipe, [guard], PROMPTS[1:], **options)
        assert output.image is not None
        assert output.trace.guards[0].calls >= 1
        return
    with pytest.raises(ConfigError) as caught:
        GuardedPipeline(pipe, [guard])
    words = str(caught.value)
    assert words.startswith(f"the guard '{name}' cannot run on a WanPipeline: it ")
    assert words.endswith(f". Guards that can: {', '.join(supported)}.")
    assert "\n" not in words


def test_built_in_guards_run_on_sdxl_and_some_on_wan(tiny_xl, tiny_wan):
    def supported(pipe):
        adapter = PipelineAdapter(pipe)
        return {n for n in NAMES if not config_class(n).unsupported_reason(adapter)}

    assert supported(tiny_wan) >= {"negative-prompt", "prompt-filter", "sld"}
    assert not supported(tiny_wan) & {"crops", "dual-latent", "judge-filter", "pno", "safree"}
    assert supported(tiny_xl) >= {"crops", "dual-latent", "latent-guard", "pno", "safree", "sld"}


@pytest.mark.parametrize("name", NAMES)
def test_a_concept_gives_defaults_or_warns(name, passing_settings):
    skulls = load_concept("skulls")
    defaults = config_class(name).defaults_from(skulls)
    assert set(defaults) <= set(config_class(name).model_fields)
    if not defaults:
        with pytest.warns(
            UnusedSettingWarning, match=f"'skulls' has no effect on the guard '{name}'"
        ):
            make_guard(name, concept=skulls, **passing_settings[name])


def test_a_concept_whose_defaults_are_all_overridden_warns():
    with pytest.warns(UnusedSettingWarning, match="'skulls' has no effect on the guard 'sld'"):
        assert read_guard({"name": "sld", "concept": "skulls", "text": "x"}).text == "x"


def test_read_guard_accepts_names_presets_and_tables():
    assert read_guard("sld-max") == make_guard("sld", "max")
    assert read_guard("sld-released-weak") == make_guard("sld", "released-weak")
    assert read_guard("negative-prompt", "skulls").text == "skulls, a skull"
    assert (
        read_guard({"name": "sld", "text": "x"}, "skulls").text == "x"
    )  # settings override the concept's defaults
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
def test_invalid_guards_are_refused_in_one_line(value, error, says):
    with pytest.raises(error, match=says) as caught:
        read_guard(value)
    assert "\n" not in str(caught.value)


def test_every_supported_pipeline_class_exists_in_diffusers():
    import diffusers

    assert all(hasattr(diffusers, name) for name in PIPELINE_SPECS)
