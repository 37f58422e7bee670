"""What every guard is: frozen settings, what they become on a pipeline, and the trail that each picture carries. Loads no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from PIL import Image
from pydantic import BaseModel, ConfigDict

from safegen.core.concept import Concept

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from safegen.guards.core.adapter import HookPoint, PipelineAdapter, Text

Probe = Callable[..., Sequence[Any]]
"""Called with texts, options in the place of the call's, `grad=True` where a gradient must flow to the latents, and `shift`, (b, tokens,
width), where it is to be added to the texts' embeddings; gives pictures."""
Action = Literal["none", "edit", "block", "black", "blur", "mosaic", "refuse", "withhold"]
"""What was done: nothing, the drawing steered, the prompt not drawn, the picture replaced or covered or not given, or a fault."""
BLOCKING_ACTIONS: frozenset[Action] = frozenset({"block", "refuse", "withhold"})
"""After these there is no picture."""
REPLACING_ACTIONS: frozenset[Action] = frozenset({"black", "blur", "mosaic"})
"""After these another picture is shown, which the finding must bring."""
ACTIONS: frozenset[Action] = frozenset(get_args(Action))


class GuardConfig(BaseModel, ABC):
    """Settings of one guard. Build it, put it on a stack, write it to JSON; never change it."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    name: str
    """The guard, as in the table."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings beside `default`, which changes none."""
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset()
    """Where it takes hold; see `takes`."""
    families: ClassVar[tuple[str, ...]] = ()
    """Classes of the pipelines whose parts it reads; any that has its seams when empty."""
    later: ClassVar[frozenset[str]] = frozenset()
    """Settings that came after stacks were hashed with this guard: at their defaults they are no fact, so those hashes stay."""
    exclusive: ClassVar[bool] = False
    """Whether a second one on the same pipeline would undo the first."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the settings that a concept gives this guard; none where it has no use for one."""
        return {}

    @classmethod
    def unsupported_reason(cls, border: PipelineAdapter) -> str:
        """Return why it cannot run on a pipeline, as what follows `it`; nothing where it can."""
        if cls.families and border.pipeline_class not in cls.families:
            return f"reads parts of a {' or '.join(cls.families)}"
        if cls.hook_points - border.hook_points:
            return f"acts inside the denoiser, which is known of {', '.join(border.known)}"
        return (
            "looks at pictures, and this draws videos"
            if "image" in cls.hook_points and border.videos
            else ""
        )

    def conflict(self, others: Sequence[GuardConfig], negative: str) -> str:
        """Return why it would do nothing beside a stack's other guards and negative prompt, as what follows `it`; nothing where it acts."""
        return ""

    @property
    def takes(self) -> frozenset[HookPoint]:
        """Where it takes hold with these settings."""
        return self.hook_points

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides pictures, as plain values; weights by their hash and not by their place.

        Raises:
            UserError: weights that must be hashed cannot be read.
        """
        fields = type(self).model_fields
        return {
            k: v
            for k, v in self.model_dump(mode="json").items()
            if k not in self.later or getattr(self, k) != fields[k].default
        }

    def resolve_paths(self, folder: Path) -> GuardConfig:
        """Return the guard with its files looked for beside a recipe that lies in `folder`."""
        return self

    @abstractmethod
    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work on a pipeline, its files loaded.

        Raises:
            UserError: a file cannot be used, or a setting has no effect on this pipeline.
        """


@dataclass(frozen=True)
class GuardResult:
    """What a guard says of one picture or its prompt."""

    action: Action = "none"
    reason: str = ""
    """Why, in one word that can be counted: `word`, `unsafe`, `unjudged` ..."""
    scores: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    image: Image.Image | None = None
    """The picture to show in place of the one that was looked at."""
    start: Any = field(default=None, compare=False)
    """Latents (c, h, w) of unit variance for the picture to start from, in place of its own."""


