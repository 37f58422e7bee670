"""Noised images of a rollout: what algorithms with a denoising loss train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from safegen.edits.rl.algorithm import DenoisingPolicy, RolloutBatch
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.noise_schedule import NoiseSchedule


@dataclass(frozen=True)
class NoisedImages:
    """Images noised `pairs` times each; every tensor has `pairs` successive rows per image."""

    z: Tensor
    """Clean latents, (b pairs, c, h, w)."""
    eps: Tensor
    """Added noise, (b pairs, c, h, w)."""
    x: Tensor
    """Noised latents, (b pairs, c, h, w)."""
    t: Tensor
    """Timesteps, (b pairs,)."""
    text: Conditioning
    """Embeddings of the prompts, b pairs rows."""


def draw_pairs(
    batch: RolloutBatch,
    pairs: int,
    schedule: NoiseSchedule,
    generator: torch.Generator,
    *,
    shared: bool,
) -> dict[str, Tensor]:
    """Return stratified timesteps and noise for every image: `t` (n, pairs) and `eps`.

    Args:
        batch: the images of a rollout.
        pairs: draws of an image.
        schedule: schedule of the model.
        generator: source of the draws.
        shared: whether the images of a group share their draws.
    """
    owner = batch.groups if shared else torch.arange(len(batch.groups))
    count = int(owner.max()) + 1
    t = schedule.timesteps[stratified_timesteps(count, pairs, len(schedule), generator)]
    eps = torch.randn(count, pairs, *batch.latents.shape[1:], generator=generator)
    return {"t": t[owner], "eps": eps[owner]}


def stratified_timesteps(n: int, pairs: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Return indices of timesteps (n, pairs), one in each of `pairs` equal parts."""
    part = torch.rand(n, pairs, generator=generator) + torch.arange(pairs)
    return (part * timesteps / pairs).long().clamp(max=timesteps - 1)


def noise_images(policy: DenoisingPolicy, batch: RolloutBatch) -> NoisedImages:
    """Return images noised by the draws in `batch.extra`; see `draw_pairs`."""
    pairs = batch.extra["t"].shape[1]
    z = batch.latents.to(policy.device).repeat_interleave(pairs, 0)
    t = batch.extra["t"].flatten().to(policy.device)
    eps = batch.extra["eps"].flatten(0, 1).to(policy.device)
    text = policy.text[batch.prompts.to(policy.device)].repeat_interleave(pairs)
    return NoisedImages(z, eps, policy.schedule.add_noise(z, eps, t), t, text)
