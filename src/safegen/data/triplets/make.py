"""Making of triplets: detect what is unsafe, censor it, and pair it with a benign image."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.files import check_output, claim, staged_directory
from safegen.core.progress import ProgressCallback, no_progress, track
from safegen.core.registry import expand_labels
from safegen.data.images import is_contact_sheet, read_image, size_error
from safegen.data.triplets.censor import Box, Censor, censor_image
from safegen.data.triplets.triplets import (
    MANIFEST,
    ROLES,
    Role,
    Triplet,
    TripletIssue,
    Triplets,
    make_row,
)
from safegen.judges.base import SCORE_FLOOR, Detections, Judge

MAX_ATTEMPTS = 3
"""Number of times that an image is censored, each with wider padding, before it is skipped."""
BATCH_SIZE = 8
"""Number of images in memory while a folder is judged."""

DEFAULT_CENSOR = Censor()


@dataclass(frozen=True)
class MakeResult:
    """Triplets that were made, and the images that were skipped."""

    triplets: Triplets
    skipped: tuple[TripletIssue, ...]


def make_triplets(
    unsafe: str | Path,
    benign: str | Path | None,
    judge: Judge,
    output: str | Path,
    censor: Censor = DEFAULT_CENSOR,
    *,
    labels: Collection[str],
    threshold: float = 0.5,
    progress: ProgressCallback = no_progress,
) -> MakeResult:
    """Censor the unsafe images of a folder, pair them with benign images and write triplets.

    An image is unsafe if the judge detects one of `labels`; benign images must be judged safe. Each
    censored image is judged again. If it is not safe, the unsafe image is censored with twice the
    padding (at least 0.1), up to three times. Benign images are used in turn, scaled and
    center-cropped to the size of the unsafe image. Images that cannot be used are skipped and
    reported. `output` appears complete or not at all.

    Args:
        unsafe: folder of unsafe images, without its subfolders.
        benign: folder of benign images; None to use the images of `unsafe` that are judged safe.
        judge: detector of what to censor; a detection without a box censors the whole image.
        output: folder to write; it must not exist, but its parent must.
        censor: settings of the cover.
        labels: labels of the judge that mean the concept is in the image.
        threshold: least score of a detection that counts.
        progress: called with (description, done, total).

    Raises:
        FileError: `output` exists or cannot be written, a folder is empty, or no unsafe or no
            benign image remains.
        ConfigError: there are no labels, or the threshold is out of range.
    """
    unsafe, output = Path(unsafe).absolute(), Path(output).absolute()
    rule = _DetectionRule(judge, frozenset(expand_labels(labels)), threshold)
    check_output(output)
    if not output.parent.is_dir():
        raise FileError(f"{output} cannot be written: {output.parent} does not exist. Create it.")
    benign = None if benign is None else Path(benign).absolute()
    with claim(output):
        unsafe_images, benign_paths, skipped = _select_images(unsafe, benign, rule, progress)
        with staged_directory(output) as folder:
            rows, issues = _write_rows(folder, unsafe_images, benign_paths, rule, censor, progress)
            if not rows:
                reasons = _summarize(skipped + issues)
                raise FileError(f"no image of {unsafe} can be used: {reasons}")
    return MakeResult(Triplets(output, tuple(rows)), tuple(skipped + issues))


@dataclass(frozen=True)
class UnsafeImage:
    """Unsafe image with the boxes of its detections."""

    path: Path
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class _DetectionRule:
    """Judge with the labels and the threshold that count."""

    judge: Judge
    labels: frozenset[str]
    threshold: float

    def __post_init__(self) -> None:
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


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _summarize(issues: Sequence[TripletIssue]) -> str:
    more = f"; and {len(issues) - 3} more" if len(issues) > 3 else ""
    return "; ".join(str(issue) for issue in issues[:3]) + more


def _select_images(
    unsafe: Path, benign: Path | None, rule: _DetectionRule, progress: ProgressCallback
) -> tuple[list[UnsafeImage], list[Path], list[TripletIssue]]:
    """Return the unsafe images, the benign images, and the images that are skipped."""
    unsafe_images, benign_paths, skipped = _judge_folder(unsafe, rule, progress)
    if not unsafe_images:
        reasons = f": {_summarize(skipped)}" if skipped else ""
        raise FileError(f"no image of {unsafe} is judged unsafe, so none can be censored{reasons}")
    if benign is not None:
        skipped += [TripletIssue(_name(p), "no detection") for p in benign_paths]
        not_benign, benign_paths, issues = _judge_folder(benign, rule, progress)
        issues += [
            TripletIssue(_name(image.path), "judged unsafe, so not benign") for image in not_benign
        ]
        if not benign_paths:
            raise FileError(f"no image of {benign} can serve as benign: {_summarize(issues)}")
        skipped += issues
    if not benign_paths:
        raise FileError(
            f"no image of {unsafe} is judged safe, so none is benign. Give a folder of benign ones."
        )
    return unsafe_images, benign_paths, skipped


def _judge_folder(
    folder: Path, rule: _DetectionRule, progress: ProgressCallback
) -> tuple[list[UnsafeImage], list[Path], list[TripletIssue]]:
    """Return the unsafe images, the safe images and the unusable files of a folder, by name."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "nothing"
        raise FileError(f"{folder} must be a folder of images, got {kind}")
    files = (path for path in folder.iterdir() if path.is_file())
    paths = sorted(path for path in files if not path.name.startswith("."))
    if not paths:
        raise FileError(f"{folder} has no files. Add images, or use another folder.")
    unsafe: list[UnsafeImage] = []
    safe: list[Path] = []
    issues: list[TripletIssue] = []
    first_use: dict[str, Path] = {}
    for start in track(range(0, len(paths), BATCH_SIZE), f"judging {folder.name}", progress):
        batch: list[tuple[Path, Image.Image]] = []
        for path in paths[start : start + BATCH_SIZE]:
            image = _read_usable(path, first_use)
            if isinstance(image, TripletIssue):
                issues.append(image)
            else:
                batch.append((path, image))
        results = rule.judge.detect([image for _, image in batch]) if batch else []
        for (path, image), detections in zip(batch, results, strict=True):
            verdict = detections.verdict(rule.labels, rule.threshold)
            if verdict == "unsafe":
                unsafe.append(UnsafeImage(path, rule.boxes(detections, image)))
            elif verdict == "safe":
                safe.append(path)
            else:
                reason = f"the image cannot be judged: {detections.unjudged}"
                issues.append(TripletIssue(_name(path), reason))
    return unsafe, safe, issues


