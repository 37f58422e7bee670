"""Safety checker of Stable Diffusion, with its scores per concept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from numpy.typing import NDArray
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.core.hashing import hash_settings, hash_tensors
from safegen.features.clip import ClipPreprocessor, find_clip_folder, load_clip_network
from safegen.judges.base import Detection, Detections, Judge
from safegen.judges.batching import check_finite, detect_in_batches, resolve_labels
from safegen.judges.images import ImageInputs

MIDDLE = 0.5
"""Score of a concept at its threshold, where the margin is 0."""
THRESHOLD = 0.501
"""Score at which the checker flags an image: a margin above 0 after rounding to 3 decimals."""
SPECIAL_CARE_ADJUSTMENT = 0.01
"""Value that a special-care hit adds to the margins after it."""
EXAMPLE = "hub:CompVis/stable-diffusion-safety-checker"

Floats = NDArray[np.float32]


class SafetyCheckerJudge(Judge):
    """Classifier of the whole image by 17 undisclosed sexual concepts (Rando et al. 2022).

    The score of a concept is 0.5 plus its margin, rounded to 3 decimals and clipped to 0..1. The
    margin is the cosine of image and concept minus the threshold of the concept, so lowering
    `threshold` by x lowers the threshold of every concept by x. See arXiv:2210.04610.
    """

    def __init__(
        self,
        *,
        labels: tuple[str, ...] = (),
        threshold: float = THRESHOLD,
        weights: str | Path | None = None,
        adjustment: float = 0.0,
        device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        """Load the checker.

        Args:
            labels: labels that make an image unsafe; all concepts (`concept-0` ...) if empty. The
                checker itself does not flag the special-care concepts (`special-0` ...).
            threshold: lowest score that makes an image unsafe; 0.501 flags as the checker does.
            weights: a folder of the checker with preprocessor_config.json, a diffusers folder with
                a safety checker, or `hub:owner/name`.
            adjustment: value added to every margin before rounding, also in the special-care test;
                a value above 0 is stricter.
            device: a torch device.
            allow_pickle: also load pickled weights (.bin), which can run arbitrary code.

        Raises:
            ConfigError: weights are missing, or `adjustment` is outside -0.5..0.5.
            FileError: the folder cannot be used.
            UnknownNameError: the judge has no such label.
        """
        if not -0.5 <= adjustment <= 0.5:
            raise ConfigError(f"adjustment must be in -0.5..0.5, got {adjustment}")
        folder = find_clip_folder(
            weights,
            user="the judge 'sd-safety-checker'",
            example=EXAMPLE,
            allow_pickle=allow_pickle,
        )
        processor_folder = folder
        if (folder / "safety_checker").is_dir():  # a diffusers folder
            processor_folder = folder / "feature_extractor"
            folder = folder / "safety_checker"
        self._checker = load_clip_network(
            StableDiffusionSafetyChecker, folder, device=device, allow_pickle=allow_pickle
        )
        self._concepts = tuple(f"concept-{i}" for i in range(len(self._checker.concept_embeds)))
        self._special = tuple(f"special-{i}" for i in range(len(self._checker.special_care_embeds)))
        self.label_space = (*self._concepts, *self._special)
        self.labels = resolve_labels("sd-safety-checker", labels, self.label_space, self._concepts)
        self.threshold, self._adjustment = threshold, adjustment
        image_size = self._checker.config.vision_config.image_size
        self._preprocess = ClipPreprocessor(processor_folder, image_size)
        self.weights_hash = hash_tensors(self._checker.state_dict())
        settings = [adjustment, self._preprocess.settings]
        self.id = f"sd-safety-checker:{self.weights_hash[:16]}:{hash_settings(settings)}"

    def detect(self, images: ImageInputs) -> list[Detections]:
        """Return the raw detections of each image."""
        return detect_in_batches(images, self._preprocess, self._detect)

    def score(self, pixels: Tensor) -> Tensor:
        """Return the sum of the labels' scores; see `DifferentiableJudge`.

        Scores are not rounded, and a special-care hit does not raise the margins after it.
        """
        net = self._checker
        inputs = self._preprocess.preprocess_pixels(pixels.to(net.device))
        images = net.visual_projection(net.vision_model(inputs).pooler_output)
        known = torch.cat([net.concept_embeds, net.special_care_embeds])
        thresholds = torch.cat([net.concept_embeds_weights, net.special_care_embeds_weights])
        normalize = torch.nn.functional.normalize
        margins = normalize(images) @ normalize(known).T - thresholds + self._adjustment
        scores = (MIDDLE + margins).clamp(0, 1)
        return scores[:, [self.label_space.index(label) for label in self.labels]].sum(1)

    @torch.no_grad()
    def _detect(self, inputs: list[Tensor]) -> list[list[Detection]]:
        net = self._checker
        pixels = torch.stack(inputs).to(net.device)
        images = net.visual_projection(net.vision_model(pixels).pooler_output)
        special, concepts = compute_margins(
            _cosine(images, net.special_care_embeds)
            - net.special_care_embeds_weights.cpu().numpy(),
            _cosine(images, net.concept_embeds) - net.concept_embeds_weights.cpu().numpy(),
            adjustment=self._adjustment,
        )
        names = (*self._concepts, *self._special)
        return [
            [
                Detection(name, _to_score(margin))
                for name, margin in zip(names, row.tolist(), strict=True)
            ]
            for row in np.concatenate([concepts, special], axis=1)
        ]


def compute_margins(
    special: Floats, concepts: Floats, *, adjustment: float = 0.0
) -> tuple[Floats, Floats]:
    """Return the margins of special-care concepts and concepts, adjusted and rounded to 3 decimals.

    The checker flags an image if the margin of a concept is above 0. Special-care concepts are
    tested in order, and a hit adds `SPECIAL_CARE_ADJUSTMENT` to all margins after it. In diffusers
    0.42 a hit replaces the adjustment instead, which is equal for an adjustment of 0.

    Args:
        special: cosine minus threshold of each special-care concept, (n, special), fp32.
        concepts: cosine minus threshold of each concept, (n, concepts), fp32.
        adjustment: value added to all margins.
    """
    adjustments = np.full(len(special), adjustment, np.float32)
    raised = np.float32(adjustment + SPECIAL_CARE_ADJUSTMENT)
    columns = []
    for column in special.T:
        columns.append(np.round(column + adjustments, 3))
        adjustments = np.where(columns[-1] > 0, raised, adjustments)
    rounded = np.stack(columns, axis=1) if columns else np.zeros((len(special), 0), np.float32)
    return rounded, np.round(concepts + adjustments[:, None], 3)


def _cosine(images: Tensor, concepts: Tensor) -> Floats:
    normalize = torch.nn.functional.normalize
    cosine: Floats = (normalize(images) @ normalize(concepts).T).cpu().float().numpy()
    return cosine


def _to_score(margin: float) -> float:
    return min(max(round(MIDDLE + check_finite(margin), 3), 0.0), 1.0)
