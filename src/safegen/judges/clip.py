"""Zero-shot judge: CLIP compares an image with unsafe and safe prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPModel

from safegen.core.errors import ConfigError
from safegen.core.hashing import hash_settings, hash_tensors
from safegen.features.clip import (
    ClipPreprocessor,
    find_clip_folder,
    load_clip_network,
    load_clip_tokenizer,
)
from safegen.judges.base import Detection, Detections, Judge
from safegen.judges.batching import check_finite, detect_in_batches, resolve_labels
from safegen.judges.images import ImageInputs

UNSAFE = "unsafe"
"""Label of the summed probability of all unsafe prompts; each unsafe prompt is also a label."""


class ClipJudge(Judge):
    """Zero-shot CLIP classifier: probability of the unsafe prompts, for the whole image."""

    def __init__(
        self,
        *,
        labels: tuple[str, ...] = (),
        threshold: float = 0.5,
        weights: str | Path | None = None,
        unsafe: Sequence[str] = (),
        safe: Sequence[str] = (),
        device: str = "cpu",
        allow_pickle: bool = False,
    ) -> None:
        """Load CLIP and encode the prompts.

        Args:
            labels: labels that make an image unsafe; `unsafe` (sum over the unsafe prompts) if
                empty.
            threshold: lowest probability that makes an image unsafe; at 0.5 the unsafe prompts
                are more probable than the safe prompts.
            weights: `mini`, a folder with a CLIPModel, tokenizer and preprocessor_config.json, or
                `hub:owner/name`.
            unsafe: prompts that describe images with the concept.
            safe: prompts that describe images without the concept.
            device: a torch device.
            allow_pickle: also load pickled weights (.bin), which can run arbitrary code.

        Raises:
            ConfigError: weights or prompts are missing, a prompt is repeated, or a prompt is too
                long for CLIP.
            FileError: the folder cannot be used.
            UnknownNameError: the judge has no such label.
        """
        folder = find_clip_folder(weights, user="the judge 'clip'", allow_pickle=allow_pickle)
        prompts = _join_prompts(unsafe, safe)
        self.label_space = (UNSAFE, *unsafe)
        self.labels = resolve_labels("clip", labels, self.label_space, (UNSAFE,))
        self.threshold = threshold
        self._clip = load_clip_network(CLIPModel, folder, device=device, allow_pickle=allow_pickle)
        self._preprocess = ClipPreprocessor(folder, self._clip.config.vision_config.image_size)
        self._texts = encode_texts(self._clip, folder, prompts)
        self._unsafe = tuple(unsafe)
        self.weights_hash = hash_tensors(self._clip.state_dict())
        settings = [list(unsafe), list(safe), self._preprocess.settings]
        self.id = f"clip:{self.weights_hash[:16]}:{hash_settings(settings)}"

    def detect(self, images: ImageInputs) -> list[Detections]:
        """Return the raw detections of each image."""
        return detect_in_batches(images, self._preprocess, self._detect)

    def score(self, pixels: Tensor) -> Tensor:
        """Return the sum of the labels' probabilities; see `DifferentiableJudge`."""
        inputs = self._preprocess.preprocess_pixels(pixels.to(self._clip.device))
        unsafe = self._probabilities(inputs)[:, : len(self._unsafe)]
        each = {UNSAFE: unsafe.sum(1), **dict(zip(self._unsafe, unsafe.unbind(1), strict=True))}
        return torch.stack([each[label] for label in self.labels]).sum(0)

    def _probabilities(self, inputs: Tensor) -> Tensor:
        pooled = self._clip.vision_model(pixel_values=inputs).pooler_output
        images, scale = self._clip.visual_projection(pooled), float(self._clip.logit_scale.exp())
        return text_probabilities(images, self._texts, scale=scale)

    @torch.no_grad()
    def _detect(self, inputs: list[Tensor]) -> list[list[Detection]]:
        probabilities = self._probabilities(torch.stack(inputs).to(self._clip.device))
        return [
            [
                Detection(UNSAFE, min(check_finite(float(row.sum())), 1.0)),  # 1 + rounding
                *(Detection(p, float(v)) for p, v in zip(self._unsafe, row, strict=True)),
            ]
            for row in probabilities[:, : len(self._unsafe)].cpu()
        ]


def text_probabilities(images: Tensor, texts: Tensor, *, scale: float) -> Tensor:
    """Return the probability of each text for each image, (images, texts).

    It is the softmax over the texts of `scale` times the cosine similarity (Radford et al. 2021).

    Args:
        images: image embeddings (images, width), not necessarily normalized.
        texts: text embeddings (texts, width), not necessarily normalized.
        scale: inverse temperature; CLIP learns it, 100 in the published models.
    """
    cosine = (
        torch.nn.functional.normalize(images, dim=-1)
        @ torch.nn.functional.normalize(texts, dim=-1).T
    )
    return (scale * cosine).softmax(dim=-1)


@torch.no_grad()
def encode_texts(clip: CLIPModel, folder: Path, texts: Sequence[str]) -> Tensor:
    """Return the projected embeddings of texts, (texts, width).

    Raises:
        FileError: the folder has no readable tokenizer.
        ConfigError: a text is too long for CLIP.
    """
    tokenizer = load_clip_tokenizer(folder)
    max_length = int(clip.config.text_config.max_position_embeddings)
    rows = [tokenizer(text).input_ids for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > max_length:
            raise ConfigError(
                f"prompts must have at most {max_length} tokens, got {len(row)} in {text[:60]!r}. "
                "Shorten it."
            )
    ids = tokenizer(
        list(texts), padding="max_length", max_length=max_length, return_tensors="pt"
    ).input_ids.to(clip.device)
    embeddings: Tensor = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return embeddings


def _join_prompts(unsafe: Sequence[str], safe: Sequence[str]) -> list[str]:
    """Return the unsafe and safe prompts as one list.

    Raises:
        ConfigError: a kind has no prompts, or prompts repeat.
    """
    for kind, values in (("unsafe", unsafe), ("safe", safe)):
        if isinstance(values, str) or not values:
            raise ConfigError(
                f"the judge 'clip' needs a list of {kind} prompts, got {values!r}. "
                f"Set {kind}=[...]."
            )
    prompts = [*unsafe, *safe]
    if UNSAFE in prompts or len(set(prompts)) < len(prompts):
        raise ConfigError(
            f"prompts of the judge 'clip' must differ from each other and from {UNSAFE!r}, "
            f"got {prompts}"
        )
    return prompts
