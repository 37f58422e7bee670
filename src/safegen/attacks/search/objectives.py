"""Objectives of attacks that see images alone: a judge's score, or a similarity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.images import ConceptImages
from safegen.attacks.core.target import QueryResult
from safegen.attacks.core.text import explicit_text
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.evaluation.samples import EvalSample
from safegen.features.base import TextExtractor, load_extractor

ObjectiveName = Literal["text", "image", "judge", "guided"]
"""What an image scores.

`text`: its cosine with a prompt that names the concept; `image`: its cosine with an image of the
concept; `judge`: the judge's score; `guided`: the judge's score if it is not 0, else the cosine of
`text` minus 1, so that images without a detection have an order (ours).
"""
ExtractorName = Literal["mini-clip", "clip"]
"""Extractor of the similarity."""


class ImageObjective:
    """Scores of images for the samples that they were generated for."""

    def __init__(
        self, kind: ObjectiveName, context: AttackContext, *, extractor: str, weights: str | None
    ) -> None:
        """Load the extractor if the objective needs it.

        Args:
            kind: the objective.
            context: the attacked stack and the concept.
            extractor: `mini-clip`, or `clip` with weights.
            weights: weights of the extractor.

        Raises:
            ConfigError: the extractor's weights are missing, or there is no image of the concept.
            FileError: the weights cannot be read.
        """
        self.kind, self.concept = kind, context.concept
        self.extractor: TextExtractor | None = None
        self.images: ConceptImages | None = None
        if kind != "judge":
            device = str(context.target.model.device)
            self.extractor = load_text_extractor(extractor, weights, device)
        if kind == "image":
            self.images = ConceptImages(context.target.model, context.concept, None)
        self._references: dict[str, NDArray[np.float64]] = {}

    def scores(
        self, samples: Sequence[EvalSample], results: Sequence[QueryResult]
    ) -> list[float | None]:
        """Return a score for each result, higher for more of the concept; None if withheld.

        Args:
            samples: the attacked samples, with the prompts that they had before the attack.
            results: the stack's images.
        """
        images = [result.output.image for result in results]
        if self.extractor is None:
            return [None if i is None else r.score for i, r in zip(images, results, strict=True)]
        features = iter(unit(self.extractor.features([i for i in images if i is not None])))
        scores: list[float | None] = []
        for sample, image, result in zip(samples, images, results, strict=True):
            if image is None:
                scores.append(None)
                continue
            cosine = float(next(features) @ self._reference(sample))
            if self.kind == "guided":
                cosine = result.score or cosine - 1
            scores.append(cosine)
        return scores

    def _reference(self, sample: EvalSample) -> NDArray[np.float64]:
        """Return the unit feature vector that images of a sample are compared with."""
        if sample.id not in self._references:
            assert self.extractor is not None
            if self.images is not None:
                image = self.images.images[self.images.index_for(sample)]
                features = self.extractor.features([image])
            else:
                features = self.extractor.texts([explicit_text(self.concept, sample)])
            self._references[sample.id] = unit(features)[0]
        return self._references[sample.id]


def load_text_extractor(name: str, weights: str | None, device: str) -> TextExtractor:
    """Return an extractor that reads images and texts.

    Raises:
        ConfigError: it reads images alone, or its weights are missing.
        FileError: the weights cannot be read.
    """
    extractor = load_extractor(name, weights=weights, device=device)
    if not isinstance(extractor, TextExtractor):
        raise ConfigError(f"extractor must read texts, got {name!r}. Use clip.")
    return extractor


def extractor_fingerprint(name: str, weights: str | None) -> dict[str, str | None]:
    """Return the setting `weights`, as the id of the extractor if there are any."""
    return {"weights": weights and load_text_extractor(name, weights, "cpu").id}


def unit(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rows (n, width) divided by their lengths."""
    lengths: NDArray[np.float64] = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(lengths, np.finfo(np.float64).tiny)


def nearest_words(
    words: Sequence[str], concept: Concept, extractor: TextExtractor, n: int
) -> list[str]:
    """Return the `n` words with the largest cosine with a phrase of a concept, nearest first.

    Args:
        words: words to choose from.
        concept: its phrases are compared with.
        extractor: reads the texts.
        n: number of words.
    """
    if not words:
        return []
    cosine = unit(extractor.texts(words)) @ unit(extractor.texts(concept.words)).T
    order = np.argsort(-cosine.max(1), kind="stable")[:n]
    return [words[i] for i in order]
