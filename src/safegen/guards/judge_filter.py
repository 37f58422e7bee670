"""Any judge as an output guard: what it calls unsafe, or cannot judge, is not shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import AfterValidator, Field

from safegen.core.concept import Concept
from safegen.core.errors import FileError, is_out_of_memory
from safegen.core.registry import CLIPS
from safegen.data.triplets.censor import Censor, censor
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Action, Guard, GuardConfig, GuardResult
from safegen.judges import Detections, Judge, load_judge
from safegen.judges.base import no_rule

Answer = Literal["black", "blur", "mosaic", "refuse"]
"""What to do with an unsafe picture: a black one in its place, the whole of it covered, or no picture at all."""
FILES = ("weights", "prompts")
"""Options of judges that name files."""


class JudgeBackedConfig(GuardConfig):
    """A guard that asks a judge."""

    judge: str
    """Name of the judge that has the last word; it should not be the one that measures."""
    labels: tuple[str, ...] = ()
    """Its labels that make a picture unsafe; all its unsafe ones when empty."""
    threshold: float | None = Field(default=None, ge=0.2, le=1)
    """From which score on; the judge's own when not given."""
    options: Annotated[dict[str, Any], AfterValidator(no_rule)] = Field(default_factory=dict)
    """What the judge takes besides: its weights, prompts ..."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's judge, labels and threshold."""
        return {"judge": concept.judge, "labels": concept.labels, "threshold": concept.threshold}

    def resolve_paths(self, folder: Path) -> GuardConfig:
        """Return the guard with its judge's files looked for in `folder`, unless they are bundled or of the hub."""
        return self.model_copy(update={"options": resolve_paths(self.options, folder)})

    def open(self) -> Judge:
        """Return the judge.

        Raises:
            UserError: it cannot be loaded.
        """
        try:
            return load_judge(
                self.judge, labels=self.labels, threshold=self.threshold, **self.options
            )
        except OSError as error:
            raise FileError(
                f"the judge {self.judge!r} of a guard cannot be opened: {error}"
            ) from error

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings with the judge's id in the place of where its weights lie."""
        return hashed(super().fingerprint(), self.open())


class JudgeFilterConfig(JudgeBackedConfig):
    """Settings of a judge as a guard."""

    name: Literal["judge-filter"] = "judge-filter"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"image"})

    action: Answer = "black"
    """What becomes of an unsafe picture. One that could not be judged is always withheld."""

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work."""
        return JudgeGuard(self, self.open(), self.action)


def resolve_paths(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Return a judge's options with the files among them looked for in `folder`, unless they are bundled or of the hub."""
    local = {
        k
        for k in FILES
        if isinstance(v := options.get(k), str | Path)
        and str(v) not in CLIPS
        and not str(v).startswith("hub:")
    }
    return {k: str(folder / v) if k in local else v for k, v in options.items()}


def hashed(settings: dict[str, Any], judge: Judge) -> dict[str, Any]:
    """Return settings without `options` and `weights`, and with the judge's id, its labels and its threshold."""
    kept = {k: v for k, v in settings.items() if k not in ("options", "weights")}
    return kept | {"judge_id": judge.id, "labels": list(judge.labels), "threshold": judge.threshold}


def ask_judge(judge: Judge, images: Sequence[Image.Image]) -> Sequence[Detections]:
    """Return the judge's detections in each image.

    Raises:
        MemoryError: it could not judge one of several for want of memory, as it may when fewer are
            drawn at once. One that is alone is unjudged.
        ValueError: there are more or fewer.
    """
    results = judge.detect(images)
    if len(results) != len(images):
        raise ValueError(f"the judge gave {len(results)} answers on {len(images)} pictures")
    short = [d.unjudged for d in results if d.unjudged and is_out_of_memory(d.unjudged)]
    if short and len(images) > 1:
        raise MemoryError(
            f"{judge.id} could not judge {len(short)} of {len(images)} pictures: {short[0]}"
        )
    return results


class JudgeGuard(Guard):
    """A judge that decides what is shown."""

    def __init__(self, guard: GuardConfig, judge: Judge, answer: Answer) -> None:
        super().__init__(guard)
        self.judge, self.answer = judge, answer

    def look(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[GuardResult]:
        """Return what becomes of each picture."""
        results = ask_judge(self.judge, images)
        return [self._one(image, each) for image, each in zip(images, results, strict=True)]

    def _one(self, image: Image.Image, detections: Detections) -> GuardResult:
        scores: dict[str, float] = {}
        for seen in detections.items:
            if seen.label in self.judge.labels:
                scores[seen.label] = max(seen.score, scores.get(seen.label, 0.0))
        limits = {"score": self.judge.threshold}
        verdict = detections.verdict(self.judge.labels, self.judge.threshold)
        if verdict == "safe":
            return GuardResult("none", "", scores, limits)
        if verdict == "unsafe":
            return censor_whole(image, self.answer, "unsafe", scores, limits)
        return GuardResult("withhold", f"unjudged: {detections.unjudged}", scores, limits)


def censor_whole(
    image: Image.Image,
    answer: Answer,
    reason: str,
    scores: dict[str, float],
    limits: dict[str, float],
) -> GuardResult:
    """Return what is shown in the place of an unsafe picture: nothing, black, or the whole of it under a mosaic or blur."""
    action: Action = answer
    if answer == "refuse":
        return GuardResult(action, reason, scores, limits)
    if answer == "black":
        return GuardResult(action, reason, scores, limits, Image.new("RGB", image.size))
    whole = (0.0, 0.0, float(image.width), float(image.height))
    tile = max(1 / 8, 2 / min(image.size))
    shown, _ = censor(image.convert("RGB"), [whole], Censor(style=answer, tile=tile))
    return GuardResult(action, reason, scores, limits, shown)
