"""Inversion of deterministic sampling: the initial latents that a sampler turns into an image.

A step of DDIM (Song et al. 2020, arXiv:2010.02502, equation 12 without noise), and an Euler step of
flow matching, are affine in the latents and the denoiser's output: x' = a x + b output(x, t).
Inverting one is a fixed-point problem in x, because the output depends on x.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from safegen.edits.functional.losses import Latent, PerSample
from safegen.models.families.noise_schedule import FLOW_PREDICTION, euler_scheduler
from safegen.models.families.pipeline_specs import step_options
from safegen.models.model import Model

Output = Callable[[Latent, float, Tensor], Latent]
"""Output of the denoiser for latents at a timestep; the last argument has the rows' numbers."""


@dataclass(frozen=True)
class Step:
    """One step of deterministic sampling: x' = a x + b output(x, t)."""

    t: float
    """Timestep of x."""
    a: float
    """Factor of the latents."""
    b: float
    """Factor of the denoiser's output."""


def ddim_steps(config: Any, num_steps: int) -> list[Step]:
    """Return the steps of DDIM on a scheduler's noise schedule, from noise to image.

    Args:
        config: configuration of any scheduler of diffusers; thresholds on the image are ignored,
            because they are not invertible.
        num_steps: number of steps.
    """
    scheduler = DDIMScheduler.from_config(config, clip_sample=False, thresholding=False)
    scheduler.set_timesteps(num_steps)
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)

    def step(output: Tensor, t: int, x: Tensor) -> float:
        return float(scheduler.step(output, t, x, return_dict=False)[0])

    return [
        Step(t, a=step(zero, t, one), b=step(one, t, zero)) for t in scheduler.timesteps.tolist()
    ]


def euler_steps(model: Model, num_steps: int) -> list[Step]:
    """Return the Euler steps of a flow-matching model, from noise to image.

    x' = x + (s' - s) output, at the noise levels s of its pipeline for an image of its size.
    """
    scheduler = euler_scheduler(model.pipeline.scheduler, stochastic_sampling=False)
    options = step_options(model.pipeline, model.latent_shape, num_steps)
    scheduler.set_timesteps(num_steps, **options)
    timesteps, levels = scheduler.timesteps.tolist(), scheduler.sigmas.tolist()
    return [
        Step(t, a=1.0, b=after - before)
        for t, before, after in zip(timesteps, levels[:-1], levels[1:], strict=True)
    ]


def sampling_steps(model: Model, num_steps: int) -> list[Step]:
    """Return the deterministic steps that are inverted on a model: those of DDIM, or of Euler."""
    if model.prediction == FLOW_PREDICTION:
        return euler_steps(model, num_steps)
    return ddim_steps(model.pipeline.scheduler.config, num_steps)


def draw(output: Output, steps: Sequence[Step], x: Latent) -> Latent:
    """Return the latents of the image that initial latents lead to."""
    rows = torch.arange(len(x), device=x.device)
    for step in steps:
        x = step.a * x + step.b * output(x, step.t, rows)
    return x


def invert(
    output: Output,
    steps: Sequence[Step],
    z: Latent,
    *,
    iterations: int,
    tolerance: float,
    stop: Callable[[], bool] = lambda: False,
) -> Latent:
    """Return initial latents that lead to the latents of an image.

    With one iteration this is plain DDIM inversion, which takes the output at the known end of each
    step for that at its unknown beginning.

    Args:
        output: output of the denoiser.
        steps: steps from noise to image.
        z: latents of images.
        iterations: outputs for each step, at most.
        tolerance: root mean square error of a step that is small enough.
        stop: asked before each step; after True, the remaining steps take one iteration.
    """
    for step in reversed(steps):
        iterations = 1 if stop() else iterations
        z = invert_step(output, step, z, iterations=iterations, tolerance=tolerance)
    return z


