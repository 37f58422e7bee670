"""DDIM steps with noise, their log-probability, and algorithms that train it."""

from __future__ import annotations

import math
from abc import ABC
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from pydantic import Field
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.edits.functional.rollout import Predict
from safegen.edits.rl.algorithm import (
    Algorithm,
    DenoisingPolicy,
    LossTerms,
    RolloutBatch,
    per_image,
)
from safegen.edits.rl.v_grpo import clipped_surrogate
from safegen.edits.training.shares import Draws
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.noise_schedule import EPSILON, FLOW_PREDICTION

ClipRange = Annotated[float, Field(gt=0, le=1)] | Literal["auto"]
"""Largest change of the ratio that is rewarded. `auto` is 0.0128 / sqrt(D) for D latent values."""


def ddim_deviation(abar: Tensor, abar_prev: Tensor, eta: float) -> Tensor:
    """Return the standard deviation of a DDIM step.

    sigma = eta sqrt((1 - a') / (1 - a) (1 - a / a')) (Song et al. 2021, arXiv:2010.02502, eq. 16).

    Args:
        abar: a, the cumulative alpha of the step's timestep.
        abar_prev: a', that of the timestep after the step.
        eta: 0 is the deterministic sampler, 1 that of DDPM.
    """
    variance = (1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev)
    return eta * variance.clamp(min=0).sqrt()


def ddim_mean(
    prediction: Tensor, x: Tensor, abar: Tensor, abar_prev: Tensor, std: Tensor, *, kind: str
) -> Tensor:
    """Return the mean of a DDIM step, in fp32.

    mu = sqrt(a') x0 + sqrt(1 - a' - sigma^2) eps (Song et al. 2021, arXiv:2010.02502, eq. 12), with
    the x0 and the eps that the prediction implies.

    Args:
        prediction: prediction for `x`, (b, c, h, w).
        x: latents before the step, (b, c, h, w).
        abar: a, the cumulative alpha of each step's timestep, (b,).
        abar_prev: a', that of the timestep after the step, (b,).
        std: sigma, see `ddim_deviation`, (b,).
        kind: `epsilon` or `v_prediction`.
    """
    prediction, x, abar = prediction.float(), x.float(), abar.float()
    a, s = (value.sqrt().view(-1, 1, 1, 1) for value in (abar, 1 - abar))
    if kind == EPSILON:
        x0, eps = (x - s * prediction) / a, prediction
    else:
        x0, eps = a * x - s * prediction, a * prediction + s * x
    a_prev, sigma = (value.float().view(-1, 1, 1, 1) for value in (abar_prev, std))
    return a_prev.sqrt() * x0 + (1 - a_prev - sigma.square()).clamp(min=0).sqrt() * eps


