"""The model without the stack's patches and LoRAs, for attacks that compare the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from safegen.models.conditioning import Conditioning
from safegen.models.denoisers import predict
from safegen.models.model import Model
from safegen.models.patched_weights import component_of
from safegen.patches.active_lora import disabled_loras


class UneditedDenoiser:
    """Denoiser with the weights that it had before its patches, and without active LoRAs."""

    def __init__(self, model: Model) -> None:
        """Note the values of the denoiser's weights before the first patch on each."""
        self.model = model
        self.weights: dict[str, Tensor] = {}
        """Values before the patches, of the patched weights of the denoiser."""
        for applied in model.applied_patches:
            for name, value in applied.before.items():
                if component_of(name) is None:
                    self.weights.setdefault(name, value)

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """Return the prediction (n, c, h, w) of the unedited denoiser.

        Args:
            noisy: noised latents (n, c, h, w).
            timesteps: (n,).
            text: what it is conditioned on, n rows.
        """
        with disabled_loras(self.model):
            return predict(self.model.denoiser, noisy, timesteps, text, self.weights)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Take patches, those of text encoders too, and LoRAs off the model inside the block."""
        with disabled_loras(self.model), self.model.without_patches():
            yield
