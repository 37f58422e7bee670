"""Searches for the text embedding at which an edit fails, by gradient."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from safegen.edits.functional import losses
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict


def fast_gradient_text(
    denoiser: nn.Module, x_t: Tensor, t: Tensor, text: Conditioning, want: Tensor, *, radius: float
) -> Conditioning:
    """Return text embeddings after one normalized gradient step up the loss.

    c + radius |c| g / |g|, g = d |eps(x_t, t, c) - want|^2 / dc, with norms per sample (ours, after
    the adversarial training of Zhang et al. 2024, arXiv:2405.15234). Pooled embeddings are moved
    in the same way, by norms of their own. Embeddings of zeros, such as the blank text of SDXL,
    stay.

    Args:
        denoiser: the network in training.
        x_t: noised latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, b rows.
        want: target of the denoiser, (b, c, h, w).
        radius: size of the step, relative to the norm of the embedding; unitless, > 0.
    """
    parts = [text.hidden] if text.pooled is None else [text.hidden, text.pooled]
    starts = [part.detach().requires_grad_() for part in parts]
    with torch.enable_grad():
        start = Conditioning(starts[0], starts[1] if starts[1:] else None, text.added)
        loss = losses.squared_error(predict(denoiser, x_t, t, start), want).sum()
        gradients = torch.autograd.grad(loss, starts)
    moved = []
    for part, gradient in zip(parts, gradients, strict=True):
        dims = tuple(range(1, part.ndim))
        norm = gradient.norm(dim=dims, keepdim=True).clamp(min=1e-12)
        size = part.norm(dim=dims, keepdim=True) / norm
        moved.append((part + radius * size * gradient).detach())
    return Conditioning(moved[0], moved[1] if moved[1:] else None, text.added)


def adv_unlearn_text(
    denoiser: nn.Module,
    x_t: Tensor,
    t: Tensor,
    text: Conditioning,
    before: Tensor,
    *,
    steps: int,
    step: float,
    rule: str,
    prefix: Tensor | None,
) -> Conditioning:
    """Return text embeddings for which the edited model predicts what the original one predicted.

    Descends |eps(x_t, t, c*) - before|^2, the inner problem of AdvUnlearn (Zhang et al. 2024,
    arXiv:2405.15234), by Adam (betas 0.9 and 0.999). Samples are independent.
    Pooled embeddings stay.

    Args:
        denoiser: the network in training.
        x_t: noised latents, (b, c, h, w).
        t: timesteps, (b,).
        text: embeddings to start from, b rows.
        before: original prediction for the erased concept, (b, c, h, w).
        steps: number of steps, >= 1.
        step: size of a step, relative to the root mean square of a sample's text; unitless, > 0.
        rule: `adam`, or `sign`, with which Adam gets the signs of the gradient.
        prefix: rows (k, width) inserted after the start token; the last k rows are dropped, and
            only the prefix is moved. None moves all rows.

    Returns:
        The embeddings, b rows.
    """
    hidden = text.hidden
    head, rows, tail = hidden[:, :0], hidden, hidden[:, :0]
    if prefix is not None:
        head, tail = hidden[:, :1], hidden[:, 1 : hidden.shape[1] - len(prefix)]
        rows = prefix.to(hidden).expand(len(hidden), -1, -1)
    size = hidden.pow(2).mean(dim=(1, 2), keepdim=True).sqrt()
    move, mean, square = torch.zeros(3, *rows.shape, dtype=hidden.dtype, device=hidden.device)
    for i in range(1, steps + 1):
        move = move.detach().requires_grad_()
        with torch.enable_grad():
            moved = torch.cat([head, rows + size * move, tail], dim=1)
            prediction = predict(denoiser, x_t, t, text.replace_hidden(moved))
            loss = losses.squared_error(prediction, before).sum()
            (gradient,) = torch.autograd.grad(loss, move)
        gradient = gradient.sign() if rule == "sign" else gradient
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        direction = mean / (1 - 0.9**i) / ((square / (1 - 0.999**i)).sqrt() + 1e-8)
        move = move.detach() - step * direction
    return text.replace_hidden(torch.cat([head, rows + size * move, tail], dim=1).detach())
