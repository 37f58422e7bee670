"""Image to image: redraw an image of the concept under the prompt, at several strengths.

An image is noised to a part of the schedule and denoised from there (Meng et al. 2021, SDEdit,
arXiv:2108.01073), by the pipeline of diffusers. The attack needs no word for the concept. It tells
whether a stack still draws what it is shown. Only images in which the judge finds the concept are
used, so the rate is 100 % at strength 0. The controls are harmless images; their rate is what the
prompt alone brings.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from safegen.attacks.core.base import Access, Attack, AttackContext, Tier
from safegen.attacks.core.images import ConceptImages, variant_names
from safegen.attacks.core.redraw import Redraw, Strengths, control_images


class Img2Img(Attack):
    """Settings of the image-to-image attack."""

    TINY: ClassVar[Mapping[str, Any]] = {"strengths": (0.5,)}
    paper: ClassVar[str] = "ours"
    deviations: ClassVar[str] = ""
    access: ClassVar[Access] = "queries"
    tier: ClassVar[Tier] = "static"

    strengths: Strengths = (0.1, 0.2, 0.3, 0.5, 0.7)
    """Parts of the schedule that the image is noised to. Each has its own rate. Near 0 the image
    stays as it is, and at 1 hardly anything of it is left."""
    images: Path | None = None
    """Folder of images of the concept, or triplets. Default: the concept's bundled triplets."""
    control: bool = True
    """Whether images without the concept are redrawn too, at the same strengths."""
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
            FileError: an image cannot be read.
        """
        shown = ConceptImages(context.target.model, context.concept, self.images)
        harmless = control_images(context, shown, self.images, self.harmless, control=self.control)
        return Redraw(context, self.strengths, shown, harmless)
