"""Latents of triplets that are kept in the checkpoint folder, so that no image is encoded twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from safegen.core.errors import FileError
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.tensor_files import read_tensors, write_tensors
from safegen.data.triplets.triplets import Triplet
from safegen.models.model import Model

LATENTS = "latents"
"""Folder of encoded triplets in a checkpoint folder."""
KEY = "key"
"""Header entry with the identity of what was encoded."""


@dataclass(frozen=True)
class LatentStore:
    """Where triplets are encoded to, and who is told how many are."""

    folder: Path | None = None
    """Folder of the files, one for each batch. Default: latents are not kept."""
    progress: ProgressCallback = no_progress
    writes: bool = True
    """Whether this process writes; one of several that train together does."""

    def encode(self, name: str, key: str, encode: Callable[[], Tensor]) -> Tensor:
        """Return latents that were encoded under a key, or encode and keep them.

        A file that is damaged or has another key is written again.
        """
        if self.folder is None:
            return encode()
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            try:
                tensors, header = read_tensors(path)
            except FileError:
                header = {}
            if header.get(KEY) == key and tensors.keys() == {LATENTS}:
                return tensors[LATENTS].clone()
        latents = encode()
        if self.writes:
            write_tensors(path, {LATENTS: latents}, {KEY: key}, replace=True)
        return latents


_NO_STORE = LatentStore()
_store: ContextVar[LatentStore] = ContextVar("latent_store", default=_NO_STORE)


def latent_store() -> LatentStore:
    """Return the store of the innermost `latent_storage` block."""
    return _store.get()


@contextmanager
def latent_storage(
    folder: Path | None = None, progress: ProgressCallback | None = None, *, writes: bool = True
) -> Iterator[None]:
    """Keep latents of triplets that are encoded inside the block, and report how many are.

    Args:
        folder: checkpoint folder. Default: that of the block outside.
        progress: called with (description, done, total). Default: that of the block outside.
        writes: see `LatentStore`.
    """
    outer = latent_store()
    inner = outer.folder if folder is None else folder / LATENTS
    token = _store.set(LatentStore(inner, progress or outer.progress, writes))
    try:
        yield
    finally:
        _store.reset(token)


def latents_key(model: Model, rows: Sequence[Triplet], *, flip: bool) -> str:
    """Return the identity of encoded triplets: autoencoder, images, their size, and the numerics.

    The autoencoder is identified by the values and types of its weights and by its scale.
    """
    config = model.vae.config
    parts = {
        "vae": model.hash_memory.hash(model.vae.state_dict()),
        "scale": [config.scaling_factor, config.get("shift_factor")],
        "size": model.size,
        "flip": flip,
        "images": [[row.id, *row.sha256.model_dump().values()] for row in rows],
        "numerics": [model.device.type, torch.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
