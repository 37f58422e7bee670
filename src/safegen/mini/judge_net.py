"""Network of the miniature judge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class JudgeNet(nn.Module):
    """Detector in the style of CenterNet (arXiv:1904.07850) for images (b, 3, 64, 64) in [-1, 1].

    Outputs, on a 16x16 grid of 4-pixel cells: `heat` (b, labels, 16, 16) logits, `size`
    (b, 2, 16, 16) box width and height in pixels over 16, and `object` (b, objects) logits.
    """

    def __init__(self, labels: int, objects: int) -> None:
        """Build the network with random weights."""
        super().__init__()

        def block(a: int, b: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)
            )

        self.fine = nn.Sequential(
            block(3, 24, 2), block(24, 32), block(32, 64, 2), block(64, 64), block(64, 64)
        )
        self.coarse = nn.Sequential(block(64, 96, 2), block(96, 96), block(96, 96))
        self.join = block(64 + 96, 96)
        self.heat = nn.Conv2d(96, labels, 1)
        self.size = nn.Conv2d(96, 2, 1)
        self.top = nn.Sequential(block(96, 128, 2), block(128, 128))
        self.object = nn.Linear(128 * 16, objects)
        nn.init.constant_(self.heat.bias, -4.0)  # type: ignore[arg-type]  # marks are rare

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return (heat, size, object)."""
        fine = self.fine(x)
        coarse = self.coarse(fine)
        joined = self.join(torch.cat([fine, F.interpolate(coarse, scale_factor=2.0)], dim=1))
        return self.heat(joined), self.size(joined), self.object(self.top(coarse).flatten(1))
