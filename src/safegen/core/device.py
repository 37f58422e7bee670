"""Choice of the device and the type of the weights that a model runs with."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from safegen.core.errors import UnknownNameError
from safegen.core.processes import local_rank

if TYPE_CHECKING:
    import torch

AUTO = "auto"
"""Name of the accelerator if there is one, else of the CPU."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
"""Types of weights, by their short names, with torch's names."""


def resolve_dtype(dtype: str | torch.dtype) -> str:
    """Return the short name of a type of weights: `fp32`, `bf16` or `fp16`.

    Args:
        dtype: short name, torch's name (`float32`), or a `torch.dtype`.

    Raises:
        UnknownNameError: it is another type.
    """
    name = str(dtype).removeprefix("torch.")
    for short, full in DTYPES.items():
        if name in (short, full):
            return short
    raise UnknownNameError("dtype", name, (*DTYPES, *DTYPES.values()))


def resolve_device(device: str | torch.device = AUTO) -> str:
    """Return the name of a torch device; `auto` is the accelerator (cuda, mps, xpu ...), or cpu.

    Of several processes on a machine, each takes an NVIDIA device of its own for `auto` and `cuda`.
    Other names are returned as they are, unchecked.
    """
    name = str(device)
    if name == AUTO:
        import torch

        found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        name = found.type if found else "cpu"
    rank = local_rank()
    return name if name != "cuda" or rank is None else f"cuda:{rank}"


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
