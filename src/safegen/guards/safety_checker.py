"""Stable Diffusion's safety checker as a guard of images, with an adjustable threshold."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig
from safegen.guards.core.result import UnsafeAction
from safegen.guards.judge_filter import JudgeGuard, hash_settings
from safegen.judges import Judge, load_judge


class SafetyCheckerConfig(GuardConfig):
    """Settings of the safety checker. The default decides as the pipeline's own checker does."""

    name: Literal["safety-checker"] = "safety-checker"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"image"})
    paper: ClassVar[str] = (
        "Stable Diffusion's own; described by Rando et al. 2022, arXiv:2210.04610"
    )
    code_url: ClassVar[str] = "https://huggingface.co/CompVis/stable-diffusion-safety-checker"
    parity: ClassVar[str] = (
        "The flags equal those of the checker's own `forward` in diffusers 0.42.1: no disagreement "
        "on 576 random images and six random checkers with special-care hits, of which 304 are "
        "flagged."
    )
    deviations: ClassVar[str] = "The threshold and the action on a flagged image are settings."

    weights: str | Path
    """Folder of the checker, diffusers folder that contains one, or `hub:owner/name`."""
    threshold: float = Field(default=0.501, ge=0.2, le=1)
    """0.5 plus the least margin over a concept's threshold. Less is stricter."""
    adjustment: float = Field(default=0.0, ge=-0.5, le=0.5)
    """Added to every cosine, also in the special-care test. Above 0 is stricter."""
    action: UnsafeAction = "black"
    """What to do with a flagged image."""
    allow_pickle: bool = False
    """Whether pickled weights may be loaded."""

    def resolve_paths(self, base_dir: Path) -> GuardConfig:
        """Return the settings with the weights resolved against `base_dir`, unless on the hub."""
        if str(self.weights).startswith("hub:"):
            return self
        return self.model_copy(update={"weights": base_dir / self.weights})

    def load_judge(self) -> Judge:
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
        """Return the settings with the hash of the checker instead of its path."""
        return hash_settings(self.model_dump(mode="json"), self.load_judge())

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard."""
        return JudgeGuard(self, self.load_judge(), self.action)
