"""Schedules of noise: the arithmetic of diffusers' schedulers, and targets that agree on x0."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.functional import losses
from safegen.models.families.noise_schedule import NoiseSchedule, euler_scheduler
from safegen.models.schedulers import build_scheduler

VP = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
}
SCHEDULERS = {
    "epsilon": lambda: DDIMScheduler(**VP),
    "v_prediction": lambda: DDIMScheduler(**VP, prediction_type="v_prediction"),
    "flow": lambda: FlowMatchEulerDiscreteScheduler(),
    "flow-shifted": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow-dynamic": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
}
FREE = 1e9
"""A clamp that binds nowhere."""


@pytest.fixture(scope="module", params=sorted(SCHEDULERS))
def scheduler(request):
    return SCHEDULERS[request.param]()


@pytest.fixture(scope="module")
def schedule(scheduler):
    """Return its schedule in float64."""
    found = NoiseSchedule.of(scheduler)
    noise = found.noise.double()
    signal = 1 - noise if found.prediction == "flow_prediction" else (1 - noise**2).sqrt()
    wide = {"timesteps": found.timesteps.double(), "signal": signal, "noise": noise}
    return replace(found, **wide, factors=None)


@pytest.fixture(scope="module")
def z():
    """Return two latents and noise in float64, for each of 1000 timesteps."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(1000, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(3)]


def tolerance(schedule):
    """Return that of x0: flow computes its coefficients in fp32."""
    flow = schedule.prediction == "flow_prediction"
    return {"rtol": 0, "atol": 1e-3 if flow else 1e-8}


def test_add_noise_and_target_equal_the_scheduler(scheduler, z):
    z_u, _, eps = (v.float() for v in z)
    found = NoiseSchedule.of(scheduler)
    t = found.timesteps
    if found.prediction == "flow_prediction":
        want, target = scheduler.scale_noise(z_u, t, eps), eps - z_u
    else:
        want = scheduler.add_noise(z_u, eps, t)
        target = scheduler.get_velocity(z_u, eps, t) if found.prediction != "epsilon" else eps
    assert len(found) == len(t) == 1000
    assert_close(found.add_noise(z_u, eps, t), want)
    assert_close(found.target(z_u, eps, t), target)


def test_the_target_implies_the_latents_and_the_noise(schedule, z):
    z_u, _, eps = z
    t = schedule.timesteps
    x, target = schedule.add_noise(z_u, eps, t), schedule.target(z_u, eps, t)
    assert_close(schedule.implied_x0(target, x, t), z_u, **tolerance(schedule))
    assert_close(schedule.implied_noise(target, x, t), eps, **tolerance(schedule))


def test_a_prediction_is_the_target_of_the_latents_and_the_noise_that_it_implies(schedule, z):
    x, prediction, _ = z
    t = schedule.timesteps
    z_0, eps = schedule.implied_x0(prediction, x, t), schedule.implied_noise(prediction, x, t)
    scale = z_0.abs().amax((1, 2, 3), keepdim=True).clamp(min=1)
    assert_close(schedule.add_noise(z_0, eps, t) / scale, x / scale, **tolerance(schedule))
    assert_close(schedule.target(z_0, eps, t) / scale, prediction / scale, **tolerance(schedule))


def test_the_schedule_consistent_target_implies_the_censored_image_at_every_timestep(schedule, z):
    """It is the fixed point of SafeGen's target x0, exact without a clamp."""
    z_u, z_c, eps = z
    t = schedule.timesteps
    factor = schedule.x0_factor(t, clamp=FREE)
    target = losses.x0_target(schedule.target(z_u, eps, t), z_u, z_c, factor)
    x = schedule.add_noise(z_u, eps, t)
    assert_close(schedule.implied_x0(target, x, t), z_c, **tolerance(schedule))


def test_the_schedule_consistent_target_moves_the_x0_of_any_prediction(schedule, z):
    z_u, z_c, prediction = z
    t, x = schedule.timesteps, z_c  # any x_t: the move does not depend on it
    target = losses.x0_target(prediction, z_u, z_c, schedule.x0_factor(t, clamp=FREE))
    before, after = schedule.implied_x0(prediction, x, t), schedule.implied_x0(target, x, t)
    assert_close(after - before, z_c - z_u, **tolerance(schedule))


