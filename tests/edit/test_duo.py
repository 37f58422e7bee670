"""DUO: its preference, its pairs, its hold on pure noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.api import make_edit
from safegen.edit import losses
from safegen.edit.duo import DUO, DUOProblem
from safegen.edit.loop import Training
from safegen.edit.samples import encode_triplets
from safegen.errors import BadSetting
from safegen.models import select

WORDS = {"erase": ("red mark",), "anchors": ("a plain wall",), "steps": 4}


def training(**changes):
    return Training(**{"updates": 3, "batch": 2, "accumulation": 1, "lr": 1e-3, "ema": 0.0, "weight_decay": 0.0} | changes)


def problem_of(edit, model, triplets):
    return DUOProblem(edit, model, triplets, select(model.denoiser, "attn1"))


def one(x):
    return torch.tensor([x])


def test_the_preference_by_hand():
    """The safe error fell by 1 and the unsafe one rose by 2: -log sigmoid(0.5 * 3)."""
    found = losses.preference(one(1.0), one(2.0), one(5.0), one(3.0), beta=0.5)
    assert found.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))
    assert losses.preference(one(1.0), one(1.0), one(4.0), one(4.0), beta=500.0).item() == pytest.approx(math.log(2))


def test_a_large_beta_does_not_overflow():
    found = losses.preference(one(3.0), one(1.0), one(1.0), one(3.0), beta=1e4)
    assert found.item() == pytest.approx(4e4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_terms_are_those_of_plain_forwards(make_model, triplets, prediction):
    model, net = make_model(prediction_type=prediction), make_model(prediction_type=prediction).denoiser
    with torch.no_grad():
        for name in select(net, "attn1"):
            net.get_parameter(name).mul_(1.3)
    problem = problem_of(DUO(**WORDS, beta=7.0), model, triplets)
    g = torch.Generator().manual_seed(0)
    safe, unsafe, eps, start = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(4))
    t_safe, t_unsafe = torch.tensor([10, 300]), torch.tensor([700, 50])
    found = problem.compare(net, safe, unsafe, eps, t_safe, t_unsafe, start)
    scheduler, before, blank = model.pipeline.scheduler, make_model(prediction_type=prediction).denoiser, model.encode_text([""] * 2)

    @torch.no_grad()
    def error(denoiser, z, t):
        truth = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, t)
        return (denoiser(scheduler.add_noise(z, eps, t), t, blank).sample - truth).pow(2).mean((1, 2, 3))

    moved = (error(net, safe, t_safe) - error(before, safe, t_safe)) - (error(net, unsafe, t_unsafe) - error(before, unsafe, t_unsafe))
    assert_close(found["L_dpo"].detach(), -F.logsigmoid(-7.0 * moved), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        last = torch.tensor([999, 999])
        kept = (net(start, last, blank).sample - before(start, last, blank).sample).pow(2).mean((1, 2, 3))
    assert_close(found["L_o"].detach(), kept, rtol=1e-3, atol=1e-7)
    assert kept.min() > 1e-8


def test_what_is_held_is_the_noisiest_timestep_whichever_way_the_schedule_runs(tiny_model, triplets):
    """The released SD3 script holds the cleanest by counting a list that runs the other way."""
    problem = problem_of(DUO(**WORDS), tiny_model, triplets)
    assert float(tiny_model.alphas_cumprod()[problem.noisiest]) == float(tiny_model.alphas_cumprod().min())


def test_before_the_first_update_nothing_is_preferred_and_all_is_kept(make_model, triplets):
    log = []
    DUO(**WORDS, rank=4, training=training(updates=1)).apply(make_model(), triplets, report=lambda done, of, row: log.append(row))
    assert log[0]["L_dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["L_o"] == pytest.approx(0, abs=1e-12)


def test_pairs_are_unsafe_pictures_and_what_is_drawn_of_them(make_model, triplets):
    model = make_model()
    near = problem_of(DUO(**WORDS, redraw=0.25), model, triplets)
    assert_close(near.unsafe, encode_triplets(model, triplets, flip=False)[0, 0])
    again = problem_of(DUO(**WORDS, redraw=0.25), model, triplets)
    assert torch.equal(near.safe, again.safe)
    other = problem_of(DUO(**WORDS | {"anchors": ("a green cone",)}, redraw=0.25), model, triplets)
    assert not torch.equal(near.safe, other.safe)
    assert near.safe.shape == near.unsafe.shape


def test_the_less_is_redrawn_the_nearer_the_twin(make_model, triplets):
    """One step of forty from almost no noise, against all of them from almost nothing else."""
    model = make_model()
    gaps = []
    for redraw in (0.025, 1.0):
        problem = problem_of(DUO(**WORDS | {"steps": 40}, redraw=redraw, guidance=1.0), model, triplets)
        gaps.append(float((problem.safe - problem.unsafe).norm()))
    assert gaps[0] < 0.3 * gaps[1]


def test_it_learns_what_it_is_taught(make_model, triplets):
    log = []
    edit = DUO(**WORDS, weight_keep=0.0, beta=50.0, rank=8, training=training(updates=40, batch=4, lr=3e-3))
    edit.apply(make_model(), triplets, report=lambda done, of, row: log.append(row))
    assert sum(row["L_dpo"] for row in log[-5:]) < 0.95 * sum(row["L_dpo"] for row in log[:5])


def test_the_paper_preset_has_the_published_values():
    paper = make_edit("duo", "paper")
    assert (paper.beta, paper.weight_keep, paper.timesteps, paper.rank, paper.alpha, paper.selector) == (
        500,
        5e6,
        (0, 750),
        32,
        None,
        "attn1",
    )
    assert (paper.redraw, paper.guidance, paper.share_timestep) == (0.75, 7.5, False)
    assert (paper.training.updates, paper.training.batch, paper.training.lr, paper.training.weight_decay) == (1000, 4, 6e-5, 1e-2)


REFUSED = {
    "validate_every has no effect on duo": {"training": {"validate_every": 2}},
    "timesteps must rise": {"timesteps": (5, 5)},
    "beta": {"beta": 0},
    "redraw": {"redraw": 0},
    "alpha has no effect without rank": {"alpha": 2.0, "rank": None},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_a_setting_that_is_wrong_or_idle_is_refused_in_one_line(words):
    with pytest.raises(BadSetting, match=words) as caught:
        make_edit("duo", **REFUSED[words])
    assert "\n" not in str(caught.value)


def test_words_and_timesteps_that_are_missing_are_refused(make_model, tiny_model, triplets):
    with pytest.raises(BadSetting, match="duo has no words to erase"):
        DUO(anchors=("a tree",)).apply(tiny_model, triplets)
    with pytest.raises(BadSetting, match="duo draws safe twins by words for the counterpart"):
        DUO(erase=("a tree",)).apply(tiny_model, triplets)
    with pytest.raises(BadSetting, match="must end by 100 on this model, got 750"):
        DUO(**WORDS).apply(make_model(num_train_timesteps=100), triplets)
