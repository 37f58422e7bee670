"""Selection of images for triplets: which show the concept, and which can serve as benign."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from PIL import Image

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.progress import ProgressCallback, track
from safegen.data.images import is_contact_sheet, read_image, size_error
from safegen.data.triplets.censor import Box
from safegen.data.triplets.triplets import TripletIssue
from safegen.judges.base import SCORE_FLOOR, Detections, Judge

BATCH_SIZE = 8
"""Number of images in memory while a folder is judged."""


@dataclass(frozen=True)
class ImageSource:
    """Image that is read when it is needed: a file, or an image in memory."""

    name: str
    """Name in messages."""
    read: Callable[[], Image.Image]
    """Function that returns the image in RGB, and raises `FileError` if it cannot be used."""


@dataclass(frozen=True)
class UnsafeImage:
    """Unsafe image with the boxes of its detections."""

    source: ImageSource
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class DetectionRule:
    """Judge with the labels and the threshold that count."""

    judge: Judge
    labels: frozenset[str]
    threshold: float

    def __post_init__(self) -> None:
        """Raise if there are no labels, the judge has none of them, or the threshold is too low."""
        if not self.labels:
            raise ConfigError("labels must name at least one label of the judge, got none")
        for label in sorted(self.labels - set(self.judge.label_space)):
            raise UnknownNameError(
                f"label of the judge {self.judge.id}", label, self.judge.label_space
            )
        if not SCORE_FLOOR <= self.threshold <= 1:
            raise ConfigError(f"threshold must be in {SCORE_FLOOR}..1, got {self.threshold}")

    def boxes(self, detections: Detections, image: Image.Image) -> tuple[Box, ...]:
        """Return the boxes of the detections that count; without a box, the whole image."""
        whole_image = (0.0, 0.0, float(image.width), float(image.height))
        return tuple(
            d.box or whole_image
            for d in detections.items
            if d.label in self.labels and d.score >= self.threshold
        )


@dataclass(frozen=True)
class Selection:
    """Images of one source, sorted by the judge's verdict."""

    unsafe: list[UnsafeImage]
    safe: list[ImageSource]
    issues: list[TripletIssue]
    """Images that cannot be used."""


def folder_sources(folder: Path) -> list[ImageSource]:
    """Return the files of a folder as sources, by name, without its subfolders and hidden files.

    Raises:
        FileError: it is no folder, or has no files.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise FileError(f"{folder} must be a folder of images, got {kind}")
    files = (path for path in folder.iterdir() if path.is_file())
    paths = sorted(path for path in files if not path.name.startswith("."))
    if not paths:
        raise FileError(f"{folder} has no files. Add images, or use another folder.")
    return [_file_source(path) for path in paths]


def memory_sources(images: Sequence[Image.Image], name: str) -> list[ImageSource]:
    """Return images in memory as sources named `NAME 0`, `NAME 1`, ..."""
    return [_memory_source(image, f"{name} {i}") for i, image in enumerate(images)]


def _memory_source(image: Image.Image, name: str) -> ImageSource:
    return ImageSource(name, lambda: image.convert("RGB"))


def _file_source(path: Path) -> ImageSource:
    def read() -> Image.Image:
        if is_contact_sheet(path):
            raise FileError("the image is a contact sheet of other images")
        return read_image(path)

    return ImageSource(f"{path.parent.name}/{path.name}", read)


def summarize_issues(issues: Sequence[TripletIssue]) -> str:
    """Return the first three issues, and the number of others, in one line."""
    more = f"; and {len(issues) - 3} more" if len(issues) > 3 else ""
    return "; ".join(str(issue) for issue in issues[:3]) + more


def select_images(
    unsafe: tuple[str, Sequence[ImageSource]],
    benign: tuple[str, Sequence[ImageSource]] | None,
    rule: DetectionRule,
    progress: ProgressCallback,
) -> Selection:
    """Return the unsafe images, the benign images, and the images that are skipped.

    Args:
        unsafe: a name for messages and images, of which those judged unsafe are used.
        benign: likewise, of which those judged safe are used; None to take those of `unsafe`.
        rule: judge, labels and threshold.
        progress: called with (description, done, total).

    Raises:
        FileError: no unsafe or no benign image remains.
    """
    name, sources = unsafe
    found = judge_sources(name, sources, rule, progress)
    if not found.unsafe:
        reasons = f": {summarize_issues(found.issues)}" if found.issues else ""
        raise FileError(f"no image of {name} is judged unsafe, so none can be censored{reasons}")
    if benign is None:
        if not found.safe:
            raise FileError(
                f"no image of {name} is judged safe, so none is benign. "
                "Give a folder of benign ones."
            )
        return found
    skipped = found.issues + [TripletIssue(source.name, "no detection") for source in found.safe]
    others = judge_sources(*benign, rule, progress)
    issues = others.issues + [
        TripletIssue(image.source.name, "judged unsafe, so not benign") for image in others.unsafe
    ]
    if not others.safe:
        reasons = summarize_issues(issues)
        raise FileError(f"no image of {benign[0]} can serve as benign: {reasons}")
    return Selection(found.unsafe, others.safe, skipped + issues)


def judge_sources(
    name: str, sources: Sequence[ImageSource], rule: DetectionRule, progress: ProgressCallback
) -> Selection:
    """Return the unsafe images, the safe images and the unusable ones, in order."""
    unsafe: list[UnsafeImage] = []
    safe: list[ImageSource] = []
    issues: list[TripletIssue] = []
    first_use: dict[str, ImageSource] = {}
    stage = f"judging {Path(name).name}"
    for start in track(range(0, len(sources), BATCH_SIZE), stage, progress):
        batch: list[tuple[ImageSource, Image.Image]] = []
        for source in sources[start : start + BATCH_SIZE]:
            image = _read_usable(source, first_use)
            if isinstance(image, TripletIssue):
                issues.append(image)
            else:
                batch.append((source, image))
        results = rule.judge.detect([image for _, image in batch]) if batch else []
        for (source, image), detections in zip(batch, results, strict=True):
            verdict = detections.verdict(rule.labels, rule.threshold)
            if verdict == "unsafe":
                unsafe.append(UnsafeImage(source, rule.boxes(detections, image)))
            elif verdict == "safe":
                safe.append(source)
            else:
                reason = f"the image cannot be judged: {detections.unjudged}"
                issues.append(TripletIssue(source.name, reason))
    return Selection(unsafe, safe, issues)


def _read_usable(
    source: ImageSource, first_use: dict[str, ImageSource]
) -> Image.Image | TripletIssue:
    """Return an image, or the reason why it cannot be used; `first_use` maps pixels to sources."""
    try:
        image = source.read()
    except FileError as error:
        return TripletIssue(source.name, str(error))
    digest = sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    other = first_use.setdefault(digest, source)
    if reason := size_error(image):
        return TripletIssue(source.name, f"the image is too small: {reason}")
    if other is not source:
        return TripletIssue(source.name, f"the image repeats {other.name.rpartition('/')[2]}")
    return image
