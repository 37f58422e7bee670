"""Partially denoised latents of a prompt: training samples of edits that learn from phrases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor, nn

from safegen.models.families import denoisers
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.noise_schedule import FLOW_PREDICTION, euler_scheduler
from safegen.models.families.pipeline_specs import step_options
from safegen.models.model import DTYPES, Model
from safegen.models.schedulers import check_num_steps

Predict = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""Latents (b, c, h, w), timesteps (b,), embeddings of b texts -> prediction (b, c, h, w)."""


SchedulerName = Literal["ddim", "pndm", "dpm-solver"]
"""Scheduler of a rollout. `pndm` is that of the SD 1.x pipelines; it repeats its second timestep.

`dpm-solver` is DPM-Solver++, the multistep one. Flow matching has one scheduler, Euler steps of its
ODE, under each of these names.
"""


class Rollout:
    """Sampling with classifier-free guidance on the model's noise schedule.

    The scheduler is named by the edit, so that the pipeline's own one has no effect.
    """

    def __init__(
        self,
        model: Model,
        *,
        steps: int,
        guidance: float,
        scheduler: SchedulerName = "ddim",
        negative_prompt: str = "",
    ) -> None:
        """Set the timesteps.

        Raises:
            ConfigError: the schedule has fewer timesteps.
        """
        check_num_steps(model.pipeline, steps)
        self.steps, self.guidance = steps, guidance
        self.scheduler = build_scheduler(model, scheduler)
        self.shape, self.device = model.latent_shape, model.device
        is_flow = model.prediction == FLOW_PREDICTION
        self.options = step_options(model.pipeline, self.shape, steps) if is_flow else {}
        self.restart()
        self.negative_text = model.encode_text([negative_prompt]).float()

    def restart(self) -> None:
        """Set the timesteps, and forget the step and the predictions of another rollout."""
        self.scheduler.set_timesteps(self.steps, **self.options)

    @property
    def timesteps(self) -> Tensor:
        """Timestep of each step, from noise to image."""
        timesteps: Tensor = self.scheduler.timesteps
        return timesteps

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Return initial noise for `n` samples, generated on the CPU."""
        return torch.randn(n, *self.shape, generator=generator).to(self.device)

    @torch.no_grad()
    def sample_until(self, stop: int, x: Tensor, text: Conditioning, predict: Predict) -> Tensor:
        """Return the latents after `stop` steps, which belong to the timestep `timesteps[stop]`.

        Args:
            stop: number of steps; 0 returns the noise.
            x: noise, (b, c, h, w).
            text: embeddings of the prompt, b rows.
            predict: the network.
        """
        return self.denoise(self.timesteps[:stop], x, text, predict)

    @torch.no_grad()
    def denoise(self, timesteps: Tensor, x: Tensor, text: Conditioning, predict: Predict) -> Tensor:
        """Return the latents after a step at each of some timesteps.

        Args:
            timesteps: successive entries of `timesteps`.
            x: latents of the first one, (b, c, h, w).
            text: embeddings of the prompt, b rows.
            predict: the network.
        """
        self.restart()
        for t in timesteps:
            x = self.scheduler.step(self.predict_guided(t, x, text, predict), t, x).prev_sample
        return x

    @torch.no_grad()
    def trajectory(
        self, x: Tensor, text: Conditioning, predict: Predict, extra: Mapping[str, Conditioning]
    ) -> dict[str, Tensor]:
        """Return the latents of every timestep and the predictions for several texts there.

        Args:
            x: noise, (n, c, h, w).
            text: embeddings of the prompt, n rows.
            predict: the network.
            extra: embeddings of further texts by name, n rows each.

        Returns:
            `x` (latents), `text` and `blank` (predictions) and the predictions for each extra
            text, (n, timesteps, c, h, w) each, on the CPU.
        """
        self.restart()
        rows: dict[str, list[Tensor]] = {name: [] for name in ("x", "text", "blank", *extra)}
        for t in self.timesteps:
            cond, uncond = self.predict_cfg(t, x, text, predict)
            timesteps = self.expand_timesteps(t, len(x))
            values = {"x": x, "text": cond, "blank": uncond}
            values |= {name: predict(x, timesteps, other).float() for name, other in extra.items()}
            for name, value in values.items():
                rows[name].append(value.cpu())
            if "guidance" in text.added:
                guided = self.predict_guided(t, x, text, predict)
            else:
                guided = self.guide(cond, uncond)
            x = self.scheduler.step(guided, t, x).prev_sample
        return {name: torch.stack(values, dim=1) for name, values in rows.items()}

    def predict_cfg(
        self, t: Tensor, x: Tensor, text: Conditioning, predict: Predict
    ) -> tuple[Tensor, Tensor]:
        """Return the predictions for a text and for the negative prompt, from one forward pass.

        Args:
            t: timestep of all latents, or one of each, (b,).
            x: latents, (b, c, h, w).
            text: embeddings of the prompts, b rows.
            predict: the network.
        """
        texts = Conditioning.concat([text, self.negative_text.expand(len(x))])
        timesteps = self.expand_timesteps(t, len(x)).repeat(2)
        cond, uncond = predict(torch.cat([x, x]), timesteps, texts).float().chunk(2)
        return cond, uncond

    def predict_guided(self, t: Tensor, x: Tensor, text: Conditioning, predict: Predict) -> Tensor:
        """Return the guided prediction; with guidance 1 the negative prompt is left out.

        A denoiser that reads its guidance gets that of the rollout, and no negative prompt, as in
        its pipeline. The arguments are those of `predict_cfg`.
        """
        if self.guidance == 1 or "guidance" in text.added:
            text = text.replace_guidance(self.guidance)
            return predict(x, self.expand_timesteps(t, len(x)), text).float()
        return self.guide(*self.predict_cfg(t, x, text, predict))

    def guide(self, cond: Tensor, uncond: Tensor) -> Tensor:
        """Return the guided prediction."""
        return uncond + self.guidance * (cond - uncond)

    def expand_timesteps(self, t: Tensor, n: int) -> Tensor:
        """Return a timestep for each of `n` samples, on the model's device."""
        return t.to(self.device).expand(n)


def build_scheduler(model: Model, name: SchedulerName) -> Any:
    """Return a scheduler with the model's noise schedule."""
    config = model.pipeline.scheduler.config
    if model.prediction == FLOW_PREDICTION:
        return euler_scheduler(model.pipeline.scheduler, stochastic_sampling=False)
    if name == "pndm":
        return PNDMScheduler.from_config(config, skip_prk_steps=True)
    if name == "dpm-solver":
        return DPMSolverMultistepScheduler.from_config(config)
    return DDIMScheduler.from_config(config, clip_sample=False)


def rollout_autocast(model: Model, precision: str) -> AbstractContextManager[object]:
    """Return the autocast context in which rollouts compute with the precision of the training."""
    return torch.autocast(model.device.type, DTYPES[precision], enabled=precision != "fp32")


def frozen_predictor(net: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Predict:
    """Return the network as a function without gradients, in fp32 output.

    Args:
        net: the network, possibly wrapped for training.
        tensors: values for some of its weights during the call, such as those before the training.
    """

    def predict(x: Tensor, t: Tensor, text: Conditioning) -> Tensor:
        with torch.no_grad():
            prediction = denoisers.predict(net, x, t, text, tensors)
        # Autocast caches the casts made here without a gradient; the training must not reuse them.
        torch.clear_autocast_cache()
        return prediction.float()

    return predict
