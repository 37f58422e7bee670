"""Results of a run in the order of its samples, read from its journals alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from safegen.core.errors import ConfigError, FileError
from safegen.core.registry import expand_labels
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.attack_records import AttackRun, Cost, read_attack
from safegen.evaluation.run.folder import (
    ATTACK,
    CHANGES,
    DETECTIONS,
    FEATURES,
    JUDGES,
    PLAN,
    SAMPLES,
    TRUTH,
    Run,
)
from safegen.evaluation.run.records import (
    WITHHELD,
    DetectionsRecord,
    ImageRecord,
    Record,
    SampleRecord,
    StackEntry,
)
from safegen.evaluation.run.truth import TruthRecord, own_truth
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.schema import FROM_FEATURES, FROM_IMAGES
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
    inputs: dict[str, list[Record]]
    """Records that the results rest on, by the name of the journal."""
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
    _check_plan(run)
    rule = run.protocol.judge
    name = (judge or rule.name).partition(":")[0]
    if name != rule.name and not labels:
        raise ConfigError(
            f"the judge {name!r} has labels of its own. "
            f"Choose those that mean {run.protocol.concept} with --label"
        )
    judge_id = run.judge(judge) if judge else run.judge(name, options=rule.public_options)
    record = run.judges[judge_id]
    protocol = run.protocol.with_judge(
        name=name, labels=labels, threshold=threshold, options=record.options
    )
    resolve_labels(name, expand_labels(protocol.judge.labels), record.label_space, ())
    journals = _Journals(run, judge_id)
    truth = own_truth(run) if truth is None else truth
    attack = read_attack(run)
    stacks = {
        entry.name: _stack_results(run, entry, protocol, journals, truth) for entry in run.stacks
    }
    inputs: dict[str, list[Record]] = {JUDGES: [record], **journals.used}
    if attack:  # its seconds decide nothing
        inputs[ATTACK] = [r.model_copy(update={"cost": Cost()}) for r in attack.records]
    known = {key for entry in run.stacks for key in run.keys(entry)} & truth.keys()
    if known:
        inputs[TRUTH] = [TruthRecord(key=key, shows=truth[key]) for key in sorted(known)]
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


def _check_plan(run: Run) -> None:
    """Raise if a list has no images, or the plan has an image twice: it would count twice."""
    counts = Counter(sample.list_name for sample in run.samples)
    places = {(s.list_name, s.id, s.seed, s.index) for s in run.samples}
    if set(counts) != {part.name for part in run.protocol.lists} or len(places) < len(run.samples):
        raise FileError(
            f"{run.folder / PLAN} must have each image of the protocol's lists once. "
            f"Check the run with `safegen verify {run.folder}`."
        )


R = TypeVar("R", bound=ImageRecord)


class _Journals:
    """Records of a run by key, and the ones that were used."""

    def __init__(self, run: Run, judge: str) -> None:
        self.run = run
        self.samples = {r.key: r for r in run.sample_records()}
        self.detections = {r.key: r for r in run.detections_records() if r.judge == judge}
        self.changes = {r.key: r for r in run.change_records()}
        self.features = {r.key: r for r in run.feature_records()}
        self.used: dict[str, list[Record]] = {
            name: [] for name in (SAMPLES, DETECTIONS, CHANGES, FEATURES)
        }

    def take(
        self, journal: str, records: Mapping[str, R], keys: Sequence[str], entry: StackEntry
    ) -> list[R]:
        """Return the records of `keys`, in order.

        Raises:
            FileError: some are missing.
        """
        present = [records[key] for key in keys if key in records]
        if len(present) < len(keys):
            raise FileError(
                f"{self.run.folder} is not complete: {journal} has {len(present)} of {len(keys)} "
                f"images of {entry.name!r}. Resume with the command that began it."
            )
        self.used[journal] += present
        return present

    def weights(self) -> dict[str, str]:
        """Return the ids of the networks that made the records that were used.

        Raises:
            FileError: several networks of one kind made them.
        """
        weights: dict[str, str] = {}
        for name, journal, attribute in (
            ("extractor", FEATURES, "extractor"),
            ("lpips", CHANGES, "lpips_id"),
        ):
            ids = sorted({getattr(record, attribute) or "" for record in self.used[journal]})
            if len(ids) > 1:
                raise FileError(
                    f"{self.run.folder / journal} must be by one {name}, got {', '.join(ids)}. "
                    "Start a new run."
                )
            if ids and ids[0]:
                weights[name] = ids[0]
        return weights


def _stack_results(
    run: Run, entry: StackEntry, protocol: Protocol, journals: _Journals, truth: Mapping[str, bool]
) -> StackResults:
    """Return the results of a stack.

    Raises:
        FileError: some records are missing.
    """
    keys, metrics = run.keys(entry), set(protocol.metrics)
    has_changes = entry.kind != "base" and metrics & set(FROM_IMAGES)
    samples = journals.take(SAMPLES, journals.samples, keys, entry)
    detections = journals.take(DETECTIONS, journals.detections, keys, entry)
    changes = journals.take(CHANGES, journals.changes, keys if has_changes else [], entry)
    features = journals.take(
        FEATURES, journals.features, keys if metrics & set(FROM_FEATURES) else [], entry
    )
    return StackResults(
        entry=entry,
        blank=[record.blank for record in samples],
        detections=[_detections(s, d) for s, d in zip(samples, detections, strict=True)],
        changes=[record.change for record in changes],
        lpips=[record.lpips for record in changes] if "lpips" in metrics else [],
        features=[record.array for record in features],
        clip=[record.clip_score for record in features] if "clip_score" in metrics else [],
        truth=[truth.get(key) for key in keys],
    )


def _detections(sample: SampleRecord, record: DetectionsRecord) -> Detections:
    """Return the detections in an image; none, unjudged, if a guard's failure withheld it.

    The judge saw a black image in its place, in which there is nothing. A prompt that a guard
    blocked by its rule is different: that is what the stack does.
    """
    if sample.failed and sample.guards:
        return Detections((), unjudged=f"{WITHHELD}{sample.guards.get('reason')}")
    return record.detections
