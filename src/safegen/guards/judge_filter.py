"""Any judge as a guard of images: replaces unsafe images, withholds those it cannot judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from PIL import Image
from pydantic import AfterValidator, Field

from safegen.core.concept import Concept
from safegen.core.errors import FileError, is_out_of_memory
from safegen.core.registry import CLIPS
from safegen.data.triplets.censor import Censor, censor_image
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig
from safegen.guards.core.result import GuardResult, InvalidResultError, UnsafeAction
from safegen.judges import Detection, Detections, Judge, load_judge
from safegen.judges.base import check_judge_options

PATH_OPTIONS = ("weights", "prompts")
"""Options of judges that name files."""


class JudgeBackedConfig(GuardConfig):
    """Settings of a guard that uses a judge."""

    judge: str
    """Name of the judge. It should not be the one that measures the result."""
    labels: tuple[str, ...] = ()
    """Labels that make an image unsafe. Default: all unsafe labels of the judge."""
    threshold: float | None = Field(default=None, ge=0.2, le=1)
    """Score from which on a label counts. Default: the judge's own."""
    options: Annotated[dict[str, Any], AfterValidator(check_judge_options)] = Field(
        default_factory=dict
    )
    """Other options of the judge, such as its weights."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's judge, labels and threshold."""
        return {
            "judge": concept.judge,
            "labels": concept.labels,
            "threshold": concept.threshold,
            "options": concept.judge_options,
        }

    def resolve_paths(self, base_dir: Path) -> GuardConfig:
        """Return the settings with the judge's local files resolved against `base_dir`."""
        return self.model_copy(update={"options": resolve_options(self.options, base_dir)})

    def load_judge(self) -> Judge:
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
                f"the judge {self.judge!r} of a guard cannot be loaded: {error}"
            ) from error

    def fingerprint(self) -> dict[str, Any]:
        """Return the settings with the judge's id instead of its options."""
        return hash_settings(super().fingerprint(), self.load_judge())


class JudgeFilterConfig(JudgeBackedConfig):
    """Settings of a judge as a guard."""

    name: Literal["judge-filter"] = "judge-filter"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"image"})
    deviations: ClassVar[str] = "An image that cannot be judged is withheld."

    action: UnsafeAction = "black"
    """What to do with an unsafe image. One that cannot be judged is always withheld."""

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard."""
        return JudgeGuard(self, self.load_judge(), self.action)


def resolve_options(options: Mapping[str, Any], base_dir: Path) -> dict[str, Any]:
    """Return a judge's options with local paths resolved, not those of the bundle or the hub."""

    def is_local(key: str, value: Any) -> bool:
        bundled = str(value) in CLIPS or str(value).startswith("hub:")
        return key in PATH_OPTIONS and isinstance(value, str | Path) and not bundled

    return {k: str(base_dir / v) if is_local(k, v) else v for k, v in options.items()}


def hash_settings(settings: Mapping[str, Any], judge: Judge) -> dict[str, Any]:
    """Return settings with the judge's id, labels and threshold, not `options` and `weights`."""
    others = {k: v for k, v in settings.items() if k not in ("options", "weights")}
    return others | {
        "judge_id": judge.id,
        "labels": list(judge.labels),
        "threshold": judge.threshold,
    }


def detect_images(judge: Judge, images: Sequence[Image.Image]) -> Sequence[Detections]:
    """Return the judge's detections in each image.

    Raises:
        MemoryError: the judge ran out of memory on one of several images, so that the caller can
            retry with fewer. A single image is unjudged instead.
        InvalidResultError: the judge has no labels, or has or detected one outside its
            `label_space`, or returned another number of results or anything else than
            `Detections`. A subclass could call an image safe in spite of its scores.
    """
    if not judge.labels:
        raise InvalidResultError("the judge has no labels, and would call every image safe")
    known = set(judge.label_space)
    if not known.issuperset(judge.labels):
        raise InvalidResultError("the judge's labels must be in its label_space")
    detections = judge.detect(images)
    if len(detections) != len(images):
        raise InvalidResultError(f"{len(detections)} results of the judge for {len(images)} images")
    for each in detections:
        if type(each) is not Detections or any(type(item) is not Detection for item in each.items):
            raise InvalidResultError("the judge must return Detections")
        if not known.issuperset(item.label for item in each.items):
            raise InvalidResultError("the judge detected a label outside its label_space")
    failures = [d.unjudged for d in detections if d.unjudged and is_out_of_memory(d.unjudged)]
    if failures and len(images) > 1:
        raise MemoryError(
            f"{judge.id} could not judge {len(failures)} of {len(images)} images: {failures[0]}"
        )
    return detections


class JudgeGuard(Guard):
    """Guard with a judge that decides which images are shown."""

    def __init__(self, config: GuardConfig, judge: Judge, action: UnsafeAction) -> None:
        super().__init__(config)
        self.judge, self.action = judge, action

    def check_images(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> list[GuardResult]:
        """Return one result per image."""
        detections = detect_images(self.judge, images)
        return [self._result(image, d) for image, d in zip(images, detections, strict=True)]

    def _result(self, image: Image.Image, detections: Detections) -> GuardResult:
        scores: dict[str, float] = {}
        for detection in detections.items:
            if detection.label in self.judge.labels:
                scores[detection.label] = max(detection.score, scores.get(detection.label, 0.0))
        thresholds = {"score": self.judge.threshold}
        verdict = detections.verdict(self.judge.labels, self.judge.threshold)
        if verdict == "safe":
            return GuardResult("none", "", scores, thresholds)
        if verdict == "unsafe":
            replacement = censor_whole(image, self.action)
            return GuardResult(self.action, "unsafe", scores, thresholds, replacement)
        return GuardResult("withhold", f"unjudged: {detections.unjudged}", scores, thresholds)


def censor_whole(image: Image.Image, action: UnsafeAction) -> Image.Image | None:
    """Return the image to show instead of an unsafe one; None for `refuse`."""
    if action == "refuse":
        return None
    if action == "black":
        return Image.new("RGB", image.size)
    box = (0.0, 0.0, float(image.width), float(image.height))
    tile = max(1 / 8, 2 / min(image.size))
    return censor_image(image.convert("RGB"), [box], Censor(style=action, tile=tile))[0]
