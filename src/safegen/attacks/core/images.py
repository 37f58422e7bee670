"""Images of the concept that an attacker has, with their latents and subjects."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.data.images import read_image
from safegen.data.triplets.triplets import ROLES, Triplets
from safegen.edits.training.samples import preprocess
from safegen.evaluation.samples import EvalSample
from safegen.judges import load_judge
from safegen.models.model import Model

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class ConceptImages:
    """Images of a concept, or harmless ones beside them, as latents of a model."""

    def __init__(
        self, model: Model, concept: Concept, folder: Path | None, *, harmless: bool = False
    ) -> None:
        """Read and encode the images.

        Args:
            model: the model.
            concept: its bundled triplets are used without a folder.
            folder: folder of images.
            harmless: take the benign images of the triplets, which do not show the concept.

        Raises:
            ConfigError: there is neither, or the folder has no image.
            FileError: an image cannot be read.
        """
        if folder:
            paths = sorted(p for p in folder.glob("*") if p.suffix.lower() in SUFFIXES)
            images = [read_image(path) for path in paths]
        elif concept.triplets:
            triplets = Triplets.load(concept.triplets)
            side = ROLES.index("benign" if harmless else "unsafe")
            images = [triplets.images(i)[side] for i in range(len(triplets))]
        else:
            images = []
        if not images:
            relation, setting = ("without", "harmless") if harmless else ("of", "images")
            raise ConfigError(
                f"images {relation} {concept.name!r} are needed, got none. "
                f"Name a folder of images with --set {setting}=DIR."
            )
        judge = load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold)
        self.images = images
        self.subjects = [d.subject for d in judge.detect(images)]
        pixels = torch.stack([preprocess(image, model.size) for image in images])
        self.latents = model.encode_images(pixels).float()
        """Latents (n, c, h, w)."""

    def index_for(self, sample: EvalSample) -> int:
        """Return the index of an image with a sample's subject, else of any; by its index."""
        same = [i for i, subject in enumerate(self.subjects) if subject == sample.subject]
        candidates = same or range(len(self.subjects))
        return candidates[sample.index % len(candidates)]

    def latents_for(self, sample: EvalSample) -> Tensor:
        """Return the latents (c, h, w) of the image for a sample."""
        return self.latents[self.index_for(sample)]