def log_probability(x_prev: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Return log N(x'; mu, sigma), averaged over the values of an image, (b,).

    The mean, where a density has the sum, is that of DDPO (Black et al. 2023, arXiv:2305.13301) as
    released; ratios then lie near 1.

    Args:
        x_prev: latents after the step, (b, c, h, w).
        mean: mean of the step, (b, c, h, w).
        std: deviation of the step, > 0, (b,).
    """
    sigma = std.float().view(-1, 1, 1, 1)
    squared = (x_prev.float() - mean).square() / (2 * sigma.square())
    return per_image(-squared - sigma.log() - 0.5 * math.log(2 * math.pi))


class DDIMSteps:
    """Steps of a policy's DDIM sampler: their alphas and deviations, (steps,) each."""

    def __init__(self, policy: DenoisingPolicy, eta: float) -> None:
        """Read the schedule, as diffusers' `DDIMScheduler.step` does.

        Args:
            policy: the policy.
            eta: 0 is the deterministic sampler, 1 that of DDPM.

        Raises:
            ConfigError: the sampler is another one, or the model is one of flow matching.
        """
        scheduler = policy.sampler.scheduler
        if policy.schedule.prediction == FLOW_PREDICTION:
            raise ConfigError(
                "prediction must be epsilon or v_prediction for log-probabilities of steps, got "
                f"{FLOW_PREDICTION}: Euler steps have no noise. Set algorithm to nft, v_grpo or "
                "draft."
            )
        if not isinstance(scheduler, DDIMScheduler):
            raise ConfigError(
                "scheduler must be ddim for log-probabilities of steps, got "
                f"{type(scheduler).__name__}. Set scheduler to ddim, or algorithm to v_grpo or nft."
            )
        timesteps = policy.sampler.timesteps.cpu()
        previous = timesteps - scheduler.config.num_train_timesteps // policy.sampler.steps
        table = scheduler.alphas_cumprod.double()
        final = torch.as_tensor(scheduler.final_alpha_cumprod).double()
        abar, abar_prev = table[timesteps], torch.where(previous >= 0, table[previous], final)
        device, self.kind = policy.device, policy.schedule.prediction
        self.timesteps = timesteps.to(device)
        self.abar, self.abar_prev = abar.float().to(device), abar_prev.float().to(device)
        self.std = ddim_deviation(abar, abar_prev, eta).float().to(device)

    def mean(self, prediction: Tensor, x: Tensor, step: Tensor) -> Tensor:
        """Return the mean of each step, (b, c, h, w).

        Args:
            prediction: prediction for `x`, (b, c, h, w).
            x: latents before the step, (b, c, h, w).
            step: index of each step, (b,).
        """
        abar, abar_prev, std = self.abar[step], self.abar_prev[step], self.std[step]
        return ddim_mean(prediction, x, abar, abar_prev, std, kind=self.kind)

    def check_deviation(self, trained: Sequence[int], minimum: float, advice: str) -> None:
        """Check that every trained step has noise, without which it has no log-probability.

        Raises:
            ConfigError: a step has too small a deviation.
        """
        for step in trained:
            if not float(self.std[step]) >= minimum:
                raise ConfigError(
                    f"the deviation of a trained sampler step must be >= {minimum:g}, got "
                    f"{float(self.std[step]):.3g} at timestep {int(self.timesteps[step])}. {advice}"
                )


class SamplerAlgorithm(Algorithm, ABC):
    """An algorithm that raises the log-probability of sampler steps of good images.

    The loss of a step is -min(r A, clip(r) A), with r = exp(log p - log p_old) the ratio of the
    step's probabilities now and in the rollout (arXiv:2305.13301, eq. 6 and PPO's clipping). The
    distance is the KL divergence of the step to that of the original model, averaged over values:
    |mu - mu_0|^2 / (2 sigma^2), as in Flow-GRPO (arXiv:2505.05470).
    """

    def __init__(
        self, policy: DenoisingPolicy, *, eta: float, clip: float | Literal["auto"]
    ) -> None:
        """Read the schedule; see `DDIMSteps`."""
        super().__init__(policy)
        self.steps = DDIMSteps(policy, eta)
        size = torch.Size(policy.sampler.shape).numel()
        self.clip = 0.0128 / size**0.5 if clip == "auto" else clip

    def sample(
        self,
        denoiser: nn.Module,
        x: Tensor,
        text: Conditioning,
        trained: Sequence[int],
        draws: Draws,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the latents after some noisy steps, and what `loss` needs of them.

        Args:
            denoiser: the network.
            x: latents before the first of the steps, (b, c, h, w).
            text: embeddings of the prompts, b rows.
            trained: indices of successive steps.
            draws: source of the noise.

        Returns:
            The latents, (b, c, h, w), and on the CPU, in fp32: `trajectory`, the latents before
            and after each step, (b, steps + 1, c, h, w), and `log_prob`, (b, steps); and `step`,
            the indices, (b, steps).
        """
        predict = partial(self.policy.predict_frozen, denoiser)
        trajectory, log_probs = [x.cpu()], []
        with self.policy.autocast():
            for i in trained:
                step = torch.full((len(x),), i, device=x.device)
                mean, std = self._mean(predict, x, step, text), self.steps.std[step]
                z = draws.normal(x.shape[1:]).to(x.device)
                x = mean + std.view(-1, 1, 1, 1) * z
                trajectory.append(x.cpu())
                log_probs.append(log_probability(x, mean, std).cpu())
        return x, {
            "trajectory": torch.stack(trajectory, dim=1),
            "log_prob": torch.stack(log_probs, dim=1),
            "step": torch.tensor(list(trained)).expand(len(x), -1),
        }

    def loss(self, denoiser: nn.Module, batch: RolloutBatch, index: int) -> LossTerms:
        """Return the clipped surrogate and the distance at one step of each image.

        Args:
            denoiser: the network in training.
            batch: images; `order` in `extra`, (b, steps), is the order of their steps.
            index: which one in that order.
        """
        policy, device = self.policy, self.policy.device
        rows, column = torch.arange(len(batch.prompts)), batch.extra["order"][:, index]
        trajectory = batch.extra["trajectory"]
        x, x_prev = (trajectory[rows, column + i].to(device) for i in (0, 1))
        step = batch.extra["step"][rows, column].to(device)
        text = policy.text[batch.prompts.to(device)]
        std = self.steps.std[step]
        mean = self._mean(partial(policy.predict, denoiser), x, step, text)
        old = batch.extra["log_prob"][rows, column].to(device)
        ratio = (log_probability(x_prev, mean, std) - old).exp()
        loss, clipped = clipped_surrogate(ratio, batch.advantages.to(device), self.clip)
        kl = torch.zeros_like(loss)
        if policy.has_distance:
            original = partial(policy.predict_frozen, denoiser, tensors=policy.reference)
            squared = per_image((mean - self._mean(original, x, step, text)).square())
            kl = squared / (2 * std.square())
        return LossTerms(loss, kl, {"ratio": ratio.detach(), "clipped": clipped})

    def _mean(self, predict: Predict, x: Tensor, step: Tensor, text: Conditioning) -> Tensor:
        """Return the mean of a guided step of each image."""
        t = self.steps.timesteps[step]
        return self.steps.mean(self.policy.sampler.predict_guided(t, x, text, predict), x, step)
