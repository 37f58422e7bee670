"""Plan of an evaluation: a batch of each kind of stack with few steps, extrapolated."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from PIL import Image

from safegen.core.generation import GenerationConfig
from safegen.evaluation.evaluate import Baselines, expand_baselines
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.judge import Evaluators, load_evaluators
from safegen.evaluation.samples import EvalSample
from safegen.stack import Stack
from safegen.stack_loader import LoadedStack, StackLoader
from safegen.workflows.plan.plan import Plan
from safegen.workflows.plan.probe import Measurement, measured

SLOW_STEP = 0.5
"""Seconds of one step of one image from which on larger batches are not tried."""
STEPS = (1, 5)
"""Denoising steps of the two measured batches."""


class _BatchCost(NamedTuple):
    """Cost of one batch of a stack."""

    seconds: float
    passes: int
    memory: int
    images: list[Image.Image]
    """Images of the probe."""


def plan_evaluation(
    protocol: Protocol,
    stacks: Sequence[Stack],
    *,
    base: Stack | None = None,
    baselines: Baselines = "all",
    loader: StackLoader | None = None,
) -> Plan:
    """Return what an evaluation will cost, from a probe with the same models.

    Args:
        protocol: what to generate and how to judge it.
        stacks: stacks to evaluate.
        base: stated base of all stacks.
        baselines: see `safegen.evaluation.evaluate.evaluate`.
        loader: loads the stacks; on the accelerator or the CPU if not given.

    Raises:
        UserError: see `safegen.evaluation.evaluate.evaluate`.
    """
    loader = loader or StackLoader()
    evaluators, samples = load_evaluators(protocol), protocol.samples()
    expanded = [entry.stack for entry in expand_baselines(protocol, stacks, baselines, base=base)]
    size = min(protocol.generation.batch_size, len(samples))
    known: dict[tuple[object, ...], _BatchCost] = {}
    seconds, passes, memory, judged, model = 0.0, 0, 0, None, ""
    for stack in expanded:
        # patches and negative prompts cost nothing while an image is generated
        kind = (stack.model, stack.config, stack.guards, stack.loras)
        if not stack.blank and kind not in known:
            with loader.open(stack) as loaded:
                model = model or loaded.model.describe()
                known[kind] = _batch_cost(loaded, samples[:size], protocol.generation)
        images = next(iter(known.values())).images if known else []
        judged = judged if judged is not None else _seconds_per_image(evaluators, images)
        seconds += len(samples) * judged
        if not stack.blank:
            cost, batches = known[kind], len(samples) / size
            seconds += batches * cost.seconds
            passes += math.ceil(batches * cost.passes)
            memory = max(memory, cost.memory)
    count = len(samples) * len(expanded)
    return Plan(
        title=f"evaluation of {len(expanded)} stacks with {len(samples):,} samples each",
        model=model,
        images=count,
        passes=passes,
        seconds=seconds,
        memory=memory,
        notes=("scores, hashes and the report are not counted",),
    )


def _batch_cost(
    loaded: LoadedStack, samples: Sequence[EvalSample], config: GenerationConfig
) -> _BatchCost:
    """Return the cost of one batch with all steps: linear in the steps, from two batches."""
    one, _ = _generate(loaded, samples[:1], config, 1)  # warms up too
    part = samples[:1] if one.seconds > SLOW_STEP * 4 else samples
    few, _ = _generate(loaded, part, config, STEPS[0])
    more, images = _generate(loaded, part, config, STEPS[1])
    scale, steps = len(samples) / len(part), config.num_inference_steps
    per_step = max(more.seconds - few.seconds, 0) / (STEPS[1] - STEPS[0])
    step_passes = (more.passes - few.passes) / (STEPS[1] - STEPS[0])
    growth = max(more.memory - more.before, 0) * (scale - 1)
    return _BatchCost(
        seconds=scale * (few.seconds + (steps - STEPS[0]) * per_step),
        passes=round(scale * (few.passes + (steps - STEPS[0]) * step_passes)),
        memory=round(more.memory + growth),
        images=images,
    )


def _generate(
    loaded: LoadedStack, samples: Sequence[EvalSample], config: GenerationConfig, steps: int
) -> tuple[Measurement, list[Image.Image]]:
    """Generate images with some steps, and return what they cost."""
    # an image that generation starts from would need more steps than the probe has
    plain = [sample.model_copy(update={"start": None}) for sample in samples]
    with measured(loaded.model) as cost:
        short = config.model_copy(update={"num_inference_steps": steps})
        images = loaded.generate_images(plain, short)
    return replace(cost), images


def _seconds_per_image(evaluators: Evaluators, images: Sequence[Image.Image]) -> float:
    """Return the seconds that the judge and the other networks take for an image."""
    import time

    if not images:
        return 0.0
    evaluators.judge.detect(images[:1])  # warms up
    began = time.perf_counter()
    evaluators.judge.detect(images)
    if evaluators.extractor:
        evaluators.extractor.features(images)
    return (time.perf_counter() - began) / len(images)
