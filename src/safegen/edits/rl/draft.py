"""DRaFT: the gradient of a reward through the last steps of the sampler."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from pydantic import Field
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_STEPS
from safegen.edits.functional.rollout import SchedulerName
from safegen.edits.rl.algorithm import (
    Algorithm,
    AlgorithmSettings,
    DenoisingPolicy,
    LossTerms,
    Reward,
    RolloutBatch,
    per_image,
)
from safegen.edits.rl.forward import draw_pairs, noise_images
from safegen.edits.training.shares import Draws
from safegen.models.families.conditioning import Conditioning


class DRaFT(AlgorithmSettings):
    """Settings of DRaFT-K (arXiv:2309.17400; AlignProp, arXiv:2310.03739, is alike).

    The last `last_steps` steps are computed again with a gradient. The loss is -R(x0), or with the
    target `bounded` the squared distance of x0 to x0 + rho |x0| g / |g|, where g = dR/dx0.

    The distance to the original model is that of predictions at one random timestep of the image
    with new noise (ours), so that it covers the whole schedule. Passes through the decoder, the
    judge and the features are not counted.
    """

    paper: ClassVar[str] = "arXiv:2309.17400"
    deviations: ClassVar[str] = (
        "The paper stops early; here a distance to the original model is needed. The target "
        "`bounded` follows DiffusionOPSD (arXiv:2608.24646) in its name and its rho only."
    )
    """Differences from the paper."""
    scheduler: ClassVar[SchedulerName] = "ddim"

    name: Literal["draft"] = "draft"
    """Name of the algorithm."""
    last_steps: int = Field(default=1, ge=1, le=MAX_STEPS)
    """Steps of the sampler that have a gradient, K in the paper."""
    target: Literal["reward", "bounded"] = "reward"
    """What images follow: the reward, or an image one bounded step above them in reward."""
    rho: float = Field(default=0.1, gt=0, le=1)
    """Length of that step, as a share of the length of the latents."""

    def build(self, policy: DenoisingPolicy, groups: int, group: int, *, updates: int) -> Algorithm:
        """Return the algorithm; see `AlgorithmSettings.build`."""
        sampler = policy.sampler
        if self.last_steps > sampler.steps:
            raise ConfigError(
                f"last_steps must be at most steps ({sampler.steps}), got {self.last_steps}. "
                "Lower it, or raise steps."
            )
        if not isinstance(sampler.scheduler, DDIMScheduler | FlowMatchEulerDiscreteScheduler):
            raise ConfigError(
                f"scheduler must be ddim for draft, got {type(sampler.scheduler).__name__}. "
                "Others need the predictions of earlier steps."
            )
        return DRaFTAlgorithm(self, policy)


class DRaFTAlgorithm(Algorithm):
    """DRaFT-K in training."""

    follows_advantages = False
    reward: Reward

    def __init__(self, settings: DRaFT, policy: DenoisingPolicy) -> None:
        """Store the settings."""
        super().__init__(policy)
        self.settings = settings

    def set_reward(self, reward: Reward) -> None:
        """Store the reward."""
        self.reward = reward

    def rollout(
        self, denoiser: nn.Module, noise: Tensor, text: Conditioning, draws: Draws
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Draw images, and keep their latents before the last steps."""
        first, last = self._timesteps()
        x = self.policy.draw(denoiser, noise, text, first)
        return self.policy.draw(denoiser, x, text, last).cpu(), {"x": x.float().cpu()}

    def prepare(
        self, denoiser: nn.Module, batch: RolloutBatch, size: int, generator: torch.Generator
    ) -> None:
        """Draw timesteps and noise of the distance to the original model."""
        batch.extra |= draw_pairs(batch, 1, self.policy.schedule, generator, shared=False)

    def loss(self, denoiser: nn.Module, batch: RolloutBatch, index: int) -> LossTerms:
        """Return minus the reward, or the distance to the bounded target, and the regularizer."""
        policy = self.policy
        text = policy.text[batch.prompts.to(policy.device)]
        z = self._denoise_last(denoiser, batch.extra["x"].to(policy.device), text)
        if self.settings.target == "bounded":
            target, reward = bounded_target(z, batch.prompts, self.reward, rho=self.settings.rho)
            policy_loss = per_image((z - target).pow(2))
        else:
            reward = self.reward(z, batch.prompts)
            policy_loss = -reward
        noised = noise_images(policy, batch)
        where = noised.x, noised.t, noised.text
        kl = policy.distance(denoiser, policy.predict(denoiser, *where), *where)
        return LossTerms(policy_loss, kl, {"reward": reward.detach()})

    def _timesteps(self) -> tuple[Tensor, Tensor]:
        steps, k = self.policy.sampler.timesteps, self.settings.last_steps
        return steps[: len(steps) - k], steps[len(steps) - k :]

    def _denoise_last(self, denoiser: nn.Module, x: Tensor, text: Conditioning) -> Tensor:
        """Return clean latents after the last steps, with a gradient through all of them."""
        sampler = self.policy.sampler

        def predict(x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
            return self.policy.predict(denoiser, x, t, text)

        sampler.restart()  # Euler steps count from the first one
        for t in self._timesteps()[1]:
            guided = sampler.predict_guided(t, x, text, predict)
            x = sampler.scheduler.step(guided, t, x).prev_sample
        return x


def bounded_target(
    z: Tensor, prompts: Tensor, reward: Reward, *, rho: float
) -> tuple[Tensor, Tensor]:
    """Return latents one step of fixed length above `z` in reward, and the rewards of `z`.

    The target is z + rho |z| g / |g| with g = dR/dz. DiffusionOPSD (arXiv:2608.24646) regresses on
    a clean output of bounded distance; the direction and the relative length are ours. Latents
    with g = 0 are their own target.

    Args:
        z: clean latents, (n, c, h, w).
        prompts: index of each image's prompt, (n,).
        reward: the reward.
        rho: length of the step relative to that of `z`.
    """
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        rewards = reward(leaf, prompts)
        (gradient,) = torch.autograd.grad(rewards.sum(), leaf)
    direction = nn.functional.normalize(gradient.flatten(1), dim=1).view_as(z)
    length = leaf.detach().flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return leaf.detach() + rho * length * direction, rewards.detach()
