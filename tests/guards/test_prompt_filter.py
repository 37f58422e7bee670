"""Prompt filter: which prompts it blocks, and that they do not affect the others."""

from __future__ import annotations

import numpy as np
import pytest

from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.guards import make_guard
from safegen.guards.core.adapter import PipelineAdapter

CUBE = {"name": "prompt-filter", "words": ["red cube"]}


def by_length(prompts):
    """Return scores that grow with the length of a prompt."""
    return [min(len(p) / 100, 1.0) for p in prompts]


def broken(prompts):
    return [float("nan")] * len(prompts)


def stopped(words, *prompts):
    guard = make_guard("prompt-filter", words=words).build(PipelineAdapter(None))
    return [f.action == "block" for f in guard.check_prompts(prompts)]


@pytest.mark.parametrize(
    ("word", "text", "hit"),
    [
        ("skull", "a skull", True),
        ("skull", "a SKULL.", True),
        ("skull", "skull-shaped", True),
        ("skull", "a skullcap", False),
        ("skull", "numskull", False),
        ("skull", "skulls", False),
        ("a skull", "a\n  skull", True),
        ("skull", "ｓｋｕｌｌ", True),
        ("skull", "sk\u200bull", True),
        ("skull", "sk\ufe0full", True),
        ("\u2620\ufe0f", "a \u2620", True),
        ("\u2620", "a \u2620\ufe0f", True),
        ("Schädel", "ein schadel", True),
        ("c++", "in c++ now", True),
        ("c++", "c+++", True),
        ("a.b", "axb", False),
        ("skull", "skull_throne", True),
        ("red cube", "best_quality, red_cube", True),
        ("red_cube", "a red cube", True),
        ("skull", "skull2", True),
        ("skull", "1skull", True),
        ("b2", "b20", False),
        ("b2", "ab2", False),
        *[("skull", f"sk{hidden}ull", True) for hidden in "\0\x1b\x1c\x7f\u200b\ue000\uffff"],
        *[("skull", f"a{hidden}skull", True) for hidden in "\0\x0b\x1c\u200b\ue000"],
        ("skull", "s\u200bkullcap", False),
        ("skull", "sk&#117;ll", True),
        ("skull", "sk&amp;#x75;ll", True),
        ("c&amp;a", "c&amp;a", True),
    ],
)
def test_whole_words_match_in_any_case_and_width(word, text, hit):
    assert stopped([word], text) == [hit]


def test_a_blocked_prompt_does_not_change_the_others(tiny_model, generate):
    plain = generate(tiny_model.pipeline, None, ["a blue ball", "a red cube"])
    shown, gone = generate(tiny_model.pipeline, [CUBE], ["a blue ball", "a red cube"])
    assert np.abs(shown.image - plain[0]).max() < 1e-4
    assert (shown.trace.action, shown.trace.reason) == ("none", "")
    assert (gone.image, gone.trace.action, gone.trace.reason) == (
        None,
        "block",
        "prompt-filter: word",
    )
    assert gone.trace.withheld


def test_nothing_is_generated_if_every_prompt_is_blocked(tiny_model, generate):
    calls = []
    hook = tiny_model.denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    outputs = generate(tiny_model.pipeline, [CUBE], ["a red cube", "RED CUBE"])
    hook.remove()
    assert [o.trace.reason for o in outputs] == ["prompt-filter: word"] * 2
    assert not calls


def test_a_classifier_blocks_from_the_threshold_on():
    guard = make_guard("prompt-filter", classifier=f"{__name__}:by_length", threshold=0.1)
    short, long = guard.build(PipelineAdapter(None)).check_prompts(["x" * 9, "x" * 10])
    assert (short.action, long.action, long.reason) == ("none", "block", "classifier")
    assert (long.scores, long.thresholds) == ({"classifier": 0.1}, {"classifier": 0.1})


def test_a_classifier_without_a_finite_score_withholds(tiny_model, generate):
    outputs = generate(
        tiny_model.pipeline, [{"name": "prompt-filter", "classifier": f"{__name__}:broken"}]
    )
    assert [o.image for o in outputs] == [None, None]
    assert "must return a score in [0, 1]" in outputs[0].trace.reason


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "it filters nothing"),
        ({"words": ["x", " "]}, "words must not be blank"),
        ({"words": ["x"], "threshold": 2}, "less than or equal to 1, got 2"),
    ],
)
def test_filters_of_nothing_or_everything_are_refused(settings, says):
    with pytest.raises(ConfigError, match=says):
        make_guard("prompt-filter", **settings)


def test_a_threshold_without_a_classifier_warns():
    with pytest.warns(UnusedSettingWarning, match="threshold has no effect without a classifier"):
        make_guard("prompt-filter", words=["x"], threshold=0.3)


@pytest.mark.parametrize("name", ["nowhere:x", "json:nothing", "json", f"{__name__}:pytest.mark"])
def test_a_classifier_that_cannot_be_imported_is_refused(name):
    with pytest.raises(ConfigError, match="classifier must be module:function"):
        make_guard("prompt-filter", classifier=name).build(PipelineAdapter(None))


def test_an_empty_classifier_is_refused():
    with pytest.raises(ConfigError, match="classifier must have at least 1 character, got ''"):
        make_guard("prompt-filter", classifier="")
