"""The miniature world's CLIP pair: features of pictures and prompts without a network or a download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.features.clip import embed_images, embed_texts, open_tokenizer, open_towers
from safegen.mini import bundle

BATCH = 64


class MiniClip:
    """The bundled CLIP pair, trained on pictures of the drawn world.

    Pictures are scaled to its 64x64 pixels.
    """

    def __init__(self, *, weights: str | None = None, device: str = "cpu") -> None:
        """Load the bundled weights.

        Raises:
            ConfigError: weights are named: it has its own.
        """
        if weights is not None:
            raise ConfigError(
                f"the extractor 'mini-clip' has its own weights; leave {weights!r} out, or name the extractor 'clip'"
            )
        self._net, digest = open_towers(bundle.clip_folder(), device)
        self._side = int(self._net.config.vision_config.image_size)
        self.width = int(self._net.config.projection_dim)
        self.id = f"mini-clip:{digest}"

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return image embeddings (n, 64), not scaled to length 1."""

        def pixels(part: Sequence[Image.Image]) -> Tensor:
            size = (self._side, self._side)
            planes = [
                np.asarray(i.convert("RGB").resize(size, Image.Resampling.BOX), np.float32)
                for i in part
            ]
            return torch.from_numpy(np.stack(planes)).permute(0, 3, 1, 2) / 127.5 - 1

        return embed_images(
            self._net,
            [pixels(images[i : i + BATCH]) for i in range(0, len(images), BATCH)],
            self.width,
        )

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return text embeddings (n, 64), not scaled to length 1; over-long texts are cut."""
        return embed_texts(
            self._net, open_tokenizer(bundle.pipeline_folder() / "tokenizer"), texts, self.width
        )
