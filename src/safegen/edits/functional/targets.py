"""Settings of SafeGen's target: what the denoiser learns to predict on noised unsafe latents."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from safegen.core.settings import BaseSettings
from safegen.edits.functional.adversary import resolve_adversary


class PaperTarget(BaseSettings):
    """Target of the released code: the added noise plus the difference of the two latents."""

    name: Literal["paper"] = "paper"
    """Name of the target."""


class X0Target(BaseSettings):
    """Target that implies the censored image as x0 at every timestep (ours)."""

    name: Literal["x0"] = "x0"
    """Name of the target."""
    anchor: Literal["noise", "teacher"] = "teacher"
    """Prediction that is moved: the added noise, or the prediction of the original model."""
    clamp: float = Field(default=3.0, gt=0)
    """Maximum factor of the difference of the two latents."""


def _named(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


Target = Annotated[
    Annotated[X0Target | PaperTarget, Field(discriminator="name")], BeforeValidator(_named)
]
"""Type of the setting `target`: a name, or a table with a name and settings."""


def check_triplet_losses(edit: Any) -> None:
    """Check the settings of the losses on triplets.

    Raises:
        ValueError: one of them breaks a rule.
    """
    additive = not edit.adversary or resolve_adversary(edit.adversary).is_additive
    if edit.adversary_moves == "both" and not additive:
        raise ValueError(
            "adversary_moves must be unsafe for an adversary that replaces the text, got both. "
            "Use the adversary one-step, or leave adversary_moves out."
        )
    if not 0 <= edit.timesteps[0] < edit.timesteps[1]:
        raise ValueError(f"timesteps must be 0 <= first < last, got {edit.timesteps}")
    if edit.weight_mosaic + edit.weight_preserve <= 0:
        raise ValueError("weight_mosaic and weight_preserve must not both be 0")
