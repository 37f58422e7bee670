"""Latent re-attention, SAFREE's second half: what projected text brings back by the denoiser's features is damped (arXiv:2410.12761).

The denoiser is asked for the prompt as it was too. Where the low frequencies of a skip feature are
stronger under the projected text than under that, they are scaled down. The released script leaves
this out by a slip; here it is as the paper has it, by magnitude and with the phase kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import Text

SCALES = (0.9, 0.2)
"""s by the width of the features that a skip joins: the network's widest, then the next (1280 and 640 in Stable Diffusion); no others."""
ORIGINAL = "original"
SKIPS = "res_hidden_states_tuple"


class Reattention:
    """Re-attention during one call: the branch that it asks for, its hooks on the network's up-blocks, and the count of those."""

    def __init__(self) -> None:
        self.original: Text | None = None
        """The prompts' text as it was before it was projected.

        None in steps in which nothing is.
        """
        self.acts: Sequence[int] = ()
        """The pictures whose text is projected in this step.

        Equal rows differ by rounding, which must not be taken for strength.
        """
        self.rows: Mapping[str, slice] = {}
        self.wanted = self.went = 0

    def extra_conditions(self) -> Mapping[str, Text]:
        """Return the prompts as they were."""
        return {} if self.original is None else {ORIGINAL: self.original}

    def set_rows(self, rows: Mapping[str, slice]) -> None:
        """Take in the rows of this step."""
        self.rows, self.went = rows, 0

    def submodule_hooks(self, network: nn.Module) -> Sequence[tuple[nn.Module, Callable[..., Any]]]:
        """Return the up-blocks, and what is done before each."""
        net: Any = network
        scale = dict(
            zip(sorted(set(net.config.block_out_channels), reverse=True), SCALES, strict=False)
        )
        self.wanted = len(net.up_blocks)

        def before(
            block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
            if self.original is None:
                return None
            if ORIGINAL not in self.rows:
                raise ConfigError(
                    "the guard 'safree' compares rows of one batch to reattend; give max_rows >= 3 a picture, or leave it out"
                )
            self.went += 1
            skips = list(kwargs[SKIPS])
            for at, layer in enumerate(block.resnets, 1):  # the first layer joins the last skip
                own = skips[-at]
                width = layer.in_channels - own.shape[1]
                if width in scale:
                    now, before_it = (
                        [self.rows[name].start + i for i in self.acts]
                        for name in ("cond", ORIGINAL)
                    )
                    skips[-at] = own.clone()
                    skips[-at][now] = reattended(
                        own[now].float(), own[before_it].float(), scale=scale[width]
                    ).to(own)
            return args, kwargs | {SKIPS: tuple(skips)}

        return [(block, before) for block in net.up_blocks]

    def check(self) -> None:
        """See that every up-block went through in this step.

        Raises:
            RuntimeError: one did not: a hook is gone.
        """
        if self.original is not None and self.went != self.wanted:
            raise RuntimeError(f"{self.went} of {self.wanted} up-blocks went through re-attention")


def reattended(filtered: Tensor, original: Tensor, *, scale: float) -> Tensor:
    """Return features with those of their lowest frequencies damped that are stronger than in others.

    F(filtered) <- s F(filtered) where |F(filtered)| > |F(original)|, in the 2 x 2 block about the
    middle of the shifted spectrum (constant and -1 along each axis), F the two-dimensional Fourier
    transform (Yoon et al. 2024, arXiv:2410.12761, latent re-attention). Real part.

    Args:
        filtered: (b, c, h, w), under the projected text.
        original: the same, under the prompt as it was.
        scale: s, in [0, 1].
    """
    f, o = (torch.fft.fftshift(torch.fft.fft2(x), dim=(-2, -1)) for x in (filtered, original))
    h, w = (side // 2 for side in filtered.shape[-2:])
    block = (..., slice(max(h - 1, 0), h + 1), slice(max(w - 1, 0), w + 1))
    factor = torch.ones_like(filtered)
    factor[block] = torch.where(f[block].abs() > o[block].abs(), scale, 1.0)
    return torch.fft.ifft2(torch.fft.ifftshift(f * factor, dim=(-2, -1))).real
