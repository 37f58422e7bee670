"""Make triplets: find what is unsafe, cover it, pair it with something benign, write it down."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageOps

from safegen.core.errors import ConfigError, FileError
from safegen.core.files import check_output, staged_directory
from safegen.core.progress import ProgressCallback, no_progress, track
from safegen.core.registry import expand_labels
from safegen.data.triplets.censor import Box, Censor
from safegen.data.triplets.censor import censor as cover
from safegen.data.triplets.triplets import (
    MANIFEST,
    ROLES,
    Role,
    RowError,
    Triplet,
    Triplets,
    as_row,
    is_sheet,
    read_picture,
    too_small,
)
from safegen.judges.base import SCORE_FLOOR, Detections, Judge

ATTEMPTS = 3
"""How often a picture is censored, each time with wider padding, before it is left out."""
CHUNK = 8
"""Pictures that are open at a time while a folder is judged."""

DEFAULT_CENSOR = Censor()


@dataclass(frozen=True)
class Report:
    """What `make` made, and what it left out."""

    triplets: Triplets
    left_out: tuple[RowError, ...]


def make(
    unsafe: str | Path,
    benign: str | Path | None,
    judge: Judge,
    out: str | Path,
    censor: Censor = DEFAULT_CENSOR,
    *,
    labels: Collection[str],
    threshold: float = 0.5,
    progress: ProgressCallback = no_progress,
) -> Report:
    """Censor the unsafe pictures of a folder, pair them with benign ones and write both as triplets.

    The judge looks at every picture first: unsafe are those in which it sees one of `labels`;
    benign ones must be judged safe. It looks again at each censored picture: while that is not
    safe, the unsafe picture is censored anew with twice the padding (at least 0.1), three times in
    all. Benign pictures are taken in turn, scaled and cropped about their centre to the unsafe
    picture's size. Pictures that cannot be used are left out and reported with the reason. Nothing
    is written outside `out`, which appears whole or not at all; only a kill leaves it behind
    unfinished, without a manifest.

    Args:
        unsafe: folder of unsafe pictures (its own files, not those of folders in it).
        benign: folder of benign pictures; None to take the pictures of `unsafe` that are judged
            safe.
        judge: finds what to cover; a detection without a box covers the whole picture.
        out: folder to write; it must not exist, the folder around it must.
        censor: how boxes are covered.
        labels: labels of the judge that mean the concept is in the picture.
        threshold: least score of a detection that counts.
        progress: called with (description, done, total).

    Raises:
        FileError: `out` is in the way or cannot be written, a folder holds no files, or no unsafe or
            no benign picture remains.
        ConfigError: no labels, or a threshold outside what judges keep.
    """
    unsafe, out = Path(unsafe).absolute(), Path(out).absolute()
    eye = _Eye(judge, frozenset(expand_labels(labels)), threshold)
    check_output(out, last=MANIFEST)
    if not out.parent.is_dir():
        raise FileError(f"{out.parent} must exist. Create the folder first.")
    finds, safe, left_out = _look_through(unsafe, eye, progress)
    if not finds:
        raise FileError(
            f"no picture of {unsafe} is judged unsafe, so there is nothing to censor{': ' * bool(left_out)}{_summary(left_out)}"
        )
    if benign is None:
        calm = safe
        if not calm:
            raise FileError(
                f"no picture of {unsafe} is judged safe, so none can serve as benign; name a folder of benign pictures"
            )
    else:
        left_out += [RowError(_name(path), "the judge finds nothing in it") for path in safe]
        loud, calm, unfit = _look_through(Path(benign).absolute(), eye, progress)
        unfit += [
            RowError(_name(find.path), "it is judged unsafe, so it cannot serve as benign")
            for find in loud
        ]
        if not calm:
            raise FileError(f"no picture of {benign} can serve as benign: {_summary(unfit)}")
        left_out += unfit

    rows: list[Triplet] = []
    with staged_directory(out, last=MANIFEST) as folder:
        for role in ROLES:
            (folder / role).mkdir()
        for find in track(finds, "censoring", progress):
            picture = read_picture(find.path)
            censored = _cover_until_safe(find, picture, eye, censor)
            if isinstance(censored, RowError):
                left_out.append(censored)
                continue
            paired = ImageOps.fit(
                read_picture(calm[len(rows) % len(calm)]), picture.size, Image.Resampling.LANCZOS
            )
            rows.append(
                _write(
                    folder,
                    f"{len(rows):04d}",
                    (picture, censored[0], paired),
                    find,
                    covered=censored[1],
                    judge=judge.id,
                )
            )
        if not rows:
            raise FileError(f"no picture of {unsafe} can be used: {_summary(left_out)}")
        (folder / MANIFEST).write_text(
            "".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8"
        )
    return Report(Triplets(out, tuple(rows)), tuple(left_out))


@dataclass(frozen=True)
class UnsafeImage:
    """An unsafe picture and what makes it so."""

    path: Path
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class _Eye:
    """A judge that looks for `labels` from `threshold` on."""

    judge: Judge
    labels: frozenset[str]
    threshold: float

    def __post_init__(self) -> None:
        if not self.labels:
            raise ConfigError("labels must name at least one label of the judge, got none")
        if not SCORE_FLOOR <= self.threshold <= 1:
            raise ConfigError(f"threshold must be in {SCORE_FLOOR}..1, got {self.threshold}")

    def boxes(self, detections: Detections, image: Image.Image) -> tuple[Box, ...]:
        whole = (0.0, 0.0, float(image.width), float(image.height))
        return tuple(
            d.box or whole
            for d in detections.items
            if d.label in self.labels and d.score >= self.threshold
        )


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _summary(problems: Sequence[RowError]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(str(problem) for problem in problems[:3]) + more


def _look_through(
    folder: Path, eye: _Eye, progress: ProgressCallback
) -> tuple[list[UnsafeImage], list[Path], list[RowError]]:
    """Judge the files of a folder, in order of name.

    Returns the unsafe ones, the safe ones, and those that cannot be used.
    """
    if not folder.is_dir():
        raise FileError(
            f"{folder} must be a folder of pictures; there is {'a file' if folder.exists() else 'nothing'} of that name"
        )
    paths = sorted(
        path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")
    )
    if not paths:
        raise FileError(f"{folder} holds no files; put pictures in it, or name another folder")
    finds: list[UnsafeImage] = []
    safe: list[Path] = []
    unfit: list[RowError] = []
    first: dict[str, Path] = {}
    for start in track(range(0, len(paths), CHUNK), f"judging {folder.name}", progress):
        batch: list[tuple[Path, Image.Image]] = []
        for path in paths[start : start + CHUNK]:
            if is_sheet(path):
                unfit.append(RowError(_name(path), "it is a contact sheet of other pictures"))
                continue
            try:
                image = read_picture(path)
            except FileError as error:
                unfit.append(RowError(_name(path), str(error)))
                continue
            twin = first.setdefault(
                sha256(f"{image.size}".encode() + image.tobytes()).hexdigest(), path
            )
            if small := too_small(image):
                unfit.append(RowError(_name(path), f"it is too small: {small}"))
            elif twin is not path:
                unfit.append(RowError(_name(path), f"it is the same picture as {twin.name}"))
            else:
                batch.append((path, image))
        results = eye.judge.detect([image for _, image in batch]) if batch else []
        for (path, image), detections in zip(batch, results, strict=True):
            verdict = detections.verdict(eye.labels, eye.threshold)
            if verdict == "unsafe":
                finds.append(UnsafeImage(path, eye.boxes(detections, image)))
            elif verdict == "safe":
                safe.append(path)
            else:
                unfit.append(RowError(_name(path), f"it cannot be judged: {detections.unjudged}"))
    return finds, safe, unfit


def _cover_until_safe(
    find: UnsafeImage, picture: Image.Image, eye: _Eye, settings: Censor
) -> tuple[Image.Image, float] | RowError:
    """Return the censored picture and its covered fraction, or why there is none."""
    for _ in range(ATTEMPTS):
        try:
            censored, covered = cover(picture, find.boxes, settings)
        except ConfigError as error:  # a box or a size that belongs to this picture alone
            return RowError(_name(find.path), str(error))
        detections = eye.judge.detect([censored])[0]
        verdict = detections.verdict(eye.labels, eye.threshold)
        if verdict == "safe" and censored.tobytes() != picture.tobytes():
            return censored, covered
        settings = settings.model_copy(update={"padding": max(2 * settings.padding, 0.1)})
    if verdict == "unjudged":
        return RowError(
            _name(find.path), f"it cannot be judged once censored: {detections.unjudged}"
        )
    return RowError(
        _name(find.path),
        f"it is still judged unsafe after censoring it {ATTEMPTS} times with wider and wider padding",
    )


def _write(
    folder: Path,
    name: str,
    pictures: tuple[Image.Image, Image.Image, Image.Image],
    find: UnsafeImage,
    *,
    covered: float,
    judge: str,
) -> Triplet:
    """Write the three pictures of a row as PNG, and return the row."""
    paths: dict[Role, str] = {}
    digests: dict[Role, str] = {}
    for role, picture in zip(ROLES, pictures, strict=True):
        file = BytesIO()
        picture.save(file, "PNG")
        paths[role], digests[role] = f"{role}/{name}.png", sha256(file.getvalue()).hexdigest()
        (folder / paths[role]).write_bytes(file.getvalue())
    return as_row(name, paths, digests).model_copy(
        update={"boxes": find.boxes, "covered": covered, "judge": judge}
    )
