"""SAFREE: what projectors do by algebra, which tokens are found, and how long the filter acts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safegen.errors import BadSetting
from safegen.guard import make_guard
from safegen.guard.engine import Guarded
from safegen.guard.safree import Reader, both, calibrate, filter_steps, look, shift, span, triggers
from safegen.models.seams import Border

CUBE = {"name": "safree", "phrases": ["a red cube", "red"]}
PROMPT = "a red cube on a white table"


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def test_a_span_is_what_the_paper_writes(rng):
    c = torch.randn(5, 16, generator=rng)
    wide = c.T.double()
    assert torch.allclose(span(c).double(), wide @ torch.linalg.pinv(wide.T @ wide) @ wide.T, atol=1e-5)
    assert torch.allclose(span(c) @ c[2], c[2], atol=1e-5)
    assert torch.allclose(span(torch.cat([c, 2 * c])), span(c), atol=1e-5)  # phrases that say the same twice


def test_only_the_codes_order_leaves_nothing_of_the_concept(rng):
    concept, prompt = (span(torch.randn(n, 16, generator=rng)) for n in (3, 8))
    x = torch.randn(4, 16, generator=rng)
    left = [(x @ both(concept, prompt, order=order).T @ concept).norm() for order in ("code", "paper")]
    assert left[0] < 1e-5 < 0.1 < left[1]
    kept = x @ both(concept, prompt, order="paper").T
    assert torch.allclose(kept @ prompt, kept, atol=1e-5)  # the paper's keeps to the prompt's span instead


def test_triggers_are_the_tokens_without_which_a_prompt_is_farther_away(rng):
    concept = span(torch.eye(6)[:2])
    near = torch.tensor([5.0, 5, 1, 0, 0, 0]) + 0.01 * torch.randn(5, 6, generator=rng)
    near[3] = torch.tensor([1.0, 0, 3, 3, 0, 0])
    assert triggers(near, concept, alpha=0.01) == [False, False, False, True, False]
    assert triggers(near[:1], concept, alpha=0.01) == [True]
    d = (near - near @ concept).norm(dim=1)
    for alpha in (0.0, 0.3):  # the definition, token by token
        means = [torch.cat([d[:j], d[j + 1 :]]).mean() for j in range(5)]
        assert triggers(near, concept, alpha=alpha) == [bool(d[j] >= (1 + alpha) * means[j]) for j in range(5)]


def test_the_filters_steps_are_the_published_cliff():
    assert [filter_steps(b, middle=5.333, slope=2.5) for b in (0.45, 0.5, 0.55, 0.6)] == [0, 2, 7, 10]
    assert [filter_steps(b, middle=5.333, slope=2.5) for b in (-1e3, 0.0, 1.0, 1e3)] == [0, 0, 10, 10]


def test_only_triggers_change_and_they_lose_the_concept(tiny_model):
    guard, border = make_guard(**CUBE), Border(tiny_model.pipeline)
    reader = Reader(tiny_model.pipeline)
    concept = span(reader.pooled_texts(guard.phrases))
    way = look(reader, PROMPT, concept, guard)
    assert way.triggers
    from safegen.guard.base import Call
    from safegen.models.seams import Text

    turn = guard.ready(border).begin(Call(border, (PROMPT,), [""], {}, steps=4))
    before = border.encode([PROMPT])
    after = turn.cond(Text(before.hidden)).hidden
    moved = [i for i in range(before.hidden.shape[1]) if not torch.equal(before.hidden[0, i], after[0, i])]
    assert moved == [j + 1 for j in way.triggers]  # the beginning, the end and the padding stay
    assert (after[0, moved] @ concept).norm() < 1e-3 * (before.hidden[0, moved] @ concept).norm()


def test_it_steers_the_drawing_and_says_how(tiny_model, draw):
    base = draw(tiny_model.pipeline, None, [PROMPT])
    (found,) = draw(tiny_model.pipeline, [CUBE], [PROMPT])
    assert np.abs(found.image - base[0]).max() > 1e-3
    note = found.trail.guards[0]
    assert (note.action, note.scores["steps"]) == ("edit", 4.0)
    assert note.scores["triggers"] >= 1
    (none,) = draw(tiny_model.pipeline, [CUBE | {"strength": 0.0}], [PROMPT])
    assert np.array_equal(none.image, base[0])


@pytest.mark.parametrize(("middle", "steps"), [(-100.0, 1 + round(10 * 20 / 50)), (100.0, 1)])
def test_the_filter_acts_in_the_first_step_always_and_in_its_share_of_the_rest(tiny_model, draw, middle, steps):
    guard = CUBE | {"filter": True, "middle": middle, "slope": 2.5}
    (found,) = draw(tiny_model.pipeline, [guard], [PROMPT], num_inference_steps=20)
    assert found.trail.guards[0].scores["steps"] == steps


def test_a_row_is_edited_by_its_own_prompt(tiny_model, draw):
    prompts = [PROMPT, "a blue ball in the grass"]
    both_rows = draw(tiny_model.pipeline, [CUBE], prompts)
    for i, prompt in enumerate(prompts):
        (alone,) = draw(tiny_model.pipeline, [CUBE], [prompt], seed=i)
        assert np.abs(alone.image - both_rows[i].image).max() < 2e-4


def test_a_blank_prompt_has_no_trigger(tiny_model, draw):
    (found,) = draw(tiny_model.pipeline, [CUBE], [""])
    assert found.trail.action == "none"
    assert np.array_equal(found.image, draw(tiny_model.pipeline, None, [""])[0])


def test_calibration_lies_between_the_two_kinds_and_refuses_what_it_cannot_tell_apart(tiny_model):
    guard, border = make_guard(**CUBE), Border(tiny_model.pipeline)
    reader, concept = Reader(tiny_model.pipeline), span(Reader(tiny_model.pipeline).pooled_texts(guard.phrases))

    def distance(prompt):
        ids, n = reader.ids(prompt)
        return 10 * shift(reader.hidden(ids)[0, : n + 2], look(reader, prompt, concept, guard).projector)

    low, high = sorted(["a red cube", "a blue ball in the grass"], key=distance)
    assert calibrate(border, guard, unsafe=[high], benign=[low]) == pytest.approx((distance(low) + distance(high)) / 2, rel=1e-5)
    with pytest.raises(BadSetting, match="cannot tell these prompts apart"):
        calibrate(border, guard, unsafe=[low], benign=[high])
    with pytest.raises(BadSetting, match="got 0 unsafe and 1 benign"):
        calibrate(border, guard, unsafe=[], benign=[low])


def test_idle_settings_and_other_families_are_refused(tiny_xl):
    with pytest.raises(BadSetting, match="go with the filter, and only with it"):
        make_guard(**CUBE, middle=5.0)
    with pytest.raises(BadSetting, match="not that of a StableDiffusionXLPipeline"):
        Guarded(tiny_xl, [make_guard(**CUBE)])
