"""Results of guards: what each did, the trace of an image, and the generated image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from PIL import Image

Action = Literal["none", "edit", "block", "black", "blur", "mosaic", "refuse", "withhold"]
"""What a guard did. `edit` steers, `block` stops the prompt, `withhold` is a failure."""
UnsafeAction = Literal["black", "blur", "mosaic", "refuse"]
"""What to do with an unsafe image: show a black one, cover the whole image, or return none."""
ACTIONS: frozenset[Action] = frozenset(get_args(Action))
PASSING_ACTIONS: frozenset[Action] = frozenset({"none", "edit"})
"""Actions after which a prompt or an image goes on."""
BLOCKING_ACTIONS: frozenset[Action] = frozenset({"block", "refuse", "withhold"})
"""Actions that leave no image."""
REPLACING_ACTIONS: frozenset[Action] = frozenset({"black", "blur", "mosaic"})
"""Actions that show another image, which the result must contain."""


class InvalidResultError(Exception):
    """A guard's result breaks a rule. The message enters traces: it must quote no prompt."""


@dataclass(frozen=True)
class GuardResult:
    """Decision of a guard on one image or its prompt."""

    action: Action = "none"
    reason: str = ""
    """Short countable reason: `word`, `unsafe`, `unjudged` ..."""
    scores: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    image: Image.Image | None = None
    """Image to show instead of the checked one."""
    latents: Any = field(default=None, compare=False)
    """Initial latents (c, h, w) of unit variance to generate from, instead of the image's own."""


@dataclass(frozen=True)
class GuardRecord:
    """What one guard did for one image, as the trace stores it."""

    guard: str
    action: Action = "none"
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    calls: int = 0
    """Number of calls of the guard, for all images of the batch together."""
    rows: int = 0
    """Denoiser rows added for this image over all steps, without probes and reference streams."""
    ms: float = 0.0
    """Milliseconds in the guard, this image's share of its batch, without added denoiser rows."""


@dataclass(frozen=True)
class GuardTrace:
    """Outcome of one image and the records of all guards."""

    action: Action
    """Last action that changed the image; `none` for an image shown as generated."""
    reason: str
    """`guard: reason` of that action, or the fault for which the image was withheld."""
    guards: tuple[GuardRecord, ...] = ()
    """One record per guard, in the order of the stack."""

    @property
    def withheld(self) -> bool:
        """Whether there is no image."""
        return self.action in BLOCKING_ACTIONS

    def to_json(self, *, times: bool = True) -> dict[str, Any]:
        """Return the trace as plain values. Without `times`, equal images have equal traces."""
        records = [
            {
                k: dict(v) if isinstance(v, Mapping) else v
                for k, v in record.__dict__.items()
                if times or k != "ms"
            }
            for record in self.guards
        ]
        return {"action": self.action, "reason": self.reason, "guards": records}


@dataclass(frozen=True)
class GeneratedImage:
    """Image, or None if it was withheld, with its trace."""

    image: Image.Image | None
    trace: GuardTrace
    nsfw_content_detected: bool | None = None
    """Whether the pipeline's own safety checker flagged the image; None without a checker."""

    @property
    def is_covered(self) -> bool:
        """Whether a guard or the pipeline's checker withheld or replaced the image."""
        return self.trace.action in BLOCKING_ACTIONS | REPLACING_ACTIONS or bool(
            self.nsfw_content_detected
        )
