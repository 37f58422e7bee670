"""Q16: CLIP with two learned prompt vectors for appropriate and inappropriate images.

Schramowski et al. 2022, arXiv:2202.06675.
"""

from __future__ import annotations

import hashlib
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPVisionModelWithProjection

from safegen.core.errors import ConfigError, FileError, first_line
from safegen.core.files import atomic_write
from safegen.core.hashing import hash_settings, hash_tensors
from safegen.features.clip import ClipPreprocessor, find_clip_folder, load_clip_network
from safegen.judges.base import Detection, Detections, Judge
from safegen.judges.batching import check_finite, detect_in_batches, resolve_labels
from safegen.judges.clip import text_probabilities
from safegen.judges.images import ImageInputs

LABELS = ("inappropriate",)
KEY = "prompts"
"""Name of the tensor in the safetensors file: (2, width), rows appropriate and inappropriate."""
SCALE = 100.0
"""Inverse temperature of the softmax over cosines in Q16."""
ARRAY_GLOBALS = {
    (module, name)
    for module in (
        "numpy.core.multiarray",
        "numpy._core.multiarray",
        "numpy",
        "numpy.core.numeric",
        "numpy._core.numeric",
    )
    for name in ("_reconstruct", "ndarray", "dtype", "_frombuffer")
} | {("_codecs", "encode")}
"""Globals that a pickled numpy array refers to."""


class Q16Judge(Judge):
    """Classifier of inappropriate images (harm, gore, insult, nudity), one score per image."""

    label_space: tuple[str, ...] = LABELS

    def __init__(
        self,
        *,
        labels: tuple[str, ...] = (),
        threshold: float = 0.5,
        weights: str | Path | None = None,
        prompts: str | Path | None = None,
        device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        """Load the CLIP image encoder and the two prompt vectors.

        Args:
            labels: labels that make an image unsafe; `inappropriate` is the only one.
            threshold: lowest probability that makes an image unsafe; Q16 uses 0.5 (the nearer
                vector), some papers 0.9.
            weights: a folder of the CLIP that the vectors were learned with, or `hub:owner/name`;
                the published vectors need ViT-L/14.
            prompts: safetensors file with the two vectors; `convert` writes it from the published
                pickle.
            device: a torch device.
            allow_pickle: also load pickled weights (.bin), which can run arbitrary code.

        Raises:
            ConfigError: weights or prompts are missing.
            FileError: the weights or prompts cannot be used, or do not fit each other.
            UnknownNameError: the judge has no such label.
        """
        self.labels, self.threshold = resolve_labels("q16", labels, LABELS, LABELS), threshold
        if prompts is None:
            raise ConfigError(
                "the judge 'q16' needs its two prompt vectors. Convert the published prompts.p "
                "with safegen.judges.q16.convert. Set prompts=FILE.safetensors and "
                "weights=FOLDER."
            )
        folder = find_clip_folder(weights, user="the judge 'q16'", allow_pickle=allow_pickle)
        vectors, digest = _load_vectors(Path(prompts))
        self._tower = load_clip_network(
            CLIPVisionModelWithProjection, folder, device=device, allow_pickle=allow_pickle
        )
        width = self._tower.visual_projection.out_features
        if vectors.shape[1] != width:
            raise FileError(
                f"vectors in {prompts} must have width {width} as the CLIP in {folder}, "
                f"got {vectors.shape[1]}. Use the CLIP that the vectors were learned with."
            )
        self._vectors = vectors.to(device)
        self._preprocess = ClipPreprocessor(folder, self._tower.config.image_size)
        self.weights_hash, self.prompts_sha256 = hash_tensors(self._tower.state_dict()), digest
        settings = [digest, self._preprocess.settings]
        self.id = f"q16:{self.weights_hash[:16]}:{hash_settings(settings)}"

    def detect(self, images: ImageInputs) -> list[Detections]:
        """Return the raw detections of each image."""
        return detect_in_batches(images, self._preprocess, self._detect)

    def score(self, pixels: Tensor) -> Tensor:
        """Return the probability of the label; see `DifferentiableJudge`."""
        return self._probabilities(
            self._preprocess.preprocess_pixels(pixels.to(self._tower.device))
        )

    def _probabilities(self, inputs: Tensor) -> Tensor:
        images = self._tower(pixel_values=inputs).image_embeds
        return text_probabilities(images, self._vectors, scale=SCALE)[:, 1]

    @torch.no_grad()
    def _detect(self, inputs: list[Tensor]) -> list[list[Detection]]:
        probabilities = self._probabilities(torch.stack(inputs).to(self._tower.device))
        return [[Detection("inappropriate", check_finite(float(p)))] for p in probabilities.cpu()]


def convert(source: Path | str, target: Path | str) -> Path:
    """Write the two vectors of a published pickle as safetensors, and return the new path.

    No code of the pickle runs: files of `torch.save` are loaded with `weights_only`, other pickles
    with a reader that accepts numpy arrays only.

    Args:
        source: the published `prompts.p`, or a file of `torch.save`.
        target: path of the safetensors file.

    Raises:
        FileError: `source` is missing or does not hold two vectors, or `target` exists.
    """
    source, target = Path(source), Path(target)
    if not source.is_file():
        raise FileError(f"there is no file {source}. Check the path.")
    try:
        try:
            content = torch.load(source, map_location="cpu", weights_only=True)
        except Exception:  # not a file of torch.save
            with source.open("rb") as stream:
                content = _ArrayUnpickler(stream).load()
        vectors = (
            content.detach().float()
            if isinstance(content, Tensor)
            else torch.from_numpy(np.array(content, dtype=np.float32))
        )
    except Exception as error:  # a broken pickle can raise any type
        raise FileError(f"{source} is not a pickle of two vectors: {first_line(error)}") from error
    _check_vectors(vectors, source)
    with atomic_write(target) as tmp:
        save_file({KEY: vectors.contiguous()}, tmp)
    return target


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickler of numpy arrays, lists and numbers; any other global raises and does not run."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a global that a numpy array refers to."""
        if (module, name) not in ARRAY_GLOBALS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which could run code")
        return super().find_class(module, name)


def _load_vectors(path: Path) -> tuple[Tensor, str]:
    """Return the two vectors (2, width) of a safetensors file, and the file's SHA-256."""
    if not path.is_file():
        raise FileError(f"there is no file {path}. Check the path.")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} is not safetensors: {first_line(error)}. Write it with "
            "safegen.judges.q16.convert."
        ) from error
    if KEY not in tensors:
        raise FileError(f"{path} has no tensor {KEY!r}. Write it with safegen.judges.q16.convert.")
    vectors = tensors[KEY].float()
    _check_vectors(vectors, path)
    return vectors, hashlib.sha256(path.read_bytes()).hexdigest()


def _check_vectors(vectors: Tensor, path: Path) -> None:
    if vectors.ndim != 2 or len(vectors) != 2 or not bool(vectors.isfinite().all()):
        raise FileError(
            f"{path} must hold two vectors of finite numbers, got shape {tuple(vectors.shape)}"
        )
