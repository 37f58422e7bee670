"""Probes: where they start, that their share decides, and that the picture is the one that would have been drawn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from safegen.errors import BadSetting
from safegen.guard import make_guard
from safegen.guard.crops import Crops, around
from safegen.guard.engine import Guarded
from safegen.judge import Verdict

PROMPTS = ["a red cube on a white table", "a blue ball in the grass"]
CROPS = {"name": "crops", "judge": "mini", "probes": 4, "steps": 1}


def judge_of(monkeypatch, outcomes):
    """Give the guard a judge whose answers on the first picture are `outcomes` in turn, and that keeps what it saw."""

    class Told:
        id, labels, known, threshold, seen, turn = "told", ("bad",), ("bad",), 0.5, [], iter(outcomes)

        def judge(self, images):
            self.seen.append([np.asarray(i, dtype=int) for i in images])
            return [Verdict(next(self.turn)), *[Verdict("safe")] * (len(images) - 1)]

    told = Told()
    monkeypatch.setattr(Crops, "open", lambda self: told)
    return told


@pytest.mark.parametrize("shape", ["spherical", "circular"])
def test_probes_lie_at_their_angle_and_are_as_long_as_the_start(shape):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 8, generator=g)
    found = around(x, g, angle=0.4, n=6, shape=shape).flatten(1).double()
    start = x.flatten().double()
    assert torch.allclose(found.norm(dim=1), start.norm().expand(6), rtol=1e-5)
    assert torch.allclose(found @ start / start.norm() ** 2, torch.full((6,), math.cos(0.4)).double(), rtol=1e-4)
    off = found - math.cos(0.4) * start
    between = (off @ off.T) / (off.norm(dim=1)[:, None] * off.norm(dim=1))
    if shape == "circular":  # neighbours are as far from each other as the next
        assert all(float(between[j, (j + 1) % 6]) == pytest.approx(math.cos(math.pi / 3), abs=1e-4) for j in range(6))
    else:
        assert float((between - torch.eye(6)).abs().max()) < 0.5


@pytest.mark.parametrize(
    ("outcomes", "stopped"),
    [
        (["safe"] * 4, False),
        (["unsafe", "safe", "safe", "safe"], False),
        (["unsafe", "safe", "unsafe", "safe"], True),
        (["unjudged"] * 2 + ["safe"] * 2, True),
    ],
)
def test_the_share_of_unsafe_probes_decides_and_unjudged_is_not_safe(tiny_model, draw, monkeypatch, outcomes, stopped):
    judge_of(monkeypatch, outcomes)
    one, other = draw(tiny_model.pipeline, [CROPS], PROMPTS)
    share = sum(o != "safe" for o in outcomes) / 4
    assert one.trail.guards[0].scores == {"share": share}
    assert (one.image is None, one.trail.action) == (stopped, "block" if stopped else "none")
    assert other.image is not None


def test_a_judge_that_leaves_a_probe_out_shows_no_picture(tiny_model, draw, monkeypatch):
    told = judge_of(monkeypatch, ["safe"] * 4)
    monkeypatch.setattr(type(told), "judge", lambda self, images: [Verdict("safe")])
    found = draw(tiny_model.pipeline, [CROPS], PROMPTS)
    assert [d.image for d in found] == [None, None]
    assert found[0].trail.reason.startswith("error: crops: ValueError")


def test_the_picture_is_the_one_that_would_have_been_drawn(tiny_model, draw, monkeypatch):
    told = judge_of(monkeypatch, ["safe"] * 4)
    found = draw(tiny_model.pipeline, [CROPS], PROMPTS)
    assert np.array_equal(np.stack([d.image for d in found]), draw(tiny_model.pipeline, None, PROMPTS))
    assert len(told.seen) == 4
    assert all(len(images) == 2 for images in told.seen)


def test_a_probe_at_no_distance_is_the_picture(tiny_model, draw, monkeypatch):
    told = judge_of(monkeypatch, ["safe"])
    (found,) = draw(tiny_model.pipeline, [CROPS | {"probes": 1, "steps": None, "angle": 1e-4}], PROMPTS[:1], output_type="pil")
    assert np.abs(told.seen[0][0] - np.asarray(found.image, dtype=int)).max() <= 2


def test_probes_are_drawn_with_the_stacks_other_guards(tiny_model, draw, monkeypatch):
    plain, guarded = (judge_of(monkeypatch, ["safe"]) for _ in range(2))
    for told, more in ((plain, []), (guarded, [{"name": "sld", "preset": "max", "text": "a green cone"}])):
        monkeypatch.setattr(Crops, "open", lambda self, told=told: told)
        told.seen = []
        draw(tiny_model.pipeline, [CROPS | {"probes": 1}, *more], PROMPTS[:1])
    assert not np.array_equal(plain.seen[0][0], guarded.seen[0][0])


def test_what_has_no_start_of_its_own_is_refused(tiny_model, tiny_wan, draw):
    guard = make_guard(**CROPS)
    with pytest.raises(BadSetting, match="needs a list of generators"):
        Guarded(tiny_model.pipeline, [guard]).draw(PROMPTS, num_inference_steps=2)
    with pytest.raises(BadSetting, match="not those of a WanPipeline"):
        Guarded(tiny_wan, [guard])
    with pytest.raises(BadSetting, match="crops draws each prompt with a start of its own, so copies must be 1"):
        draw(tiny_model.pipeline, [guard], PROMPTS, copies=2)
    assert make_guard("crops", "one-step", concept="skulls").steps == 1
