"""DUO: its preference, its pairs, its hold on pure noise."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.duo import DUO, DUOObjective
from safegen.edits.functional import losses
from safegen.edits.training.samples import encode_triplets
from safegen.edits.training.trainer import Training
from safegen.judges import Detection, Detections, judge_images
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

WORDS = {"erase": ("red mark",), "anchors": ("a plain wall",), "steps": 4}


def training(**changes):
    return Training(
        **{"updates": 3, "batch": 2, "accumulation": 1, "lr": 1e-3, "ema": 0.0, "weight_decay": 0.0}
        | changes
    )


def problem_of(edit, model, triplets):
    return DUOObjective(edit, model, triplets, select_parameters(model.denoiser, "attn1"))


def one(x):
    return torch.tensor([x])


def test_the_preference_by_hand():
    """The safe error fell by 1 and the unsafe one rose by 2: -log sigmoid(0.5 * 3)."""
    found = losses.preference(one(1.0), one(2.0), one(5.0), one(3.0), beta=0.5)
    assert found.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))
    assert losses.preference(
        one(1.0), one(1.0), one(4.0), one(4.0), beta=500.0
    ).item() == pytest.approx(math.log(2))


def test_a_large_beta_does_not_overflow():
    found = losses.preference(one(3.0), one(1.0), one(1.0), one(3.0), beta=1e4)
    assert found.item() == pytest.approx(4e4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_terms_are_those_of_plain_forwards(make_model, triplets, prediction):
    model, net = (
        make_model(prediction_type=prediction),
        make_model(prediction_type=prediction).denoiser,
    )
    with torch.no_grad():
        for name in select_parameters(net, "attn1"):
            net.get_parameter(name).mul_(1.3)
    problem = problem_of(DUO(**WORDS, beta=7.0), model, triplets)
    g = torch.Generator().manual_seed(0)
    safe, unsafe, eps, start = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(4))
    t_safe, t_unsafe = torch.tensor([10, 300]), torch.tensor([700, 50])
    found = problem.compare(net, safe, unsafe, eps, t_safe, t_unsafe, start)
    scheduler, before, blank = (
        model.pipeline.scheduler,
        make_model(prediction_type=prediction).denoiser,
        model.encode_text([""] * 2),
    )

    @torch.no_grad()
    def error(denoiser, z, t):
        truth = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, t)
        return (
            (denoiser(scheduler.add_noise(z, eps, t), t, blank).sample - truth)
            .pow(2)
            .mean((1, 2, 3))
        )

    moved = (error(net, safe, t_safe) - error(before, safe, t_safe)) - (
        error(net, unsafe, t_unsafe) - error(before, unsafe, t_unsafe)
    )
    assert_close(found["L_dpo"].detach(), -F.logsigmoid(-7.0 * moved), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        last = torch.tensor([999, 999])
        kept = (
            (net(start, last, blank).sample - before(start, last, blank).sample)
            .pow(2)
            .mean((1, 2, 3))
        )
    assert_close(found["L_o"].detach(), kept, rtol=1e-3, atol=1e-7)
    assert kept.min() > 1e-8


@pytest.mark.parametrize("turned", [False, True])
def test_timesteps_are_counted_by_their_noise_whichever_way_the_schedule_runs(
    tiny_model, triplets, monkeypatch, turned
):
    """The released SD3 script trains the noisy part and holds the cleanest timestep, by counting a list that runs the other way."""
    abar = tiny_model.alphas_cumprod().flip(0) if turned else tiny_model.alphas_cumprod()
    monkeypatch.setattr(type(tiny_model), "alphas_cumprod", lambda self: abar)
    problem, asked = problem_of(DUO(**WORDS, training=training(batch=64)), tiny_model, triplets), []
    monkeypatch.setattr(
        problem,
        "compare",
        lambda net, safe, unsafe, eps, t, other, start: asked.append(torch.cat([t, other])) or {},
    )
    problem.training_step(tiny_model.denoiser, 0, torch.Generator().manual_seed(0), (0, 1))
    (t,) = asked
    clean = abar.sort(descending=True).values[:750]
    assert clean[-1] <= abar[t].min() < clean[700]  # up to three quarters of the way to pure noise
    assert abar[t].max() > clean[50]
    said = []
    handle = tiny_model.denoiser.register_forward_pre_hook(lambda net, args: said.append(args[1]))
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    DUOObjective.compare(problem, tiny_model.denoiser, z, z, z, t[:2], t[2:4], z)
    handle.remove()
    assert {float(abar[t]) for t in said[-1][-2:]} == {float(abar.min())}  # what is held


def test_before_the_first_update_nothing_is_preferred_and_all_is_kept(make_model, triplets):
    log = []
    DUO(**WORDS, rank=4, training=training(updates=1)).apply(
        make_model(), triplets, callback=lambda done, of, row: log.append(row)
    )
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
        problem = problem_of(
            DUO(**WORDS | {"steps": 40}, redraw=redraw, guidance=1.0), model, triplets
        )
        gaps.append(float((problem.safe - problem.unsafe).norm()))
    assert gaps[0] < 0.3 * gaps[1]


def test_it_learns_what_it_is_taught(make_model, triplets):
    log = []
    edit = DUO(
        **WORDS, weight_keep=0.0, beta=50.0, rank=8, training=training(updates=40, batch=4, lr=3e-3)
    )
    edit.apply(make_model(), triplets, callback=lambda done, of, row: log.append(row))
    assert sum(row["L_dpo"] for row in log[-5:]) < 0.95 * sum(row["L_dpo"] for row in log[:5])


def test_the_paper_preset_has_the_published_values():
    paper = make_edit("duo", "paper")
    assert (
        paper.beta,
        paper.weight_keep,
        paper.timesteps,
        paper.rank,
        paper.alpha,
        paper.selector,
    ) == (500, 5e6, (0, 750), 32, None, "attn1")
    assert (paper.redraw, paper.guidance, paper.share_timestep) == (0.75, 7.5, False)
    assert (
        paper.training.updates,
        paper.training.batch,
        paper.training.lr,
        paper.training.weight_decay,
    ) == (1000, 4, 6e-5, 1e-2)
    harder = make_edit("duo", "paper-violence")
    assert (harder.beta, harder.weight_keep, harder.training.updates, harder.training.lr) == (
        1000,
        1e7,
        500,
        3e-5,
    )
    for preset in (paper, harder):  # lambda = 1e6 beta / 100, rate = 3e-4 * 100 / beta
        assert preset.weight_keep == pytest.approx(1e4 * preset.beta)
        assert preset.training.lr == pytest.approx(0.03 / preset.beta)


REFUSED = {
    "validate_every has no effect on duo": {"training": {"validate_every": 2}},
    "timesteps must rise": {"timesteps": (5, 5)},
    "beta": {"beta": 0},
    "redraw": {"redraw": 0},
    "alpha has no effect without rank": {"alpha": 2.0, "rank": None},
    "share_timestep has no effect with objective kto": {"objective": "kto", "share_timestep": True},
    "tries has no effect without a judge": {"tries": 3},
    "labels has no effect without a judge": {"labels": ("skulls",)},
    "tries must be greater than or equal to 1": {"judge": "mini", "tries": 0},
    "objective must be 'dpo' or 'kto', got 'ppo'": {"objective": "ppo"},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_a_setting_that_is_wrong_or_idle_is_refused_in_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("duo", **REFUSED[words])
    assert "\n" not in str(caught.value)


def test_words_and_timesteps_that_are_missing_are_refused(make_model, tiny_model, triplets):
    with pytest.raises(ConfigError, match="duo has no words to erase"):
        DUO(anchors=("a tree",)).apply(tiny_model, triplets)
    with pytest.raises(ConfigError, match="duo draws safe twins by words for the counterpart"):
        DUO(erase=("a tree",)).apply(tiny_model, triplets)
    with pytest.raises(ConfigError, match="must end by 100 on this model, got 750"):
        DUO(**WORDS).apply(make_model(num_train_timesteps=100), triplets)


# ------------------------------------------------------------ kto


def test_the_unpaired_preference_by_hand():
    """Safe errors moved by -1 and +3, so by 1 on average.

    Unsafe ones by 2 and -2: -log sigmoid(-0.5 (1 - 2)) and (1 + 2).
    """
    found = losses.unpaired_preference(
        *(torch.tensor(v) for v in ([1.0, 5.0], [2.0, 2.0], [5.0, 1.0], [3.0, 3.0])), beta=0.5
    )
    assert found.tolist() == pytest.approx(
        [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.5))]
    )
    alone = [one(v) for v in (1.0, 2.0, 5.0, 3.0)]
    assert_close(losses.unpaired_preference(*alone, beta=0.5), losses.preference(*alone, beta=0.5))


def test_kto_holds_each_unsafe_picture_against_the_mean_of_the_safe_ones_at_a_shared_timestep(
    make_model, triplets, monkeypatch
):
    model, net, seen = make_model(), make_model().denoiser, []
    with torch.no_grad():
        for name in select_parameters(net, "attn1"):
            net.get_parameter(name).mul_(1.3)
    problem = problem_of(
        DUO(**WORDS, objective="kto", beta=7.0, training=training(batch=3)), model, triplets
    )
    plain = problem.compare
    monkeypatch.setattr(problem, "compare", lambda *given: seen.append(given) or plain(*given))
    found = problem.training_step(net, 0, torch.Generator().manual_seed(0), (0, 1))[
        "L_dpo"
    ].detach()
    ((_, safe, unsafe, eps, t, same, _),) = seen
    assert torch.equal(t, same)
    before, blank, noised = (
        make_model().denoiser,
        model.encode_text([""] * 3),
        model.pipeline.scheduler.add_noise,
    )

    @torch.no_grad()
    def moved(z):
        now, then = (
            (d(noised(z, eps, t), t, blank).sample - eps).pow(2).mean((1, 2, 3))
            for d in (net, before)
        )
        return now - then

    assert_close(
        found, -F.logsigmoid(-7.0 * (moved(safe).mean() - moved(unsafe))), rtol=1e-3, atol=1e-5
    )
    assert (found - F.softplus(7.0 * (moved(safe) - moved(unsafe)))).abs().max() > 1e-6


# ------------------------------------------------------------ judged twins


class Brightness:
    """A judge of one number: a picture whose mean is above the limit is unsafe, one of the given means cannot be judged."""

    id, labels, threshold = "brightness:1", ("bright",), 0.5

    def __init__(self, limit, unreadable=()):
        self.limit, self.unreadable, self.asked = limit, unreadable, []

    def detect(self, images):
        means = [
            sum(image.convert("L").tobytes()) / (image.width * image.height) for image in images
        ]
        self.asked.append(means)
        return [
            Detections((), unjudged="torn")
            if any(abs(m - u) < 1e-9 for u in self.unreadable)
            else Detections((Detection("bright", 0.9),) * (m > self.limit))
            for m in means
        ]


def with_judge(monkeypatch, judge):
    monkeypatch.setattr("safegen.edits.duo.load_judge", lambda name, **rule: judge)


def test_twins_are_drawn_again_until_the_judge_is_silent_and_only_those(
    make_model, triplets, monkeypatch
):
    model = make_model()
    once = problem_of(DUO(**WORDS), model, triplets)
    first = Brightness(-1)
    first.detect(model.decode_images(once.safe))
    (means,) = first.asked
    judge = Brightness(
        sorted(means)[2], unreadable=(min(means),)
    )  # three of six are too bright, and one cannot be read
    with_judge(monkeypatch, judge)
    edit = DUO(**WORDS, judge="mini", tries=40)
    found = problem_of(edit, model, triplets)
    assert [len(asked) for asked in judge.asked][:2] == [6, 4]
    silent = [i for i, m in enumerate(means) if m <= judge.limit and m != min(means)]
    assert len(silent) == 2
    twins = found.facts["twins"]
    kept = [i for i, row in enumerate(triplets.rows) if row.id not in twins["left out"]]
    assert twins["pairs"] == len(kept) == len(found.safe) == len(found.unsafe)
    assert twins["open_after_attempt"] == [
        sum(m > judge.limit or m in judge.unreadable for m in means) for means in judge.asked
    ]
    for at, i in enumerate(kept):
        assert_close(found.unsafe[at], once.unsafe[i])
        assert torch.equal(found.safe[at], once.safe[i]) is (
            i in silent
        )  # a twin that passed is not touched
    assert set(judge_images(judge, model.decode_images(found.safe))) == {"safe"}
    assert torch.equal(problem_of(edit, model, triplets).safe, found.safe)


def test_a_pair_whose_judge_is_never_silent_is_left_out_and_named_in_the_patch(
    make_model, triplets, monkeypatch
):
    model = make_model()
    means = Brightness(-1)
    means.detect(model.decode_images(problem_of(DUO(**WORDS), model, triplets).safe))
    (first,) = means.asked
    with_judge(monkeypatch, Brightness(sorted(first)[3]))
    patch = DUO(**WORDS, judge="mini", tries=1, rank=2, training=training(updates=1)).apply(
        model, triplets
    )
    bright = [row.id for row, m in zip(triplets.rows, first, strict=True) if m > sorted(first)[3]]
    assert patch.metadata.twins == {
        "judge": "brightness:1",
        "pairs": 4,
        "open_after_attempt": [2],
        "left out": bright,
    }


def test_a_judge_that_is_silent_on_no_twin_is_refused_by_name(tiny_model, triplets, monkeypatch):
    with_judge(monkeypatch, Brightness(-1))
    with pytest.raises(
        ConfigError,
        match=r"brightness:1 is silent on no safe twin in 2 tries \(0, 1, 2 \.\.\.\): give anchors",
    ):
        problem_of(DUO(**WORDS, judge="mini", tries=2), tiny_model, triplets)


def test_a_concept_lends_its_judge_with_its_rule_and_another_judge_gets_none_of_it():
    own = make_edit("duo", concept="skulls")
    assert (own.judge, own.labels, own.threshold) == ("mini", ("skulls",), 0.5)
    other, none = (make_edit("duo", concept="skulls", judge=judge) for judge in ("clip", None))
    assert (other.judge, other.labels, other.threshold) == ("clip", (), None)
    assert (none.judge, none.labels, none.threshold) == (None, (), None)
    assert make_edit("duo", concept="skulls", labels=("fire",)).labels == ("fire",)


def test_decoded_latents_are_the_pipelines_pictures(tiny_model):
    ask = {"prompt": "a red cube", "num_inference_steps": 2}
    shown, latents = (
        tiny_model.pipeline(
            **ask, output_type=kind, generator=torch.Generator().manual_seed(0)
        ).images
        for kind in ("pil", "latent")
    )
    assert [p.tobytes() for p in tiny_model.decode_images(latents)] == [p.tobytes() for p in shown]
