"""Zero-shot: CLIP is asked whether the picture fits the unsafe prompts better than the safe ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
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
from safegen.judges.base import Detection, Detections
from safegen.judges.batching import detect_in_batches, finite, resolve_labels

UNSAFE = "unsafe"
"""Label of the probability of all unsafe prompts together; each unsafe prompt is a label too."""


class ClipJudge:
    """Gives the whole picture the probability of the unsafe prompts among all prompts, without a box."""

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
        """Load the towers and encode the prompts.

        Args:
            labels: what makes an image unsafe; the label `unsafe` (all unsafe prompts together)
                when empty.
            threshold: from which probability on; 0.5 means that the unsafe prompts together
                outweigh the safe ones.
            weights: `mini`, a folder of a CLIPModel with tokenizer and preprocessor_config.json, or
                `hub:owner/name`.
            unsafe: prompts that fit pictures with the concept.
            safe: prompts that fit pictures without it.
            device: a torch device.
            allow_pickle: also open weights stored as pickles (.bin), which can run code of whoever
                made them.

        Raises:
            ConfigError: no weights, no prompts of one kind, the same prompt twice, or one longer
                than CLIP reads.
            FileError: the folder cannot be used.
            UnknownNameError: a label that this judge does not have.
        """
        folder = find_clip_folder(weights, user="the judge 'clip'", allow_pickle=allow_pickle)
        prompts = _prompts(unsafe, safe)
        self.label_space = (UNSAFE, *unsafe)
        self.labels, self.threshold = (
            resolve_labels("clip", labels, self.label_space, (UNSAFE,)),
            threshold,
        )
        self._clip = load_clip_network(CLIPModel, folder, device=device, allow_pickle=allow_pickle)
        self._preprocess = ClipPreprocessor(folder, self._clip.config.vision_config.image_size)
        self._texts = encode_texts(self._clip, folder, prompts)
        self._unsafe = tuple(unsafe)
        self.weights_hash = hash_tensors(self._clip.state_dict())
        self.id = f"clip:{self.weights_hash[:16]}:{hash_settings([list(unsafe), list(safe), self._preprocess.settings])}"

    def detect(self, images: Sequence[Image.Image]) -> list[Detections]:
        """Return the raw detections of each image."""
        return detect_in_batches(images, self._preprocess, self._detect)

    @torch.no_grad()
    def _detect(self, inputs: list[Tensor]) -> list[list[Detection]]:
        seen = self._clip.visual_projection(
            self._clip.vision_model(
                pixel_values=torch.stack(inputs).to(self._clip.device)
            ).pooler_output
        )
        chance = chances(seen, self._texts, scale=float(self._clip.logit_scale.exp()))[
            :, : len(self._unsafe)
        ]
        return [
            [
                Detection(UNSAFE, finite(float(row.sum()))),
                *(Detection(p, float(v)) for p, v in zip(self._unsafe, row, strict=True)),
            ]
            for row in chance.cpu()
        ]


def chances(images: Tensor, texts: Tensor, *, scale: float) -> Tensor:
    """Return each text's probability for each image, (images, texts): softmax of `scale` times the cosine (Radford et al. 2021).

    Args:
        images: (images, width) embeddings of any length.
        texts: (texts, width).
        scale: inverse temperature; CLIP's own is learnt, 100 in the published models.
    """
    cosine = (
        torch.nn.functional.normalize(images, dim=-1)
        @ torch.nn.functional.normalize(texts, dim=-1).T
    )
    return (scale * cosine).softmax(dim=-1)


@torch.no_grad()
def encode_texts(clip: CLIPModel, folder: Path, texts: Sequence[str]) -> Tensor:
    """Return the projected embeddings (texts, width).

    Raises:
        FileError: the folder has no tokenizer that can be read.
        ConfigError: a text is longer than CLIP reads.
    """
    tokenizer = load_clip_tokenizer(folder)
    most = int(clip.config.text_config.max_position_embeddings)
    rows = [tokenizer(text).input_ids for text in texts]
    for text, row in zip(texts, rows, strict=True):
        if len(row) > most:
            raise ConfigError(
                f"a prompt has {len(row)} tokens, CLIP reads {most}: {text[:60]!r}; shorten it"
            )
    ids = tokenizer(
        list(texts), padding="max_length", max_length=most, return_tensors="pt"
    ).input_ids.to(clip.device)
    out: Tensor = clip.text_projection(clip.text_model(input_ids=ids).pooler_output)
    return out


def _prompts(unsafe: Sequence[str], safe: Sequence[str]) -> list[str]:
    """Return all prompts, having checked them."""
    for kind, given in (("unsafe", unsafe), ("safe", safe)):
        if isinstance(given, str) or not given:
            raise ConfigError(
                f"the judge 'clip' needs a list of {kind} prompts, got {given!r}; give {kind}=[...]"
            )
    prompts = [*unsafe, *safe]
    if UNSAFE in prompts or len(set(prompts)) < len(prompts):
        raise ConfigError(
            f"the prompts of the judge 'clip' must differ from each other and from {UNSAFE!r}, got {prompts}"
        )
    return prompts
