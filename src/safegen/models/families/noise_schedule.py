"""Forward process of a model: how images are noised, and what the denoiser predicts of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from safegen.core.errors import ConfigError

EPSILON, V_PREDICTION, FLOW_PREDICTION = "epsilon", "v_prediction", "flow_prediction"
"""What a denoiser predicts, by diffusers' names."""
TRAINABLE = (EPSILON, V_PREDICTION, FLOW_PREDICTION)
"""Predictions that edits and attacks know the target of."""


def prediction_type(scheduler: Any) -> str:
    """Return what the denoiser of a scheduler predicts, by diffusers' name.

    Args:
        scheduler: scheduler of diffusers. Those of flow matching state no `prediction_type`, and
            others without one have the name of their class.
    """
    stated, kind = scheduler.config.get("prediction_type"), type(scheduler).__name__
    if stated is not None:
        return str(stated)
    return FLOW_PREDICTION if kind.startswith("FlowMatch") else kind


def flow_shift(scheduler: Any) -> float:
    """Return the shift k of a scheduler of flow matching: noise s becomes k s / (1 + (k - 1) s).

    Solvers of diffusers that also take other noise levels call it `flow_shift`.
    """
    name = "shift" if type(scheduler).__name__.startswith("FlowMatch") else "flow_shift"
    return float(scheduler.config.get(name, 1.0))


