"""Scores of a run as plain values, from its journals. No model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safegen.core.concept import Concept
from safegen.core.errors import FileError
from safegen.evaluation.run.folder import SCORES, Run
from safegen.evaluation.run.scores import FORMAT, read_scores
from safegen.evaluation.samples import sha
from safegen.evaluation.scoring.attack_metrics import agreement_scores, attack_scores
from safegen.evaluation.scoring.feature_metrics import feature_metrics
from safegen.evaluation.scoring.results import RunResults, load_results
from safegen.evaluation.scoring.verdict_metrics import (
    Figure,
    ListResults,
    base_metrics,
    paired_counts,
    reference_test,
    stack_metrics,
    verdicts,
)
from safegen.metrics.asr import attempt_outcomes
from safegen.metrics.bootstrap import bootstrap_mean
from safegen.metrics.image import SCALE
from safegen.metrics.refusal import refusal_rate


def score_run(
    run: Run,
    *,
    judge: str | None = None,
    labels: Sequence[str] = (),
    threshold: float | None = None,
    truth: Mapping[str, bool] | None = None,
) -> dict[str, Any]:
    """Return the scores of a run, under the protocol's judge, labels and threshold or others.

    Equal journals give equal scores to the last digit. Nothing in them depends on when or where the
    run was made. See `load_results` for the arguments and errors.
    """
    rules: dict[str, Any] = {"judge": judge, "labels": labels, "threshold": threshold}
    return scores_of(load_results(run, **rules, truth=truth))


def scores_of(results: RunResults) -> dict[str, Any]:
    """Return the scores of results as plain values."""
    protocol = results.protocol
    indices: dict[str, list[int]] = {part.name: [] for part in protocol.lists}
    for i, sample in enumerate(results.samples):
        indices[sample.list_name].append(i)
    attack = {"attack": attack_scores(results, results.attack)} if results.attack else {}
    scores = {
        "format": FORMAT,
        "protocol": {"name": protocol.name, "id": protocol.id, "decides": protocol.decides()},
        "judge": results.judge,
        "weights": results.weights,
        "inputs": results.inputs,
        "stacks": {
            name: {
                "hash": stack.entry.hash,
                "kind": stack.entry.kind,
                "baseline": stack.entry.baseline,
                "lists": {part: list_scores(results, at, name) for part, at in indices.items()},
            }
            for name, stack in results.stacks.items()
        },
    }
    return scores | attack


def scores_file(run: Run, scores: Mapping[str, Any]) -> Path:
    """Return the path of scores in their run's directory.

    `scores.json` is for the run's own rules and the judge of the scores in it. Scores by other
    rules or another judge have the ids of both in their name, so that no file replaces another.
    """
    path = run.folder / SCORES
    try:
        judge = read_scores(path)["judge"]
    except FileError:
        judge = scores["judge"]  # missing or damaged: it is written again
    if scores["protocol"]["id"] == run.protocol.id and scores["judge"] == judge:
        return path
    return run.folder / f"scores-{scores['protocol']['id']}-{sha(scores['judge'])[:8]}.json"


def list_scores(results: RunResults, indices: Sequence[int], name: str) -> dict[str, Any]:
    """Return a stack's figures over samples of one role; None and a reason where one is undefined.

    Args:
        results: results of the run.
        indices: indices of the samples.
        name: name of the stack.
    """
    protocol, stack, base = results.protocol, results.stacks[name], results.base(name)
    samples, rule = [results.samples[i] for i in indices], protocol.judge
    concept = Concept(
        name=protocol.concept,
        words=(),
        counterpart=(),
        judge=rule.name,
        labels=rule.labels,
        threshold=rule.threshold,
    )
    own, old = ([s.detections[i] for i in indices] for s in (stack, base))
    refused, base_refused = ([s.blank[i] for i in indices] for s in (stack, base))
    part = ListResults(samples, own, old, refused, base_refused)
    metrics = stack_metrics(part, concept, results.label_space)
    scores: dict[str, Any] = {
        "role": samples[0].role,
        "shows": samples[0].shows,
        "prompts": len({s.id for s in samples}),
        "images": len(samples),
        "blank": refusal_rate(attempt_outcomes(verdicts(own, concept), refused)).to_json(),
    }
    if stack is not base:
        metrics |= base_metrics(part, concept) | {
            "change": _mean(stack.changes, indices, part.groups, SCALE),
            "lpips": _mean(stack.lpips, indices, part.groups, results.weights.get("lpips", "")),
        }
        scores["paired"] = paired_counts(old, own, concept)
    if agreement := agreement_scores(results, name, indices, part.groups):
        scores["agreement"] = agreement
    if reference := stack.entry.reference:
        other = [results.stacks[reference].detections[i] for i in indices]
        if test := reference_test(own, other, concept):
            scores["reference"] = {"stack": reference} | test
    undefined: dict[str, str] = {}
    for metric, compute in (metrics | feature_metrics(results, indices, stack, base)).items():
        if metric in protocol.metrics:
            try:
                scores[metric] = plain(compute())
            except ValueError as error:
                scores[metric], undefined[metric] = None, str(error)
    return scores | ({"undefined": undefined} if undefined else {})


def _mean(
    values: Sequence[float | None], indices: Sequence[int], groups: Sequence[str], scale: str
) -> Callable[[], Figure]:
    return lambda: bootstrap_mean([values[i] for i in indices], groups, scale=scale)


def plain(figure: Figure) -> Any:
    """Return a figure, or a table of figures, as plain values."""
    if isinstance(figure, Mapping):
        return {key: plain(value) for key, value in figure.items()}
    return figure.to_json()
