"""Latent re-attention, SAFREE's second half: damps features that the projected text strengthens.

From arXiv:2410.12761. The denoiser also predicts for the original prompt. Where the low frequencies
of a skip feature are stronger under the projected text, they are scaled down. The released script
skips this by mistake; here it follows the paper, by magnitude and with the phase kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.guards.core.result import InvalidResultError
from safegen.models.families.conditioning import Conditioning

SCALES = (0.9, 0.2)
"""s of the two greatest feature widths that skips join, 1280 and 640 in Stable Diffusion."""
ORIGINAL = "original"
SKIPS = "res_hidden_states_tuple"


class Reattention:
    """Re-attention during one call: its extra condition and its hooks on the up-blocks."""

    def __init__(self) -> None:
        self.original: Conditioning | None = None
        """Embeddings of the original prompts. None in steps without projection."""
        self.images: Sequence[int] = ()
        """Images with projected text in this step. Others differ by rounding only."""
        self.rows: Mapping[str, slice] = {}
        self.num_blocks = self.num_hooked = 0
        self.not_finite = set[int]()
        """Images to withhold: what they are compared with was not finite in some step."""

    def extra_conditions(self) -> Mapping[str, Conditioning]:
        """Return the embeddings of the original prompts."""
        return {} if self.original is None else {ORIGINAL: self.original}

    def set_rows(self, rows: Mapping[str, slice]) -> None:
        """Receive the denoiser rows of this step."""
        self.rows, self.num_hooked = rows, 0

    def submodule_hooks(self, network: nn.Module) -> Sequence[tuple[nn.Module, Callable[..., Any]]]:
        """Return the up-blocks with their pre-hook."""
        net: Any = network
        widths = sorted(set(net.config.block_out_channels), reverse=True)
        scales = dict(zip(widths, SCALES, strict=False))
        self.num_blocks = len(net.up_blocks)

        def damp_skips(
            block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self.original is None:
                return None
            if ORIGINAL not in self.rows:
                raise ConfigError(
                    "max_rows must be >= 3 per image for the guard 'safree' with reattend. "
                    "It compares rows of one batch."
                )
            self.num_hooked += 1
            skips = list(kwargs[SKIPS])
            for i, layer in enumerate(block.resnets, 1):  # the first layer joins the last skip
                width = layer.in_channels - skips[-i].shape[1]
                if width in scales:
                    skips[-i] = self._damped(skips[-i], scales[width])
            return args, kwargs | {SKIPS: tuple(skips)}

        return [(block, damp_skips) for block in net.up_blocks]

    def _damped(self, skip: Tensor, scale: float) -> Tensor:
        projected, original = (
            [self.rows[name].start + i for i in self.images] for name in ("cond", ORIGINAL)
        )
        damped = skip.clone()
        damped[projected] = reattend(
            skip[projected].float(), skip[original].float(), scale=scale
        ).to(skip)
        return damped

    def check(self, predictions: Mapping[str, Tensor]) -> None:
        """Check that every up-block was hooked in this step, beside finite features.

        Raises:
            InvalidResultError: a hook or the original prompts' prediction is missing.
        """
        if self.original is None:
            return
        if ORIGINAL not in predictions:
            raise InvalidResultError("the noise was not predicted for the original prompts")
        finite = predictions[ORIGINAL].flatten(1).isfinite().all(dim=1).tolist()
        self.not_finite |= {i for i in self.images if not finite[i]}
        if self.num_hooked != self.num_blocks:
            raise InvalidResultError(
                f"{self.num_hooked} of {self.num_blocks} up-blocks went through re-attention"
            )


def reattend(filtered: Tensor, original: Tensor, *, scale: float) -> Tensor:
    """Return features with the lowest frequencies damped that exceed the original's.

    F(filtered) <- s F(filtered) unless |F(filtered)| <= |F(original)|, in the 2 x 2 block about the
    middle of the shifted spectrum (constant and -1 along each axis), F the two-dimensional Fourier
    transform (Yoon et al. 2024, arXiv:2410.12761, latent re-attention). Real part.

    Args:
        filtered: (b, c, h, w), under the projected text.
        original: the same, under the original prompt.
        scale: s, in [0, 1].
    """
    f, o = (torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) for x in (filtered, original))
    h, w = (side // 2 for side in filtered.shape[-2:])
    block = (..., slice(max(h - 1, 0), h + 1), slice(max(w - 1, 0), w + 1))
    factor = torch.ones_like(filtered)
    factor[block] = torch.where(f[block].abs() <= o[block].abs(), 1.0, scale)
    return torch.fft.ifft2(torch.fft.ifftshift(f * factor, dim=(-2, -1))).real
