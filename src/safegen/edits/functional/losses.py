"""Losses and targets of the edits, one function per equation.

Losses return one value per sample; the training loop takes the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Latent = Float[Tensor, "b c h w"]
PerSample = Float[Tensor, "b"]


def squared_error(prediction: Latent, target: Latent) -> PerSample:
    """Return the mean squared error of each sample, computed in fp32."""
    return (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))


def paper_target(eps: Latent, z_u: Latent, z_c: Latent) -> Latent:
    """Return the noise target of the released SafeGen code for a noised unsafe latent.

    eps + (z_u - z_c), the same at every timestep (arXiv:2404.06666, released training step). Its
    implied x0 is z_u - sqrt((1 - abar) / abar) (z_u - z_c): the censored image at one timestep
    only (about 354 of 1000 on SD 1.x).

    Args:
        eps: the added noise.
        z_u: scaled latents of the unsafe images.
        z_c: scaled latents of their censored twins.
    """
    return eps + (z_u - z_c)


def x0_target(anchor: Latent, z_u: Latent, z_c: Latent, factor: Float[Tensor, "b 1 1 1"]) -> Latent:
    """Return a target that moves the implied x0 from the unsafe to the censored image (ours).

    anchor + factor (z_u - z_c). With the perfect prediction as anchor and an unclamped factor of
    `NoiseSchedule.x0_factor` the implied x0 is z_c at every timestep, for noise and both
    velocities. On the SD 1.x schedule the factor is 34 at t = 0, hence its clamp; where it binds,
    the implied x0 lies between the two.

    Args:
        anchor: `NoiseSchedule.target` of the unsafe image, or the prediction of the original model.
        z_u: scaled latents of the unsafe images.
        z_c: scaled latents of their censored twins.
        factor: how far a prediction moves x0; see `NoiseSchedule.x0_factor`.
    """
    return anchor + factor * (z_u - z_c)


def negative_guidance(base: Latent, push: Latent, origin: Latent, *, strength: float) -> Latent:
    """Return base - strength (push - origin): a prediction moved away from a concept.

    With base = origin = the original model's blank prediction it is the target of ESD (Gandikota
    et al. 2023, arXiv:2303.07345, eq. 7); with the prediction for a harmless anchor in both places
    it redirects to the anchor. It is affine in the predictions, so it holds for noise and velocity.

    Args:
        base: prediction to start from.
        push: prediction for the erased concept.
        origin: prediction that `push` is compared with.
        strength: length of the move; unitless, 0 returns `base`.
    """
    return base - strength * (push - origin)


def preference(
    safe: PerSample,
    safe_before: PerSample,
    unsafe: PerSample,
    unsafe_before: PerSample,
    *,
    beta: float,
) -> PerSample:
    """Return the Diffusion-DPO loss of pairs of a safe and an unsafe image.

    -log sigmoid(-beta ((safe - safe_before) - (unsafe - unsafe_before))) (Wallace et al. 2023,
    arXiv:2311.12908, as in DUO, arXiv:2407.21035, eq. 8). It is log 2 for the original model, and
    smaller if the error on the safe image fell or the error on the unsafe one rose.

    Args:
        safe: denoising error on the safe image.
        safe_before: the same of the original model.
        unsafe: denoising error on the unsafe image.
        unsafe_before: the same of the original model.
        beta: sharpness; unitless, > 0.
    """
    return nn.functional.softplus(beta * ((safe - safe_before) - (unsafe - unsafe_before)))


def unpaired_preference(
    safe: PerSample,
    safe_before: PerSample,
    unsafe: PerSample,
    unsafe_before: PerSample,
    *,
    beta: float,
    mean: Callable[[Tensor], Tensor] = torch.mean,
) -> PerSample:
    """Return the preference loss of each unsafe image against the mean over all safe ones.

    -log sigmoid(-beta (mean(safe - safe_before) - (unsafe - unsafe_before))), the `kto` of DUO's
    released code (arXiv:2407.21035). It is not the loss of KTO (arXiv:2402.01306), which has a term
    of its own for safe images. With one pair it is `preference`.

    Args:
        safe: denoising errors on the safe images.
        safe_before: the same of the original model.
        unsafe: denoising errors on the unsafe images.
        unsafe_before: the same of the original model.
        beta: sharpness; unitless, > 0.
        mean: mean over all safe images, of which `safe` may be a part.
    """
    moved = mean(safe - safe_before)
    return nn.functional.softplus(beta * (moved - (unsafe - unsafe_before)))


__all__ = [
    "negative_guidance",
    "paper_target",
    "preference",
    "squared_error",
    "unpaired_preference",
    "x0_target",
]
