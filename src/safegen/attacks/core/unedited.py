"""The model without the stack's patches and LoRAs, for attacks that compare the two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.model import Model
from safegen.models.patched_weights import component_of, pipeline_weights, restore
from safegen.patches.active_lora import disabled_loras


class UneditedModel:
    """Model with the weights that it had before its patches, and without active LoRAs."""

    def __init__(self, model: Model) -> None:
        """Note the values of the weights before the first patch on each."""
        self.model = model
        self.weights: dict[str, Tensor] = {}
        """Values before the patches, of the patched weights, by their names in patches."""
        for applied in model.applied_patches:
            for name, value in applied.before.items():
                self.weights.setdefault(name, value)
        self.denoiser = {n: v for n, v in self.weights.items() if component_of(n) is None}
        """Those of the denoiser."""

    @torch.no_grad()
    def predict(self, noisy: Tensor, timesteps: Tensor, text: Conditioning) -> Tensor:
        """Return the prediction (n, c, h, w) of the unedited denoiser.

        Args:
            noisy: noised latents (n, c, h, w).
            timesteps: (n,).
            text: what it is conditioned on, n rows.
        """
        with disabled_loras(self.model):
            return predict(self.model.denoiser, noisy, timesteps, text, self.denoiser)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put the old values into the model inside the block, for what needs no edit."""
        parameters = pipeline_weights(self.model.pipeline)
        edited = {name: parameters[name].detach().clone() for name in self.weights}
        try:
            with disabled_loras(self.model):
                self._write(self.weights)
                yield
        finally:
            self._write(edited)

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        parameters = pipeline_weights(self.model.pipeline)
        for name, value in values.items():
            restore(parameters[name], value)
