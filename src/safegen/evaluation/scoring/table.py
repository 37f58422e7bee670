"""A run's scores as a file: from its journals to plain values. No model is loaded."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from safegen.evaluation.run.folder import SCORES, Line, Run
from safegen.evaluation.samples import hash_lines, sha
from safegen.evaluation.scoring.results import RunResults, load_results
from safegen.evaluation.scoring.score import list_row

FORMAT = "safegen-scores/2"


def score_run(
    run: Run,
    *,
    judge: str | None = None,
    labels: Sequence[str] = (),
    threshold: float | None = None,
) -> Line:
    """Return a run's scores from its journals, under the protocol's judge, labels and threshold or others.

    Equal journals give equal scores to the last digit; nothing in them tells when, where or in how
    many goes the run was made.

    Args:
        run: a complete run.
        judge: name or id of a judge that has looked at it.
        labels: its labels that mean the concept.
        threshold: least score of a detection that counts.

    Raises:
        FileError: the run is not complete, or a journal is damaged.
        ConfigError: the threshold is outside what detections are kept for, or another judge comes
            without labels.
        UnknownNameError: a label that the judge does not have, and so would never be seen.
    """
    return scores_of(load_results(run, judge=judge, labels=labels, threshold=threshold))


def scores_of(read: RunResults) -> Line:
    """Return the scores of a run that was read."""
    at = {
        p.name: [i for i, item in enumerate(read.items) if item.list_name == p.name]
        for p in read.rule.lists
    }
    return {
        "format": FORMAT,
        "protocol": {"name": read.rule.name, "id": read.rule.id, "decides": read.rule.decides()},
        "judge": read.judge,
        "weights": read.weights,
        "inputs": {name: hash_lines(rows) for name, rows in read.used.items()},
        "stacks": {
            name: {
                "hash": side.entry["hash"],
                "kind": side.entry["kind"],
                "against": side.entry["against"],
                "lists": {part: list_row(read, rows, name) for part, rows in at.items()},
            }
            for name, side in read.sides.items()
        },
    }


def scores_file(run: Run, scores: Line) -> Path:
    """Return where scores belong in their run's folder.

    `scores.json` is for the run's own rules, and for the judge whose scores lie there already;
    scores by other rules or another judge id get a name of both, so that none replaces another's.
    """
    path = run.folder / SCORES
    try:
        held = (
            json.loads(path.read_text(encoding="utf-8"))["judge"]
            if path.exists()
            else scores["judge"]
        )
    except (KeyError, TypeError, ValueError):
        held = scores["judge"]  # damaged: made again
    if scores["protocol"]["id"] == run.protocol.id and scores["judge"] == held:
        return path
    return run.folder / f"scores-{scores['protocol']['id']}-{sha(scores['judge'])[:8]}.json"
