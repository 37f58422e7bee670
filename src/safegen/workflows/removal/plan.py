"""Plan of a job: images, edit and check, from a short probe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from safegen.core.concept import Concept
from safegen.data.triplets.make import write_row
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import Edit
from safegen.models.model import Model
from safegen.stack import Stack
from safegen.stack_loader import StackLoader
from safegen.workflows.plan import Plan, plan_edit, plan_evaluation
from safegen.workflows.removal.check import CheckConfig, make_protocol
from safegen.workflows.removal.images import TrainingImages


def plan_job(
    edit: Edit,
    model: Model,
    base: Stack,
    concept: Concept,
    images: TrainingImages,
    check: CheckConfig,
    *,
    edited: int,
    loader: StackLoader,
) -> Plan:
    """Return what a job will cost, from a probe with the same model.

    Args:
        edit: settings of the edit.
        model: the model.
        base: the model as a stack.
        concept: the concept.
        images: where the training images come from.
        check: the check.
        edited: number of edited stacks in the check.
        loader: loads the stacks.

    Raises:
        UserError: see `plan_edit` and `plan_evaluation`.
    """
    with TemporaryDirectory() as folder:
        protocol = make_protocol(concept, check, Path(folder))
        one = plan_evaluation(protocol, [base], baselines="none", loader=loader)
    plan = _scale(one, 1 + edited, f"check of {edited} edited stack{'s' * (edited > 1)}")
    plan = replace(plan, images=one.images * (1 + edited))
    if edit.inputs == "words":
        return plan_edit(edit, model) + plan
    count = images.count()
    plan = plan_edit(edit, model, _placeholder_triplets(count, model.size)) + plan
    if not images.is_generated:
        return plan
    generated = _scale(one, 2 * count / one.images, f"{2 * count} training images")
    note = "more training images if the model seldom draws the concept"
    return replace(generated, images=2 * count, notes=(note,)) + plan


def _scale(plan: Plan, factor: float, title: str) -> Plan:
    return replace(
        plan, title=title, passes=round(plan.passes * factor), seconds=plan.seconds * factor
    )


def _placeholder_triplets(count: int, size: int) -> Triplets:
    """Return triplets of noise, as many as there will be."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 255, (size, size, 3), np.uint8)) for _ in range(3)]
    files: dict[str, bytes] = {}
    row = write_row(files.__setitem__, "0000", (noise[0], noise[1], noise[2]))
    return Triplets(Path(), (row,) * count, files)
