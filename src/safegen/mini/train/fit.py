"""One small loop for every stage."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from safegen.core.errors import FileError
from safegen.core.files import atomic_write
from safegen.core.generation import preferred_precision

SEED = 2404_06666
KEEP_EVERY = 120.0
"""Seconds between checkpoints."""


def arithmetic() -> torch.autocast:
    """Return the context in which every stage computes: bf16 where the processor does."""
    return torch.autocast("cpu", torch.bfloat16, enabled=preferred_precision() == "bf16")


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

    The generator of a step depends on the seed and the step alone, so that a resumed run draws what
    an unbroken one draws.

    Args:
        name: of the stage; its checkpoint is `work`/name-checkpoint.safetensors, and where there is
            one the run goes on from it.
        work: folder of the checkpoint and of log.jsonl.
        model: what is trained.
        steps: updates in all, over which the rate falls.
        loss: from (step, generator) to the loss and its parts for the log.
        lr: largest learning rate.
        ema: largest decay of the weight average.
        warmup: steps over which the rate rises.
        keep_every: seconds between checkpoints; there is always one after the last step.

    Raises:
        FileError: the checkpoint is damaged or of another model, or one cannot be written.
    """
    path, log = work / f"{name}-checkpoint.safetensors", work / "log.jsonl"
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    start, spent = 0, 0.0
    if path.exists():
        start, spent = _read(path, model, opt, average)
    began, saved = time.time() - spent, time.time()
    sums: dict[str, float] = {}
    summed = 0
    model.train()
    for step in range(start, steps):
        rate = (
            lr
            * min(1.0, (step + 1) / warmup)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
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
            row = {
                "stage": name,
                "step": step + 1,
                "seconds": round(time.time() - began, 1),
                "lr": rate,
            }
            row |= {k: round(v / summed, 6) for k, v in sums.items()}
            sums, summed = {}, 0
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if time.time() - saved > keep_every or last:
            _write(path, model, opt, average, step + 1, time.time() - began)
            saved = time.time()
    with torch.no_grad():
        for k, v in model.named_parameters():
            v.copy_(average[k])
    return model.eval()


def _write(
    path: Path,
    model: nn.Module,
    opt: torch.optim.Optimizer,
    average: dict[str, Tensor],
    step: int,
    seconds: float,
) -> None:
    """Write a stage's state: tensors by name, and in the header what is none."""
    tensors = {f"model/{k}": v for k, v in model.state_dict().items()} | {
        f"average/{k}": v for k, v in average.items()
    }
    tensors |= {
        f"{k}/{name}": v for name, p in model.named_parameters() for k, v in opt.state[p].items()
    }
    with atomic_write(path, replace=True) as tmp:
        try:
            save_file(
                {k: v.detach().contiguous() for k, v in tensors.items()},
                tmp,
                {"step": str(step), "seconds": str(seconds)},
            )
        except SafetensorError as error:
            raise FileError(f"{path} cannot be written: {error}") from error


def _read(
    path: Path, model: nn.Module, opt: torch.optim.Optimizer, average: dict[str, Tensor]
) -> tuple[int, float]:
    """Put a stage's state back in place.

    Return how many steps it has done, and in how many seconds.
    """
    try:
        with safe_open(path, "pt") as file:
            header, tensors = file.metadata() or {}, {k: file.get_tensor(k) for k in file.keys()}
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            parts.setdefault(kind, {})[name] = value
        model.load_state_dict(parts.pop("model"))
        averaged = parts.pop("average")
        for name, p in model.named_parameters():
            average[name].copy_(averaged[name])
            opt.state[p] = {kind: _like(p, held[name]) for kind, held in parts.items()}
        return int(header["step"]), float(header["seconds"])
    except (
        SafetensorError,
        OSError,
        KeyError,
        RuntimeError,
        ValueError,
    ) as error:  # RuntimeError: other names or shapes
        line = str(error).splitlines()[0]
        raise FileError(
            f"the checkpoint {path} is damaged or of another model ({line}); remove it to start again"
        ) from error


def _like(p: Tensor, value: Tensor) -> Tensor:
    """Return a moment in its parameter's memory layout, as the optimiser made it.

    A step count as it is.
    """
    return (
        torch.empty_like(p, requires_grad=False).copy_(value) if value.shape == p.shape else value
    )
