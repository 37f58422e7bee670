"""Judges and features of a rollout: from latents to the inputs of the rewards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor, nn

from safegen.core.errors import ConfigError, first_line
from safegen.core.processes import gather_objects, gather_rows
from safegen.edits.rl.prompts import TrainingPrompt
from safegen.edits.rl.rewards import REWARDS, RewardInputs
from safegen.features.base import (
    DifferentiableExtractor,
    Extractor,
    TextExtractor,
    list_differentiable_extractors,
    load_extractor,
)
from safegen.judges import Detections, Judge, load_judge
from safegen.judges.base import DifferentiableJudge, list_differentiable_judges
from safegen.mini.world import IMAGE_SIZE
from safegen.models.model import Model

if TYPE_CHECKING:
    from safegen.edits.shielddiff import ShieldDiff

NAN = float("nan")


@dataclass(frozen=True)
class JudgedImages:
    """Images of a rollout as judges and features see them."""

    inputs: RewardInputs
    """What the rewards read."""
    verdicts: Mapping[str, Tensor]
    """By judge (`judge`, `held_out`): 1 if it finds the concept, 0 if not, NaN unjudged, (n,)."""
    unjudged: str | None
    """Why the judge could not judge the first of such images; None if it judged all."""


def gather_images(judged: JudgedImages, rows: Tensor, size: int) -> JudgedImages:
    """Return what the judges and features of all processes find, in the order of the images.

    Args:
        judged: images of this process.
        rows: their places in the rollout, (n,).
        size: images of the rollout.
    """

    def gather(value: Tensor) -> Tensor:
        return gather_rows(value, rows, size)

    x = judged.inputs
    per_image = ("scores", "images", "captions", "base_images", "benign")
    inputs = replace(x, **{name: gather(getattr(x, name)) for name in per_image})
    verdicts = {name: gather(value) for name, value in judged.verdicts.items()}
    reasons = [reason for reason in gather_objects(judged.unjudged) if reason is not None]
    return JudgedImages(inputs, verdicts, reasons[0] if reasons else None)


class Rewarder:
    """Judges and features that turn latents into the inputs of the rewards."""

    def __init__(self, edit: ShieldDiff, prompts: Sequence[TrainingPrompt], size: int) -> None:
        """Load the judges and the features, and embed the captions.

        Args:
            edit: settings of the edit.
            prompts: prompts of the training.
            size: side of the model's images in pixels.

        Raises:
            ConfigError: the features cannot embed texts, or know other images only.
        """
        self.judge: Judge = load_judge(
            edit.judge, labels=edit.labels, threshold=edit.threshold, **edit.judge_options
        )
        self.held_out: Judge | None = None
        if edit.held_out_judge:
            self.held_out = load_judge(
                edit.held_out_judge, labels=edit.labels, **edit.held_out_options
            )
        self.extractor: Extractor = load_extractor(edit.extractor, weights=edit.extractor_weights)
        if not isinstance(self.extractor, TextExtractor):
            raise ConfigError(
                f"extractor must embed texts too, got {edit.extractor!r}. Use clip or mini-clip."
            )
        if edit.extractor == "mini-clip" and size > IMAGE_SIZE:
            raise ConfigError(
                f"extractor must know the model's images: mini-clip knows scenes of {IMAGE_SIZE} "
                f"pixels only, got a model of {size}. Set extractor=clip and extractor_weights."
            )
        self.benign = torch.tensor([prompt.benign for prompt in prompts])
        self.captions = self._embed([prompt.caption for prompt in prompts])
        self.safe = torch.zeros(self.captions.shape[1])
        if edit.anchors:
            safe, unsafe = self._embed(edit.anchors).mean(0), self._embed(edit.erase).mean(0)
            self.safe = safe - unsafe

    def read(
        self,
        model: Model,
        latents: Tensor,
        prompts: Tensor,
        finite: Tensor,
        base: Tensor | None = None,
    ) -> JudgedImages:
        """Return what judges and features find in the images of latents.

        Args:
            model: the model that decodes the latents.
            latents: clean latents, all finite, (n, c, h, w).
            prompts: index of each image's prompt, (n,).
            finite: whether the latents are those of the image; the others are masked, (n,).
            base: latents of the original model for the benign images, in order.
        """
        images, benign = decode(model, latents), self.benign[prompts]
        detections = detect_all(self.judge, images)
        verdicts = {"judge": contains_concept(self.judge, detections)}
        if self.held_out:
            found = detect_all(self.held_out, images)
            verdicts["held_out"] = contains_concept(self.held_out, found)
        scores = torch.tensor([self._score(found) for found in detections])
        features = self._features(images).masked_fill(~finite[:, None], NAN)
        base_images = torch.full_like(features, NAN)
        if base is not None and len(base):
            base_images[benign] = self._features(decode(model, base))
        inputs = RewardInputs(
            scores=scores.masked_fill(~finite, NAN),
            images=features,
            captions=self.captions[prompts],
            safe=self.safe,
            base_images=base_images,
            benign=benign,
        )
        verdicts = {name: value.masked_fill(~finite, NAN) for name, value in verdicts.items()}
        reasons = [found.unjudged for found in detections if found.unjudged is not None]
        return JudgedImages(inputs, verdicts, reasons[0] if reasons else None)

    def _score(self, detections: Detections) -> float:
        if detections.unjudged is not None:
            return NAN
        return sum((d.score for d in detections.items if d.label in self.judge.labels), 0.0)

    def _features(self, images: Sequence[Image.Image]) -> Tensor:
        features = torch.from_numpy(self.extractor.features(images)).float()
        return nn.functional.normalize(features, dim=1)

    def _embed(self, texts: Sequence[str]) -> Tensor:
        assert isinstance(self.extractor, TextExtractor)
        features = torch.from_numpy(self.extractor.texts(list(texts))).float()
        return nn.functional.normalize(features, dim=1)


def decode(model: Model, latents: Tensor) -> list[Image.Image]:
    """Return the images of latents, in the decoder's own precision where training is in fp16.

    Decoders overflow in fp16, as that of SDXL does.
    """
    device = model.device.type
    is_half = torch.get_autocast_dtype(device) == torch.float16
    with torch.autocast(device, enabled=torch.is_autocast_enabled(device) and not is_half):
        return model.decode_images(latents)


def detect_all(judge: Judge, images: Sequence[Image.Image]) -> list[Detections]:
    """Return the detections of each image; one that makes the judge raise is unjudged."""
    try:
        return judge.detect(images)
    except Exception as error:  # a plug-in may break its contract
        if len(images) == 1:
            return [Detections((), unjudged=first_line(error))]
    return [detect_all(judge, [image])[0] for image in images]


def contains_concept(judge: Judge, detections: Sequence[Detections]) -> Tensor:
    """Return 1 for an image with the concept, 0 without it and NaN if unjudged, (n,)."""
    found = [d.contains(judge.labels, judge.threshold) for d in detections]
    return torch.tensor([NAN if value is None else float(value) for value in found])


class DifferentiableReward:
    """Weighted sum of rewards of latents; see `Reward`.

    The judge rewards images of prompts of the concept only (ours). Rewards are not divided by a
    deviation, so their weights are in units of 1 / reward.
    """

    def __init__(self, edit: ShieldDiff, model: Model, rewarder: Rewarder) -> None:
        """Check that the judge and the features have a gradient.

        Raises:
            ConfigError: they do not, or a reward needs images of the original model.
        """
        self.edit, self.model, self.rewarder = edit, model, rewarder
        self.weights = edit.rewards.used
        name = edit.algorithm.name
        if not isinstance(rewarder.judge, DifferentiableJudge):
            raise ConfigError(
                f"judge must have a gradient for {name}, got {edit.judge!r}. "
                f"Use {' or '.join(list_differentiable_judges())}, or another algorithm."
            )
        if not isinstance(rewarder.extractor, DifferentiableExtractor):
            raise ConfigError(
                f"extractor must have a gradient for {name}, got {edit.extractor!r}. "
                f"Use {' or '.join(list_differentiable_extractors())}, or another algorithm."
            )
        self.judge, self.extractor = rewarder.judge, rewarder.extractor
        if "anchor" in self.weights:
            raise ConfigError(
                f"rewards.anchor must be 0 with {name}, got {self.weights['anchor']}. "
                "weight_keep compares benign prompts with the original model."
            )

    def __call__(self, latents: Tensor, prompts: Tensor) -> Tensor:
        """Return the weighted sum of rewards of each image, in fp32; see `Reward`."""
        with torch.autocast(latents.device.type, enabled=False):
            inputs = self.read(latents.float(), prompts)
            rewards = [weight * REWARDS[name](inputs) for name, weight in self.weights.items()]
            return torch.stack(rewards).sum(0)

    def read(self, latents: Tensor, prompts: Tensor) -> RewardInputs:
        """Return the inputs of the rewards with a gradient; benign images have the score 0."""
        device, prompts = latents.device, prompts.cpu()
        pixels = self.model.decode_pixels(latents).float()
        benign = self.rewarder.benign[prompts].to(device)
        features = nn.functional.normalize(self.extractor.embed(pixels).to(device), dim=1)
        return RewardInputs(
            scores=torch.where(benign, 0.0, self.judge.score(pixels).to(device)),
            images=features,
            captions=self.rewarder.captions[prompts].to(device),
            safe=self.rewarder.safe.to(device),
            base_images=torch.full_like(features, float("nan")),
            benign=benign,
        )
