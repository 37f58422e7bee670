"""The release check: the only place that decides whether a client gets an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from safegen.guards.core.result import (
    BLOCKING_ACTIONS,
    REPLACING_ACTIONS,
    GeneratedImage,
    GuardRecord,
    GuardTrace,
)
from safegen.serve.messages import ImageRequest, StackInfo, Stage

Status = Literal["released", "blocked", "fault"]
"""`released`: the client gets it; `blocked`: a guard decided; `fault`: something failed."""


@dataclass(frozen=True)
class Outcome:
    """What a client learns about one image of a request."""

    status: Status
    trace: GuardTrace
    seed: int
    image: Image.Image | None = None
    """The image; None unless it is released."""
    stage: Stage | None = None
    """Where it was blocked."""
    guard: str = ""
    """Guard that blocked it, or that failed."""
    reason: str = ""
    """Why: a countable phrase that quotes no prompt."""
    judge: str | None = None
    """Id of the judge behind the decision."""
    score: float | None = None
    threshold: float | None = None
    categories: tuple[str, ...] = ()
    """The concept, or the labels that reached the threshold."""

    def __post_init__(self) -> None:
        """Refuse an image that is not released."""
        if (self.image is not None) != (self.status == "released"):
            raise ValueError("an outcome has an image exactly if it is released")


def check_release(
    generated: GeneratedImage,
    request: ImageRequest,
    seed: int,
    stack: StackInfo,
    concept: str | None = None,
) -> Outcome:
    """Return whether an image may leave the server.

    It may if every guard of the stack has run, none of them covered or withheld the image, and it
    is an image of the requested size.

    Args:
        generated: what the engine made.
        request: what was asked for.
        seed: seed of the image.
        stack: the stack as it was when the server started.
        concept: category of every block. Default: the labels that reached the threshold.
    """
    trace = generated.trace
    if trace.action in ("block", "refuse") or trace.action in REPLACING_ACTIONS:
        stage: Stage = "input" if trace.action == "block" else "output"
        return block(trace, seed, stack, stage, concept)
    if trace.withheld:
        return fault(trace, seed, trace.reason or "withheld")
    if generated.nsfw_content_detected:
        return block(trace, seed, stack, "output", concept, guard="safety_checker")
    if reason := _missing_guard(trace, stack):
        return fault(trace, seed, reason)
    image = generated.image
    if reason := _image_fault(image, request, stack):
        return fault(trace, seed, reason)
    return Outcome("released", trace, seed, image)


def block(
    trace: GuardTrace,
    seed: int,
    stack: StackInfo,
    stage: Stage,
    concept: str | None = None,
    *,
    guard: str = "",
) -> Outcome:
    """Return the outcome of an image that a guard withheld, with the score that decided."""
    name = guard or trace.reason.partition(":")[0]
    record = next((r for r in trace.guards if r.guard == name), None)
    info = next((g for g in stack.guards if g.name == name), None)
    label, score, threshold = _decisive(record)
    found = _labels(record, threshold)
    return Outcome(
        "blocked",
        trace,
        seed,
        stage=stage,
        guard=name,
        reason=trace.reason.partition(": ")[2] or "unsafe",
        judge=info.judge if info and label else None,
        score=score,
        threshold=threshold,
        # the pipeline's own checker and another server look for their own categories
        categories=(concept,) if concept and info else found or (name,),
    )


def fault(trace: GuardTrace, seed: int, reason: str) -> Outcome:
    """Return the outcome of an image that is withheld because something failed.

    Its guard is the one that the trace names, as `GUARD: reason` or `error: GUARD: reason`.
    """
    names = {record.guard for record in trace.guards}
    words = trace.reason.split(":")[:2]
    guard = next((word.strip() for word in words if word.strip() in names), "")
    return Outcome("fault", trace, seed, guard=guard, reason=reason)


def _missing_guard(trace: GuardTrace, stack: StackInfo) -> str:
    """Return why a trace is not that of an image which passed every guard; empty if it is."""
    ran = [record.guard for record in trace.guards]
    expected = [guard.name for guard in stack.guards]
    if ran != expected:
        return f"guards: the trace has {ran}, the stack {expected}"
    acted = [r.guard for r in trace.guards if r.action in BLOCKING_ACTIONS | REPLACING_ACTIONS]
    if acted:
        return f"guards: {', '.join(acted)} acted, and the trace does not say so"
    silent = [record.guard for record in trace.guards if record.calls < 1]
    return f"guards: {', '.join(silent)} did not run" if silent else ""


def _image_fault(image: object, request: ImageRequest, stack: StackInfo) -> str:
    """Return what is wrong with an image; empty if nothing is."""
    if not isinstance(image, Image.Image):
        return "image: the engine returned none"
    config = request.generation_config
    size = config.width or stack.size[0], config.height or stack.size[1]
    fits = all(want in (0, got) for want, got in zip(size, image.size, strict=True))  # 0: any
    return "" if fits else f"image: its size is {image.size}, not {size}"


def _decisive(record: GuardRecord | None) -> tuple[str, float | None, float | None]:
    """Return the label, the score and the threshold that decided; the highest score."""
    if record is None or not record.scores:
        return "", None, None
    label, score = max(record.scores.items(), key=lambda item: item[1])
    return label, score, record.thresholds.get(label, record.thresholds.get("score"))


def _labels(record: GuardRecord | None, threshold: float | None) -> tuple[str, ...]:
    """Return the labels with scores that reach the threshold."""
    if record is None or threshold is None:
        return ()
    return tuple(label for label, score in record.scores.items() if score >= threshold)
