"""DDIM steps: mean, deviation, log-probability, and the losses of what trains them."""

from __future__ import annotations

import math

import pytest
import torch
from sampling import Trial, build_policy, draws, reschedule
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close
from toy import BENIGN, EXPLICIT

from safegen.core.errors import ConfigError
from safegen.edits.rl.ddim import DDIMSteps, ddim_deviation, ddim_mean, log_probability
from safegen.edits.rl.ddpo import DDPO
from safegen.edits.rl.grpo_window import GRPOWindow

TEXTS = ("a red cube", "a blue ball")
NAMES = ("block.attn2.to_v.weight", "block.attn2.to_out.weight")
EACH = pytest.mark.parametrize("settings", [DDPO(), GRPOWindow()], ids=lambda s: s.name)
KINDS = pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])


@pytest.fixture
def toy_trial(toy):
    """Return a builder of a trial on the toy."""

    def build(settings, kind="epsilon", *, size=4, has_distance=True, **changes):
        policy = build_policy(toy(kind), EXPLICIT + BENIGN, names=NAMES, has_distance=has_distance)
        return Trial(policy, settings, size=size, **changes)

    return build


@pytest.fixture(scope="module")
def tiny_weights(make_model):
    """Return a tiny model and its weights."""
    model = make_model()
    return model, {name: p.detach().clone() for name, p in model.denoiser.state_dict().items()}


@pytest.fixture
def tiny(tiny_weights):
    """Return a tiny model with its first weights."""
    model, weights = tiny_weights
    model.denoiser.load_state_dict(weights)
    return model


# ------------------------------------------------------------ the step


@KINDS
def test_a_step_equals_a_hand_derivation(kind):
    """a = 0.25, a' = 0.64, x = 1, eps = 0.5: sigma^2 = 0.48 * (1 - 0.390625) = 0.2925.

    x0 = (1 - sqrt(0.75) / 2) / 0.5 = 2 - sqrt(0.75), mu = 0.8 x0 + sqrt(0.36 - 0.2925) / 2.
    """
    a, a_prev, x = torch.tensor([0.25]), torch.tensor([0.64]), torch.ones(1, 1, 1, 1)
    std = ddim_deviation(a, a_prev, 1.0)
    assert_close(std, torch.tensor([math.sqrt(0.2925)]))
    assert_close(ddim_deviation(a, a_prev, 0.5), std / 2)
    x0, eps = 2 - math.sqrt(0.75), 0.5
    prediction = eps if kind == "epsilon" else 0.5 * eps - math.sqrt(0.75) * x0
    mean = ddim_mean(torch.full_like(x, prediction), x, a, a_prev, std, kind=kind)
    assert_close(mean.item(), 0.8 * x0 + math.sqrt(0.0675) * eps, rtol=1e-6, atol=1e-6)


