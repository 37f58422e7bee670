"""Losses and targets of the edits, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.edits.functional import losses


@pytest.fixture(scope="module")
def z():
    """Return unsafe latents, censored latents and noise in float64."""
    g = torch.Generator().manual_seed(0)
    z_u, z_c, eps = (torch.randn(9, 4, 2, 2, generator=g, dtype=torch.float64) for _ in range(3))
    return z_u, z_c, eps


def test_targets_without_a_difference_are_the_anchor(z):
    z_u, _, eps = z
    factor = torch.full((9, 1, 1, 1), 3.0)
    assert_close(losses.paper_target(eps, z_u, z_u), eps, rtol=0, atol=0)
    assert_close(losses.x0_target(eps, z_u, z_u, factor), eps, rtol=0, atol=0)


def test_targets_by_hand():
    one = torch.ones(1, 1, 1, 1)
    eps, z_u, z_c = 2 * one, 5 * one, 3 * one
    assert losses.paper_target(eps, z_u, z_c).item() == 4
    assert losses.x0_target(eps, z_u, z_c, 0.5 * one).item() == 3


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
        losses.x0_target(latent, latent, latent, torch.ones(3))
