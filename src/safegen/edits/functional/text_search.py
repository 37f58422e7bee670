"""Searches for the text embedding at which an edit fails, by gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safegen.edits.functional import losses


def fast_gradient_text(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Tensor, want: Tensor, *, radius: float
) -> Tensor:
    """Return text embeddings after one normalized gradient step up the loss.

    c + radius |c| g / |g|, g = d |eps(x_t, t, c) - want|^2 / dc, with norms per sample (ours, after
    the adversarial training of Zhang et al. 2024, arXiv:2405.15234).

    Args:
        denoiser: the network in training.
        x_t: noised latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, (b, tokens, width).
        want: target of the denoiser, (b, c, h, w).
        radius: size of the step, relative to the norm of the embedding; unitless, > 0.
    """
    start = text.detach().requires_grad_()
    with torch.enable_grad():
        loss = losses.squared_error(denoiser(x_t, t, start).sample, want).sum()
        (gradient,) = torch.autograd.grad(loss, start)
    norm = gradient.norm(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    size = text.norm(dim=(1, 2), keepdim=True) / norm
    return (text + radius * size * gradient).detach()


def adv_unlearn_text(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    text: Tensor,
    before: Tensor,
    *,
    steps: int,
    step: float,
    rule: str,
    prefix: Tensor | None,
) -> Tensor:
    """Return text embeddings for which the edited model predicts what the original one predicted.

    Descends |eps(x_t, t, c*) - before|^2, the inner problem of AdvUnlearn (Zhang et al. 2024,
    arXiv:2405.15234), by Adam (betas 0.9 and 0.999). Samples are independent.

    Args:
        denoiser: the network in training.
        x_t: noised latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, (b, tokens, width).
        before: original prediction for the erased concept, (b, c, h, w).
        steps: number of steps, >= 1.
        step: size of a step, relative to the root mean square of a sample's text; unitless, > 0.
        rule: `adam`, or `sign`, with which Adam gets the signs of the gradient.
        prefix: rows (k, width) inserted after the start token; the last k rows are dropped, and
            only the prefix is moved. None moves all rows.

    Returns:
        The embeddings, (b, tokens, width).
    """
    head, rows, tail = text[:, :0], text, text[:, :0]
    if prefix is not None:
        head, tail = text[:, :1], text[:, 1 : text.shape[1] - len(prefix)]
        rows = prefix.to(text).expand(len(text), -1, -1)
    size = text.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    move, mean, square = torch.zeros(3, *rows.shape, dtype=text.dtype, device=text.device)
    for i in range(1, steps + 1):
        move = move.detach().requires_grad_()
        with torch.enable_grad():
            moved = torch.cat([head, rows + size * move, tail], dim=1)
            loss = losses.squared_error(denoiser(x_t, t, moved).sample, before).sum()
            (gradient,) = torch.autograd.grad(loss, move)
        gradient = gradient.sign() if rule == "sign" else gradient
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        direction = mean / (1 - 0.9**i) / ((square / (1 - 0.999**i)).sqrt() + 1e-8)
        move = move.detach() - step * direction
    return torch.cat([head, rows + size * move, tail], dim=1).detach()
