"""Judge images for a concept: verdicts with their scores, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, FileError, check_keywords
from safegen.core.files import exists
from safegen.core.text import cut_text
from safegen.data.images import is_contact_sheet
from safegen.judges import Detections, Judge, Verdict, load_concept_judge, load_judge
from safegen.judges.images import ImageInput, ImageInputs, list_images


@dataclass(frozen=True)
class Judgment:
    """Verdict of a judge on one image."""

    image: str
    """Path of the file; `#0`, `#1` ... for images and arrays."""
    verdict: Verdict
    """Decision: unsafe, safe, or unjudged."""
    score: float | None
    """Highest score of a label that makes an image unsafe; 0 if there is none, None if unjudged."""
    detections: Detections
    """Everything that the judge detected, before labels and threshold."""

    @property
    def reason(self) -> str | None:
        """Why the image is unjudged; None if it was judged."""
        return self.detections.unjudged

    def __repr__(self) -> str:
        """Return image, verdict and score or reason in one line."""
        why = f"score={self.score:.2f}" if self.score is not None else f"reason={self.reason!r}"
        return cut_text(f"Judgment({self.image!r}, {self.verdict!r}, {why})")


@check_keywords
def judge(
    images: ImageInputs,
    concept: Concept | str | Path | None = None,
    *,
    judge: Judge | str | None = None,
    labels: str | Sequence[str] = (),
    threshold: float | None = None,
) -> list[Judgment]:
    """Judge images and return one verdict per image, in order.

    An image that cannot be read or judged is `unjudged` with the reason, never `safe`.

    Args:
        images: one image or several: Pillow images, files, or numpy arrays (h, w, 3) of uint8 or
            of floats in [0, 1]. A folder stands for its files by name, without hidden ones and
            contact sheets.
        concept: a name, a TOML file or a `Concept`. It gives the judge, labels and threshold.
        judge: name of a judge, or one from `load_judge`, in place of the concept's.
        labels: label or labels that make an image unsafe. Default: the concept's, else the judge's.
        threshold: lowest score that makes an image unsafe. Default: the concept's, else the
            judge's.

    Raises:
        ConfigError: there are no images, neither a concept nor a judge, or another judge than the
            concept's without labels.
        UserError: the concept or the judge cannot be loaded, or a folder cannot be read.

    Example:
        >>> unsafe, censored, benign = safegen.Triplets.load("mini:skulls").images(0)
        >>> [judgment.verdict for judgment in safegen.judge([unsafe, benign], "skulls")]
        ['unsafe', 'safe']
    """
    labels = [labels] if isinstance(labels, str) else labels
    chosen = _choose_judge(concept, judge, labels, threshold)
    given = _read_folder(images) if isinstance(images, str | Path) else list_images(images)
    if not given:
        raise ConfigError("images must be at least one, got none")
    return [
        _decide(chosen, image, i, detections)
        for i, (image, detections) in enumerate(zip(given, chosen.detect(given), strict=True))
    ]


def _choose_judge(
    concept: Concept | str | Path | None,
    judge: Judge | str | None,
    labels: Sequence[str],
    threshold: float | None,
) -> Judge:
    """Return the judge with the labels and the threshold to use."""
    if concept is None and judge is None:
        raise ConfigError("judge needs a concept or the name of a judge, got neither")
    if judge is not None and not isinstance(judge, str):
        if concept is not None or labels or threshold is not None:
            raise ConfigError(
                "a loaded judge must come alone, as it has its labels and threshold. "
                "Leave out concept, labels and threshold, or give its name"
            )
        return judge
    if concept is None:
        return load_judge(judge or "", labels=labels, threshold=threshold)
    known = load_concept(str(concept)) if isinstance(concept, str | Path) else concept
    if not isinstance(known, Concept):
        raise ConfigError(
            f"concept must be a name, a TOML file or a Concept, got {type(known).__name__}. "
            "Images come first; a loaded judge goes with judge=."
        )
    return load_concept_judge(known, judge, labels=labels, threshold=threshold)


def _read_folder(path: str | Path) -> list[ImageInput]:
    """Return the files of a folder by name; a file is a list of one.

    Raises:
        FileError: there is no such file or folder, or the folder has no images.
    """
    path = Path(path)
    if not exists(path):
        raise FileError(f"{str(path)!r} must be an image or a folder of images. It does not exist")
    if not path.is_dir():
        return [path]
    files = sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    found: list[ImageInput] = [file for file in files if not is_contact_sheet(file)]
    if not found:
        raise FileError(f"{str(path)!r} must be an image or a folder of images. It is empty")
    return found


def _decide(judge: Judge, image: ImageInput, index: int, detections: Detections) -> Judgment:
    scores = [d.score for d in detections.items if d.label in judge.labels]
    return Judgment(
        image=str(image) if isinstance(image, str | Path) else f"#{index}",
        verdict=detections.verdict(judge.labels, judge.threshold),
        score=None if detections.unjudged is not None else max(scores, default=0.0),
        detections=detections,
    )
