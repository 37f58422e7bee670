"""Traces of the two stages around another server, joined into one of all guards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from safegen.guards.core.result import (
    PASSING_ACTIONS,
    Action,
    GeneratedImage,
    GuardRecord,
    GuardTrace,
)
from safegen.serve.messages import GuardInfo, Stage

SERVER = "upstream"
"""Name in traces by which the other server blocks."""


def join_stages(
    guards: Sequence[GuardInfo], prompt: GuardTrace | None, image: GuardTrace | None
) -> GuardTrace:
    """Return one trace with a record for each guard, in the order of the guards.

    The action is that of the first stage that does not pass. A guard that has no record in a stage
    where it acts has 0 calls, so that the release check sees that it did not run. A trace with
    other records than those of the guards of its stage is a fault.

    Args:
        guards: all guards.
        prompt: trace of the prompt; None if no guard reads prompts.
        image: trace of the image; None if there is no image.
    """
    by_prompt = _records([g for g in guards if g.reads_prompts], prompt)
    by_image = _records([g for g in guards if g.reads_images], image)
    if by_prompt is None or by_image is None:
        reason = "guards: the records are not those of the guards"
        return GuardTrace("withhold", reason, tuple(GuardRecord(g.name) for g in guards))
    records = []
    for guard in guards:
        stages = [next(by_prompt)] if guard.reads_prompts else []
        stages += [next(by_image)] if guard.reads_images else []
        records.append(_merge(guard, stages))
    for trace in (prompt, image):
        if trace is not None and trace.action not in PASSING_ACTIONS:
            return GuardTrace(trace.action, trace.reason, tuple(records))
    last = next((t for t in (image, prompt) if t is not None and t.action != "none"), None)
    action: Action = last.action if last else "none"
    return GuardTrace(action, last.reason if last else "", tuple(records))


def join_image(
    guards: Sequence[GuardInfo], prompt: GuardTrace | None, checked: GeneratedImage
) -> GeneratedImage:
    """Return a checked image with the trace of both stages; no image where it was withheld."""
    trace = join_stages(guards, prompt, checked.trace)
    return replace(checked, image=None if trace.withheld else checked.image, trace=trace)


def block_trace(guards: Sequence[GuardInfo], prompt: GuardTrace | None, stage: Stage) -> GuardTrace:
    """Return the trace of an image that the other server blocked."""
    action: Action = "block" if stage == "input" else "refuse"
    records = join_stages(guards, prompt, None).guards
    return GuardTrace(action, f"{SERVER}: moderation_blocked", records)


def _records(guards: Sequence[GuardInfo], trace: GuardTrace | None) -> Iterator[GuardRecord] | None:
    """Return an iterator over the records of the guards of one stage; None if they do not fit."""
    if trace is None:
        return iter([GuardRecord(guard.name) for guard in guards])
    if [record.guard for record in trace.guards] != [guard.name for guard in guards]:
        return None
    return iter(trace.guards)


def _merge(guard: GuardInfo, stages: Sequence[GuardRecord]) -> GuardRecord:
    """Return the record of one guard from those of its stages."""
    if not stages:
        return GuardRecord(guard.name)
    if len(stages) == 1:
        return stages[0]
    first, second = stages
    last = second if second.action != "none" else first
    return replace(
        last,
        scores={**first.scores, **second.scores},
        thresholds={**first.thresholds, **second.thresholds},
        calls=first.calls + second.calls if first.calls and second.calls else 0,
        ms=first.ms + second.ms,
    )
