"""Partly denoised latents of a prompt, for edits that learn from words: the model's own pictures on their way, stopped at a step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from safegen.models.generation import check_num_steps
from safegen.models.model import DTYPES, Model

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Latents (b, c, h, w), timesteps (b,), text embeddings (b, tokens, width) -> prediction (b, c, h, w)."""


class DdimRollout:
    """DDIM with guidance over the model's own schedule, whatever sampler its pipeline uses.

    Every method that rolls out says DDIM.
    """

    def __init__(self, model: Model, *, steps: int, guidance: float) -> None:
        """Fix the steps.

        Raises:
            ConfigError: the schedule has fewer timesteps.
        """
        check_num_steps(model, steps)
        self.ddim = DDIMScheduler.from_config(model.pipeline.scheduler.config, clip_sample=False)
        self.ddim.set_timesteps(steps)
        self.guidance = guidance
        side = int(model.denoiser.config.sample_size)
        self.shape, self.device = (int(model.denoiser.config.in_channels), side, side), model.device
        self.blank = model.encode_text([""]).float()

    @property
    def timesteps(self) -> Tensor:
        """The timestep of each step, from noise to picture: step i goes from latents at timestep i to those of timestep i + 1."""
        out: Tensor = self.ddim.timesteps
        return out

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Return `n` starts, drawn on the CPU."""
        return torch.randn(n, *self.shape, generator=generator).to(self.device)

    @torch.no_grad()
    def sample_until(self, stop: int, x: Tensor, text: Tensor, predict: Predict) -> Tensor:
        """Return latents of timestep `stop`: after `stop` steps, so that 0 gives the noise itself back and latent and timestep agree.

        Args:
            stop: steps to do, 0 or more.
            x: noise, (b, c, h, w).
            text: what to draw, (b, tokens, width).
            predict: the network.
        """
        for t in self.timesteps[:stop]:
            x = self.step(t, x, *self.predict_cfg(t, x, text, predict))
        return x

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, text: Tensor, predict: Predict, asked: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return latents `x` of every timestep and what the network predicts there for `text`, `blank` and all that is asked.

        Args:
            x: noise, (n, c, h, w).
            text: what to draw, (n, tokens, width).
            predict: the network.
            asked: other texts by name, (n, tokens, width) each.

        Returns:
            By name, (n, steps, c, h, w) each, on the CPU: one guided rollout gives every latent and
            every target of its prompt.
        """
        rows: dict[str, list[Tensor]] = {name: [] for name in ("x", "text", "blank", *asked)}
        for t in self.timesteps:
            said, blank = self.predict_cfg(t, x, text, predict)
            more = {
                name: predict(x, self.at(t, len(x)), other).float() for name, other in asked.items()
            }
            for name, value in {"x": x, "text": said, "blank": blank, **more}.items():
                rows[name].append(value.cpu())
            x = self.step(t, x, said, blank)
        return {name: torch.stack(values, dim=1) for name, values in rows.items()}

    def predict_cfg(
        self, t: Tensor, x: Tensor, text: Tensor, predict: Predict
    ) -> tuple[Tensor, Tensor]:
        """Return the predictions for a text and for the blank one, of one forward."""
        texts = torch.cat([text, self.blank.expand(len(x), -1, -1)])
        said, blank = predict(torch.cat([x, x]), self.at(t, 2 * len(x)), texts).float().chunk(2)
        return said, blank

    def step(self, t: Tensor, x: Tensor, said: Tensor, blank: Tensor) -> Tensor:
        """Return the latents one step on."""
        out: Tensor = self.ddim.step(blank + self.guidance * (said - blank), t, x).prev_sample
        return out

    def at(self, t: Tensor, n: int) -> Tensor:
        """Return a timestep for each of `n` samples, on the model's device."""
        return t.to(self.device).expand(n)


def full_precision(model: Model, precision: str) -> AbstractContextManager[object]:
    """Return the context in which rollouts compute as the training does."""
    return torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32")


def frozen_predictor(net: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Predict:
    """Return the network as a function without gradients, with other values in some of its weights for the time of the call.

    A network in training is called under autocast, which keeps its weights' casts; those made here
    have no gradient and are dropped.
    """

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            if tensors is None:
                out: Tensor = net(x, t, text).sample
            else:
                out = torch.func.functional_call(
                    getattr(net, "module", net), dict(tensors), (x, t, text)
                ).sample
        torch.clear_autocast_cache()
        return out.float()

    return predict
