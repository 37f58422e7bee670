"""The bundled miniature CLIP as a feature extractor."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPModel

from safegen.core.errors import ConfigError
from safegen.core.hashing import hash_tensors
from safegen.features.clip import embed_images, embed_texts, load_clip_network, load_clip_tokenizer
from safegen.mini import bundle

BATCH_SIZE = 64


class MiniClip:
    """CLIP model trained on the miniature world; images are scaled to 64x64 pixels."""

    def __init__(self, *, weights: str | None = None, device: str = "cpu") -> None:
        """Load the bundled weights.

        Raises:
            ConfigError: weights are given.
        """
        if weights is not None:
            raise ConfigError(
                f"the extractor 'mini-clip' has its own weights, got {weights!r}. "
                "Omit them, or use the extractor 'clip'."
            )
        self._net = load_clip_network(CLIPModel, bundle.clip_folder(), device=device)
        self.width = int(self._net.config.projection_dim)
        self.id = f"mini-clip:{hash_tensors(self._net.state_dict())}"

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return image embeddings (n, 64), not normalized."""
        batches = (images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE))
        return embed_images(self._net, [self._preprocess(b) for b in batches])

    def embed(self, pixels: Tensor) -> Tensor:
        """Return image embeddings (n, 64) with a gradient; see `DifferentiableExtractor`."""
        size = int(self._net.config.vision_config.image_size)
        small = F.interpolate(pixels.float().to(self._net.device), (size, size), mode="area")
        embeddings: Tensor = self._net.get_image_features(pixel_values=small).pooler_output
        return embeddings

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return text embeddings (n, 64), not normalized; long texts are truncated."""
        return embed_texts(self._net, load_clip_tokenizer(bundle.clip_folder()), texts)

    def _preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        size = int(self._net.config.vision_config.image_size)
        scaled = (i.convert("RGB").resize((size, size), Image.Resampling.BOX) for i in images)
        pixels = np.stack([np.asarray(i, np.float32) for i in scaled])
        return torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
