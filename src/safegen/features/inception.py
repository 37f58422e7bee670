"""Inception-v3 of the FID in plain torch: images to the 2048 features of its last pooling.

The FID uses TensorFlow's network of 2015-12-05 (1008 classes), not torchvision's: average pools
exclude the padding, and the last block has a maximum pool. The weights have the names of the port
that pytorch-fid and torch-fidelity read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from safegen.core.errors import ConfigError, FileError
from safegen.features.weights import load_weights, read_weights

SIDE, WIDTH, CLASSES, BATCH_SIZE = 299, 2048, 1008, 16

Step = tuple[str, int, tuple[int, int]]
"""Convolution: suffix of its name, channels, kernel."""
Branch = tuple[str, tuple[Step | tuple[Step, Step], ...]]
"""Branch: name and steps; a pair of steps has one input, and its outputs are concatenated."""


class Conv(nn.Module):
    """Convolution without bias, batch norm, ReLU; `same` padding unless `pad` is False."""

    def __init__(
        self, a: int, b: int, kernel: tuple[int, int], *, stride: int = 1, pad: bool = True
    ) -> None:
        """Build the network with random weights."""
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2) if pad else (0, 0)
        self.conv = nn.Conv2d(a, b, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(b, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """Return the activations."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Mixed(nn.Module):
    """Parallel branches and a pooled branch: average or maximum with a convolution, or `reduce`."""

    def __init__(
        self,
        a: int,
        branches: tuple[Branch, ...],
        *,
        pool: Literal["mean", "max", "reduce"],
        pooled: int = 0,
    ) -> None:
        """Build the network with random weights."""
        super().__init__()
        self._plan: list[list[tuple[str, ...]]] = []
        self._pool = pool
        self.channels = pooled or a
        for stem, steps in branches:
            plan, width = [], a
            for n, step in enumerate(steps):
                halve = pool == "reduce" and n == len(steps) - 1
                convolutions: tuple[Step, ...] = step if isinstance(step[0], tuple) else (step,)
                for end, b, kernel in convolutions:
                    self.add_module(
                        stem + end, Conv(width, b, kernel, stride=2 if halve else 1, pad=not halve)
                    )
                plan.append(tuple(stem + end for end, _, _ in convolutions))
                width = sum(b for _, b, _ in convolutions)
            self._plan.append(plan)
            self.channels += width
        if pooled:
            self.branch_pool = Conv(a, pooled, (1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the concatenated channels of the branches, the pooled branch last."""
        parts = []
        for plan in self._plan:
            y = x
            for names in plan:
                y = (
                    torch.cat([self.get_submodule(n)(y) for n in names], 1)
                    if len(names) > 1
                    else self.get_submodule(names[0])(y)
                )
            parts.append(y)
        if self._pool == "reduce":
            return torch.cat([*parts, F.max_pool2d(x, 3, 2)], 1)
        y = (
            F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
            if self._pool == "mean"
            else F.max_pool2d(x, 3, 1, 1)
        )
        return torch.cat([*parts, self.branch_pool(y)], 1)


def _a(width: int, pooled: int) -> Mixed:
    branches: tuple[Branch, ...] = (
        ("branch1x1", (("", 64, (1, 1)),)),
        ("branch5x5", (("_1", 48, (1, 1)), ("_2", 64, (5, 5)))),
        ("branch3x3dbl", (("_1", 64, (1, 1)), ("_2", 96, (3, 3)), ("_3", 96, (3, 3)))),
    )
    return Mixed(width, branches, pool="mean", pooled=pooled)


def _b(width: int) -> Mixed:
    double = (("_1", 64, (1, 1)), ("_2", 96, (3, 3)), ("_3", 96, (3, 3)))
    return Mixed(
        width, (("branch3x3", (("", 384, (3, 3)),)), ("branch3x3dbl", double)), pool="reduce"
    )


def _c(width: int, c: int) -> Mixed:
    single = (("_1", c, (1, 1)), ("_2", c, (1, 7)), ("_3", 192, (7, 1)))
    double = (
        ("_1", c, (1, 1)),
        ("_2", c, (7, 1)),
        ("_3", c, (1, 7)),
        ("_4", c, (7, 1)),
        ("_5", 192, (1, 7)),
    )
    return Mixed(
        width,
        (("branch1x1", (("", 192, (1, 1)),)), ("branch7x7", single), ("branch7x7dbl", double)),
        pool="mean",
        pooled=192,
    )


def _d(width: int) -> Mixed:
    long = (("_1", 192, (1, 1)), ("_2", 192, (1, 7)), ("_3", 192, (7, 1)), ("_4", 192, (3, 3)))
    return Mixed(
        width,
        (("branch3x3", (("_1", 192, (1, 1)), ("_2", 320, (3, 3)))), ("branch7x7x3", long)),
        pool="reduce",
    )


def _e(width: int, pool: Literal["mean", "max"]) -> Mixed:
    def fork(n: int) -> tuple[Step, Step]:
        return (f"_{n}a", 384, (1, 3)), (f"_{n}b", 384, (3, 1))

    branches: tuple[Branch, ...] = (
        ("branch1x1", (("", 320, (1, 1)),)),
        ("branch3x3", (("_1", 384, (1, 1)), fork(2))),
        ("branch3x3dbl", (("_1", 448, (1, 1)), ("_2", 384, (3, 3)), fork(3))),
    )
    return Mixed(width, branches, pool=pool, pooled=192)


class Trunk(nn.Module):
    """Inception network from images (b, 3, 299, 299) in [-1, 1] to features (b, 2048)."""

    def __init__(self) -> None:
        """Build the network with random weights."""
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, (3, 3), stride=2, pad=False)
        self.Conv2d_2a_3x3 = Conv(32, 32, (3, 3), pad=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, (3, 3))
        self.Conv2d_3b_1x1 = Conv(64, 80, (1, 1))
        self.Conv2d_4a_3x3 = Conv(80, 192, (3, 3), pad=False)
        mixed = {
            "5b": _a(192, 32),
            "5c": _a(256, 64),
            "5d": _a(288, 64),
            "6a": _b(288),
            "6b": _c(768, 128),
            "6c": _c(768, 160),
            "6d": _c(768, 160),
            "6e": _c(768, 192),
            "7a": _d(768),
            "7b": _e(1280, "mean"),
            "7c": _e(2048, "max"),
        }
        assert [m.channels for m in mixed.values()][-1] == WIDTH
        assert all(
            conv.conv.in_channels == before.channels
            for before, after in pairwise(mixed.values())
            for conv in _entries(after)
        )
        self._order = [f"Mixed_{k}" for k in mixed]
        for name, block in zip(self._order, mixed.values(), strict=True):
            self.add_module(name, block)

    def forward(self, x: Tensor) -> Tensor:
        """Return the pooled features."""
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (b, 64, 147, 147)
        x = F.max_pool2d(x, 3, 2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (b, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)
        for name in self._order:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def _entries(block: Mixed) -> list[Conv]:
    return [block.get_submodule(plan[0][0]) for plan in block._plan]  # type: ignore[misc]


def resize_tf1(pixels: NDArray[np.uint8]) -> Tensor:
    """Return (3, 299, 299) in 0..255 by TensorFlow 1's bilinear rule, as torch-fidelity does.

    Output pixel i reads input at i h / 299 (corners, not centers, are aligned at 0) without
    smoothing, so large images alias.
    """
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    for dim in (2, 1):
        n = x.shape[dim]
        position = torch.arange(SIDE, dtype=torch.float32) * torch.tensor(
            n / SIDE, dtype=torch.float32
        )
        low = position.long().clamp_max(n - 1)
        high, fraction = (low + 1).clamp_max(n - 1), position - low
        left, right = x.index_select(dim, low), x.index_select(dim, high)
        x = left + (right - left) * (fraction if dim == 2 else fraction[:, None])
    return x


def resize_torch(pixels: NDArray[np.uint8]) -> Tensor:
    """Return (3, 299, 299) in 0..255 by torch's bilinear rule, as pytorch-fid does."""
    x = torch.from_numpy(pixels.astype(np.float32)).permute(2, 0, 1)
    return F.interpolate(x[None], size=(SIDE, SIDE), mode="bilinear", align_corners=False)[0]


def resize_clean(pixels: NDArray[np.uint8]) -> Tensor:
    """Return (3, 299, 299) in 0..255 by Pillow's bicubic rule in floats (clean-fid).

    Parmar et al. 2022, arXiv:2104.11222.
    """
    planes = [
        Image.fromarray(pixels[..., c].astype(np.float32)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        for c in range(3)
    ]
    return torch.from_numpy(np.stack([np.asarray(p).clip(0, 255) for p in planes]))


def _scale_tf1(x: Tensor) -> Tensor:
    return (x - 128) / 128


def _scale_unit(x: Tensor) -> Tensor:
    return x / 127.5 - 1


RESIZES: dict[str, tuple[Callable[[NDArray[np.uint8]], Tensor], Callable[[Tensor], Tensor]]] = {
    "tf1": (resize_tf1, _scale_tf1),
    "torch": (resize_torch, _scale_unit),
    "clean": (resize_clean, _scale_tf1),
}
"""Resize and scale to about [-1, 1]. Features of different resizes are not comparable."""


class Inception:
    """Feature extractor of the FID.

    Its weights come from a local file: pt_inception-2015-12-05-6726825d.pth, or the same as
    safetensors.
    """

    width = WIDTH

    def __init__(
        self, *, weights: str | None = None, device: str = "cpu", resize: str = "tf1"
    ) -> None:
        """Load the weights.

        Args:
            weights: .safetensors or .pth file with the names of the TensorFlow port.
            device: a torch device.
            resize: `tf1` (torch-fidelity, torchmetrics), `torch` (pytorch-fid) or `clean`
                (clean-fid).

        Raises:
            ConfigError: no weights are given.
            FileError: the weights cannot be read, or are of another network.
        """
        if not weights:
            raise ConfigError(
                "the extractor 'inception' needs weights. "
                "Set weights to the file pt_inception-2015-12-05-6726825d.pth of pytorch-fid."
            )
        tensors, digest = read_weights(Path(weights))
        head = tensors.get("fc.weight")
        if head is None or head.shape[0] != CLASSES:
            got = "no fc.weight" if head is None else f"{head.shape[0]} classes"
            raise FileError(
                f"{weights} must be TensorFlow's Inception of 2015-12-05 with {CLASSES} classes, "
                f"got {got}. torchvision's Inception, with 1000 classes, gives other numbers."
            )
        self._net = Trunk()
        trunk = {k: v for k, v in tensors.items() if not k.startswith("fc.")}
        load_weights(self._net, trunk, source=Path(weights), what="the FID's Inception")
        self._net.to(device)
        self._device = torch.device(device)
        self._resize, self._scale = RESIZES[resize]
        self.id = f"inception:{digest}:{resize}"

    @torch.no_grad()
    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return the pooled features (n, 2048)."""
        rows = []
        for i in range(0, len(images), BATCH_SIZE):
            pixels = [
                self._resize(np.asarray(image.convert("RGB")))
                for image in images[i : i + BATCH_SIZE]
            ]
            rows.append(
                self._net(self._scale(torch.stack(pixels).to(self._device))).double().cpu().numpy()
            )
        return np.concatenate(rows) if rows else np.empty((0, WIDTH))


def inception_torch(**options: Any) -> Inception:
    """Return the extractor with pytorch-fid's resize."""
    return Inception(resize="torch", **options)


def inception_clean(**options: Any) -> Inception:
    """Return the extractor with clean-fid's resize."""
    return Inception(resize="clean", **options)
