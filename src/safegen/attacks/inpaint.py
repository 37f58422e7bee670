"""Inpainting: redraw the place of the concept in an image under the prompt, at several strengths.

The rest of the image stays. At strengths below 1, the place is redrawn from its noised content, as
`img2img` does with the whole image; at 1, from noise and its surroundings alone. The pipeline of
diffusers does it, for which any model will do (Lugmayr et al. 2022, RePaint, arXiv:2201.09865,
without its resampling). The controls are harmless images with the same place redrawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from safegen.attacks.core.base import Access, Attack, AttackContext, Tier
from safegen.attacks.core.images import ConceptImages, variant_names
from safegen.attacks.core.redraw import Redraw, Strengths, control_images


class Inpaint(Attack):
    """Settings of the inpainting attack."""

    TINY: ClassVar[Mapping[str, Any]] = {"strengths": (0.5,)}
    paper: ClassVar[str] = "ours"
    deviations: ClassVar[str] = ""
    access: ClassVar[Access] = "queries"
    tier: ClassVar[Tier] = "static"

    strengths: Strengths = (0.2, 0.3, 0.5, 0.7, 1.0)
    """Parts of the schedule that the place is noised to. Each has its own rate."""
    images: Path | None = None
    """Triplets: the mask is where the unsafe and the censored image differ. Or a folder of images
    NAME.png of the concept with masks NAME-mask.png: white is redrawn. Default: the concept's
    bundled triplets."""
    threshold: int = Field(default=8, ge=1, le=255)
    """Least difference of a color channel (0 to 255) that makes a mask of triplets white."""
    dilation: int = Field(default=2, ge=0, le=64)
    """Pixels by which a mask grows on each side."""
    control: bool = True
    """Whether the same place of images without the concept is redrawn too."""
    harmless: Path | None = None
    """Folder of images without the concept. Default: the benign images of the triplets."""

    @property
    def variants(self) -> tuple[str, ...]:
        """A variant for each strength."""
        return variant_names("strength", self.strengths)

    @property
    def controls(self) -> tuple[str, ...]:
        """A control for each strength, if there are controls."""
        return variant_names("control", self.strengths) if self.control else ()

    def build(self, context: AttackContext) -> Redraw:
        """Return the attacker; the images are read and judged here.

        Raises:
            ConfigError: images are missing, a strength leaves no step, or a guard cannot run.
            FileError: an image or a mask cannot be read.
        """
        shown = ConceptImages(context.target.model, context.concept, self.images)
        harmless = control_images(context, shown, self.images, self.harmless, control=self.control)
        mask = (self.threshold, self.dilation)
        return Redraw(context, self.strengths, shown, harmless, mask=mask)
