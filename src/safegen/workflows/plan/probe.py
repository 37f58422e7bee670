"""Measurement of short pieces of a job: time, peak memory and network passes."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn

from safegen.models.model import Model

PROBE_SECONDS = 10.0
"""Time that a probe aims at. It takes longer where one update or one step does."""
SAMPLING_SECONDS = 0.005
"""Time between two looks at the memory of the process."""


@dataclass
class Measurement:
    """Cost of one measured block."""

    seconds: float = 0.0
    """Wall-clock time."""
    memory: int = 0
    """Peak memory in bytes, in all."""
    before: int = 0
    """Memory before the block, in bytes."""
    passes: int = 0
    """Samples that went through the denoiser, and once more where a gradient flowed back."""


@contextmanager
def measured(model: Model) -> Iterator[Measurement]:
    """Yield a measurement that is complete after the block."""
    result = Measurement(before=_memory(model.device))
    with _peak_memory(model.device, result), _counted_passes(model.denoiser, result):
        began = time.perf_counter()
        try:
            yield result
        finally:
            synchronize(model.device)
            result.seconds = time.perf_counter() - began


def synchronize(device: torch.device) -> None:
    """Wait until an accelerator has done its work."""
    if device.type != "cpu" and torch.accelerator.is_available():
        torch.accelerator.synchronize()


def _memory(device: torch.device) -> int:
    """Return the memory in use: of a CUDA device, else of this process."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return int(psutil.Process().memory_info().rss)


@contextmanager
def _peak_memory(device: torch.device, result: Measurement) -> Iterator[None]:
    """Write the peak memory of the block into a measurement."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield
        result.memory = int(torch.cuda.max_memory_reserved(device))
        return
    process, done, peak = psutil.Process(), threading.Event(), [result.before]

    def watch() -> None:
        while not done.wait(SAMPLING_SECONDS):
            peak[0] = max(peak[0], process.memory_info().rss)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        result.memory = max(peak[0], process.memory_info().rss)


@contextmanager
def _counted_passes(denoiser: nn.Module, result: Measurement) -> Iterator[None]:
    """Count the samples that go through a network inside the block."""

    def count(_: nn.Module, __: Any, output: Any) -> None:
        tensor = output[0] if isinstance(output, tuple) else output.sample
        result.passes += len(tensor) * (2 if tensor.requires_grad else 1)

    handle = denoiser.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
