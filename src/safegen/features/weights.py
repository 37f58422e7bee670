"""Weights of third-party networks from local files: read, hashed and checked."""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from safegen.core.errors import FileError, first_line

PICKLES = (".pth", ".pt", ".bin")


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a .safetensors or .pth file, and the SHA-256 of its bytes.

    A .pth file is read by torch's restricted unpickler, which runs no code.

    Raises:
        FileError: the file is missing, of another format, damaged, not a state dict, or has NaN
            or infinite values.
    """
    if not path.is_file():
        raise FileError(f"the weights {str(path)!r} do not exist")
    if path.suffix not in {".safetensors", *PICKLES}:
        raise FileError(
            f"{path} must end in .safetensors, {', '.join(PICKLES)} to be a file of weights"
        )
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns of pickle protocols
            tensors = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except (
        SafetensorError,
        OSError,
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        pickle.UnpicklingError,
    ) as error:
        raise FileError(
            f"{path} cannot be read: {first_line(error)}. Get an intact copy."
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
        raise FileError(f"{path} is not a state dict. Get a file with the weights only.")
    for key, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FileError(f"{path} has NaN or infinite values in {key}. Get an intact copy.")
    return dict(tensors), hashlib.sha256(path.read_bytes()).hexdigest()


def load_weights(net: nn.Module, tensors: dict[str, Tensor], *, source: Path, what: str) -> None:
    """Load tensors into a network, which must have exactly their names and shapes.

    Raises:
        FileError: names or shapes differ from those of `what`.
    """
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise FileError(
            f"{source} does not have the weights of {what}: {lines[0][:200]}"
        ) from error
    net.float().eval().requires_grad_(False)
