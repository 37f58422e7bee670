"""Plan of an edit: a few of its updates, or a solution with few captions, extrapolated."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safegen.core.errors import SafegenWarning
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import ClosedFormEdit, Edit, TrainedEdit
from safegen.edits.safegen_plus import SafeGenPlus
from safegen.edits.training.samples import read_captions
from safegen.models.model import Model
from safegen.workflows.plan.memory import training_bytes
from safegen.workflows.plan.plan import Plan
from safegen.workflows.plan.probe import PROBE_SECONDS, Measurement, measured, synchronize

SLOW_UPDATE = 4.0
"""Seconds of an update of one sample from which on larger batches are not tried."""
UNITS = (2, 6)
"""Numbers of triplets, or of images that are generated before a training, in two probes."""
FEW_CAPTIONS = (8, 24)
"""Numbers of captions with which a closed form is solved in the probe."""


class _ProbeEndedError(Exception):
    """The time of the probe is over."""


@dataclass
class _TrainingProbe(Measurement):
    """Measured part of a training."""

    setup: float = 0.0
    """Seconds before the first update."""
    setup_passes: int = 0
    """Passes before the first update."""
    update: float = 0.0
    """Seconds of an update, without the first, which warms up."""
    update_passes: float = 0.0
    """Passes of an update."""


def plan_edit(config: Edit, model: Model, triplets: Triplets | None = None) -> Plan:
    """Return what an edit will cost, from a probe with the same model.

    The model is not changed. A training may end before its last update (`patience`, `target`).

    Args:
        config: settings of the edit.
        model: the model.
        triplets: training images, for an edit that learns from them.

    Raises:
        UserError: see `Edit.apply`.
    """
    if isinstance(config, SafeGenPlus):
        plan = plan_edit(config.build_safegen(), model, triplets)
        closed_form = config.build_closed_form()
        plan = plan + plan_edit(closed_form, model) if closed_form else plan
        return replace(plan, title=_title(config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SafegenWarning)
        if isinstance(config, TrainedEdit):
            return _plan_training(config, model, triplets)
        assert isinstance(config, ClosedFormEdit)
        return _plan_closed_form(config, model)


def _title(config: Edit) -> str:
    if not isinstance(config, TrainedEdit):
        return f"{config.method()}, a closed form"
    training = config.training
    return (
        f"{config.method()}, {training.updates:,} updates of {training.batch} x "
        f"{training.accumulation} samples"
    )


def _plan_training(config: TrainedEdit, model: Model, triplets: Triplets | None) -> Plan:
    """Return the plan of a training: its preparation, and updates by the mean of some of them."""
    n, updates = len(triplets or ()), config.training.updates
    prepared = getattr(config, config.prepares) if config.prepares else 0
    with _few_captions(config, FEW_CAPTIONS[0]) as (probe, captions):
        small = large = _train(probe, model, triplets, batch=1, units=UNITS[0], updates=2)
        batch, slow = 1, small.update > SLOW_UPDATE
        if not slow:
            batch = _largest_batch(config, small.update)
            small = _train(probe, model, triplets, batch=batch, units=UNITS[0], updates=3)
            more = max(3, min(24, int(PROBE_SECONDS / small.update)))
            large = _train(probe, model, triplets, batch=batch, units=UNITS[1], updates=more)
    (tried, ratio), between = config.probe(batch), UNITS[1] - UNITS[0]
    units = max(n, prepared) - UNITS[0]
    setup = small.setup + captions * _text_seconds(model)
    setup_passes: float = small.setup_passes
    if units > 0 and slow:
        setup += units * 3 * _encoding_seconds(model) if n else 0.0
    elif units > 0:
        setup += units * max(large.setup - small.setup, 0) / between
        setup_passes += units * (large.setup_passes - small.setup_passes) / between
    growth = config.training.batch / tried.training.batch - 1
    activations = max(large.memory - large.before - training_bytes(config, model), 0)
    notes = []
    if growth:
        notes.append(f"a batch is scaled from one of {tried.training.batch}, in time and memory")
    if slow and prepared:
        notes.append(f"{prepared} images that are generated before the training are not counted")
    if config.training.patience or isinstance(getattr(config, "target", None), float):
        notes.append("the training may end early; this is the cost of all updates")
    return Plan(
        title=_title(config),
        model=model.describe(),
        images=prepared,
        passes=round(setup_passes + large.update_passes * ratio * updates),
        seconds=setup + updates * ratio * large.update,
        memory=round(large.memory + growth * activations + 9 * n * model.size**2 * 4),
        notes=tuple(notes),
    )


def _largest_batch(config: TrainedEdit, seconds: float) -> int:
    """Return the largest batch, halved from the edit's, with an update that fits the probe.

    Args:
        config: the edit.
        seconds: time of an update of a batch of one.
    """
    batch, whole = config.training.batch, config.probe(1)[1]
    while batch > 1 and seconds * whole / config.probe(batch)[1] > PROBE_SECONDS:
        batch //= 2
    return batch


def _train(
    config: TrainedEdit,
    model: Model,
    triplets: Triplets | None,
    *,
    batch: int,
    units: int,
    updates: int,
) -> _TrainingProbe:
    """Run the first updates of a training and return what they cost.

    Args:
        config: the edit.
        model: the model.
        triplets: training images.
        batch: samples of a forward pass.
        units: number of triplets, and of images that are generated before the training.
        updates: number of updates, fewer if the time of the probe is over.
    """
    few = None if triplets is None else replace(triplets, rows=triplets.rows[:units])
    probe, _ = config.probe(batch)
    changes = {"updates": updates, "warmup": 0, "validate_every": 0, "patience": 0}
    training = probe.training.model_copy(update=changes)
    own = {probe.prepares: units} if probe.prepares else {}
    probe = probe.model_copy(update={"training": training, **own})
    times: list[float] = []
    passes: list[int] = []

    def follow(done: int, total: int, row: Any) -> None:
        synchronize(model.device)
        times.append(time.perf_counter())
        passes.append(cost.passes)
        if times[-1] - began > PROBE_SECONDS and len(times) > 1:
            raise _ProbeEndedError

    _ = model.hash  # is taken once, and not by the edit alone
    with measured(model) as cost:
        began = time.perf_counter()
        with suppress(_ProbeEndedError):
            probe.apply(model, few, callback=follow)
    result = _TrainingProbe(**vars(cost))
    result.update = (times[-1] - times[0]) / (len(times) - 1)
    result.update_passes = (passes[-1] - passes[0]) / (len(times) - 1)
    result.setup = max(times[0] - began - result.update, 0.0)
    result.setup_passes = max(passes[0] - round(result.update_passes), 0)
    return result


@contextmanager
def _few_captions(config: Any, n: int) -> Iterator[tuple[Any, int]]:
    """Yield an edit with its first captions only, and the number of those left out."""
    captions = read_captions(getattr(config, "captions", ()))
    if len(captions) <= n or config.method() == "shielddiff":
        yield config, 0
        return
    with TemporaryDirectory() as folder:
        path = Path(folder) / "captions.txt"
        path.write_text("\n".join(captions[:n]) + "\n", encoding="utf-8")
        yield config.model_copy(update={"captions": (str(path),)}), len(captions) - n


def _text_seconds(model: Model) -> float:
    """Return the seconds that the text encoder takes for one text of a batch."""
    texts = ["a photo of a cat"] * FEW_CAPTIONS[0]
    model.encode_text(texts)
    with measured(model) as cost:
        model.encode_text(texts)
    return cost.seconds / len(texts)


def _encoding_seconds(model: Model) -> float:
    """Return the seconds that the autoencoder takes for one image."""
    import torch

    pixels = torch.zeros(1, 3, model.size, model.size)
    model.encode_images(pixels)
    with measured(model) as cost:
        model.encode_images(pixels)
    return cost.seconds


def _plan_closed_form(config: ClosedFormEdit, model: Model) -> Plan:
    """Return the plan of a closed form: its time is linear in the number of captions.

    One that takes less than the time of a probe is solved as a whole.
    """
    _ = model.hash
    model.encode_text([""])  # warms up
    first = _solve(config, model, FEW_CAPTIONS[0])
    last = _solve(config, model, FEW_CAPTIONS[1])
    total, between = len(read_captions(getattr(config, "captions", ()))), FEW_CAPTIONS[1]
    rest = max(total - between, 0) / (between - FEW_CAPTIONS[0])
    seconds = last.seconds + rest * max(last.seconds - first.seconds, 0.0)
    memory = last.memory + rest * max(last.memory - first.memory, 0)
    if seconds < PROBE_SECONDS / 2:
        whole = _solve(config, model, total)
        seconds, memory = whole.seconds, whole.memory
    return Plan(
        title=_title(config),
        model=model.describe(),
        images=0,
        passes=0,
        seconds=seconds,
        memory=round(memory),
    )


def _solve(config: ClosedFormEdit, model: Model, captions: int) -> Measurement:
    """Solve a closed form with its first captions, and return what that costs."""
    with _few_captions(config, captions) as (probe, _), measured(model) as cost:
        probe.apply(model)
    return cost
