"""Making of triplets: detect what is unsafe, censor it, and pair it with a benign image."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from safegen.core.errors import ConfigError, FileError
from safegen.core.files import check_output, claim, staged_directory
from safegen.core.progress import ProgressCallback, no_progress, track
from safegen.core.registry import expand_labels
from safegen.data.triplets.censor import Censor, censor_image
from safegen.data.triplets.select import (
    DetectionRule,
    ImageSource,
    UnsafeImage,
    folder_sources,
    memory_sources,
    select_images,
    summarize_issues,
)
from safegen.data.triplets.triplets import (
    MANIFEST,
    ROLES,
    Role,
    Triplet,
    TripletIssue,
    Triplets,
    make_row,
)
from safegen.judges.base import Judge

MAX_ATTEMPTS = 3
"""Number of times that an image is censored, each with wider padding, before it is skipped."""

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
    rule = DetectionRule(judge, frozenset(expand_labels(labels)), threshold)
    check_output(output)
    if not output.parent.is_dir():
        raise FileError(f"{output} cannot be written: {output.parent} does not exist. Create it.")
    benign = None if benign is None else Path(benign).absolute()
    with claim(output):
        selection = select_images(
            (str(unsafe), folder_sources(unsafe)),
            None if benign is None else (str(benign), folder_sources(benign)),
            rule,
            progress,
        )
        with staged_directory(output) as folder:
            for role in ROLES:
                (folder / role).mkdir()

            def write(name: str, data: bytes) -> None:
                (folder / name).write_bytes(data)

            rows, issues = _write_rows(
                selection.unsafe, selection.safe, rule, censor, write, progress
            )
            skipped = selection.issues + issues
            if not rows:
                raise FileError(f"no image of {unsafe} can be used: {summarize_issues(skipped)}")
            lines = (row.model_dump_json() + "\n" for row in rows)
            (folder / MANIFEST).write_text("".join(lines), encoding="utf-8")
    return MakeResult(Triplets(output, tuple(rows)), tuple(skipped))


def make_triplets_in_memory(
    unsafe: Sequence[Image.Image],
    benign: Sequence[Image.Image],
    judge: Judge,
    censor: Censor = DEFAULT_CENSOR,
    *,
    labels: Collection[str],
    threshold: float = 0.5,
    progress: ProgressCallback = no_progress,
) -> MakeResult:
    """Make triplets of images in memory; nothing is written.

    The rows and the hash are those that `make_triplets` gives for files with these images.

    Args:
        unsafe: images, of which those judged unsafe are used.
        benign: images, of which those judged safe are used.
        judge: detector of what to censor.
        censor: settings of the cover.
        labels: labels of the judge that mean the concept is in the image.
        threshold: least score of a detection that counts.
        progress: called with (description, done, total).

    Raises:
        FileError: no unsafe or no benign image remains.
        ConfigError: there are no labels, or the threshold is out of range.
    """
    rule = DetectionRule(judge, frozenset(expand_labels(labels)), threshold)
    selection = select_images(
        ("generated images", memory_sources(unsafe, "unsafe image")),
        ("benign images", memory_sources(benign, "benign image")),
        rule,
        progress,
    )
    files: dict[str, bytes] = {}
    rows, issues = _write_rows(
        selection.unsafe, selection.safe, rule, censor, files.__setitem__, progress
    )
    skipped = selection.issues + issues
    if not rows:
        raise FileError(f"no generated image can be used: {summarize_issues(skipped)}")
    return MakeResult(Triplets(Path(), tuple(rows), files), tuple(skipped))


def censor_until_safe(
    unsafe: UnsafeImage, image: Image.Image, rule: DetectionRule, settings: Censor
) -> tuple[Image.Image, float] | TripletIssue:
    """Return the censored image and its covered fraction, or the reason why there is none."""
    for _ in range(MAX_ATTEMPTS):
        try:
            censored, coverage = censor_image(image, unsafe.boxes, settings)
        except ConfigError as error:  # a box or a size that only this image has
            return TripletIssue(unsafe.source.name, str(error))
        detections = rule.judge.detect([censored])[0]
        verdict = detections.verdict(rule.labels, rule.threshold)
        if verdict == "safe" and censored.tobytes() != image.tobytes():
            return censored, coverage
        settings = settings.model_copy(update={"padding": max(2 * settings.padding, 0.1)})
    if verdict == "unjudged":
        reason = f"the censored image cannot be judged: {detections.unjudged}"
    else:
        reason = f"still judged unsafe after {MAX_ATTEMPTS} attempts with growing padding"
    return TripletIssue(unsafe.source.name, reason)


def _write_rows(
    unsafe: Sequence[UnsafeImage],
    benign: Sequence[ImageSource],
    rule: DetectionRule,
    censor: Censor,
    write: Callable[[str, bytes], None],
    progress: ProgressCallback,
) -> tuple[list[Triplet], list[TripletIssue]]:
    """Write the images as PNG; return the rows, and the unsafe images that stay unsafe."""
    rows: list[Triplet] = []
    issues: list[TripletIssue] = []
    for unsafe_image in track(unsafe, "censoring", progress):
        image = unsafe_image.source.read()
        result = censor_until_safe(unsafe_image, image, rule, censor)
        if isinstance(result, TripletIssue):
            issues.append(result)
            continue
        censored, coverage = result
        pair = benign[len(rows) % len(benign)].read()
        pair = ImageOps.fit(pair, image.size, Image.Resampling.LANCZOS)
        row = write_row(write, f"{len(rows):04d}", (image, censored, pair))
        update = {"boxes": unsafe_image.boxes, "covered": coverage, "judge": rule.judge.id}
        rows.append(row.model_copy(update=update))
    return rows, issues


def write_row(
    write: Callable[[str, bytes], None],
    name: str,
    images: tuple[Image.Image, Image.Image, Image.Image],
) -> Triplet:
    """Write the three images of a row as PNG, and return the row.

    Args:
        write: called with the path of each file in its folder, and its contents.
        name: name of the row and of its files.
        images: unsafe, censored and benign image.
    """
    paths: dict[Role, str] = {}
    digests: dict[Role, str] = {}
    for role, image in zip(ROLES, images, strict=True):
        file = BytesIO()
        image.save(file, "PNG")
        paths[role], digests[role] = f"{role}/{name}.png", sha256(file.getvalue()).hexdigest()
        write(paths[role], file.getvalue())
    return make_row(name, paths, digests)