@KINDS
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("steps", "config"),
    [
        (10, {}),
        (7, {"timestep_spacing": "trailing"}),
        (5, {"timestep_spacing": "linspace"}),
        (6, {"set_alpha_to_one": True, "steps_offset": 0}),
    ],
)
def test_every_step_equals_that_of_diffusers(kind, eta, steps, config, toy):
    model = reschedule(toy(kind), **config)
    policy = build_policy(model, BENIGN, names=NAMES, steps=steps)
    ours, theirs = DDIMSteps(policy, eta), model.pipeline.scheduler
    theirs.set_timesteps(steps)
    prediction, x, z = torch.randn(3, 2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    for i, t in enumerate(theirs.timesteps):
        step = torch.full((2,), i)
        mean, std = ours.mean(prediction, x, step), ours.std[step].view(-1, 1, 1, 1)
        expected = theirs.step(prediction, t, x, eta=eta, variance_noise=z).prev_sample
        assert_close(mean + std * z, expected, rtol=1e-5, atol=1e-5)


def test_without_noise_a_step_solves_the_ode(toy):
    """x' / sqrt(a') - x / sqrt(a) = (sqrt(1/a' - 1) - sqrt(1/a - 1)) eps, as in DDIM, eq. 13."""
    steps = DDIMSteps(build_policy(toy(), BENIGN, names=NAMES), 0.0)
    eps, x = torch.randn(2, 6, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    after = steps.mean(eps, x, torch.arange(6))
    a, b = (value.view(-1, 1, 1, 1) for value in (steps.abar, steps.abar_prev))
    change = ((1 / b - 1).sqrt() - (1 / a - 1).sqrt()) * eps
    assert_close(after / b.sqrt() - x / a.sqrt(), change, rtol=1e-4, atol=1e-4)


def test_noise_keeps_the_distribution_of_images(toy):
    """On an exact denoiser, images drawn with and without noise have the same moments."""
    policy = build_policy(toy(), BENIGN, names=NAMES, steps=250)
    text = policy.text[:1].expand(200)
    noise = torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    ode = policy.draw(policy.model.denoiser, noise, text)
    algorithm = DDPO().build(policy, 1, 200, updates=1)
    sde, _ = algorithm.rollout(
        policy.model.denoiser, noise, text, draws(200, torch.Generator().manual_seed(2))
    )
    assert_close(sde.mean(0), ode.mean(0), rtol=0, atol=0.1)
    assert_close(sde.std(0).mean(), ode.std(0).mean(), rtol=0.05, atol=0)


def test_the_log_probability_is_the_mean_of_normal_densities():
    generator = torch.Generator().manual_seed(1)
    x, mean = torch.randn(2, 3, 4, 8, 8, generator=generator)
    std = torch.tensor([0.02, 0.3, 1.5])
    expected = Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x).flatten(1).mean(1)
    assert_close(log_probability(x, mean, std), expected)


# ------------------------------------------------------------ schedules


@pytest.mark.parametrize("config", [{"steps_offset": 0}, {"set_alpha_to_one": True}])
def test_ddpo_refuses_a_schedule_with_a_step_without_noise(config, toy):
    """With steps_offset 0, the released code computes an infinite log-probability."""
    policy = build_policy(reschedule(toy(), **config), BENIGN, names=NAMES)
    with pytest.raises(ConfigError, match=r"must be >= 0.001, got 0 at timestep .* steps_offset"):
        DDPO().build(policy, 2, 2, updates=1)
    GRPOWindow().build(policy, 2, 2, updates=1)  # its steps are those of the first half


def test_a_window_refuses_steps_of_little_noise(toy):
    model = reschedule(toy(), beta_start=1e-6, beta_end=1e-5)
    policy = build_policy(model, BENIGN, names=NAMES, steps=100)
    with pytest.raises(ConfigError, match=r"must be >= 0.03, got .* Lower steps \(100\), or"):
        GRPOWindow().build(policy, 2, 2, updates=1)


@EACH
@pytest.mark.parametrize("scheduler", ["pndm", "dpm-solver"])
def test_another_sampler_is_refused(settings, scheduler, toy):
    policy = build_policy(toy(), BENIGN, names=NAMES, scheduler=scheduler)
    with pytest.raises(ConfigError, match=r"scheduler must be ddim .* v_grpo"):
        settings.build(policy, 2, 2, updates=1)


def test_the_published_clip_follows_from_the_size_of_the_latents(toy_trial):
    assert DDPO().clip == "auto"
    assert 0.0128 / math.sqrt(4 * 64 * 64) == pytest.approx(1e-4)
    assert toy_trial(DDPO()).algorithm.clip == pytest.approx(0.0016)
    assert toy_trial(DDPO(clip=0.3)).algorithm.clip == 0.3


# ------------------------------------------------------------ ratio


@EACH
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_ratio_is_one_before_the_first_update(settings, guidance, tiny):
    trial = Trial(build_policy(tiny, TEXTS, guidance=guidance, steps=3), settings)
    for term in trial.terms():
        assert_close(term.figures["ratio"], torch.ones(4), rtol=0, atol=1e-6)
        assert not term.figures["clipped"].any()
        assert term.kl.abs().max() < 1e-9
    trial.move(0.01)
    assert any((term.figures["ratio"] - 1).abs().max() > 1e-5 for term in trial.terms())


def test_latents_are_stored_in_fp32_and_half_precision_would_break_the_ratio(tiny):
    """In bf16, the rounding of stored latents moves the last log-probability beyond the clip."""
    policy = build_policy(tiny, TEXTS, guidance=3.0, precision="bf16", steps=3)
    trial = Trial(policy, DDPO())
    batch, last = trial.batch, policy.sampler.steps - 1
    assert batch.extra["trajectory"].dtype == batch.extra["log_prob"].dtype == torch.float32
    batch.extra["order"] = torch.arange(trial.columns).expand(len(batch.prompts), -1)

    def shift():
        with policy.autocast():
            terms = trial.terms(columns=[last])
        return torch.cat([(term.figures["ratio"] - 1).abs() for term in terms])

    assert shift().max() < 1e-6
    batch.extra["trajectory"] = batch.extra["trajectory"].bfloat16().float()
    assert shift().min() > 10 * 1e-4


# ------------------------------------------------------------ gradient


@EACH
@KINDS
def test_a_step_raises_good_images_and_lowers_bad_ones(settings, kind, toy_trial):
    trial = toy_trial(settings, kind, group=2, size=4)
    for sign in (1.0, -1.0):
        trial.batch.advantages = torch.full((4,), sign)
        gradient = trial.gradient()
        assert gradient.norm() > 0
        trial.move(-1e-3 * gradient / gradient.norm())
        ratio = torch.cat([term.figures["ratio"] for term in trial.terms()]).mean()
        assert sign * (ratio - 1) > 1e-7
        trial.move(1e-3 * gradient / gradient.norm())


@EACH
def test_images_without_advantage_have_no_gradient(settings, toy_trial):
    trial = toy_trial(settings)
    trial.batch.advantages.zero_()
    assert trial.gradient().abs().max() == 0


@EACH
def test_clipped_steps_have_no_gradient(settings, toy_trial):
    trial = toy_trial(settings, size=8)
    trial.move(0.05)
    change = trial.terms(columns=[0])[0].figures["ratio"] - 1
    beyond = change.abs() > trial.algorithm.clip
    assert beyond.sum() >= 3
    trial.batch.advantages = torch.where(beyond, change.sign(), 0.0)
    terms = trial.terms(columns=[0])
    assert torch.equal(terms[0].figures["clipped"].bool(), beyond)
    assert trial.gradient(terms).abs().max() == 0
    trial.batch.advantages *= -1  # the ratio may go back
    terms = trial.terms(columns=[0])
    assert not terms[0].figures["clipped"].any()
    assert trial.gradient(terms).abs().max() > 0


@EACH
def test_four_small_batches_have_the_gradient_of_a_large_one(settings, toy_trial):
    trial = toy_trial(settings, groups=4, group=4, size=4)
    small = trial.gradient(kl=0.1)
    trial.size = 16
    assert_close(trial.gradient(kl=0.1), small, rtol=1e-5, atol=1e-5)


@EACH
def test_the_distance_is_the_kl_divergence_of_the_step(settings, toy_trial):
    trial = toy_trial(settings, size=8)
    algorithm, policy, batch = trial.algorithm, trial.policy, trial.batch
    trial.move(0.05)
    found = trial.terms(columns=[0])[0].kl
    rows, column = torch.arange(8), batch.extra["order"][:, 0]
    step, x = batch.extra["step"][rows, column], batch.extra["trajectory"][rows, column]
    t, std = policy.sampler.timesteps[step], algorithm.steps.std[step].view(-1, 1, 1, 1)

    def distribution(tensors):
        prediction = policy.predict_frozen(trial.net, x, t, policy.text[batch.prompts], tensors)
        return Normal(algorithm.steps.mean(prediction, x, step), std)

    expected = kl_divergence(distribution(None), distribution(policy.reference))
    assert found.min() > 0
    assert_close(found, expected.flatten(1).mean(1), rtol=1e-4, atol=1e-7)


# ------------------------------------------------------------ passes


@EACH
@pytest.mark.parametrize(("guidance", "halves"), [(1.0, 1), (3.0, 2)])
@pytest.mark.parametrize(("has_distance", "frozen"), [(True, 1), (False, 0)])
def test_the_passes_of_a_rollout_and_its_training_are_counted(
    settings, guidance, halves, has_distance, frozen, toy
):
    changes = {"guidance": guidance, "has_distance": has_distance}
    policy = build_policy(toy(), BENIGN, names=NAMES, **changes)
    trial = Trial(policy, settings)
    assert policy.passes == 8 * 6 * halves
    trial.terms()
    assert policy.passes == 8 * (6 + trial.columns * (3 + frozen)) * halves