@pytest.mark.parametrize("clamp", [1.5, 3.0])
def test_a_clamped_target_implies_an_image_between_unsafe_and_censored(schedule, z, clamp):
    z_u, z_c, eps = z
    t = schedule.timesteps
    free, factor = schedule.x0_factor(t, clamp=FREE), schedule.x0_factor(t, clamp=clamp)
    target = losses.x0_target(schedule.target(z_u, eps, t), z_u, z_c, factor)
    x0 = schedule.implied_x0(target, schedule.add_noise(z_u, eps, t), t)
    share = (factor / free).double()
    assert share.min() < 1
    assert share.max() == 1
    assert_close(x0, z_u + share * (z_c - z_u), **tolerance(schedule))


def test_the_factor_of_sd_1_is_34_at_the_first_timestep():
    schedule = NoiseSchedule.of(SCHEDULERS["epsilon"]())
    assert float(schedule.x0_factor(torch.tensor([0]), clamp=FREE)) == pytest.approx(34, abs=0.5)
    assert float(schedule.x0_factor(torch.tensor([0]), clamp=3.0)) == 3


def test_the_papers_target_implies_an_image_part_of_the_way(z):
    z_u, z_c, eps = z
    found = NoiseSchedule.of(SCHEDULERS["epsilon"]())
    schedule = replace(
        found, signal=found.signal.double(), noise=found.noise.double(), factors=None
    )
    t = schedule.timesteps
    x0 = schedule.implied_x0(losses.paper_target(eps, z_u, z_c), schedule.add_noise(z_u, eps, t), t)
    share = (schedule.noise / schedule.signal)[:, None, None, None]
    assert_close(x0, z_u - share * (z_u - z_c), rtol=0, atol=1e-9)
    assert int((share.flatten() - 1).abs().argmin()) == pytest.approx(354, abs=1)


# ------------------------------------------------------------ forms of one prediction


def forms():
    """Return schedules of the three predictions with the noise levels of flow matching, scaled.

    x of flow matching at s is that of diffusion at a noise of s / sqrt((1 - s)^2 + s^2), times
    sqrt((1 - s)^2 + s^2).
    """
    s = torch.linspace(0.02, 0.98, 1000)
    scale = ((1 - s) ** 2 + s**2).sqrt()
    t = torch.arange(1000)
    diffusion = [
        NoiseSchedule(kind, t, (1 - s) / scale, s / scale) for kind in ("epsilon", "v_prediction")
    ]
    flow = NoiseSchedule("flow_prediction", 1000 * s, 1 - s, s)
    return [(schedule, 1.0) for schedule in diffusion] + [(flow, scale[:, None, None, None])]


def test_noise_v_and_flow_forms_of_one_denoiser_agree_on_x0_and_on_the_targets(z):
    """The target of each edit is one pair of x0 and noise in all forms."""
    z_u, z_c, eps = (v.float() for v in z)
    teacher_x0 = z_u.roll(1, 0)
    found = []
    for schedule, scale in forms():
        t = schedule.timesteps
        x = schedule.add_noise(z_u, eps, t)
        a, s = schedule.coefficients(t)  # x and x0 imply the noise
        prediction = schedule.target(teacher_x0, (x - a * teacher_x0) / s, t)
        other = schedule.target(z_c, (x - a * z_c) / s, t)
        targets = {
            "teacher": prediction,
            "safegen": losses.x0_target(prediction, z_u, z_c, schedule.x0_factor(t, clamp=FREE)),
            "esd": losses.negative_guidance(prediction, other, prediction, strength=2.0),
            "blank": other,
        }
        images = {name: schedule.implied_x0(value, x, t) for name, value in targets.items()}
        found.append(images | {"x": x / scale})
    for name in found[0]:
        for other in found[1:]:
            assert_close(found[0][name], other[name], rtol=1e-3, atol=5e-3, msg=name)
    assert_close(found[0]["safegen"], teacher_x0 + z_c - z_u, rtol=1e-3, atol=5e-3)


def test_losses_of_the_three_forms_differ_by_the_weight_of_the_noise_level(z):
    """|d prediction|^2 is a^2 / s^2, 1 / s^2 and 1 / s^2 times |d x0|^2."""
    z_u, z_c, eps = (v.float() for v in z)
    want = losses.squared_error(z_u, z_c)
    for schedule, _ in forms():
        t = schedule.timesteps
        x = schedule.add_noise(z_u, eps, t)
        a, s = schedule.coefficients(t)
        one, two = (schedule.target(v, (x - a * v) / s, t) for v in (z_u, z_c))
        factor = schedule.x0_factor(t, clamp=FREE).flatten()
        assert_close(losses.squared_error(one, two) / factor**2, want, rtol=2e-3, atol=1e-4)