class Guard:
    """A guard at work.

    Every method is optional; what belongs to one call of the pipeline lives in the `Turn`.
    """

    def __init__(self, guard: GuardConfig) -> None:
        self.guard = guard

    @property
    def active_points(self) -> frozenset[HookPoint]:
        """Where it takes hold."""
        return self.guard.takes

    def check(self, prompts: Sequence[str]) -> Sequence[GuardResult]:
        """Return a finding a prompt, before anything is drawn.

        Those with the action `block` are not drawn.
        """
        raise NotImplementedError

    def probe(
        self, draw: Probe, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> Sequence[GuardResult]:
        """Return a finding a prompt from pictures drawn beforehand; those with the action `block` are not drawn.

        Args:
            draw: from texts and options in the place of the call's to pictures, by the stack's
                guards but those of pictures.
            prompts: what is asked for.
            options: the other arguments of the call, lists for these prompts only; `latents` where
                the start is given, or was moved before.
        """
        raise NotImplementedError

    def wants_reference_stream(self, prompts: Sequence[str]) -> Sequence[bool]:
        """Return which prompts are drawn in two streams from one start, the second to be mixed into the first and thrown away."""
        return [False] * len(prompts)

    def start(self, call: Call) -> GuardHook:
        """Return the state of one call of the pipeline."""
        raise NotImplementedError

    def look(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Sequence[GuardResult]:
        """Return a finding a picture."""
        raise NotImplementedError


@dataclass(eq=False)
class Call:
    """One call of the pipeline."""

    border: PipelineAdapter
    prompts: tuple[str, ...]
    """One a picture."""
    negative: list[str]
    """What each picture is pushed away from.

    A guard that adds to it writes here, for those after it.
    """
    options: Mapping[str, Any]
    """The other arguments of the call."""
    step: int = 0
    """Steps of the scheduler done so far."""
    reference_rows: Mapping[int, int] = field(default_factory=dict)
    """Row of a picture: row of its second stream, for pictures that have one."""
    steps: int = 0
    """Steps in all: turns of the pipeline's loop, so about twice as many as asked for with a scheduler of second order."""

    def at(self, fiftieths: float) -> int:
        """Return a step of a 50-step run as a step of this one."""
        return round(fiftieths * self.steps / 50)


class GuardHook:
    """A guard during one call of the pipeline.

    Every method is optional; tensors hold one row a picture.
    """

    def edit_negative_embeds(self, text: Text) -> Text:
        """Return what the blank side of guidance is conditioned on in this step."""
        return text

    def edit_prompt_embeds(self, text: Text) -> Text:
        """Return what the prompt's side is conditioned on in this step."""
        return text

    def extra_conditions(self) -> Mapping[str, Text]:
        """Return the texts under which the denoiser is asked besides in this step, by a name of the guard's own."""
        return {}

    def submodule_hooks(self, network: Module) -> Sequence[tuple[Module, Callable[..., Any]]]:
        """Return parts of the denoiser, each with what torch calls before it (`register_forward_pre_hook`, with keywords)."""
        return ()

    def set_rows(self, rows: Mapping[str, slice]) -> None:
        """Take in where rows lie in the denoiser's batch in this step: `cond`, and by name the branches that are asked in the same."""

    def guidance_correction(self, said: Mapping[str, Tensor]) -> Tensor | None:
        """Return Gamma, (b, ...): what is taken from the prompt's prediction in this step; None for nothing.

        Args:
            said: fp32 predictions `uncond`, `cond` and those of the branches.
        """
        return None

    def on_step_end(self, latents: Tensor) -> Tensor:
        """Return the latents that the next step starts from."""
        return latents

    def results(self) -> Sequence[GuardResult]:
        """Return a finding a picture once all is drawn; nothing where there is nothing to say."""
        return ()


@dataclass(frozen=True)
class GuardRecord:
    """What one guard did for one picture."""

    guard: str
    action: Action = "none"
    reason: str = ""
    scores: Mapping[str, float] = field(default_factory=dict)
    thresholds: Mapping[str, float] = field(default_factory=dict)
    calls: int = 0
    """How often it was asked, for all pictures of the batch together."""
    rows: int = 0
    """Rows that it added to the denoiser's batches, for this picture, over all steps.

    Not those of probes, or of a second stream.
    """
    ms: float = 0.0
    """Milliseconds of the guard's own, this picture's share of its batch.

    Rows of the denoiser are not in it.
    """


@dataclass(frozen=True)
class GuardTrace:
    """What became of one picture, and by whom."""

    action: Action
    """The last action that changed what is shown.

    `none` for a picture that is shown as it was drawn.
    """
    reason: str
    """`guard: reason` of that action; of a fault, what failed."""
    guards: tuple[GuardRecord, ...] = ()
    """In the order of the stack."""

    @property
    def withheld(self) -> bool:
        """Whether there is no picture."""
        return self.action in BLOCKING_ACTIONS

    def to_json(self, *, times: bool = True) -> dict[str, Any]:
        """Return plain values; without `times`, equal pictures have equal trails."""
        notes = [
            {
                k: dict(v) if isinstance(v, Mapping) else v
                for k, v in note.__dict__.items()
                if times or k != "ms"
            }
            for note in self.guards
        ]
        return {"action": self.action, "reason": self.reason, "guards": notes}


@dataclass(frozen=True)
class GeneratedImage:
    """A picture, or None where it was withheld, and its trail."""

    image: Image.Image | None
    trail: GuardTrace
