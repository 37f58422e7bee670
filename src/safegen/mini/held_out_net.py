"""Network of the miniature world's held-out judge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = ((32, 1), (64, 2), (112, 2))
"""Channels and blocks of each stage, at a resolution of 32, 16 and 8."""
GROUPS = 8


class HeldOutNet(nn.Module):
    """Residual classifier with pre-activation (arXiv:1603.05027) for images (b, 3, 64, 64).

    Pixels are in [-1, 1]. Unlike `JudgeNet` it predicts no boxes, normalizes by groups of channels
    (arXiv:1803.08494) and reads the mean and the maximum over all positions. Outputs: `labels`
    (b, labels) logits of what the whole image contains, and `object` (b, objects) logits.
    """

    def __init__(self, labels: int, objects: int) -> None:
        """Build the network with random weights."""
        super().__init__()
        width = STAGES[0][0]
        self.stem = nn.Conv2d(3, width, 5, 2, 2, bias=False)
        self.blocks = nn.Sequential()
        for channels, blocks in STAGES:
            for _ in range(blocks):
                self.blocks.append(ResidualBlock(width, channels))
                width = channels
        self.norm = nn.GroupNorm(GROUPS, width)
        self.labels = nn.Linear(2 * width, labels)
        self.object = nn.Linear(2 * width, objects)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (labels, object)."""
        features = F.silu(self.norm(self.blocks(self.stem(x))))
        pooled = torch.cat([features.mean((2, 3)), features.amax((2, 3))], dim=1)
        return self.labels(pooled), self.object(pooled)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions, each after GroupNorm and SiLU, added to the input.

    A block that changes the channels from `a` to `b` halves the resolution.
    """

    def __init__(self, a: int, b: int) -> None:
        """Build the block with random weights."""
        super().__init__()
        stride = 1 if a == b else 2
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, a), nn.GroupNorm(GROUPS, b)
        self.conv1 = nn.Conv2d(a, b, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(b, b, 3, 1, 1, bias=False)
        self.skip = None if a == b else nn.Conv2d(a, b, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        active = F.silu(self.norm1(x))
        skip = x if self.skip is None else self.skip(active)
        out: Tensor = skip + self.conv2(F.silu(self.norm2(self.conv1(active))))
        return out
