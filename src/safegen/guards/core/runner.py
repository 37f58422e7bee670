"""One guard during one batch: timed, counted, its results checked, its exceptions `GuardError`."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from safegen.core.errors import UserError, is_out_of_memory
from safegen.guards.core.adapter import EXTERNAL_POINTS, HookPoint
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook
from safegen.guards.core.checks import check_hook
from safegen.guards.core.result import (
    ACTIONS,
    BLOCKING_ACTIONS,
    REPLACING_ACTIONS,
    Action,
    GeneratedImage,
    GuardRecord,
    GuardResult,
    GuardTrace,
    InvalidResultError,
)
from safegen.models.families.conditioning import Conditioning

REASON_LENGTH = 100
"""Most characters of a guard's reason in a trace."""
LEAST_DIFFERENCE = 0.4
"""See `shows_image`. Resized, cropped and palette copies measure 0 to 0.3, blurs 0.5 and more."""
logger = logging.getLogger(__name__)


class GuardError(Exception):
    """A guard raised, or returned an invalid result. The text enters traces and quotes no prompt.

    Of an exception it has the type and the function that raised it; the message is only logged, at
    the level `DEBUG`, since it may quote a prompt.
    """

    def __init__(self, guard: str, error: Exception) -> None:
        if isinstance(error, InvalidResultError):
            reason = str(error)
        else:
            logger.debug("the guard %r raised", guard, exc_info=error)
            reason = type(error).__name__
            for frame in traceback.extract_tb(error.__traceback__)[-1:]:
                reason += f" in {PurePath(frame.filename).stem}.{frame.name}"
        super().__init__(f"{guard}: {reason}")


