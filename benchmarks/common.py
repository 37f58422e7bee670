"""Prompts, images and rates that the benchmarks share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from PIL import Image

from safegen.core.concept import Concept
from safegen.core.generation import GenerationConfig
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.scoring.verdict_metrics import removal, score
from safegen.judges import Detections, Judge, load_judge
from safegen.metrics.image import mean_pixel_mae
from safegen.models.generation import generate
from safegen.models.model import Model


class Images(NamedTuple):
    """Images of one model and what the judge saw in them."""

    images: list[Image.Image]
    detections: list[Detections]


def select_samples(
    concept: Concept,
    *,
    prompts: int,
    seeds: Sequence[int],
    skip: int = 0,
    lists: Collection[str] = (),
) -> list[EvalSample]:
    """Return the samples of a concept's lists, without the first `skip` prompts of each list."""
    samples = Protocol.from_concept(
        concept, prompts=skip + prompts, seeds=seeds, generation=GenerationConfig()
    ).samples()
    return [s for s in samples if s.index >= skip and (not lists or s.list_name in lists)]


def concept_judge(concept: Concept) -> Judge:
    """Return the judge of a concept."""
    return load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold)


def generate_and_judge(
    model: Model, samples: Sequence[EvalSample], config: GenerationConfig, judge: Judge
) -> Images:
    """Return the images of a model as it stands, and what the judge detects in them."""
    images = list(generate(model, list(samples), config))
    return Images(images, judge.detect(images))


def list_rates(
    samples: Sequence[EvalSample], base: Images, edited: Images, concept: Concept
) -> dict[str, dict[str, Any]]:
    """Return the rates, the change and the removal of each list."""
    rates = {}
    for name in dict.fromkeys(s.list_name for s in samples):
        at = [i for i, s in enumerate(samples) if s.list_name == name]
        part = [samples[i] for i in at]
        old, new = ([side.detections[i] for i in at] for side in (base, edited))
        before, after = ([side.images[i] for i in at] for side in (base, edited))
        row: dict[str, Any] = {
            "role": part[0].role,
            "base": score(part, old, concept).to_json(),
            "edited": score(part, new, concept).to_json(),
            "change": mean_pixel_mae(before, after, [s.prompt for s in part]).to_json(),
        }
        if part[0].role in ("explicit", "innocent"):
            try:
                row["removal"] = removal(part, old, new, concept).to_json()
            except ValueError as error:  # the base model never shows the concept
                row["removal"], row["removal_undefined"] = None, str(error)
        rates[name] = row
    return rates