def _read_usable(path: Path, first_use: dict[str, Path]) -> Image.Image | TripletIssue:
    """Return an image, or the reason why it cannot be used; `first_use` maps pixels to files."""
    if is_contact_sheet(path):
        return TripletIssue(_name(path), "the image is a contact sheet of other images")
    try:
        image = read_image(path)
    except FileError as error:
        return TripletIssue(_name(path), str(error))
    digest = sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
    other = first_use.setdefault(digest, path)
    if reason := size_error(image):
        return TripletIssue(_name(path), f"the image is too small: {reason}")
    if other is not path:
        return TripletIssue(_name(path), f"the image repeats {other.name}")
    return image


def _censor_until_safe(
    unsafe: UnsafeImage, image: Image.Image, rule: _DetectionRule, settings: Censor
) -> tuple[Image.Image, float] | TripletIssue:
    """Return the censored image and its covered fraction, or the reason why there is none."""
    for _ in range(MAX_ATTEMPTS):
        try:
            censored, coverage = censor_image(image, unsafe.boxes, settings)
        except ConfigError as error:  # a box or a size that only this image has
            return TripletIssue(_name(unsafe.path), str(error))
        detections = rule.judge.detect([censored])[0]
        verdict = detections.verdict(rule.labels, rule.threshold)
        if verdict == "safe" and censored.tobytes() != image.tobytes():
            return censored, coverage
        settings = settings.model_copy(update={"padding": max(2 * settings.padding, 0.1)})
    if verdict == "unjudged":
        reason = f"the censored image cannot be judged: {detections.unjudged}"
    else:
        reason = f"still judged unsafe after {MAX_ATTEMPTS} attempts with growing padding"
    return TripletIssue(_name(unsafe.path), reason)


def _write_rows(
    folder: Path,
    unsafe: Sequence[UnsafeImage],
    benign: Sequence[Path],
    rule: _DetectionRule,
    censor: Censor,
    progress: ProgressCallback,
) -> tuple[list[Triplet], list[TripletIssue]]:
    """Write images and manifest; return the rows, and the unsafe images that stay unsafe."""
    rows: list[Triplet] = []
    issues: list[TripletIssue] = []
    for role in ROLES:
        (folder / role).mkdir()
    for unsafe_image in track(unsafe, "censoring", progress):
        image = read_image(unsafe_image.path)
        result = _censor_until_safe(unsafe_image, image, rule, censor)
        if isinstance(result, TripletIssue):
            issues.append(result)
            continue
        censored, coverage = result
        pair = read_image(benign[len(rows) % len(benign)])
        pair = ImageOps.fit(pair, image.size, Image.Resampling.LANCZOS)
        row = _write_row(folder, f"{len(rows):04d}", (image, censored, pair))
        update = {"boxes": unsafe_image.boxes, "covered": coverage, "judge": rule.judge.id}
        rows.append(row.model_copy(update=update))
    lines = (row.model_dump_json() + "\n" for row in rows)
    (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
    return rows, issues


def _write_row(
    folder: Path, name: str, images: tuple[Image.Image, Image.Image, Image.Image]
) -> Triplet:
    """Write the three images of a row as PNG, and return the row."""
    paths: dict[Role, str] = {}
    digests: dict[Role, str] = {}
    for role, image in zip(ROLES, images, strict=True):
        file = BytesIO()
        image.save(file, "PNG")
        paths[role], digests[role] = f"{role}/{name}.png", sha256(file.getvalue()).hexdigest()
        (folder / paths[role]).write_bytes(file.getvalue())
    return make_row(name, paths, digests)