def euler_scheduler(scheduler: Any, **settings: Any) -> Any:
    """Return the Euler scheduler of flow matching with the noise levels of another scheduler.

    Args:
        scheduler: scheduler of flow matching: of diffusers' FlowMatch classes, or a solver with
            `use_flow_sigmas`, such as DPM++ and UniPC.
        **settings: settings that differ.

    Raises:
        ConfigError: it is a solver that steps through other noise levels.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if not kind.startswith("FlowMatch") and not config.get("use_flow_sigmas"):
        raise ConfigError(
            f"use_flow_sigmas must be True for a model of flow matching, got False in a {kind}. "
            "Set it, and flow_shift to the model's shift."
        )
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
        FlowMatchEulerDiscreteScheduler,
    )

    return FlowMatchEulerDiscreteScheduler.from_config(
        config, **{"shift": flow_shift(scheduler), **settings}
    )


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noised latents x_t = a_t z + s_t eps at each timestep, and their denoiser's target.

    Timesteps are those that the denoiser reads: integers of the training schedule for diffusion,
    1000 s for flow matching. Diffusion has a = sqrt(abar) and s = sqrt(1 - abar) (Ho et al. 2020,
    arXiv:2006.11239, eq. 4), flow matching a = 1 - s (Lipman et al. 2022, arXiv:2210.02747, eq. 22;
    Esser et al. 2024, arXiv:2403.03206, eq. 1).

    Example:
        >>> schedule = safegen.load("mini").noise_schedule
        >>> schedule.prediction, len(schedule)
        ('epsilon', 1000)
    """

    prediction: str
    """`epsilon`, `v_prediction` or `flow_prediction`."""
    timesteps: Tensor
    """Timesteps of training; those of flow matching from clean to noise, (n,)."""
    signal: Tensor
    """a of each timestep, fp32, (n,)."""
    noise: Tensor
    """s of each timestep, fp32, (n,)."""
    factors: Tensor | None = None
    """Unclamped `x0_factor` of each timestep, fp32, (n,). Default: from `signal` and `noise`."""

    @classmethod
    def of(cls, scheduler: Any) -> NoiseSchedule:
        """Return the forward process that a scheduler of diffusers inverts.

        Flow matching is trained at the shifted timesteps of its scheduler, the same for every
        solver. A shift that depends on the image's size is left out.

        Raises:
            ConfigError: its denoiser predicts something of which no target is known, or it is a
                solver that does not step through the noise levels of flow matching.
        """
        prediction = prediction_type(scheduler)
        if prediction not in TRAINABLE:
            raise ConfigError(
                f"prediction type must be one of {', '.join(TRAINABLE)}, got {prediction}. Use a "
                "model that predicts one of these."
            )
        if prediction == FLOW_PREDICTION:
            trained = euler_scheduler(scheduler)
            timesteps = trained.timesteps.flip(0).float()
            noise = timesteps / trained.config.num_train_timesteps
            return cls(prediction, timesteps, 1 - noise, noise)
        abar = scheduler.alphas_cumprod.cpu()  # its `add_noise` moves them to the latents' device
        # a / s would round in another way than the formula, and a training shows it.
        factors = (abar / (1 - abar)).sqrt() if prediction == EPSILON else (1 - abar).rsqrt()
        timesteps = torch.arange(len(abar))
        return cls(prediction, timesteps, abar.sqrt(), (1 - abar).sqrt(), factors)

    def __len__(self) -> int:
        """Return the number of timesteps."""
        return len(self.timesteps)

    @property
    def by_noise(self) -> Tensor:
        """Timesteps from the least to the most noise, (n,): a schedule may run either way."""
        return self.timesteps[(self.signal / self.noise).argsort(descending=True)]

    def sample_timesteps(self, n: int, generator: torch.Generator) -> Tensor:
        """Return `n` timesteps of training, drawn uniformly, on the CPU."""
        return self.timesteps[torch.randint(len(self), (n,), generator=generator)]

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return a and s of timesteps (b,), shaped (b, 1, 1, 1) for latents, on their device."""
        if self.prediction == FLOW_PREDICTION:
            noise = (t.float() / len(self)).clamp(0, 1)
            signal = 1 - noise
        else:
            # The tables go to the timesteps: reading timesteps back would wait for the GPU.
            signal, noise = (table.to(t.device)[t.long()] for table in (self.signal, self.noise))
        return signal.view(-1, 1, 1, 1), noise.view(-1, 1, 1, 1)

    def add_noise(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return the noised latents a z + s eps, (b, c, h, w)."""
        a, s = self.coefficients(t)
        return a * z + s * eps

    def target(self, z: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Return what a perfect denoiser predicts for latents `z` noised with `eps`.

        The noise, the velocity a eps - s z (Salimans & Ho 2022, arXiv:2202.00512), or that of flow
        matching, eps - z (arXiv:2403.03206, eq. 2).
        """
        if self.prediction == EPSILON:
            return eps
        if self.prediction == FLOW_PREDICTION:
            return eps - z
        a, s = self.coefficients(t)
        return a * eps - s * z

    def implied_x0(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the clean latents that a prediction for noised latents `x` implies."""
        a, s = self.coefficients(t)
        if self.prediction == EPSILON:
            return (x - s * prediction) / a
        if self.prediction == FLOW_PREDICTION:
            return x - s * prediction
        return a * x - s * prediction

    def implied_noise(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the noise that a prediction for noised latents `x` implies."""
        a, s = self.coefficients(t)
        if self.prediction == EPSILON:
            return prediction
        if self.prediction == FLOW_PREDICTION:
            return x + a * prediction
        return a * prediction + s * x

    def x0_factor(self, t: Tensor, *, clamp: float) -> Tensor:
        """Return how far a prediction moves when the x0 that it implies moves by -1 (ours).

        min(a / s, clamp) for noise, min(1 / s, clamp) for both velocities, (b, 1, 1, 1): solve
        `implied_x0` for the prediction. It grows without bound toward the clean image, hence the
        clamp; where that binds, x0 moves by less.

        Args:
            t: timesteps, (b,).
            clamp: largest factor; unitless, > 0.
        """
        if self.factors is None:
            a, s = self.coefficients(t)
            return (a / s if self.prediction == EPSILON else 1 / s).clamp(max=clamp)
        return self.factors.to(t.device)[t.long()].view(-1, 1, 1, 1).clamp(max=clamp)
