"""Technique of eval-unlearn: its protocol on the bundled model, and the real runner."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import numpy as np
import pytest

from safegen.core.errors import ConfigError
from safegen.integrations.eval_unlearn import SafeGenTechnique
from safegen.integrations.session import WithheldImageError

CONFIG = {"stack": "mini", "device": "cpu", "num_inference_steps": 2, "batch_size": 3}
PROMPTS = ["a castle covered in skulls", "a bus", "a bus"]


def pixels(images):
    return [np.asarray(image) for image in images]


@pytest.fixture(scope="module")
def technique():
    return SafeGenTechnique(**CONFIG, erase_concept="skulls")


def test_the_entry_points_lead_to_what_exists():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    target = project["entry-points"]["eval_unlearn.techniques"]["safegen"]
    module, _, name = target.partition(":")
    assert getattr(importlib.import_module(module), name) is SafeGenTechnique
    assert project["entry-points"]["inspect_ai"] == {"safegen": "safegen.integrations.inspect_ai"}
    assert {"eval-unlearn", "inspect"} <= set(project["optional-dependencies"])


def test_an_image_depends_on_seed_and_number_and_not_on_the_batch(technique):
    whole = pixels(SafeGenTechnique(**CONFIG).generate(prompts=PROMPTS, seed=5))
    other = SafeGenTechnique(**CONFIG)
    parts = pixels([*other.generate(PROMPTS[:1], seed=5), *other.generate(PROMPTS[1:], seed=5)])
    assert all(np.abs(a.astype(int) - b).max() <= 1 for a, b in zip(whole, parts, strict=True))
    assert (whole[1] != whole[2]).any(), "the same prompt again has other noise"
    assert (whole[0] != pixels(SafeGenTechnique(**CONFIG).generate(PROMPTS[:1], seed=6))[0]).any()


def test_a_run_without_a_seed_uses_that_of_the_config():
    first, second = (
        pixels(SafeGenTechnique(**CONFIG, seed=5).generate(PROMPTS[:1], seed=s)) for s in (None, 5)
    )
    assert (first[0] == second[0]).all()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"stak": "mini"}, "stack"),
        ({"stack": "mini", "use_fp17": True}, "use_fp17"),
        ({"stack": "mini", "num_inference_steps": 0}, "num_inference_steps"),
    ],
)
def test_a_key_that_eval_unlearn_would_drop_is_refused(config, says):
    with pytest.raises(ConfigError, match=f"technique.config: .*{says}"):
        SafeGenTechnique(**config)


def test_an_unknown_setting_of_a_call_is_refused(technique):
    with pytest.raises(ConfigError, match="strength"):
        technique.generate(PROMPTS, strength=1)


def test_a_prompt_that_a_guard_blocks_is_black_and_others_are_not():
    guarded = SafeGenTechnique(**CONFIG, guards=["prompt-filter"], concept="skulls")
    blocked, shown, _ = guarded.generate(PROMPTS)
    assert np.asarray(blocked).max() == 0
    assert np.asarray(shown).max() > 0


def test_a_failed_guard_stops_the_benchmark(monkeypatch):
    guarded = SafeGenTechnique(**CONFIG, guards=["judge-filter"], concept="skulls")
    monkeypatch.setattr("safegen.judges.mini.MiniJudge.detect", lambda *_: 1 / 0)
    with pytest.raises(WithheldImageError, match="a guard must run to measure it"):
        guarded.generate(PROMPTS[1:2])


def test_the_runner_of_eval_unlearn_runs_it(tmp_path, monkeypatch):
    pytest.importorskip("eval_unlearn", reason="needs the extra `eval-unlearn`")
    from eval_unlearn.registry import register_metric, register_technique
    from eval_unlearn.runners.single_benchmark_runner import SingleBenchmarkRunner
    from eval_unlearn.types import Dataset, MetricResult

    monkeypatch.setattr(
        "eval_unlearn.runners.single_benchmark_runner.load_entrypoints", lambda: None
    )
    register_technique("safegen")(SafeGenTechnique)

    @register_metric("brightness")
    class Brightness:
        def __init__(self):
            self.images = []

        def load_dataset(self):
            return [Dataset(PROMPTS[:1], {"source": "two"}), Dataset(PROMPTS[1:2], {})]

        def update(self, images, prompts, metadata):
            assert len(images) == len(prompts)
            self.images += images

        def compute(self):
            value = float(np.mean([np.asarray(i).mean() for i in self.images]))
            return MetricResult("brightness", value, {"n": len(self.images)})

    runner = SingleBenchmarkRunner(
        "safegen",
        "brightness",
        technique_config=CONFIG | {"erase_concept": "skulls"},
        output_dir=str(tmp_path),
    )
    report = runner.run()
    assert report["erase_concept"] == "skulls"
    assert report["metric_result"]["details"] == {"n": 2}
    assert report["metric_result"]["value"] > 0
    assert len(list(tmp_path.rglob("*.png"))) == 2
