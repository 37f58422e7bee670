"""Rollouts of the algorithms on sampler log-probabilities, for their tests."""

from __future__ import annotations

import torch
from diffusers import DDIMScheduler

from safegen.edits.rl.algorithm import DenoisingPolicy, RolloutBatch
from safegen.edits.training.shares import Draws

STEPS = 6


def draws(n, generator=None):
    """Return draws for the n images of a whole batch."""
    return Draws(generator or torch.Generator(), torch.arange(n), n)


def reschedule(model, **config):
    """Return a model after a change of its scheduler's settings."""
    scheduler = model.pipeline.scheduler
    model.pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, **config)
    return model


def build_policy(model, texts, *, names=None, **settings):
    """Return the policy of a model whose cross-attention is trained."""
    parameters = dict(model.denoiser.named_parameters())
    names = names or [n for n in parameters if "attn2" in n and n.endswith("weight")]
    for name in names:
        parameters[name].requires_grad_(True)
    settings = {"guidance": 1.0, "scheduler": "ddim", "precision": "fp32", "steps": 6} | settings
    return DenoisingPolicy(model, names, texts, **settings)


class Trial:
    """An algorithm and a rollout of `groups` groups of `group` images, `size` in a pass."""

    def __init__(self, policy, settings, *, groups=2, group=4, size=4, seed=5):
        self.policy, self.net = policy, policy.model.denoiser
        self.algorithm = settings.build(policy, groups, group, updates=2)
        self.generator = torch.Generator().manual_seed(seed)
        self.groups, self.group, self.size = groups, group, size
        self.columns = settings.batches_per_image(policy.sampler.steps)
        self.roll_out()

    def roll_out(self):
        """Draw images; their advantages are random."""
        n = self.groups * self.group
        index = torch.arange(self.groups).repeat_interleave(self.group)
        noise = torch.randn(n, *self.policy.sampler.shape, generator=self.generator)
        parts = [
            self.algorithm.rollout(
                self.net,
                noise[rows],
                self.policy.text[index[rows]],
                draws(len(rows), self.generator),
            )
            for rows in torch.arange(n).split(self.size)
        ]
        latents = torch.cat([part[0] for part in parts])
        extra = {name: torch.cat([part[1][name] for part in parts]) for name in parts[0][1]}
        advantages = torch.randn(n, generator=self.generator)
        self.noise = noise
        self.batch = RolloutBatch(index, index, latents, advantages, extra)
        self.algorithm.prepare(self.net, self.batch, self.size, self.generator)

    def terms(self, batch=None, columns=None):
        """Return the losses of every batch and column, in the order of a training."""
        batch = batch or self.batch
        return [
            self.algorithm.loss(self.net, batch.rows(rows), column)
            for rows in torch.arange(len(batch.prompts)).split(self.size)
            for column in columns or range(self.columns)
        ]

    def gradient(self, terms=None, *, kl=0.0):
        """Return the gradient of the mean loss, flat."""
        self.net.zero_grad()
        terms = self.terms() if terms is None else terms
        sum((t.policy.mean() + kl * t.kl.mean()) / len(terms) for t in terms).backward()
        grads = [p.grad for p in self.policy.trained.values()]
        return torch.cat([g.flatten() for g in grads if g is not None]).clone()

    def move(self, vector):
        """Add a flat vector, or random values of a size, to the trained weights."""
        if isinstance(vector, float):
            size = sum(p.numel() for p in self.policy.trained.values())
            vector = vector * torch.randn(size, generator=torch.Generator().manual_seed(9))
        weights = list(self.policy.trained.values())
        with torch.no_grad():
            for weight, part in zip(
                weights, vector.split([p.numel() for p in weights]), strict=True
            ):
                weight.add_(part.view_as(weight))
