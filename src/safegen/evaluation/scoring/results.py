"""Results of a run in the order of its samples, read from its journals alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safegen.core.errors import ConfigError, FileError
from safegen.core.registry import expand_labels
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.attack_records import AttackRun, Cost, read_attack
from safegen.evaluation.run.folder import ATTACK, JUDGES, PLAN, TRUTH, Run
from safegen.evaluation.run.journal import to_line, to_lines
from safegen.evaluation.run.records import StackEntry
from safegen.evaluation.run.truth import TruthRecord, own_truth
from safegen.evaluation.samples import EvalSample, sha
from safegen.evaluation.schema import FROM_FEATURES, FROM_IMAGES
from safegen.evaluation.scoring.journals import Journals, read_by_judge
from safegen.evaluation.shards import check_whole
from safegen.judges.base import Detections
from safegen.judges.batching import resolve_labels


@dataclass(frozen=True)
class StackResults:
    """Results of one stack, one per sample. A list is empty if the protocol does not need it."""

    entry: StackEntry
    blank: list[bool]
    """Whether each image has one color, as a refused one has."""
    detections: list[Detections]
    changes: list[float]
    lpips: list[float | None]
    features: list[NDArray[np.float64] | None]
    """Features (width,) of each image; None if they are not finite."""
    clip: list[float | None]
    """100 times the cosine with the prompt; None if it is not finite."""
    truth: list[bool | None]
    """Whether each image shows the concept; None if unknown."""


@dataclass(frozen=True)
class RunResults:
    """Results of a run under one rule of judging."""

    protocol: Protocol
    """The run's protocol, with the judge's rule that is applied."""
    judge: str
    """Id of the judge."""
    samples: list[EvalSample]
    """Samples of one stack."""
    stacks: dict[str, StackResults]
    """Results by the name of the stack."""
    label_space: Collection[str]
    """Every label that the judge can detect."""
    weights: dict[str, str]
    """Ids of the other networks: `extractor` and `lpips`."""
    inputs: dict[str, str]
    """SHA-256 over the records that the results rest on, by the name of the journal."""
    attack: AttackRun | None = None
    """Attack that the run made; None if it made none."""

    def base(self, name: str) -> StackResults:
        """Return the results of the base model of a stack."""
        return self.stacks[self.stacks[name].entry.baseline]


def load_results(
    run: Run,
    *,
    judge: str | None = None,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    truth: Mapping[str, bool] | None = None,
) -> RunResults:
    """Return the results of a run, under the protocol's judge, labels and threshold or others.

    Args:
        run: a complete run.
        judge: name or id of a judge with detections in the run.
        labels: labels that mean the concept.
        threshold: lowest score of a detection that counts.
        truth: whether images show the concept, by key. Default: what the run's directory holds.

    Raises:
        FileError: the run is incomplete or a shard, or a journal is damaged.
        ConfigError: the threshold is below the stored scores, or another judge has no labels.
        UnknownNameError: the judge has no such label.
    """
    check_whole(run)
    places = _check_plan(run)
    rule = run.protocol.judge
    name = (judge or rule.name).partition(":")[0]
    if name != rule.name and not labels:
        raise ConfigError(
            f"the judge {name!r} has labels of its own. "
            f"Choose those that mean {run.protocol.concept} with --label"
        )
    detections = read_by_judge(run, places)
    judges = run.describe_judges(detections)
    options = None if judge else rule.public_options
    judge_id = run.judge(judge or name, options=options, judges=judges)
    record = judges[judge_id]
    protocol = run.protocol.with_judge(
        name=name, labels=labels, threshold=threshold, options=record.options
    )
    resolve_labels(name, expand_labels(protocol.judge.labels), record.label_space, ())
    truth = own_truth(run) if truth is None else truth
    attack = read_attack(run)
    journals = Journals(run, places, judge_id, detections.pop(judge_id))
    stacks = {
        entry.name: _stack_results(run, entry, protocol, journals, truth) for entry in run.stacks
    }
    inputs = {JUDGES: sha(to_line(record)), **journals.digests()}
    if attack:  # its seconds decide nothing
        records = [r.model_copy(update={"cost": Cost()}) for r in attack.records]
        inputs[ATTACK] = sha(to_lines(records))
    if known := sorted(places.keys() & truth.keys()):
        inputs[TRUTH] = sha(to_lines(TruthRecord(key=key, shows=truth[key]) for key in known))
    return RunResults(
        protocol=protocol,
        judge=judge_id,
        samples=run.samples,
        stacks=stacks,
        label_space=record.label_space,
        weights=journals.weights(),
        inputs=inputs,
        attack=attack,
    )


def _check_plan(run: Run) -> dict[str, int]:
    """Return the place of every image of a run by its key: stack by stack, sample by sample.

    Raises:
        FileError: a list has no images, or the plan has an image twice: it would count twice.
    """
    counts = Counter(sample.list_name for sample in run.samples)
    names = {(s.list_name, s.id, s.seed, s.index) for s in run.samples}
    keys = [key for entry in run.stacks for key in run.keys(entry)]
    places = {key: place for place, key in enumerate(keys)}
    is_unique = len(names) == len(run.samples) and len(places) == len(keys)
    if set(counts) != {part.name for part in run.protocol.lists} or not is_unique:
        raise FileError(
            f"{run.folder / PLAN} must have each image of the protocol's lists once. "
            f"Check the run with `safegen verify {run.folder}`."
        )
    return places


def _stack_results(
    run: Run, entry: StackEntry, protocol: Protocol, journals: Journals, truth: Mapping[str, bool]
) -> StackResults:
    """Return the results of a stack.

    Raises:
        FileError: some records are missing.
    """
    keys, metrics = run.keys(entry), set(protocol.metrics)
    samples = journals.samples.of(entry)
    detections = journals.detections.of(entry)
    has_changes = entry.kind != "base" and metrics & set(FROM_IMAGES)
    changes = journals.changes.of(entry) if has_changes else []
    features = journals.features.of(entry) if metrics & set(FROM_FEATURES) else []
    return StackResults(
        entry=entry,
        blank=[blank for blank, _ in samples],
        detections=[
            seen if failure is None else Detections((), unjudged=failure)
            for seen, (_, failure) in zip(detections, samples, strict=True)
        ],
        changes=[change for change, _ in changes],
        lpips=[lpips for _, lpips in changes] if "lpips" in metrics else [],
        features=[array for array, _ in features],
        clip=[score for _, score in features] if "clip_score" in metrics else [],
        truth=[truth.get(key) for key in keys],
    )
