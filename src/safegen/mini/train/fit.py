"""One small loop for every stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

SEED = 2404_06666
KEEP_EVERY = 120.0
"""Seconds between checkpoints."""


def fit(
    name: str,
    work: Path,
    model: nn.Module,
    steps: int,
    loss: Callable[[int, torch.Generator], tuple[Tensor, dict[str, float]]],
    *,
    lr: float,
    ema: float = 0.999,
    warmup: int = 100,
    keep_every: float = KEEP_EVERY,
) -> nn.Module:
    """Minimise `loss(step, generator)` by AdamW with a cosine schedule; leave the averaged weights in `model`.

    The generator of a step depends on the seed and the step alone, so that a resumed run draws what an unbroken one draws.

    Args:
        name: of the stage; its checkpoint is `work`/name.pt, and where there is one the run goes on from it.
        work: folder of the checkpoint and of log.jsonl.
        model: what is trained.
        steps: updates in all, over which the rate falls.
        loss: from (step, generator) to the loss and its parts for the log.
        lr: largest learning rate.
        ema: largest decay of the weight average.
        warmup: steps over which the rate rises.
        keep_every: seconds between checkpoints; there is always one after the last step.
    """
    path, log = work / f"{name}.pt", work / "log.jsonl"
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    start, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        opt.load_state_dict(state["opt"])
        average, start, spent = state["average"], state["step"], state["seconds"]
    began, saved = time.time() - spent, time.time()
    sums: dict[str, float] = {}
    summed = 0
    model.train()
    for step in range(start, steps):
        rate = lr * min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in opt.param_groups:
            group["lr"] = rate
        value, parts = loss(step, torch.Generator().manual_seed(SEED + 1_000_003 * step))
        opt.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            for k, v in model.named_parameters():
                average[k].lerp_(v, 1 - decay)
        for k, part in parts.items():
            sums[k] = sums.get(k, 0.0) + part
        summed += 1
        last = step + 1 == steps
        if (step + 1) % 50 == 0 or last:
            row = {"stage": name, "step": step + 1, "seconds": round(time.time() - began, 1), "lr": rate}
            row |= {k: round(v / summed, 6) for k, v in sums.items()}
            sums, summed = {}, 0
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if time.time() - saved > keep_every or last:
            state = {"model": model.state_dict(), "opt": opt.state_dict(), "average": average, "step": step + 1}
            torch.save(state | {"seconds": time.time() - began}, path.with_suffix(".tmp"))
            path.with_suffix(".tmp").rename(path)
            saved = time.time()
    with torch.no_grad():
        for k, v in model.named_parameters():
            v.copy_(average[k])
    return model.eval()
