"""The negative prompt as a guard is the pipeline's own, and joins the user's."""

from __future__ import annotations

import numpy as np
import pytest

from safegen.core.errors import ConfigError
from safegen.guards.negative_prompt import join_texts

TEXT = {"name": "negative-prompt", "text": "a green cone"}


def arrays(drawn):
    return np.stack([np.asarray(d.image, dtype=np.float32) for d in drawn])


def near(one, other):
    """Equal but for rounding: a text that several pictures share is encoded once."""
    return np.abs(one - other).max() < 1e-5


@pytest.mark.parametrize("family", ["sd", "xl"])
def test_it_draws_what_the_pipelines_own_negative_prompt_draws(
    family, tiny_model, tiny_xl, generate
):
    pipe = tiny_model.pipeline if family == "sd" else tiny_xl
    assert near(
        arrays(generate(pipe, [TEXT])), generate(pipe, negative_prompt=["a green cone"] * 2)
    )
    assert near(
        arrays(generate(pipe, [TEXT], negative_prompt=["a tree", "grass"])),
        generate(pipe, negative_prompt=["a tree, a green cone", "grass, a green cone"]),
    )


def test_it_draws_what_the_pipelines_own_does_in_two_calls(tiny_wan, generate):
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}
    assert near(
        arrays(generate(tiny_wan, [TEXT], **small)),
        generate(tiny_wan, negative_prompt=["a green cone"] * 2, **small),
    )


def test_it_is_as_long_as_the_pipelines_own_by_default_too(tiny_wan, generate):
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
def test_a_text_that_a_call_would_cut_is_refused(tiny_wan, generate, guard):
    small = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 3}
    with pytest.raises(
        ConfigError, match=rf"of the guard '{guard['name']}' must have at most 3 tokens, got \d"
    ):
        generate(tiny_wan, [guard], **small)


def test_two_of_them_join(tiny_model, generate):
    two = generate(tiny_model.pipeline, [TEXT, {"name": "negative-prompt", "text": "grass"}])
    assert near(
        arrays(two), generate(tiny_model.pipeline, negative_prompt=["a green cone, grass"] * 2)
    )


def test_it_adds_no_row_to_the_denoiser(tiny_model, generate):
    note = generate(tiny_model.pipeline, [TEXT])[0].trace.guards[0]
    assert (note.rows, note.action, note.reason) == (0, "edit", "steered")


@pytest.mark.parametrize(
    ("own", "more", "both"), [("", "b", "b"), ("a", "", "a"), ("a", "b", "a, b"), ("", "", "")]
)
def test_texts_are_joined_by_a_comma(own, more, both):
    assert join_texts(own, more) == both
