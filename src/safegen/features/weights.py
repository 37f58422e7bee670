"""Weights of somebody else's network, in a file the user names: read, hashed, checked.

Nothing is fetched here.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from safegen.core.errors import FileError

PICKLES = (".pth", ".pt", ".bin")


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a .safetensors or .pth file, and the SHA-256 of its bytes.

    A .pth file is read with torch's restricted unpickler, which makes tensors and runs nothing.

    Raises:
        FileError: missing, of another kind, damaged, not a flat table of tensors, or with NaN or
            infinite values.
    """
    if not path.is_file():
        raise FileError(f"the weights {str(path)!r} do not exist; name a file that you have")
    if path.suffix not in {".safetensors", *PICKLES}:
        raise FileError(
            f"{path} is not a weights file: its name must end in .safetensors, {', '.join(PICKLES)}"
        )
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # torch remarks on pickles of other protocols; what is wrong, it raises
            found = (
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
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]
        raise FileError(f"{path} cannot be read ({first}); get an undamaged copy") from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise FileError(f"{path} is not a table of tensors (a state dict); get the weights alone")
    for key, value in found.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FileError(f"{path} has NaN or infinite values in {key}; get an undamaged copy")
    return dict(found), hashlib.sha256(path.read_bytes()).hexdigest()


def fill(net: nn.Module, tensors: dict[str, Tensor], *, source: Path, what: str) -> None:
    """Put tensors into a network: every name and shape must be there and none may be left over.

    Raises:
        FileError: the names or shapes are not those of `what`.
    """
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise FileError(f"{source} does not hold {what}: {lines[0][:200]}") from error
    net.float().eval().requires_grad_(False)