# ------------------------------------------------------------ timesteps


@pytest.mark.parametrize(
    "kind", [DDIMScheduler, EulerDiscreteScheduler, lambda **c: PNDMScheduler(skip_prk_steps=True)]
)
def test_timesteps_of_diffusion_are_the_integers_of_training(kind):
    schedule = NoiseSchedule.of(kind(num_train_timesteps=1000))
    assert schedule.timesteps.tolist() == list(range(1000))
    assert torch.equal(schedule.by_noise, schedule.timesteps)


def test_timesteps_of_flow_run_from_clean_to_noise_and_ignore_those_of_a_call():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    schedule = NoiseSchedule.of(scheduler)
    assert (schedule.timesteps.diff() > 0).all()
    assert float(schedule.timesteps[-1]) == 1000
    assert_close(schedule.noise, scheduler.sigmas.flip(0))
    assert torch.equal(schedule.by_noise, schedule.timesteps)
    scheduler.set_timesteps(4)
    assert torch.equal(NoiseSchedule.of(scheduler).timesteps, schedule.timesteps)


def test_by_noise_turns_a_schedule_that_runs_from_noise_to_image():
    plain = NoiseSchedule.of(SCHEDULERS["epsilon"]())
    turned = replace(plain, signal=plain.signal.flip(0), noise=plain.noise.flip(0))
    assert torch.equal(turned.by_noise, plain.timesteps.flip(0))


def test_a_timestep_between_those_of_training_has_its_own_noise():
    """Rollouts of flow matching have timesteps of their own."""
    schedule = NoiseSchedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    one = torch.ones(2, 1, 1, 1)
    x = schedule.add_noise(one, 3 * one, torch.tensor([250.0, 333.25]))
    assert_close(x.flatten(), torch.tensor([1 + 2 * 0.25, 1 + 2 * 0.33325]))


def test_a_scheduler_that_states_no_prediction_is_no_flow_matching():
    with pytest.raises(ConfigError, match="got CMStochasticIterativeScheduler"):
        NoiseSchedule.of(CMStochasticIterativeScheduler())


# ------------------------------------------------------------ solvers on flow matching

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
SOLVERS = {"DPM++ 2M": DPMSolverMultistepScheduler, "UniPC": UniPCMultistepScheduler}


@pytest.mark.parametrize("kind", SOLVERS.values())
def test_solvers_of_flow_are_trained_at_the_timesteps_that_euler_is(kind):
    euler = NoiseSchedule.of(FlowMatchEulerDiscreteScheduler(shift=3.0))
    solver = NoiseSchedule.of(kind(flow_shift=3.0, **FLOW))
    assert torch.equal(solver.timesteps, euler.timesteps)
    assert torch.equal(solver.noise, euler.noise)


@pytest.mark.parametrize("kind", SOLVERS.values())
def test_solvers_of_flow_step_at_the_noise_that_the_schedule_states(kind):
    """A solver rounds the timestep that the denoiser reads down to an integer."""
    solver = kind(flow_shift=3.0, **FLOW)
    solver.set_timesteps(7)
    a, s = NoiseSchedule.of(solver).coefficients(solver.timesteps)
    assert_close(s.flatten(), solver.sigmas[:-1], rtol=0, atol=1.01e-3)
    assert_close(a + s, torch.ones_like(a))


@pytest.mark.parametrize("name", SOLVERS)
def test_a_solver_and_euler_built_from_each_other_keep_the_shift(name):
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    solver = build_scheduler(euler, name)
    assert solver.config.flow_shift == 3.0
    for back in (build_scheduler(solver, "Euler"), euler_scheduler(solver)):
        assert torch.equal(back.sigmas, euler.sigmas)
    # what it was built from does not count where its own shift was changed
    moved = type(solver).from_config(solver.config, flow_shift=5.0)
    other = next(each for each in SOLVERS if each != name)
    assert build_scheduler(moved, other).config.flow_shift == 5.0
    assert NoiseSchedule.of(moved).noise[499] == pytest.approx(5 / 6, abs=1e-6)


@pytest.mark.parametrize("kind", SOLVERS.values())
def test_a_solver_with_noise_levels_of_diffusion_is_refused_for_flow(kind):
    with pytest.raises(ConfigError, match="use_flow_sigmas must be True"):
        NoiseSchedule.of(kind(prediction_type="flow_prediction"))
