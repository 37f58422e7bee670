"""The negative prompt as a guard equals the pipeline's own, and extends the call's."""

from __future__ import annotations

import numpy as np
import pytest

from safegen.core.errors import ConfigError
from safegen.guards.negative_prompt import join_texts

TEXT = {"name": "negative-prompt", "text": "a green cone"}


def arrays(outputs):
    return np.stack([np.asarray(o.image, dtype=np.float32) for o in outputs])


def near(one, other):
    """Return whether images are equal up to rounding: a shared text is encoded once."""
    return np.abs(one - other).max() < 1e-5


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_equals_the_pipelines_negative_prompt(family, tiny_model, tiny_xl, generate):
    pipe = tiny_model.pipeline if family == "sd" else tiny_xl
    assert near(
        arrays(generate(pipe, [TEXT])), generate(pipe, negative_prompt=["a green cone"] * 2)
    )
    assert near(
        arrays(generate(pipe, [TEXT], negative_prompt=["a tree", "grass"])),
        generate(pipe, negative_prompt=["a tree, a green cone", "grass, a green cone"]),
    )


def test_equals_the_pipelines_negative_prompt_with_two_calls_per_step(tiny_wan, generate):
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    assert near(
        arrays(generate(tiny_wan, [TEXT], **small)),
        generate(tiny_wan, negative_prompt=["a green cone"] * 2, **small),
    )


def test_uses_the_default_length_of_a_call(tiny_wan, generate):
    small = {
        "height": 16,
        "width": 16,
        "num_frames": 1,
    }  # a call pads texts to 512 tokens, `encode_prompt` alone to 226
    assert near(
        arrays(generate(tiny_wan, [TEXT], **small)),
        generate(tiny_wan, negative_prompt=["a green cone"] * 2, **small),
    )


@pytest.mark.parametrize("guard", [TEXT, {"name": "sld", "preset": "max", "text": "a green cone"}])
def test_a_text_longer_than_a_call_reads_is_refused(tiny_wan, generate, guard):
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 3}
    with pytest.raises(
        ConfigError, match=rf"of the guard '{guard['name']}' must have at most 3 tokens, got \d"
    ):
        generate(tiny_wan, [guard], **small)


def test_two_negative_prompts_are_joined(tiny_model, generate):
    two = generate(tiny_model.pipeline, [TEXT, {"name": "negative-prompt", "text": "grass"}])
    assert near(
        arrays(two), generate(tiny_model.pipeline, negative_prompt=["a green cone, grass"] * 2)
    )


def test_adds_no_denoiser_rows(tiny_model, generate):
    record = generate(tiny_model.pipeline, [TEXT])[0].trace.guards[0]
    assert (record.rows, record.action, record.reason) == (0, "edit", "steered")


@pytest.mark.parametrize(
    ("own", "more", "both"), [("", "b", "b"), ("a", "", "a"), ("a", "b", "a, b"), ("", "", "")]
)
def test_join_texts_uses_a_comma(own, more, both):
    assert join_texts(own, more) == both


@pytest.mark.parametrize("negative", ["A red cube ", ["a tree", "a red cube"]])
def test_sld_beside_an_equal_negative_prompt_of_the_call_is_refused(tiny_model, generate, negative):
    sld = {"name": "sld", "preset": "max", "text": "a red cube"}
    with pytest.raises(ConfigError, match="'sld' would have no effect: the negative prompt equals"):
        generate(tiny_model.pipeline, [sld], negative_prompt=negative)
    joined = [sld, {"name": "negative-prompt", "text": "cube"}]
    pipe = tiny_model.pipeline
    assert generate(pipe, joined, negative_prompt=negative)[0].image is not None
    with pytest.raises(ConfigError, match="'sld' would have no effect"):
        generate(pipe, [sld | {"text": "a tree, cube"}, joined[1]], negative_prompt="a tree")
