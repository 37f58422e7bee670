"""Loss targets: the images that they imply by the arithmetic of the schedulers."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from torch.testing import assert_close

from safegen.edits.functional import losses

T = torch.arange(1000)
"""Every timestep of the SD 1.x schedule is one sample of the batch."""


@pytest.fixture(scope="module")
def scheduler():
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        clip_sample=False,
    )


@pytest.fixture(scope="module")
def abar(scheduler):
    return scheduler.alphas_cumprod.double()


@pytest.fixture(scope="module")
def z():
    """Return unsafe latents, censored latents and noise in float64."""
    g = torch.Generator().manual_seed(0)
    z_u, z_c, eps = (torch.randn(1000, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(3))
    return z_u, z_c, eps


def wide(values):
    return values[:, None, None, None]


def x0_of_v(x_t, v, abar):
    """Return the clean latent that a velocity implies (Salimans & Ho 2022, section 4)."""
    return wide(abar.sqrt()) * x_t - wide((1 - abar).sqrt()) * v


def implied_x0(x_t, eps, abar):
    """Return the clean latent that a noise prediction implies."""
    return (x_t - wide((1 - abar).sqrt()) * eps) / wide(abar.sqrt())


def share_of_the_way(x0, z_u, z_c):
    """Return the position of a latent between z_u (0) and z_c (1), per element."""
    return (z_u - x0) / (z_u - z_c)


def test_add_noise_equals_the_scheduler(scheduler, abar, z):
    z_u, _, eps = z
    want = scheduler.add_noise(z_u.float(), eps.float(), T)
    assert_close(losses.add_noise(z_u.float(), eps.float(), scheduler.alphas_cumprod), want)


def test_velocity_equals_the_scheduler(scheduler, abar, z):
    z_u, _, eps = z
    want = scheduler.get_velocity(z_u.float(), eps.float(), T)
    assert_close(losses.velocity(eps.float(), z_u.float(), scheduler.alphas_cumprod), want)


def test_implied_x0_inverts_add_noise(abar, z):
    z_u, _, eps = z
    assert_close(implied_x0(losses.add_noise(z_u, eps, abar), eps, abar), z_u, rtol=0, atol=1e-10)


@pytest.mark.parametrize("clamp", [0.5, 3.0, 1e9])
def test_x0_target_implies_the_censored_image_without_clamping(abar, z, clamp):
    z_u, z_c, eps = z
    x0 = implied_x0(
        losses.add_noise(z_u, eps, abar), losses.x0_target(eps, z_u, z_c, abar, clamp=clamp), abar
    )
    free = (abar / (1 - abar)).sqrt() <= clamp
    assert free.any()
    assert_close(x0[free], z_c[free], rtol=0, atol=1e-10)


def test_clamped_x0_target_implies_an_image_between_unsafe_and_censored(abar, z):
    z_u, z_c, eps = z
    x0 = implied_x0(
        losses.add_noise(z_u, eps, abar), losses.x0_target(eps, z_u, z_c, abar, clamp=3.0), abar
    )
    bound = (abar / (1 - abar)).sqrt() > 3.0
    assert bound.any()
    way = share_of_the_way(x0, z_u, z_c)[bound]
    assert way.min() > 0
    assert way.max() < 1
    assert_close(
        way, wide(3.0 * ((1 - abar) / abar).sqrt()[bound]).expand_as(way), rtol=1e-6, atol=1e-9
    )


def test_the_factor_of_x0_target_is_34_at_the_first_timestep(abar):
    assert float((abar[0] / (1 - abar[0])).sqrt()) == pytest.approx(34, abs=0.5)


@pytest.mark.parametrize("clamp", [1.5, 3.0, 1e9])
def test_v_target_implies_the_censored_image_without_clamping(abar, z, clamp):
    z_u, z_c, eps = z
    x0 = x0_of_v(
        losses.add_noise(z_u, eps, abar),
        losses.v_target(losses.velocity(eps, z_u, abar), z_u, z_c, abar, clamp=clamp),
        abar,
    )
    free = (1 - abar).rsqrt() <= clamp
    assert free.any()
    assert_close(x0[free], z_c[free], rtol=0, atol=1e-10)


def test_clamped_v_target_implies_an_image_between_unsafe_and_censored(abar, z):
    z_u, z_c, eps = z
    x0 = x0_of_v(
        losses.add_noise(z_u, eps, abar),
        losses.v_target(losses.velocity(eps, z_u, abar), z_u, z_c, abar, clamp=3.0),
        abar,
    )
    bound = (1 - abar).rsqrt() > 3.0
    assert bound.any()
    way = share_of_the_way(x0, z_u, z_c)[bound]
    assert way.min() > 0
    assert way.max() < 1


def test_v_target_and_x0_target_agree(abar, z):
    """v = sqrt(abar) eps_hat - sqrt(1 - abar) x0_hat for any consistent pair."""
    z_u, z_c, eps = z
    eps_hat = losses.x0_target(eps, z_u, z_c, abar, clamp=1e9)
    assert_close(
        losses.v_target(losses.velocity(eps, z_u, abar), z_u, z_c, abar, clamp=1e9),
        losses.velocity(eps_hat, z_c, abar),
        rtol=0,
        atol=1e-9,
    )


def test_paper_target_implies_an_image_part_of_the_way(abar, z):
    z_u, z_c, eps = z
    x0 = implied_x0(losses.add_noise(z_u, eps, abar), losses.paper_target(eps, z_u, z_c), abar)
    k = ((1 - abar) / abar).sqrt()
    assert_close(x0, z_u - wide(k) * (z_u - z_c), rtol=0, atol=1e-9)
    assert int((k - 1).abs().argmin()) == pytest.approx(354, abs=1)


def test_targets_without_a_difference_are_the_anchor(abar, z):
    z_u, _, eps = z
    assert_close(losses.paper_target(eps, z_u, z_u), eps, rtol=0, atol=0)
    assert_close(losses.x0_target(eps, z_u, z_u, abar, clamp=3.0), eps, rtol=0, atol=0)
    assert_close(
        losses.v_target(losses.velocity(eps, z_u, abar), z_u, z_u, abar, clamp=3.0),
        losses.velocity(eps, z_u, abar),
        rtol=0,
        atol=0,
    )


def test_targets_move_the_implied_x0_of_any_anchor_by_the_difference(abar, z):
    z_u, z_c, said = z
    x_t = losses.add_noise(z_u, z_c, abar)  # any x_t: the move does not depend on it
    before, after = (
        implied_x0(x_t, e, abar) for e in (said, losses.x0_target(said, z_u, z_c, abar, clamp=1e9))
    )
    assert_close(after - before, z_c - z_u, rtol=0, atol=1e-8)
    before, after = (
        x0_of_v(x_t, v, abar) for v in (said, losses.v_target(said, z_u, z_c, abar, clamp=1e9))
    )
    assert_close(after - before, z_c - z_u, rtol=0, atol=1e-8)


def test_targets_by_hand():
    one = torch.ones(1, 1, 1, 1)
    eps, z_u, z_c, abar = 2 * one, 5 * one, 3 * one, torch.tensor([0.8])  # sqrt(0.8 / 0.2) = 2
    assert losses.paper_target(eps, z_u, z_c).item() == 4
    assert losses.x0_target(eps, z_u, z_c, abar, clamp=9.0).item() == pytest.approx(2 + 2 * 2)
    assert losses.x0_target(eps, z_u, z_c, abar, clamp=0.5).item() == pytest.approx(2 + 0.5 * 2)
    plain = 0.8**0.5 * 2 - 0.2**0.5 * 5
    assert losses.velocity(eps, z_u, abar).item() == pytest.approx(plain)
    assert losses.v_target(
        losses.velocity(eps, z_u, abar), z_u, z_c, abar, clamp=9.0
    ).item() == pytest.approx(plain + 2 / 0.2**0.5)
    assert losses.v_target(
        losses.velocity(eps, z_u, abar), z_u, z_c, abar, clamp=1.5
    ).item() == pytest.approx(plain + 1.5 * 2)


def test_negative_guidance_by_hand():
    base, push, origin = (torch.full((1, 1, 1, 1), x) for x in (5.0, 4.0, 1.0))
    assert losses.negative_guidance(base, push, origin, strength=2.0).item() == 5 - 2 * 3
    assert losses.negative_guidance(base, push, origin, strength=0.0).item() == 5


def test_rewritten_esd_has_one_more_strength_than_the_paper(z):
    """e0(c) - (1 + n) (e0(c) - e0(blank)) = e0(blank) - n (e0(c) - e0(blank))."""
    said, blank, _ = z
    theirs = losses.negative_guidance(said, said, blank, strength=2.0)
    assert_close(
        theirs, losses.negative_guidance(blank, said, blank, strength=1.0), rtol=0, atol=1e-12
    )


def test_squared_error_by_hand():
    prediction = torch.zeros(2, 1, 2, 2)
    target = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 2.0]]]])
    assert_close(losses.squared_error(prediction, target), torch.tensor([7.5, 1.0]))


def test_the_mean_of_squared_error_equals_mse_loss(z):
    z_u, z_c, _ = z
    want = torch.nn.functional.mse_loss(z_u.float(), z_c.float())
    assert_close(losses.squared_error(z_u, z_c).mean(), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squared_error_of_half_precision_is_computed_in_fp32(dtype):
    big = torch.full((1, 1, 2, 2), 512.0, dtype=dtype)
    out = losses.squared_error(big, torch.zeros_like(big))
    assert out.dtype == torch.float32
    assert_close(out, torch.tensor([512.0**2]))


def test_a_wrong_shape_raises():
    pytest.importorskip("beartype", reason="shapes are checked where beartype is installed")
    from jaxtyping import TypeCheckError

    latent = torch.zeros(2, 4, 2, 2)
    with pytest.raises(TypeCheckError):
        losses.add_noise(latent, latent, torch.ones(3))
