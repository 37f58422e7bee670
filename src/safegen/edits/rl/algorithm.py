"""What the algorithms share: settings, the policy in training, and the images of a rollout."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from safegen.core.processes import sum_values
from safegen.core.settings import MethodSettings
from safegen.edits.functional.rollout import (
    Rollout,
    SchedulerName,
    frozen_predictor,
    rollout_autocast,
)
from safegen.edits.rl.rewards import advantages
from safegen.edits.training.shares import Draws
from safegen.models.families import denoisers
from safegen.models.families.conditioning import Conditioning
from safegen.models.model import Model

BACKWARD = 2
"""Cost of a backward pass in forward passes."""


class DenoisingPolicy:
    """The denoiser in training: its schedule, its prompts, and a count of its passes."""

    def __init__(
        self,
        model: Model,
        names: Sequence[str],
        texts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        scheduler: SchedulerName,
        precision: str,
        has_distance: bool = True,
    ) -> None:
        """Encode the prompts, and keep the values of the trained weights before training.

        Args:
            model: the model.
            names: names of the trained parameters.
            texts: prompts.
            steps: steps of a rollout.
            guidance: guidance scale of a rollout; 1 draws without guidance.
            scheduler: scheduler of a rollout.
            precision: arithmetic of rollouts.
            has_distance: whether the distance to the original model has a weight.

        Raises:
            ConfigError: the schedule has fewer timesteps.
        """
        self.model, self.precision = model, precision
        self.schedule = model.noise_schedule
        parameters = dict(model.denoiser.named_parameters())
        self.trained = {name: parameters[name] for name in names}
        self.reference = {name: p.detach().clone() for name, p in self.trained.items()}
        self.sampler = Rollout(model, steps=steps, guidance=guidance, scheduler=scheduler)
        chunks = [list(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        self.text = Conditioning.concat([model.encode_text(chunk).float() for chunk in chunks])
        self.has_distance = has_distance
        self.passes_state = torch.zeros(2)
        """The count `passes` in two parts, which fp32 holds exactly; a checkpoint saves it."""

        self.new_passes = 0.0
        """Those of this process that `passes_state` lacks."""

    @property
    def passes(self) -> float:
        """Samples that went through the network, with `BACKWARD` more for each that went back."""
        high, low = self.passes_state.tolist()
        return float(high * 2**20 + low) + self.new_passes

    def count_passes(self) -> None:
        """Add the new passes of all processes to the count."""
        (new,), self.new_passes = sum_values([self.new_passes]), 0.0
        self.passes_state[0], self.passes_state[1] = divmod(self.passes + new, 2**20)

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.model.device

    def predict(self, denoiser: nn.Module, x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        """Return the prediction in training, in fp32, with a gradient."""
        self.new_passes += len(x) * (1 + BACKWARD)
        return denoisers.predict(denoiser, x, t, text).float()

    def predict_frozen(
        self,
        denoiser: nn.Module,
        x: Tensor,
        t: Tensor,
        text: Conditioning,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return a prediction without a gradient, of the weights as they are or of others."""
        self.new_passes += len(x)
        return frozen_predictor(denoiser, tensors)(x, t, text)

    def distance(
        self, denoiser: nn.Module, prediction: Tensor, x: Tensor, t: Tensor, text: Conditioning
    ) -> Tensor:
        """Return the squared distance of predictions to those of the original model, (b,).

        It is 0, without a pass, if the distance has no weight.
        """
        if not self.has_distance:
            return torch.zeros(len(x), device=x.device)
        reference = self.predict_frozen(denoiser, x, t, text, self.reference)
        return per_image((prediction - reference).pow(2))

    def draw(
        self,
        denoiser: nn.Module,
        x: Tensor,
        text: Conditioning,
        timesteps: Tensor | None = None,
        tensors: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return latents denoised by the ordinary, deterministic sampler.

        Args:
            denoiser: the network.
            x: latents of the first timestep, (b, c, h, w).
            text: embeddings of the prompts, b rows.
            timesteps: successive timesteps of the sampler. Default: all.
            tensors: values for some weights of the network.
        """

        def predict(x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            return self.predict_frozen(denoiser, x, t, text, tensors)

        steps = self.sampler.timesteps if timesteps is None else timesteps
        with self.autocast():
            return self.sampler.denoise(steps, x, text, predict)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of a rollout, which is that of training."""
        return rollout_autocast(self.model, self.precision)

    def truth(self, eps: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """Return what the network should predict for latents `z` noised with `eps`."""
        return self.schedule.target(z, eps, t)

    def x0(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the clean latents that a prediction implies."""
        return self.schedule.implied_x0(prediction, x, t)


@dataclass
class RolloutBatch:
    """Images of one rollout; every tensor has one row per image."""

    prompts: Tensor
    """Index of each image's prompt, (n,)."""
    groups: Tensor
    """Index of each image's group, from 0, (n,)."""
    latents: Tensor
    """Clean latents, fp32, (n, c, h, w)."""
    advantages: Tensor
    """Advantage of each image, (n,)."""
    extra: dict[str, Tensor] = field(default_factory=dict)
    """Tensors of the algorithm, such as trajectories."""

    def rows(self, index: Tensor) -> RolloutBatch:
        """Return the images of some rows."""
        extra = {name: value[index] for name, value in self.extra.items()}
        return RolloutBatch(
            self.prompts[index],
            self.groups[index],
            self.latents[index],
            self.advantages[index],
            extra,
        )


@dataclass
class LossTerms:
    """Losses of one batch, (b,) each."""

    policy: Tensor
    """Loss that raises the probability of images with a positive advantage."""
    kl: Tensor
    """Distance to the original model, >= 0."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """Values to log, (b,) each, such as the ratio and whether it was clipped."""


class AlgorithmSettings(MethodSettings, ABC):
    """Settings of an algorithm."""

    scheduler: ClassVar[SchedulerName] = "dpm-solver"
    """Scheduler of a rollout, unless the edit sets one."""

    @abstractmethod
    def build(self, policy: DenoisingPolicy, groups: int, group: int, *, updates: int) -> Algorithm:
        """Return the algorithm.

        Args:
            policy: the policy.
            groups: groups of images in a rollout.
            group: images in a group, all of one prompt.
            updates: updates for which the images of a rollout serve.

        Raises:
            ConfigError: a setting does not fit the model's schedule.
        """

    def limits_ratio(self, updates: int) -> bool:
        """Return whether a clipped ratio limits the changes of the policy.

        Args:
            updates: updates for which the images of a rollout serve.
        """
        return False

    def batches_per_image(self, steps: int) -> int:
        """Return how often an image goes through training: its number of trained timesteps.

        Args:
            steps: steps of a rollout.
        """
        return 1


class Algorithm(ABC):
    """An algorithm in training."""

    deviation: ClassVar[Literal["group", "global"]] = "global"
    """Deviation that advantages are divided by."""
    follows_advantages: ClassVar[bool] = True
    """Whether an image with advantage 0 teaches nothing; its loss then counts as 0."""

    def __init__(self, policy: DenoisingPolicy) -> None:
        """Store the policy."""
        self.policy = policy

    @property
    def state(self) -> Mapping[str, Tensor]:
        """Tensors that training changes, to save in checkpoints; see `HasState`."""
        return {}

    def advantages(
        self,
        rewards: Mapping[str, Tensor],
        weights: Mapping[str, float],
        prompts: Tensor,
        groups: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return the advantage of each image and whether its group has variance, on the CPU.

        Args:
            rewards: rewards by name, (n,) each, NaN for a masked image.
            weights: weight of each reward.
            prompts: index of each image's prompt, (n,).
            groups: index of each image's group, (n,).
        """
        return advantages(rewards, weights, groups, std=self.deviation)

    def rollout(
        self, denoiser: nn.Module, noise: Tensor, text: Conditioning, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw the images of one batch, or this process's share of them.

        Args:
            denoiser: the network.
            noise: initial noise of the images, (b, c, h, w).
            text: embeddings of the prompts, b rows.
            draws: source of further draws.

        Returns:
            The clean latents, (b, c, h, w), and tensors that `loss` needs, (b, ...) each.
        """
        return self.policy.draw(denoiser, noise, text).cpu(), {}

    def prepare(  # noqa: B027 - most algorithms need nothing
        self, denoiser: nn.Module, batch: RolloutBatch, size: int, generator: torch.Generator
    ) -> None:
        """Add what `loss` needs to a whole rollout, in `batch.extra`.

        Args:
            denoiser: the network.
            batch: all images, with their advantages.
            size: images in one forward pass, as in training.
            generator: source of draws.
        """

    @abstractmethod
    def loss(self, denoiser: nn.Module, batch: RolloutBatch, index: int) -> LossTerms:
        """Return the losses of some images.

        Args:
            denoiser: the network in training.
            batch: images.
            index: which of `batches_per_image` passes it is, from 0.
        """

    def after_update(self, weights: Mapping[str, Tensor]) -> Mapping[str, float]:
        """Follow an update of the weights, and return figures to log."""
        return {}


class Reward(Protocol):
    """Reward of latents, with a gradient."""

    def __call__(self, latents: Tensor, prompts: Tensor) -> Tensor:
        """Return the weighted sum of rewards of each image, (n,).

        Args:
            latents: clean latents, (n, c, h, w).
            prompts: index of each image's prompt, (n,).
        """
        ...


@runtime_checkable
class UsesReward(Protocol):
    """An algorithm that needs the gradient of the reward."""

    def set_reward(self, reward: Reward) -> None:
        """Store the reward."""
        ...


def per_image(value: Tensor) -> Tensor:
    """Return the mean over everything but the first dimension."""
    return value.flatten(1).mean(1)
