"""Interface of guards: frozen settings, the guard built from them, and its hook for one call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from PIL import Image

from safegen.core.concept import Concept
from safegen.core.settings import MethodSettings
from safegen.guards.core.result import GuardResult

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Module

    from safegen.guards.core.adapter import HookPoint, PipelineAdapter
    from safegen.models.families.conditioning import Conditioning


class GuardConfig(MethodSettings, ABC):
    """Frozen settings of one guard, for a stack or a JSON file."""

    name: str
    """Name of the guard in the registry."""
    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Named settings, by preset. `default` changes none."""
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset()
    """Points of the pipeline that this guard hooks: those of the methods that it implements."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """Pipeline classes that the guard supports, with subclasses. Empty: all with its points."""
    exclusive: ClassVar[bool] = False
    """Whether a second guard of this kind on one pipeline would undo the first."""
    paper: ClassVar[str] = "ours"

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the settings that a concept provides; empty if the guard uses none."""
        return {}

    @classmethod
    def unsupported_reason(cls, adapter: PipelineAdapter) -> str:
        """Return why the guard cannot run on a pipeline, a phrase after "it"; empty if it can."""
        if missing := adapter.missing_reason(cls.hook_points):
            return missing
        if cls.pipelines and adapter.family not in cls.pipelines:
            return f"needs a {' or '.join(cls.pipelines)}"
        return ""

    def conflict(self, others: Sequence[GuardConfig], negative_prompt: str) -> str:
        """Return why the guard has no effect with a stack's other guards; empty if it acts.

        Args:
            others: the other guards of the stack.
            negative_prompt: negative prompt of a call.
        """
        return ""

    def fingerprint(self) -> dict[str, Any]:
        """Return the plain values that decide images. Weights count by their hash, not their path.

        Raises:
            UserError: weights that must be hashed cannot be read.
        """
        return self.model_dump(mode="json")

    def resolve_paths(self, base_dir: Path) -> GuardConfig:
        """Return the settings with relative paths resolved against `base_dir`."""
        return self

    @abstractmethod
    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard for a pipeline, its files loaded.

        Raises:
            UserError: a file cannot be used, or a setting has no effect on this pipeline.
        """


class ProbeFunction(Protocol):
    """Function that generates probe images, with all guards but those of images."""

    def __call__(
        self,
        prompts: Sequence[str],
        options: Mapping[str, Any],
        *,
        grad: bool = False,
        embedding_offset: Tensor | None = None,
    ) -> Sequence[Any]:
        """Return one image per prompt.

        Args:
            prompts: prompts of the probes.
            options: options that replace those of the call.
            grad: let a gradient flow to the latents.
            embedding_offset: tensor (b, tokens, width) added to the prompts' embeddings.
        """


class Guard:
    """Guard on a pipeline. Every method is optional. `GuardHook` holds the state of one call."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.hook_points = config.hook_points

    def check_prompts(self, prompts: Sequence[str]) -> Sequence[GuardResult]:
        """Return one result per prompt. Prompts with the action `block` are not generated."""
        raise NotImplementedError

    def probe(
        self, generate: ProbeFunction, prompts: Sequence[str], options: Mapping[str, Any]
    ) -> Sequence[GuardResult]:
        """Return one result per prompt from probe images. `block` stops the prompt.

        Args:
            generate: generates probes for prompts, with options that replace those of the call.
            prompts: prompts of the call.
            options: options of the call for these prompts, including `latents` if they are given
                or an earlier guard changed them.
        """
        raise NotImplementedError

    def wants_reference_stream(self, prompts: Sequence[str]) -> Sequence[bool]:
        """Return which prompts need a second stream from the same latents, dropped at the end."""
        return [False] * len(prompts)

    def start(self, call: Call) -> GuardHook:
        """Return the hook for one call of the pipeline."""
        raise NotImplementedError

    def check_images(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> Sequence[GuardResult]:
        """Return one result per image."""
        raise NotImplementedError


@dataclass(eq=False)
class Call:
    """One call of the pipeline, as guards see it."""

    adapter: PipelineAdapter
    prompts: tuple[str, ...]
    """One per image."""
    negative_prompts: list[str]
    """One per image. A guard that extends them writes here, for the guards after it."""
    options: Mapping[str, Any]
    """Other options of the call."""
    step: int = 0
    """Scheduler steps done so far."""
    reference_rows: Mapping[int, int] = field(default_factory=dict)
    """Row of an image to the row of its reference stream, for images that have one."""
    is_probe: bool = False
    """Whether the call makes probe images, which may have fewer steps than the images."""
    num_steps: int = 0
    """Scheduler steps in all: about twice `num_inference_steps` for second-order schedulers."""

    @property
    def has_guidance(self) -> bool:
        """Whether the call uses classifier-free guidance."""
        return self.adapter.has_guidance(self.options)

    def scale_step(self, step: float) -> int:
        """Return the step of this run that corresponds to a step of a 50-step run."""
        return round(step * self.num_steps / 50)


class GuardHook:
    """State of a guard during one call. Every method is optional. Tensors have a row per image."""

    def edit_negative_embeds(self, embeds: Conditioning) -> Conditioning:
        """Return the negative prompts' embeddings for this step."""
        return embeds

    def edit_prompt_embeds(self, embeds: Conditioning) -> Conditioning:
        """Return the prompts' embeddings for this step."""
        return embeds

    def extra_conditions(self) -> Mapping[str, Conditioning]:
        """Return further embeddings to predict the noise for in this step, by name."""
        return {}

    def submodule_hooks(self, network: Module) -> Sequence[tuple[Module, Callable[..., Any]]]:
        """Return submodules of the denoiser, each with a forward pre-hook that takes keywords."""
        return ()

    def set_rows(self, rows: Mapping[str, slice]) -> None:
        """Receive the denoiser rows of `cond` and of the extra conditions in the same batch."""

    def guidance_correction(self, predictions: Mapping[str, Tensor]) -> Tensor | None:
        """Return the tensor (b, ...) to subtract from the prompt's prediction; None for nothing.

        Args:
            predictions: fp32 predictions `uncond`, `cond` and those of the extra conditions.
        """
        return None

    def on_step_end(self, latents: Tensor) -> Tensor:
        """Return the latents that the next step starts from."""
        return latents

    def results(self) -> Sequence[GuardResult]:
        """Return one result per image after the last step; empty if there is nothing to report."""
        return ()
