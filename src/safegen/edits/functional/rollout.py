"""Partially denoised latents of a prompt: training samples of edits that learn from phrases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor, nn

from safegen.models.generation import check_num_steps
from safegen.models.model import DTYPES, Model

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Latents (b, c, h, w), timesteps (b,), text embeddings (b, tokens, width) -> prediction."""


class DdimRollout:
    """DDIM sampling with classifier-free guidance on the model's noise schedule.

    All published methods with rollouts use DDIM, so the pipeline's own scheduler is not used.
    """

    def __init__(self, model: Model, *, steps: int, guidance: float) -> None:
        """Set the timesteps.

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
        """Timestep of each step, from noise to image."""
        timesteps: Tensor = self.ddim.timesteps
        return timesteps

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Return initial noise for `n` samples, generated on the CPU."""
        return torch.randn(n, *self.shape, generator=generator).to(self.device)

    @torch.no_grad()
    def sample_until(self, stop: int, x: Tensor, text: Tensor, predict: Predict) -> Tensor:
        """Return the latents after `stop` steps, which belong to the timestep `timesteps[stop]`.

        Args:
            stop: number of steps; 0 returns the noise.
            x: noise, (b, c, h, w).
            text: embeddings of the prompt, (b, tokens, width).
            predict: the network.
        """
        for t in self.timesteps[:stop]:
            x = self.step(t, x, *self.predict_cfg(t, x, text, predict))
        return x

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, text: Tensor, predict: Predict, extra: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the latents of every timestep and the predictions for several texts there.

        Args:
            x: noise, (n, c, h, w).
            text: embeddings of the prompt, (n, tokens, width).
            predict: the network.
            extra: embeddings of further texts by name, (n, tokens, width) each.

        Returns:
            `x` (latents), `text` and `blank` (predictions) and the predictions for each extra
            text, (n, steps, c, h, w) each, on the CPU.
        """
        rows: dict[str, list[Tensor]] = {name: [] for name in ("x", "text", "blank", *extra)}
        for t in self.timesteps:
            cond, uncond = self.predict_cfg(t, x, text, predict)
            timesteps = self.expand_timesteps(t, len(x))
            values = {"x": x, "text": cond, "blank": uncond}
            values |= {name: predict(x, timesteps, other).float() for name, other in extra.items()}
            for name, value in values.items():
                rows[name].append(value.cpu())
            x = self.step(t, x, cond, uncond)
        return {name: torch.stack(values, dim=1) for name, values in rows.items()}

    def predict_cfg(
        self, t: Tensor, x: Tensor, text: Tensor, predict: Predict
    ) -> tuple[Tensor, Tensor]:
        """Return the predictions for a text and for the blank text, from one forward pass."""
        texts = torch.cat([text, self.blank.expand(len(x), -1, -1)])
        timesteps = self.expand_timesteps(t, 2 * len(x))
        cond, uncond = predict(torch.cat([x, x]), timesteps, texts).float().chunk(2)
        return cond, uncond

    def step(self, t: Tensor, x: Tensor, cond: Tensor, uncond: Tensor) -> Tensor:
        """Return the latents after one guided DDIM step."""
        guided = uncond + self.guidance * (cond - uncond)
        previous: Tensor = self.ddim.step(guided, t, x).prev_sample
        return previous

    def expand_timesteps(self, t: Tensor, n: int) -> Tensor:
        """Return a timestep for each of `n` samples, on the model's device."""
        return t.to(self.device).expand(n)


def rollout_autocast(model: Model, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context in which rollouts compute with the precision of the training."""
    return torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32")


def frozen_predictor(net: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Predict:
    """Return the network as a function without gradients, in fp32 output.

    Args:
        net: the network, possibly wrapped for training.
        tensors: values for some of its weights during the call, such as those before the training.
    """

    def predict(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            if tensors is None:
                prediction: Tensor = net(x, t, text).sample
            else:
                prediction = torch.func.functional_call(
                    getattr(net, "module", net), dict(tensors), (x, t, text)
                ).sample
        # Autocast caches the casts made here without a gradient; the training must not reuse them.
        torch.clear_autocast_cache()
        return prediction.float()

    return predict
