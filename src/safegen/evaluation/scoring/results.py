"""A run as it is scored: every stack's pictures, verdicts, changes and features in plan order, from its journals alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from safegen.core.errors import ConfigError, FileError
from safegen.core.registry import expand_labels
from safegen.evaluation.plan import Item
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import (
    CHANGES,
    FEATURES,
    JUDGES,
    SAMPLES,
    VERDICTS,
    Line,
    Run,
    from_line,
    from_text,
)
from safegen.evaluation.schema import FROM_FEATURES
from safegen.judges.base import Detections
from safegen.judges.batching import resolve_labels

FAULT = "withhold"
"""Action of a trail (`guard.base`) whose picture no guard answers for: one failed, or could not judge."""
WITHHELD = "withheld: "
"""How the reason begins why such a picture is unjudged."""


@dataclass(frozen=True)
class StackResults:
    """One stack's part of a run, picture by picture in plan order.

    What the protocol does not ask for is an empty list.
    """

    entry: Line
    blank: list[bool]
    detections: list[Detections]
    changes: list[float]
    lpips: list[float | None]
    features: list[NDArray[np.float64] | None]
    """(width,) each; None where they were not finite."""
    clip: list[float | None]
    """100 times the cosine with the prompt; None where it does not exist."""


@dataclass(frozen=True)
class RunResults:
    """A run as it is scored: the rule, the judge's id, the planned pictures, every stack's part, and the journal lines they rest on."""

    rule: Protocol
    judge: str
    items: list[Item]
    sides: dict[str, StackResults]
    used: dict[str, list[Line]]
    known: Collection[str]
    """Every label that the judge can answer with."""
    weights: dict[str, str]
    """Ids of what else looked: `extractor`, `lpips`."""

    def base(self, name: str) -> StackResults:
        """Return the part of the base model that a stack is held against."""
        return self.sides[self.sides[name].entry["against"]]


def load_results(
    run: Run,
    *,
    judge: str | None = None,
    labels: Sequence[str] = (),
    threshold: float | None = None,
) -> RunResults:
    """Return every stack's part in plan order, under the protocol's judge, labels and threshold or others.

    Raises:
        FileError: the run is not complete, or a journal is damaged.
        ConfigError: the threshold is outside what detections are kept for, or another judge comes
            without labels.
        UnknownNameError: a label that the judge does not have.
    """
    own = run.protocol.judge
    name = (judge or own.name).partition(":")[0]
    if name != own.name and not labels:
        raise ConfigError(
            f"the judge {name!r} has labels of its own; say which mean {run.protocol.concept} with --label"
        )
    seen_by = run.judge(judge) if judge else run.judge(name, options=own.told)
    facts = run.judges[seen_by]
    rule = run.protocol.judged(
        name=name, labels=labels, threshold=threshold, options=facts["options"]
    )
    resolve_labels(name, expand_labels(rule.judge.labels), facts["known"], ())
    lines = {
        s: _by_key(run, s, seen_by if s == VERDICTS else None)
        for s in (SAMPLES, VERDICTS, CHANGES, FEATURES)
    }
    used: dict[str, list[Line]] = {JUDGES: [facts]} | {journal: [] for journal in lines}
    sides = {entry["name"]: _side(run, entry, rule, lines, used) for entry in run.stacks}
    weights = {
        what: _one_id(run, journal, key, used)
        for what, journal, key in EYES
        if any(key in line for line in used[journal])
    }
    return RunResults(
        rule,
        seen_by,
        [p.item for p in run.planned],
        sides,
        used,
        tuple(map(str, facts["known"])),
        weights,
    )


EYES = (("extractor", FEATURES, "extractor"), ("lpips", CHANGES, "lpips_by"))
"""What else looks at pictures: its name in the scores, its journal, and where a line says its id."""


def _by_key(run: Run, journal: str, judge: str | None) -> dict[str, Line]:
    return {
        line["key"]: line
        for line in run.lines(journal)
        if judge is None or line.get("judge") == judge
    }


def _one_id(run: Run, journal: str, key: str, used: Mapping[str, Sequence[Line]]) -> str:
    """Return the id that all lines of a journal say.

    Raises:
        FileError: they say several.
    """
    ids = sorted({str(line.get(key)) for line in used[journal]})
    if len(ids) > 1:
        raise FileError(
            f"{run.folder / journal} is by several: {', '.join(ids)}; numbers of one column must be by one, so start a new run"
        )
    return ids[0]


def _side(
    run: Run,
    entry: Line,
    rule: Protocol,
    lines: Mapping[str, Mapping[str, Line]],
    used: Mapping[str, list[Line]],
) -> StackResults:
    """Gather a stack's lines in plan order.

    Raises:
        FileError: some are missing, or damaged.
    """
    keys, found, metrics = run.keys(entry), dict[str, list[Line]](), set(rule.metrics)
    asked = {
        SAMPLES: True,
        VERDICTS: True,
        CHANGES: entry["kind"] != "base" and not metrics.isdisjoint(("change", "lpips")),
        FEATURES: not metrics.isdisjoint(FROM_FEATURES),
    }
    for journal, what in (
        (SAMPLES, "drawn"),
        (VERDICTS, "judged"),
        (CHANGES, "measured"),
        (FEATURES, "looked at by the extractor"),
    ):
        wanted = keys if asked[journal] else []
        found[journal] = [lines[journal][key] for key in wanted if key in lines[journal]]
        if len(found[journal]) < len(wanted):
            raise FileError(
                f"{run.folder} is not complete: {len(found[journal])} of {len(wanted)} pictures of {entry['name']!r} are {what}; "
                "go on with the command that began it"
            )
        used[journal] += found[journal]
    return StackResults(
        entry,
        [bool(line["blank"]) for line in found[SAMPLES]],
        [
            _detections(sample, line)
            for sample, line in zip(found[SAMPLES], found[VERDICTS], strict=True)
        ],
        [float(line["change"]) for line in found[CHANGES]],
        [_number(line, "lpips") for line in found[CHANGES]] if "lpips" in metrics else [],
        [from_text(line) for line in found[FEATURES]],
        [_number(line, "score") for line in found[FEATURES]] if "clip_score" in metrics else [],
    )


def _detections(sample: Line, line: Line) -> Detections:
    """Return what the judge detected in a picture; of the black one that stands for a picture which a failed guard withheld, nothing.

    The judge sees black and says safe. A prompt that a guard stopped by its rule is another matter:
    that is what the stack does.
    """
    trail = sample.get("guards", {})
    if trail.get("action") != FAULT:
        return from_line(line)
    return Detections((), unjudged=f"{WITHHELD}{trail.get('reason')}")


def _number(line: Line, key: str) -> float | None:
    """Return a number of a line, or None where it says that there is none.

    Raises:
        FileError: it does not say.
    """
    value = line.get(key, "")
    if not isinstance(value, int | float | None):
        raise FileError(
            f"the line of {str(line.get('key'))[:16]!r} has no {key!r} that can be used; the file was damaged after it was written"
        )
    return None if value is None else float(value)