@dataclass
class GuardRunner:
    """One guard during one batch, with its result for each image."""

    guard: Guard
    num_images: int
    device: str
    """Device type that the pipeline computes on."""
    calls: int = 0
    rows: int = 0
    """Rows added to the denoiser's batches, for all images together."""
    row_images: tuple[int, ...] = ()
    """Image of each row of the pipeline's batch, reference streams included."""
    seconds: float = 0.0
    generated: tuple[Image.Image, ...] = ()
    """The pipeline's images that the guard could replace."""
    results: list[GuardResult] = field(init=False)

    def __post_init__(self) -> None:
        """Start with one empty result per image."""
        self.results = [GuardResult()] * self.num_images

    @property
    def config(self) -> GuardConfig:
        """Settings of the guard."""
        return self.guard.config

    def acts_at(self, *points: HookPoint) -> bool:
        """Return whether the guard hooks one of these points."""
        return bool(self.guard.hook_points & set(points))

    def blocks(self, image: int) -> bool:
        """Return whether the guard has blocked an image."""
        return self.results[image].action in BLOCKING_ACTIONS

    def record(self, image: int) -> GuardRecord:
        """Return what the guard did for one image."""
        result = self.results[image]
        return GuardRecord(
            self.config.name,
            result.action,
            _printable(result.reason)[:REASON_LENGTH],
            {k: round(float(v), 6) for k, v in result.scores.items()},
            {k: float(v) for k, v in result.thresholds.items()},
            self.calls,
            self.rows * self.row_images.count(image) // max(len(self.row_images), 1),
            round(1000 * self.seconds / self.num_images, 3),
        )

    @contextmanager
    def timed_call(self, *, keep_autocast: bool = False) -> Iterator[None]:
        """Count and time one call of the guard, in full precision.

        Args:
            keep_autocast: keep the pipeline's autocast, for texts that must be encoded as the
                pipeline encodes its own.

        Raises:
            GuardError: the guard raised. A `UserError` or a lack of memory passes unchanged.
        """
        self.calls, start = self.calls + 1, time.perf_counter()
        try:
            with nullcontext() if keep_autocast else torch.autocast(self.device, enabled=False):
                yield
        except (UserError, GuardError):
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise GuardError(self.config.name, error) from error
        finally:
            self.seconds += time.perf_counter() - start

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function of the guard, each call counted and timed."""

        def timed(*args: Any) -> Any:
            with self.timed_call():
                return function(*args)

        return timed

    def merge_results(
        self,
        results: Sequence[GuardResult],
        images: Sequence[int],
        *,
        generated: Sequence[Image.Image] | None = None,
    ) -> None:
        """Merge one new result per image into those so far.

        An earlier action stays if the new one is `none` or the earlier one blocks. Scores are
        joined. A score that is not finite withholds the image for good.

        Args:
            results: results of the guard.
            images: index of the image of each result.
            generated: the pipeline's images, if the guard received them and may replace them.

        Raises:
            GuardError: wrong number of results, an unknown action, one that replaces the image
                without another image, or another image without such an action.
        """
        if len(results) != len(images):
            raise self._invalid(f"{len(results)} results for {len(images)} images")
        self.generated = tuple(generated or ())
        for image, new in zip(images, results, strict=True):
            if new.action not in ACTIONS:
                raise self._invalid(f"unknown action {_printable(repr(new.action))[:20]}")
            if new.action in REPLACING_ACTIONS:
                if generated is None or not isinstance(new.image, Image.Image):
                    raise self._invalid(f"the action {new.action!r} needs an image to show")
            elif new.image is not None:
                raise self._invalid(f"the action {new.action!r} must return no image")
            self.results[image] = _merge(self.results[image], new)

    def _invalid(self, message: str) -> GuardError:
        return GuardError(self.config.name, InvalidResultError(message))


def _printable(text: str) -> str:
    """Return a text in one line without control characters."""
    return "".join(c for c in " ".join(text.split()) if c.isprintable())


def shows_image(generated: Image.Image, replacement: Image.Image) -> bool:
    """Return whether a replacement shows a generated image, unless that has a single color.

    Both are compared in RGB at the generated size, averaged over a grid of at most 32 x 32: the
    replacement must differ by at least `LEAST_DIFFERENCE` of what a mosaic of 8 x 8 tiles differs
    by. One that cannot be read counts as shown.
    """
    box, size = Image.Resampling.BOX, generated.size
    grid = min(32, size[0]), min(32, size[1])
    try:
        one = generated.convert("RGB")
        other = replacement.convert("RGB").resize(size, box).resize(grid, box)
    except (OSError, ValueError):
        return True
    small = one.resize(grid, box)
    mosaic = small.resize((8, 8), box).resize(grid, Image.Resampling.NEAREST)
    pixels, *others = (np.asarray(image, dtype=np.float32) for image in (small, other, mosaic))
    difference, hidden = (float(np.abs(pixels - each).mean()) for each in others)
    return one.getcolors(1) is None and difference <= LEAST_DIFFERENCE * hidden


def _merge(old: GuardResult, new: GuardResult) -> GuardResult:
    invalid = [k for k, v in {**new.scores, **new.thresholds}.items() if not math.isfinite(v)]
    scores = {k: v for k, v in {**old.scores, **new.scores}.items() if k not in invalid}
    thresholds = {k: v for k, v in {**old.thresholds, **new.thresholds}.items() if k not in invalid}
    if invalid:
        return GuardResult("withhold", f"not-finite: {', '.join(invalid)}", scores, thresholds)
    last = old if new.action == "none" or old.action in BLOCKING_ACTIONS else new
    return GuardResult(last.action, last.reason, scores, thresholds)


def build_image(
    image: Any, runners: Sequence[GuardRunner], index: int, fault: str
) -> GeneratedImage:
    """Return one image with its trace; None if a guard blocked it or something went wrong."""
    records = tuple(runner.record(index) for runner in runners)
    steered = [r for r in records if r.action == "edit"]
    acted = [r for r in records if r.action not in ("none", "edit")] or steered
    blocking = [r for r in acted if r.action in BLOCKING_ACTIONS]
    if not fault and image is None and not blocking:
        fault = "error: the pipeline returned no image"
    covering = [r for r in acted if r.action in REPLACING_ACTIONS]
    if not fault and covering and not blocking:
        generated = {id(each): each for runner in runners for each in runner.generated}
        if any(shows_image(each, image) for each in generated.values()):
            fault = f"error: {covering[-1].guard}: the replacement shows a generated image"
    if fault:
        return GeneratedImage(None, GuardTrace("withhold", fault, records))
    last = (blocking or acted)[-1:]
    action: Action = last[0].action if last else "none"
    reason = f"{last[0].guard}: {last[0].reason}" if last else ""
    return GeneratedImage(None if blocking else image, GuardTrace(action, reason, records))


def allowed_images(runners: Sequence[GuardRunner], images: Sequence[int]) -> list[int]:
    """Return the images that no guard has blocked."""
    return [i for i in images if not any(r.blocks(i) for r in runners)]


def reference_streams(runners: Sequence[GuardRunner], prompts: Sequence[str]) -> list[int]:
    """Return the prompts for which a guard wants a reference stream."""
    wanted = [False] * len(prompts)
    for runner in runners:
        if runner.acts_at("latents"):
            with runner.timed_call():
                more = runner.guard.wants_reference_stream(prompts)
                wanted = [a or b for a, b in zip(wanted, more, strict=True)]
    return [i for i, want in enumerate(wanted) if want]


def start_hooks(
    runners: Sequence[GuardRunner], call: Call, row_images: tuple[int, ...]
) -> list[tuple[GuardRunner, GuardHook]]:
    """Start the guards that act inside the call."""
    active = []
    for runner in runners:
        runner.row_images = row_images
        if runner.guard.hook_points - EXTERNAL_POINTS:
            with runner.timed_call(keep_autocast=True):
                hook = runner.guard.start(call)
                check_hook(runner.guard, hook)
                active.append((runner, hook))
    return active


class EmbeddingOffset(Guard):
    """Internal guard of probes: adds an offset to the prompts' embeddings."""

    def __init__(self, config: GuardConfig, offset: Tensor) -> None:
        super().__init__(config)
        self.offset, self.hook_points = offset, frozenset({"prompt_embeds"})

    def start(self, call: Call) -> GuardHook:
        """Return the hook that adds the offset in one call."""
        return _OffsetHook(self.offset, call)


class _OffsetHook(GuardHook):
    def __init__(self, offset: Tensor, call: Call) -> None:
        # reference streams stand last, in the order of their images
        self.offset = offset[
            [*range(len(call.prompts) - len(call.reference_rows)), *call.reference_rows]
        ]

    def edit_prompt_embeds(self, embeds: Conditioning) -> Conditioning:
        return embeds.replace_hidden(embeds.hidden + self.offset.to(embeds.hidden))
