"""Fingerprints of models: what tells an edited model from its base without both in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from safegen.core.errors import ConfigError
from safegen.models.model import Model

PART_NAMES = {"tokenizers": "tokenizer", "empty_prompt": "model_index.json", "configs": "configs"}
"""Names of parts of `Model.pipeline_parts` in messages, where they differ."""


@dataclass(frozen=True)
class ModelFingerprint:
    """Architecture of a model and the hashes of its parts."""

    name: str
    family: str
    size: int
    shapes: Mapping[str, tuple[int, ...]]
    """Shape of each weight of the denoiser."""
    hash: str
    """`Model.hash`."""
    parts: Mapping[str, Any]
    """`Model.pipeline_parts`."""

    @classmethod
    def of(cls, model: Model) -> ModelFingerprint:
        """Return the fingerprint of a model without its patches."""
        shapes = {name: tuple(p.shape) for name, p in model.denoiser.named_parameters()}
        return cls(
            model.name, model.family, model.size, shapes, model.hash, dict(model.pipeline_parts)
        )

    def check_architecture(self, base: ModelFingerprint) -> None:
        """Check that a base has the architecture and the image size of this model.

        Raises:
            ConfigError: it has others.
        """
        for what, own, other in (
            ("family", self.family, base.family),
            ("image size", f"{self.size} px", f"{base.size} px"),
            ("number of weights", len(self.shapes), len(base.shapes)),
        ):
            if own != other:
                raise ConfigError(
                    f"the base of {self.name!r} must have its {what}, {own}, got {other} in "
                    f"{base.name!r}. Name the model that was edited"
                )
        for name, shape in self.shapes.items():
            if base.shapes.get(name) != shape:
                raise ConfigError(
                    f"the base of {self.name!r} must have its architecture, got {name} of shape "
                    f"{base.shapes.get(name)} in {base.name!r} for {shape}. "
                    "Name the model that was edited"
                )

    def differing_parts(self, base: ModelFingerprint) -> list[str]:
        """Return the parts besides the denoiser's weights in which this model differs from a base.

        The names are those of a diffusers folder: `vae`, `text_encoder`, `scheduler` ...
        """
        own, other = _flat(self.parts), _flat(base.parts)
        return sorted(
            {key for key in own.keys() | other.keys() if own.get(key) != other.get(key)}
            - {"unet", "transformer", "dtype"}
        )


def _flat(parts: Mapping[str, Any]) -> dict[str, Any]:
    """Return parts by name, with an entry for the weights of each component."""
    others = {PART_NAMES.get(key, key): v for key, v in parts.items() if key != "weights"}
    return others | dict(parts["weights"])
