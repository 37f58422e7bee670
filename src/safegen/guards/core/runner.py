"""A guard at work in one batch: it is timed, counted and heard, and what it raises is its failure."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from safegen.core.errors import UserError, is_out_of_memory
from safegen.guards.core.adapter import HookPoint, Text
from safegen.guards.core.base import (
    ACTIONS,
    BLOCKING_ACTIONS,
    REPLACING_ACTIONS,
    Call,
    Guard,
    GuardConfig,
    GuardHook,
    GuardRecord,
    GuardResult,
)


class GuardError(Exception):
    """A guard raised, or answered with nonsense."""

    def __init__(self, guard: str, error: Exception) -> None:
        super().__init__(f"{guard}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


@dataclass
class GuardRunner:
    """A guard of the pipeline, and what is known of it in this batch: one entry a picture."""

    guard_impl: Guard
    n: int
    device: str
    """Kind of device that the pipeline computes on."""
    calls: int = 0
    rows: int = 0
    """Rows that it added to the denoiser's batches, for all together."""
    drawn: tuple[int, ...] = ()
    """The pictures that came to the denoiser, each as often as it stood in a batch."""
    seconds: float = 0.0
    results: list[GuardResult] = field(default_factory=list)

    @property
    def guard(self) -> GuardConfig:
        """Its settings."""
        return self.guard_impl.guard

    @property
    def active_points(self) -> frozenset[HookPoint]:
        """Where it takes hold."""
        return self.guard_impl.active_points

    def note(self, at: int) -> GuardRecord:
        """Return what it did for picture `at`."""
        found = self.results[at]
        scores = {k: round(float(v), 6) for k, v in found.scores.items()}
        limits = {k: float(v) for k, v in found.thresholds.items()}
        ms = round(1000 * self.seconds / self.n, 3)
        rows = self.rows * self.drawn.count(at) // max(len(self.drawn), 1)
        return GuardRecord(
            self.guard.name, found.action, found.reason, scores, limits, self.calls, rows, ms
        )

    @contextmanager
    def timed_call(self, *, as_drawn: bool = False) -> Iterator[None]:
        """Count and time what the guard does, in full precision; what it raises is its failure, but for what the caller can mend.

        Args:
            as_drawn: leave the pipeline's own arithmetic, for texts that must be encoded as it
                encodes its own.

        Raises:
            Failed: the guard raised something else than a `UserError` or a want of memory.
        """
        self.calls, began = self.calls + 1, time.perf_counter()
        try:
            with nullcontext() if as_drawn else torch.autocast(self.device, enabled=False):
                yield
        except (UserError, GuardError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise GuardError(self.guard.name, error) from error
        finally:
            self.seconds += time.perf_counter() - began

    def merge_results(
        self, findings: Sequence[GuardResult], at: Sequence[int], *, seen: bool = False
    ) -> None:
        """Take in a finding for each of the pictures `at`; what an earlier one did stands where a new one does nothing, scores join.

        A finding with a score that is no number decided nothing: that picture is withheld, whatever
        the guard says of it afterwards.

        Args:
            findings: what the guard said.
            at: of which pictures.
            seen: whether it saw them, and may bring others to show in their place.

        Raises:
            Failed: there are more or fewer, or one names an action that would leave the picture as
                it is.
        """
        if len(findings) != len(at):
            raise GuardError(
                self.guard.name, ValueError(f"{len(findings)} answers for {len(at)} pictures")
            )
        for i, found in zip(at, findings, strict=True):
            if found.action not in ACTIONS or (
                found.action in REPLACING_ACTIONS and not (seen and found.image is not None)
            ):
                raise GuardError(
                    self.guard.name,
                    ValueError(
                        f"the action {found.action!r} hides nothing without a picture to show"
                    ),
                )
            old, odd = (
                self.results[i],
                [
                    k
                    for k, v in {**found.scores, **found.thresholds}.items()
                    if not math.isfinite(v)
                ],
            )
            stays = found.action == "none" or old.action in BLOCKING_ACTIONS
            last = (
                GuardResult("withhold", f"not-finite: {', '.join(odd)}")
                if odd
                else old
                if stays
                else found
            )
            scores = {k: v for k, v in {**old.scores, **found.scores}.items() if k not in odd}
            limits = {
                k: v for k, v in {**old.thresholds, **found.thresholds}.items() if k not in odd
            }
            self.results[i] = GuardResult(last.action, last.reason, scores, limits)


class EmbeddingOffset(Guard):
    """A probe's own hand on the prompts' embeddings, before the guards': something is added to them."""

    def __init__(self, guard: GuardConfig, shift: Tensor) -> None:
        super().__init__(guard)
        self.shift = shift

    @property
    def active_points(self) -> frozenset[HookPoint]:
        """The prompt's side alone."""
        return frozenset({"text"})

    def start(self, call: Call) -> GuardHook:
        """Return the shift of one call."""
        return _Shift(self.shift, call)


class _Shift(GuardHook):
    def __init__(self, shift: Tensor, call: Call) -> None:
        rows = [
            *range(len(call.prompts) - len(call.reference_rows)),
            *call.reference_rows,
        ]  # second streams stand behind, in the order of their first
        self.shift = shift[rows]

    def edit_prompt_embeds(self, text: Text) -> Text:
        return Text(text.hidden + self.shift.to(text.hidden), text.extra)
