"""CLIP embeddings of pictures and texts, from weights on disk or (`hub:owner/name`) from the hub.

No torchvision.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from safegen.core.errors import ConfigError, FileError, first_line
from safegen.core.hub import HUB, fetch_snapshot
from safegen.core.logging import silence_libraries

MEAN = (0.48145466, 0.4578275, 0.40821073)
SPREAD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and deviation of the pixels CLIP was trained on (Radford et al.

2021), for checkpoints that do not say theirs.
"""
BATCH = 32
WANTED = ("*.json", "merges.txt", "model*.safetensors")
"""What is fetched from the hub: no pickles, no other frameworks' copies."""


class Clip:
    """Both towers of a CLIP model."""

    def __init__(self, *, weights: str | None = None, device: str = "cpu") -> None:
        """Load the towers.

        Args:
            weights: a folder in the layout of transformers (config.json, model.safetensors,
                tokenizer), or `hub:owner/name`.
            device: a torch device.

        Raises:
            ConfigError: no weights are named.
            FileError: they cannot be fetched or read.
        """
        if not weights:
            raise ConfigError(
                "the extractor 'clip' needs weights: name a folder with a CLIP model, or hub:openai/clip-vit-large-patch14"
            )
        folder = (
            fetch_snapshot(weights, allow_patterns=WANTED)
            if weights.startswith(HUB)
            else Path(weights)
        )
        self._net, digest = open_towers(folder, device)
        self._folder = folder
        self._side = int(self._net.config.vision_config.image_size)
        self._mean, self._spread = _normalisation(folder)
        self.width = int(self._net.config.projection_dim)
        self.id = f"clip:{digest}"

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return image embeddings (n, width), not scaled to length 1."""

        def pixels(part: Sequence[Image.Image]) -> Tensor:
            x = (
                torch.from_numpy(np.stack([crop(i, self._side) for i in part]))
                .permute(0, 3, 1, 2)
                .float()
                / 255
            )
            return (x - x.new_tensor(self._mean)[None, :, None, None]) / x.new_tensor(self._spread)[
                None, :, None, None
            ]

        return embed_images(
            self._net,
            [pixels(images[i : i + BATCH]) for i in range(0, len(images), BATCH)],
            self.width,
        )

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return text embeddings (n, width), not scaled to length 1; over-long texts are cut.

        Raises:
            FileError: the folder has no tokenizer.
        """
        return embed_texts(self._net, open_tokenizer(self._folder), texts, self.width)


def crop(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Return CLIP's view of a picture, (side, side, 3) in 0..255: shorter edge to `side` (bicubic, antialiased), then the middle."""
    w, h = image.size
    size = (side, int(side * h / w)) if w < h else (int(side * w / h), side)
    small = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC))
    top, left = (size[1] - side) // 2, (size[0] - side) // 2
    return small[top : top + side, left : left + side]


def open_towers(folder: Path, device: str) -> tuple[CLIPModel, str]:
    """Return the CLIP model of a folder in fp32, and the SHA-256 of its weights' bytes (files in the order of their names).

    Raises:
        FileError: the folder is no CLIP model with safetensors weights, or has NaN in them.
    """
    files = sorted(folder.glob("model*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise FileError(
            f"{folder} is not a CLIP model: it must be a folder with config.json and model.safetensors (no pickles)"
        )
    try:
        with silence_libraries("transformers"):
            net, facts = CLIPModel.from_pretrained(
                str(folder),
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise a dozen kinds; all mean that these files cannot be used
        raise FileError(f"the CLIP model {str(folder)!r} cannot be read: {first_line(error)}") from error
    if facts["missing_keys"]:
        raise FileError(
            f"{folder} does not hold a whole CLIP model: it lacks {min(facts['missing_keys'])}; get both towers"
        )
    for key, value in net.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FileError(
                f"the CLIP model {str(folder)!r} has NaN or infinite weights in {key}; get an undamaged copy"
            )
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return net.eval().requires_grad_(False).to(device), digest.hexdigest()


def open_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer of a folder.

    Raises:
        FileError: it has none.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileError(
            f"{folder} has no tokenizer: it must hold tokenizer.json, or vocab.json and merges.txt"
        )
    try:
        with silence_libraries("transformers"):
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # as above
        raise FileError(f"the tokenizer in {str(folder)!r} cannot be read: {first_line(error)}") from error


@torch.no_grad()
def embed_images(net: CLIPModel, batches: Sequence[Tensor], width: int) -> NDArray[np.float64]:
    """Return the projected embeddings of normalised pixels (b, 3, side, side), one row a picture.

    (0, width) for none.
    """
    rows = [
        net.get_image_features(pixel_values=b.to(net.device)).pooler_output.double().cpu().numpy()
        for b in batches
    ]
    return np.concatenate(rows) if rows else np.empty((0, width))


@torch.no_grad()
def embed_texts(
    net: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str], width: int
) -> NDArray[np.float64]:
    """Return the projected embeddings of texts, one row each; (0, width) for none."""
    rows, longest = [], int(net.config.text_config.max_position_embeddings)
    for i in range(0, len(texts), BATCH):
        part = tokenizer(
            list(texts[i : i + BATCH]),
            padding="max_length",
            max_length=longest,
            truncation=True,
            return_tensors="pt",
        )
        rows.append(
            net.get_text_features(**part.to(net.device)).pooler_output.double().cpu().numpy()
        )
    return np.concatenate(rows) if rows else np.empty((0, width))


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    path = folder / "preprocessor_config.json"
    if not path.is_file():
        return MEAN, SPREAD
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        mean, spread = (
            tuple(float(v) for v in facts.get(k, d))
            for k, d in (("image_mean", MEAN), ("image_std", SPREAD))
        )
    except (
        json.JSONDecodeError,
        UnicodeDecodeError,
        AttributeError,
        TypeError,
        ValueError,
    ) as error:
        raise FileError(f"{path} cannot be read: {error}") from error
    if len(mean) != 3 or len(spread) != 3 or not all(v > 0 for v in spread):
        raise FileError(
            f"{path} must give three means and three deviations > 0, got {mean} and {spread}"
        )
    return mean, spread
