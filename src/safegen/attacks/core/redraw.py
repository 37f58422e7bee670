"""Attacker that redraws images: every prompt starts from one, noised to several strengths."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from math import ceil
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from safegen.attacks.core.base import AttackContext, AttackRecord
from safegen.attacks.core.images import ConceptImages, image_name, variant_names
from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.evaluation.samples import EvalSample
from safegen.models.generation import PipelineKind

MAX_STRENGTHS = 100


def _check_strengths(strengths: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(variant_names("strength", strengths))) < len(strengths):
        raise ValueError(f"strengths must differ from each other, got {strengths}")
    return strengths


Strengths = Annotated[
    tuple[Annotated[float, Field(gt=0, le=1)], ...],
    Field(min_length=1, max_length=MAX_STRENGTHS),
    AfterValidator(_check_strengths),
]
"""Parts of the schedule that an image is noised to; each is a variant of the attack."""


class Redraw:
    """Starts every prompt from an image of its subject; it asks the stack nothing."""

    def __init__(
        self,
        context: AttackContext,
        strengths: Sequence[float],
        shown: ConceptImages,
        harmless: ConceptImages | None,
        *,
        mask: tuple[int, int] | None = None,
    ) -> None:
        """Check that the stack can start from an image.

        Args:
            context: the target, and the folder of the images.
            strengths: parts of the schedule that an image is noised to.
            shown: images of the concept.
            harmless: images without it, for the controls; None without controls.
            mask: least difference and growth of `mask_for`; None to redraw the whole image.

        Raises:
            ConfigError: a strength leaves no step, or a guard of the stack cannot run.
            FileError: an image has no mask.
        """
        self.context, self.strengths = context, strengths
        self.shown, self.harmless, self.mask = shown, harmless, mask
        steps = context.target.generation.num_inference_steps
        for strength in strengths:
            if int(strength * steps) < 1:
                raise ConfigError(
                    f"strengths must be at least 1 / {steps} steps, got {strength:g}. Use "
                    f"--steps {ceil(1 / strength)} or more, or a higher strength."
                )
        kind: PipelineKind = "image" if mask is None else "inpaint"
        context.target.loaded.check_kind(kind)
        if mask is not None:
            shown.check_masks()

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the record of each sample with each image at each strength."""
        return [record for sample in samples for record in self._records(sample)]

    def _records(self, sample: EvalSample) -> Iterator[AttackRecord]:
        mask = None
        if self.mask is not None:
            mask = self.shown.mask_for(sample, threshold=self.mask[0], dilation=self.mask[1])
        for prefix, images in (("strength", self.shown), ("control", self.harmless)):
            if images is None:
                continue
            image = images.image_for(sample)
            name = image_name(*((image,) if mask is None else (image, mask)))
            names = variant_names(prefix, self.strengths)
            for variant, strength in zip(names, self.strengths, strict=True):
                yield AttackRecord(
                    id=sample.id,
                    variant=variant,
                    prompt=sample.prompt,
                    seed=sample.seed,
                    start=self.context.start_from_image(name, image, strength=strength, mask=mask),
                )


def control_images(
    context: AttackContext,
    shown: ConceptImages,
    images: Path | None,
    harmless: Path | None,
    *,
    control: bool,
) -> ConceptImages | None:
    """Return the images without the concept: those of a folder, else the benign ones of triplets.

    Args:
        context: the target.
        shown: images of the concept.
        images: their source.
        harmless: folder of images without the concept.
        control: whether there are controls; None is returned if not.

    Raises:
        ConfigError: there is no such folder, and no triplets.
        FileError: an image cannot be read.

    Warns:
        UnusedSettingWarning: there is a folder, but no control.
    """
    if not control:
        if harmless is not None:
            message = "harmless has no effect with control=false"
            warnings.warn(message, UnusedSettingWarning, stacklevel=3)
        return None
    if harmless is None and not shown.has_twins:
        raise ConfigError(
            f"controls need images without {context.concept.name!r}, got none. Name a folder with "
            "--set harmless=DIR, or leave controls out with --set control=false."
        )
    source = harmless or images
    return ConceptImages(context.target.model, context.concept, source, harmless=True)
