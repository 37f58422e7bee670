"""Training loop of every stage."""

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
CHECKPOINT_SECONDS = 120.0
"""Seconds between checkpoints."""


def autocast() -> torch.autocast:
    """Return the autocast context of every stage: bf16 if the processor computes in it."""
    return torch.autocast("cpu", torch.bfloat16, enabled=preferred_precision() == "bf16")


class _Optimizers:
    """AdamW, and Muon for the matrices that are chosen."""

    def __init__(
        self, model: nn.Module, lr: float, muon: Callable[[str, nn.Parameter], bool]
    ) -> None:
        chosen = {p for name, p in model.named_parameters() if muon(name, p)}
        others = [p for p in model.parameters() if p not in chosen]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99), weight_decay=1e-3)
        ]
        if chosen:
            matrices = [p for p in model.parameters() if p in chosen]
            self.parts.append(
                torch.optim.Muon(matrices, lr=lr, weight_decay=1e-3, adjust_lr_fn="match_rms_adamw")
            )
        self._part_of = {
            p: part for part in self.parts for group in part.param_groups for p in group["params"]
        }

    def set_lr(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def kinds_of(self, parameter: nn.Parameter) -> tuple[str, ...]:
        is_muon = isinstance(self._part_of[parameter], torch.optim.Muon)
        return ("momentum_buffer",) if is_muon else ("step", "exp_avg", "exp_avg_sq")

    def state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self._part_of[parameter].state[parameter]
        return state


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
    checkpoint_seconds: float = CHECKPOINT_SECONDS,
    muon: Callable[[str, nn.Parameter], bool] = lambda name, parameter: False,
) -> nn.Module:
    """Minimize `loss` with a cosine schedule and return `model` with averaged weights.

    The generator of a step depends on the seed and the step only, so a resumed run equals an
    uninterrupted one.

    Args:
        name: name of the stage; a checkpoint `work`/name-checkpoint.safetensors is resumed.
        work: directory of the checkpoint and of log.jsonl.
        model: network to train, in place.
        steps: number of updates, over which the learning rate decays.
        loss: function of (step, generator) that returns the loss and its terms for the log.
        lr: peak learning rate.
        ema: largest decay of the weight average.
        warmup: steps over which the learning rate rises.
        checkpoint_seconds: seconds between checkpoints; the last step always writes one.
        muon: whether Muon updates a parameter, at the same root mean square as AdamW, which
            updates the others.

    Raises:
        FileError: the checkpoint is damaged, of another model, or cannot be written.
    """
    path, log = work / f"{name}-checkpoint.safetensors", work / "log.jsonl"
    opt = _Optimizers(model, lr, muon)
    average = {k: v.detach().clone() for k, v in model.named_parameters()}
    start, elapsed = 0, 0.0
    if path.exists():
        start, elapsed = _read(path, model, opt, average)
    start_time, saved = time.time() - elapsed, time.time()
    sums: dict[str, float] = {}
    summed = 0
    model.train()
    for step in range(start, steps):
        rate = (
            lr
            * min(1.0, (step + 1) / warmup)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        )
        opt.set_lr(rate)
        value, parts = loss(step, torch.Generator().manual_seed(SEED + 1_000_003 * step))
        model.zero_grad(set_to_none=True)
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
                "seconds": round(time.time() - start_time, 1),
                "lr": rate,
            }
            row |= {k: round(v / summed, 6) for k, v in sums.items()}
            sums, summed = {}, 0
            with log.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if time.time() - saved > checkpoint_seconds or last:
            _write(path, model, opt, average, step + 1, time.time() - start_time)
            saved = time.time()
    with torch.no_grad():
        for k, v in model.named_parameters():
            v.copy_(average[k])
    return model.eval()


def _write(
    path: Path,
    model: nn.Module,
    opt: _Optimizers,
    average: dict[str, Tensor],
    step: int,
    seconds: float,
) -> None:
    """Write the state of a stage: tensors by name, step and seconds in the header."""
    tensors = {f"model/{k}": v for k, v in _untied_state(model).items()} | {
        f"average/{k}": v for k, v in average.items()
    }
    tensors |= {
        f"{k}/{name}": v for name, p in model.named_parameters() for k, v in opt.state_of(p).items()
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
    path: Path, model: nn.Module, opt: _Optimizers, average: dict[str, Tensor]
) -> tuple[int, float]:
    """Restore the state of a stage; return its steps and seconds so far."""
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
        parts: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, _, name = key.partition("/")
            parts.setdefault(kind, {})[name] = value
        values = parts.pop("model")
        with torch.no_grad():
            for name, value in _untied_state(model).items():
                value.copy_(values.pop(name))
        if values:
            raise ValueError(f"unknown weight {next(iter(values))}")
        averaged = parts.pop("average")
        for name, p in model.named_parameters():
            average[name].copy_(averaged[name])
            kinds = opt.kinds_of(p)
            opt.state_of(p).update({kind: _like(p, parts[kind][name]) for kind in kinds})
        return int(header["step"]), float(header["seconds"])
    except (SafetensorError, OSError, KeyError, RuntimeError, ValueError) as error:
        line = str(error).splitlines()[0]
        raise FileError(
            f"checkpoint {path} is damaged or of another model ({line}). Remove it to start again."
        ) from error


def _untied_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the state of a network with one name for weights that have several, as in T5."""
    seen: set[int] = set()
    state = {}
    for name, value in model.state_dict().items():
        if value.data_ptr() not in seen or not value.numel():
            state[name] = value
        seen.add(value.data_ptr())
    return state


def _like(p: Tensor, value: Tensor) -> Tensor:
    """Return an optimizer moment in its parameter's memory layout; other values unchanged."""
    return (
        torch.empty_like(p, requires_grad=False).copy_(value) if value.shape == p.shape else value
    )
