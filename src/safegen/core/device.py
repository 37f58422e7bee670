"""Choice of the device that a model runs on, and its description."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""Name of the accelerator if there is one, else of the CPU."""


def resolve_device(device: str | torch.device = AUTO) -> str:
    """Return the name of a torch device; `auto` is the accelerator (cuda, mps, xpu ...), or cpu.

    Other names are returned as they are, unchecked.
    """
    if str(device) != AUTO:
        return str(device)
    import torch

    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()):
        return found.type
    return "cpu"


def describe_device(device: str | torch.device) -> str:
    """Return a device with its model name or its number of threads, such as `cpu (2 threads)`."""
    import torch

    name = str(device)
    if name.startswith("cuda") and torch.cuda.is_available():
        return f"{name} ({torch.cuda.get_device_name(name)})"
    if name == "cpu":
        threads, cores = torch.get_num_threads(), os.cpu_count() or 1
        return f"cpu ({threads} thread{'s' * (threads != 1)} of {cores} cores)"
    return name
