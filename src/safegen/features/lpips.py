"""LPIPS with AlexNet: perceptual distance of two images; the weights come from local files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from safegen.core.errors import ConfigError, FileError
from safegen.features.weights import load_weights, read_weights

WIDTHS = (64, 192, 384, 256, 256)
"""Channels after each of the five convolutions of AlexNet."""
MIN_SIZE = 31
"""Least side in pixels for which the last convolution has an output."""
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""Mean and standard deviation of ImageNet for pixels in [-1, 1], as LPIPS rounds them."""


def layer_distance(a: Tensor, b: Tensor, head: Tensor) -> Tensor:
    """Return one layer's term, (b,): the spatial mean of sum_c head_c (a_c / |a| - b_c / |b|)^2.

    Zhang et al. 2018, arXiv:1801.03924, eq. 1, with the learned weights outside the square, as in
    the authors' code.

    Args:
        a: (b, c, h, w) activations of the first images.
        b: (b, c, h, w) activations of the second images.
        head: (c,) learned weights, >= 0.
    """

    def unit(x: Tensor) -> Tensor:
        return x / (x.pow(2).sum(1, keepdim=True).sqrt() + 1e-10)

    return ((unit(a) - unit(b)).pow(2) * head[None, :, None, None]).sum(1).mean((1, 2))


class AlexTrunk(nn.Module):
    """Convolutions of AlexNet under torchvision's names, from images to five activations."""

    def __init__(self) -> None:
        """Build the network with random weights."""
        super().__init__()

        def conv(a: int, b: int, kernel: int, stride: int = 1) -> list[nn.Module]:
            return [nn.Conv2d(a, b, kernel, stride, kernel // 2 if stride == 1 else 2), nn.ReLU()]

        self.features = nn.Sequential(
            *conv(3, 64, 11, 4),
            nn.MaxPool2d(3, 2),
            *conv(64, 192, 5),
            nn.MaxPool2d(3, 2),
            *conv(192, 384, 3),
            *conv(384, 256, 3),
            *conv(256, 256, 3),
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the activations after each ReLU, (b, 64 | 192 | 384 | 256 | 256, ., .)."""
        activations = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                activations.append(x)
        return activations


class Lpips:
    """LPIPS v0.1 with AlexNet; an edit without effect scores 0."""

    def __init__(
        self, *, trunk: str, heads: str, side: int | None = None, device: str = "cpu"
    ) -> None:
        """Load the weights.

        Args:
            trunk: file of torchvision's AlexNet (alexnet-owt-7be5be79.pth); the classifier is not
                used.
            heads: file of the five linear heads of the `lpips` package (alex.pth, with
                lin0.model.1.weight ...).
            side: size in pixels to which images are resized first (64 in ESD and RECE); None to
                keep their size.
            device: a torch device.

        Raises:
            FileError: a file is missing, or has other weights.
            ConfigError: `side` is too small for AlexNet.
        """
        if side is not None and side < MIN_SIZE:
            raise ConfigError(f"side must be at least {MIN_SIZE} for LPIPS, got {side}")
        tensors, trunk_hash = read_weights(Path(trunk))
        self._net = AlexTrunk()
        convolutions = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
        load_weights(self._net, convolutions, source=Path(trunk), what="AlexNet's convolutions")
        self._net.to(device)
        tensors, heads_hash = read_weights(Path(heads))
        self._heads = [_head(tensors, n, Path(heads)).to(device) for n in range(len(WIDTHS))]
        self.side, self._device = side, torch.device(device)
        self.id = f"lpips-alex:{trunk_hash}:{heads_hash}" + (f":side{side}" if side else "")

    @torch.no_grad()
    def distances(
        self, a: Sequence[Image.Image], b: Sequence[Image.Image], *, batch: int = 16
    ) -> NDArray[np.float64]:
        """Return the distance of each pair, (n,), >= 0; 0 for equal images.

        Raises:
            ConfigError: lengths differ, sizes differ within a pair, or an image is too small.
        """
        if len(a) != len(b):
            raise ConfigError(
                f"both lists of images must be equally long, got {len(a)} and {len(b)}"
            )
        distances = np.empty(len(a))
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if x.size != y.size or min(x.size) < MIN_SIZE:
                raise ConfigError(
                    f"images of pair {i} must have one size of at least {MIN_SIZE} pixels, "
                    f"got {x.size} and {y.size}"
                )
        for size in sorted({x.size for x in a}):  # batches of one size
            rows = [i for i, x in enumerate(a) if x.size == size]
            for start in range(0, len(rows), batch):
                part = rows[start : start + batch]
                pairs = self._pairs([a[i] for i in part], [b[i] for i in part])
                distances[part] = pairs.double().cpu().numpy()
        return distances

    def _pairs(self, a: list[Image.Image], b: list[Image.Image]) -> Tensor:
        x, y = self._net(self._pixels(a)), self._net(self._pixels(b))
        return torch.stack(
            [layer_distance(*layer) for layer in zip(x, y, self._heads, strict=True)]
        ).sum(0)

    def _pixels(self, images: list[Image.Image]) -> Tensor:
        x = (
            torch.from_numpy(np.stack([np.asarray(i.convert("RGB"), np.float32) for i in images]))
            .permute(0, 3, 1, 2)
            .to(self._device)
        )
        x = x / 127.5 - 1
        if self.side:
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        return (x - x.new_tensor(SHIFT)[None, :, None, None]) / x.new_tensor(SCALE)[
            None, :, None, None
        ]


def _head(tensors: dict[str, Tensor], n: int, source: Path) -> Tensor:
    key = f"lin{n}.model.1.weight"
    value = tensors.get(key)
    if value is None or value.numel() != WIDTHS[n]:
        got = "nothing" if value is None else tuple(value.shape)
        raise FileError(
            f"{source} has no LPIPS heads for AlexNet: "
            f"{key} must be (1, {WIDTHS[n]}, 1, 1), got {got}"
        )
    return value.float().flatten()
