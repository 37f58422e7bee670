"""The losses of the editing methods, one function an equation.

Each returns one value per sample; the loop takes the mean.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

Latent = Float[Tensor, "b c h w"]
PerSample = Float[Tensor, "b"]


def squared_error(prediction: Latent, target: Latent) -> PerSample:
    """Return the mean squared error of each sample, computed in fp32 as the published step does."""
    return (prediction.float() - target.float()).pow(2).mean(dim=(1, 2, 3))


def paper_target(eps: Latent, z_u: Latent, z_c: Latent) -> Latent:
    """Return what SafeGen as released teaches the denoiser to predict on a noised unsafe latent.

    eps + (z_u - z_c), the same at every timestep (arXiv:2404.06666, released training step). Its
    implied x0 is z_u - sqrt((1 - abar) / abar) (z_u - z_c): the censored picture at one timestep
    only (about 354 of 1000 on SD 1.x).

    Args:
        eps: the noise that was added.
        z_u: scaled latents of the unsafe pictures.
        z_c: scaled latents of their censored twins.
    """
    return eps + (z_u - z_c)


def x0_target(anchor: Latent, z_u: Latent, z_c: Latent, abar: PerSample, *, clamp: float) -> Latent:
    """Return a noise prediction whose implied x0 is moved from the unsafe picture to the censored one, at every timestep (ours).

    anchor + min(sqrt(abar / (1 - abar)), clamp) (z_u - z_c). With the added noise as anchor the
    implied x0 is z_c itself: solve sqrt(abar) z_c + sqrt(1 - abar) e = x_t for e. The factor is 34
    at t = 0 on the SD 1.x schedule, hence the clamp; where it binds, the implied x0 stops between
    the two.

    Args:
        anchor: the noise that was added, or what the untouched model predicts.
        z_u: scaled latents of the unsafe pictures.
        z_c: scaled latents of their censored twins.
        abar: the schedule's cumulative alpha at each sample's timestep, in (0, 1).
        clamp: largest factor; unitless, > 0.
    """
    factor = (abar / (1 - abar)).sqrt().clamp(max=clamp)
    return anchor + factor[:, None, None, None] * (z_u - z_c)


def v_target(anchor: Latent, z_u: Latent, z_c: Latent, abar: PerSample, *, clamp: float) -> Latent:
    """Return the same for a model that predicts v (ours).

    anchor + min(1 / sqrt(1 - abar), clamp) (z_u - z_c), from x0 = sqrt(abar) x_t - sqrt(1 - abar) v
    (Salimans & Ho 2022, arXiv:2202.00512). With the ordinary velocity of the unsafe picture as
    anchor the implied x0 is z_c itself.

    Args:
        anchor: the velocity of the unsafe picture, or what the untouched model predicts.
        z_u: scaled latents of the unsafe pictures.
        z_c: scaled latents of their censored twins.
        abar: the schedule's cumulative alpha at each sample's timestep, in (0, 1).
        clamp: largest factor; unitless, >= 1.
    """
    factor = (1 - abar).rsqrt().clamp(max=clamp)
    return anchor + factor[:, None, None, None] * (z_u - z_c)


def velocity(eps: Latent, z: Latent, abar: PerSample) -> Latent:
    """Return the v-prediction target sqrt(abar) eps - sqrt(1 - abar) z (arXiv:2202.00512)."""
    shape = (-1, 1, 1, 1)
    return abar.sqrt().view(shape) * eps - (1 - abar).sqrt().view(shape) * z


def add_noise(z: Latent, eps: Latent, abar: PerSample) -> Latent:
    """Return x_t = sqrt(abar) z + sqrt(1 - abar) eps (Ho et al. 2020, eq. 4)."""
    shape = (-1, 1, 1, 1)
    return abar.sqrt().view(shape) * z + (1 - abar).sqrt().view(shape) * eps


def negative_guidance(base: Latent, push: Latent, origin: Latent, *, strength: float) -> Latent:
    """Return base - strength (push - origin): a prediction moved away from what some words ask for.

    With base = origin = the untouched model's blank prediction it is the target of ESD (Gandikota
    et al. 2023, arXiv:2303.07345, eq. 7), with the prediction for a harmless anchor in both places
    a redirection to the anchor. Affine in what the model predicts, so it means the same for noise
    and for velocity.

    Args:
        base: where to go from.
        push: prediction for what is erased.
        origin: prediction that `push` is told apart from.
        strength: how far; unitless, 0 is `base` itself.
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
    """Return -log sigmoid(-beta ((safe - safe_before) - (unsafe - unsafe_before))), Diffusion-DPO with a pair of pictures.

    Wallace et al. 2023 (arXiv:2311.12908), as DUO has it (arXiv:2407.21035, eq. 8): log 2 where
    nothing has moved, smaller where the safe picture's error fell or the unsafe one's rose.

    Args:
        safe: denoising error on the safe picture.
        safe_before: of the untouched model.
        unsafe: on the unsafe picture.
        unsafe_before: of the untouched model.
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
) -> PerSample:
    """Return -log sigmoid(-beta (mean(safe - safe_before) - (unsafe - unsafe_before))): every unsafe picture against all safe ones.

    The `kto` of DUO's released code (arXiv:2407.21035): `preference` with the safe side's mean over
    the batch. It is not the loss of KTO (arXiv:2402.01306), which has a term of its own for safe
    pictures. With one pair it is `preference`.

    Args:
        safe: denoising error on the safe pictures.
        safe_before: of the untouched model.
        unsafe: on the unsafe pictures.
        unsafe_before: of the untouched model.
        beta: sharpness; unitless, > 0.
    """
    moved = (safe - safe_before).mean()
    return nn.functional.softplus(beta * (moved - (unsafe - unsafe_before)))


__all__ = [
    "add_noise",
    "paper_target",
    "preference",
    "negative_guidance",
    "squared_error",
    "unpaired_preference",
    "v_target",
    "velocity",
    "x0_target",
]