def invert_step(
    output: Output, step: Step, y: Latent, *, iterations: int, tolerance: float
) -> Latent:
    """Return x with a x + b output(x, t) = y, row by row.

    Fixed point x <- x - rate (a x + b output(x, t) - y) / a from x = y, as in ReNoise (Garibi et
    al. 2024, arXiv:2403.14602) without its averaging. Where the error grows, the row returns to its
    best x and halves its rate (ours), so that a denoiser that is no contraction does not diverge.
    """
    best, best_error = y.clone(), y.new_full((len(y),), math.inf)
    best_residual, rate, x = torch.zeros_like(y), y.new_ones(len(y)), y.clone()
    rows = torch.arange(len(y), device=y.device)
    for _ in range(iterations):
        residual = step.a * x[rows] + step.b * output(x[rows], step.t, rows) - y[rows]
        error = residual.pow(2).mean(dim=(1, 2, 3)).sqrt()
        better = error < best_error[rows]
        won = rows[better]
        best[won], best_residual[won], best_error[won] = x[won], residual[better], error[better]
        rate[rows[~better]] /= 2
        rows = rows[best_error[rows] > tolerance]
        if not len(rows):
            break
        x[rows] = best[rows] - rate[rows, None, None, None] * best_residual[rows] / step.a
    return x


def refine(
    output: Output,
    steps: Sequence[Step],
    x: Latent,
    z: Latent,
    *,
    updates: int,
    lr: float,
    stop: Callable[[], bool] = lambda: False,
) -> tuple[Latent, list[PerSample]]:
    """Return initial latents that lead nearer to an image's, and their errors so far.

    Adam on the mean squared error between `draw(x)` and `z`, through all steps; the best x of each
    row is returned.

    Args:
        output: output of the denoiser.
        steps: steps from noise to image.
        x: initial latents.
        z: latents of images.
        updates: updates of x; 0 measures the error alone.
        lr: learning rate.
        stop: asked before each update.

    Returns:
        The latents, and the lowest error of each row after 0, 1, ... updates.
    """
    rows = torch.arange(len(x), device=x.device)
    current = x.clone().requires_grad_(updates > 0)
    best, lowest = x, x.new_full((len(x),), math.inf)
    optimizer = torch.optim.Adam([current], lr=lr)
    history = []
    for number in range(updates + 1):
        last = number == updates or stop()
        # whole passes: one that stops early is not counted
        with torch.set_grad_enabled(not last), set_checkpoint_early_stop(False):
            end = current
            for step in steps:
                out = (
                    output(end, step.t, rows)
                    if last
                    else checkpoint(output, end, step.t, rows, use_reentrant=False)
                )
                end = step.a * end + step.b * out
            error = (end - z).pow(2).mean(dim=(1, 2, 3))
        better = error.detach() < lowest
        best = torch.where(better[:, None, None, None], current.detach(), best)
        lowest = torch.minimum(error.detach(), lowest)
        history.append(lowest)
        if last:
            break
        (current.grad,) = torch.autograd.grad(error.sum(), current)
        optimizer.step()
    return best, history


def likelihood(x: Float[Tensor, "c h w"]) -> dict[str, float]:
    """Return how initial latents compare with draws from N(0, I).

    Returns:
        `log_density`: log-density under N(0, I) by dimension; -1.419 for a typical draw.
        `norm_z`: squared norm in standard deviations from its mean, d and sqrt(2 d) for a draw.
        `correlation_z`: sum of products of adjacent values in its standard deviations for a draw.
            The density depends on the norm alone; this sees structure that a draw does not have.
    """
    x = x.double()
    square, d = float(x.pow(2).sum()), x.numel()
    products = [x[:, 1:] * x[:, :-1], x[..., 1:] * x[..., :-1]]
    pairs = sum(part.numel() for part in products)
    total = sum(float(part.sum()) for part in products)
    return {
        "log_density": -(square / d + math.log(2 * math.pi)) / 2,
        "norm_z": (square - d) / math.sqrt(2 * d),
        "correlation_z": total / (square / d) / math.sqrt(pairs) if square else 0.0,
    }
