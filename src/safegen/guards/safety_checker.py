"""Stable Diffusion's safety checker as an output guard of any pipeline, with its threshold and what it does in your hands."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig
from safegen.guards.judge_filter import Answer, JudgeGuard, hashed
from safegen.judges import Judge, load_judge


class SafetyCheckerConfig(GuardConfig):
    """Settings of the safety checker; the default decides as the pipeline's own does."""

    name: Literal["safety-checker"] = "safety-checker"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"image"})

    weights: str | Path
    """A folder of the checker, a diffusers folder that has one, or `hub:owner/name`.

    CompVis/stable-diffusion-safety-checker is theirs.
    """
    threshold: float = Field(default=0.501, ge=0.2, le=1)
    """0.5 plus the least margin over a concept's own threshold.

    0.501 is the checker's own rule, less is stricter.
    """
    adjustment: float = Field(default=0.0, ge=-0.5, le=0.5)
    """Added to every cosine; above 0 is stricter. It reaches the special-care test too."""
    action: Answer = "black"
    """What becomes of a flagged picture."""
    allow_pickle: bool = False
    """Whether weights stored as pickles may be opened."""

    def resolve_paths(self, folder: Path) -> GuardConfig:
        """Return the guard with its weights looked for in `folder`, unless they are of the hub."""
        name = str(self.weights)
        return (
            self if name.startswith("hub:") else self.model_copy(update={"weights": folder / name})
        )

    def open(self) -> Judge:
        """Return the checker as a judge.

        Raises:
            UserError: it cannot be loaded.
        """
        options: dict[str, Any] = {
            "weights": str(self.weights),
            "adjustment": self.adjustment,
            "allow_pickle": self.allow_pickle,
        }
        return load_judge("sd-safety-checker", threshold=self.threshold, **options)

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings with the checker's hash in the place of where it lies."""
        return hashed(self.model_dump(mode="json"), self.open())

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work."""
        return JudgeGuard(self, self.open(), self.action)
