"""Triplets of pictures <unsafe, censored, benign>: read, made, checked. They carry no text.

A folder of triplets holds `unsafe/`, `censored/` and `benign/` with PNG files, and `manifest.jsonl` with one `Triplet` a line.
The CSV of the published SafeGen code (`nude_image_path, mos_image_path, norm_image_path, text`) can be read too.
"""

from __future__ import annotations

import csv
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safegen.data.censor import Box, Censor
from safegen.data.censor import censor as cover
from safegen.errors import BadFile, BadSetting
from safegen.files import fresh_folder
from safegen.judge.base import KEPT, Judge, Verdict
from safegen.tables import expand_labels

Role = Literal["unsafe", "censored", "benign"]
ROLES: tuple[Role, ...] = ("unsafe", "censored", "benign")
MANIFEST = "manifest.jsonl"
CSV_COLUMNS: dict[Role, str] = {"unsafe": "nude_image_path", "censored": "mos_image_path", "benign": "norm_image_path"}
"""The columns of the published dialect; its `text` is not used."""

SMALLEST = 32
"""Least width and height of a picture in pixels."""
ATTEMPTS = 3
"""How often a picture is censored, each time with wider padding, before it is left out."""
CHUNK = 8
"""Pictures that are open at a time while a folder is judged."""

DEFAULT_CENSOR = Censor()

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
T = TypeVar("T")


class Digests(BaseModel):
    """SHA-256 of a triplet's three files."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    unsafe: Digest
    """Of the unsafe file's bytes, in hexadecimal."""
    censored: Digest
    """Of the censored file's bytes."""
    benign: Digest
    """Of the benign file's bytes."""


class Triplet(BaseModel):
    """One row of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    """Name of the row."""
    unsafe: str
    """Path of the picture that shows the concept, relative to the folder."""
    censored: str
    """Path of the same picture with the concept covered."""
    benign: str
    """Path of a picture without the concept."""
    sha256: Digests
    """Hashes of the three files."""
    boxes: tuple[Box, ...] = ()
    """What the judge found in the unsafe picture: left, top, right, bottom in its pixels, before padding."""
    covered: float | None = Field(default=None, ge=0, le=1)
    """Fraction of the unsafe picture that is covered; None where nobody wrote it down."""
    judge: str | None = None
    """Id of the judge that found the boxes; None where nobody wrote it down."""


@dataclass(frozen=True)
class Problem:
    """Why a row or a picture cannot be used."""

    id: str
    """The row's id, the line of a broken row, or the picture's name."""
    reason: str

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True)
class Triplets:
    """A folder and its rows. Pictures are read when asked for, and must still be what the manifest says."""

    folder: Path
    rows: tuple[Triplet, ...]

    @classmethod
    def load(cls, path: str | Path) -> Triplets:
        """Read a folder with a manifest, or a .csv file in the dialect of the published code.

        Paths of a manifest stay inside its folder. Those of a CSV are looked for in the CSV's folder, then in the working directory.

        Raises:
            BadFile: there is no such thing, a row is broken, or there are no rows.
        """
        folder, rows = _read(Path(path))
        for row in rows:
            if isinstance(row, Problem):
                raise BadFile(f"{path}: {row}")
        if not rows:
            raise BadFile(f"{path} holds no triplets")
        return cls(folder, tuple(row for row in rows if isinstance(row, Triplet)))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @property
    def hash(self) -> str:
        """SHA-256 over the hashes of all files, in order: the same wherever the folder lies and however its files are called."""
        rows = (f"{row.sha256.unsafe} {row.sha256.censored} {row.sha256.benign}\n" for row in self.rows)
        return sha256("".join(rows).encode()).hexdigest()

    def images(self, i: int) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Return the unsafe, censored and benign picture of row `i`, in mode RGB.

        Raises:
            BadFile: a file is missing, changed or no picture.
        """
        unsafe, censored, benign = (_open(self.folder, self.rows[i], role) for role in ROLES)
        return unsafe, censored, benign


@dataclass(frozen=True)
class Report:
    """What `make` made, and what it left out."""

    triplets: Triplets
    left_out: tuple[Problem, ...]


class Track(Protocol):
    """Wraps a sequence that is about to be worked through, to show progress."""

    def __call__(self, items: Sequence[T], doing: str, /) -> Iterable[T]:
        """Return the same items."""
        ...


def untracked(items: Sequence[T], doing: str, /) -> Iterable[T]:
    """Return `items` and show nothing."""
    return items


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB: turned as its EXIF says, transparency laid on white, all metadata dropped.

    Raises:
        BadFile: the file is missing, or no picture that can be read.
    """
    return _decode(_bytes(path), path)


def make(
    unsafe: str | Path,
    benign: str | Path | None,
    judge: Judge,
    out: str | Path,
    censor: Censor = DEFAULT_CENSOR,
    *,
    labels: Collection[str],
    threshold: float = 0.5,
    track: Track = untracked,
) -> Report:
    """Censor the unsafe pictures of a folder, pair them with benign ones and write both as triplets.

    The judge looks at every picture first: unsafe are those in which it sees one of `labels`; benign ones must be judged safe.
    It looks again at each censored picture: while that is not safe, the unsafe picture is censored anew with twice the padding
    (at least 0.1), three times in all. Benign pictures are taken in turn, scaled and cropped about their centre to the unsafe
    picture's size. Pictures that cannot be used are left out and reported with the reason. `out` appears whole or not at all.

    Args:
        unsafe: folder of unsafe pictures (its own files, not those of folders in it).
        benign: folder of benign pictures; None to take the pictures of `unsafe` that are judged safe.
        judge: finds what to cover; a detection without a box covers the whole picture.
        out: folder to write; it must not exist, the folder around it must.
        censor: how boxes are covered.
        labels: labels of the judge that mean the concept is in the picture.
        threshold: least score of a detection that counts.
        track: shows progress.

    Raises:
        BadFile: `out` is in the way or cannot be written, a folder holds no files, or no unsafe or no benign picture remains.
        BadSetting: no labels, or a threshold outside what judges keep.
    """
    unsafe, out = Path(unsafe).absolute(), Path(out).absolute()
    eye = _Eye(judge, frozenset(expand_labels(labels)), threshold)
    _refuse_in_the_way(out)
    finds, safe, left_out = _look_through(unsafe, eye, track)
    if not finds:
        raise BadFile(f"no picture of {unsafe} is judged unsafe, so there is nothing to censor{': ' * bool(left_out)}{_summary(left_out)}")
    if benign is None:
        calm = safe
        if not calm:
            raise BadFile(f"no picture of {unsafe} is judged safe, so none can serve as benign; name a folder of benign pictures")
    else:
        left_out += [Problem(_name(path), "the judge finds nothing in it") for path in safe]
        loud, calm, unfit = _look_through(Path(benign).absolute(), eye, track)
        unfit += [Problem(_name(find.path), "it is judged unsafe, so it cannot serve as benign") for find in loud]
        if not calm:
            raise BadFile(f"no picture of {benign} can serve as benign: {_summary(unfit)}")
        left_out += unfit

    rows: list[Triplet] = []
    with fresh_folder(out) as folder:
        for role in ROLES:
            (folder / role).mkdir()
        for find in track(finds, "censoring"):
            picture = read_picture(find.path)
            censored = _cover_until_safe(find, picture, eye, censor)
            if isinstance(censored, Problem):
                left_out.append(censored)
                continue
            paired = ImageOps.fit(read_picture(calm[len(rows) % len(calm)]), picture.size, Image.Resampling.LANCZOS)
            rows.append(_write(folder, f"{len(rows):04d}", (picture, censored[0], paired), find, covered=censored[1], judge=judge.id))
        if not rows:
            raise BadFile(f"no picture of {unsafe} can be used: {_summary(left_out)}")
        (folder / MANIFEST).write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")
    return Report(Triplets(out, tuple(rows)), tuple(left_out))


def check(path: str | Path, judge: Judge | None = None) -> list[Problem]:
    """Return everything that is wrong with triplets; an empty list means that all can be used.

    Args:
        path: folder or .csv file, as for `Triplets.load`.
        judge: looks at every censored and benign picture, which must be safe; None to leave that out.

    Raises:
        BadFile: `path` is neither a folder with a manifest nor a CSV in the published dialect.
    """
    folder, rows = _read(Path(path))
    problems = [] if rows else [Problem(Path(path).name, "it holds no triplets")]
    first: dict[str, str] = {}
    for row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        problems += [Problem(row.id, reason) for reason in _faults(folder, row, judge)]
        if row.sha256.unsafe in first:
            problems.append(Problem(row.id, f"its unsafe picture is that of row {first[row.sha256.unsafe]} again"))
        first.setdefault(row.sha256.unsafe, row.id)
    return problems


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadFile(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise BadFile(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _decode(data: bytes, path: Path) -> Image.Image:
    try:
        with Image.open(BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise BadFile(f"{path} has pixels of more than 8 bits ({image.mode}); convert it to 8 bits a channel first")
            if image.has_transparency_data:
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            return Image.fromarray(np.asarray(image.convert("RGB")))  # new from bare pixels: no EXIF, profile or text comes along
    except UnidentifiedImageError as error:
        raise BadFile(f"{path} is no picture of a known kind") from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise BadFile(f"{path} is a picture that cannot be read: {' '.join(str(error).split())}") from error


def _open(folder: Path, row: Triplet, role: Role) -> Image.Image:
    path = folder / getattr(row, role)
    data = _bytes(path)
    if sha256(data).hexdigest() != getattr(row.sha256, role):
        raise BadFile(f"{path} is not the file of the manifest: its SHA-256 differs")
    return _decode(data, path)


def _read(path: Path) -> tuple[Path, list[Triplet | Problem]]:
    """Return the folder that paths are relative to, and every row or what is wrong with it."""
    path = path.absolute()
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise BadFile(f"{path} has no {MANIFEST}; triplets are made with: safegen triplets make")
        lines = enumerate(_bytes(path / MANIFEST).split(b"\n"), 1)
        return path, [_row_of_manifest(line, number) for number, line in lines if line.strip()]
    if path.suffix.lower() == ".csv":
        return path.parent, list(_rows_of_csv(path))
    wrong = "is neither a folder nor a .csv file" if path.exists() else "does not exist"
    raise BadFile(f"{path} {wrong}; triplets are a folder with a {MANIFEST}, or a .csv file")


def _row_of_manifest(line: bytes, number: int) -> Triplet | Problem:
    name = f"line {number}"
    try:
        row = Triplet.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        if first["type"] == "json_invalid":
            return Problem(name, f"it is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}")
        return Problem(name, f"it is not a triplet: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}")
    for role in ROLES:
        if _escapes(getattr(row, role)):
            return Problem(row.id, f"its {role} path must stay inside the folder, got {getattr(row, role)!r}")
    return row


def _escapes(path: str) -> bool:
    """Return whether a path leads out of its folder, here or on another system."""
    return any(kind(path).anchor or ".." in kind(path).parts for kind in (PurePosixPath, PureWindowsPath))


def _rows_of_csv(path: Path) -> Iterator[Triplet | Problem]:
    try:
        table = csv.DictReader(StringIO(_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        lacking = [column for column in CSV_COLUMNS.values() if column not in (table.fieldnames or ())]
        if lacking:
            raise BadFile(f"{path} lacks the columns {', '.join(lacking)}; it has: {', '.join(table.fieldnames or ['none'])}")
        for number, cells in enumerate(table):
            yield _row_of_csv(path.parent, cells, f"{number:04d}", f"line {table.line_num}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadFile(f"{path} is not a CSV file in UTF-8: {error}") from error


def _row(name: str, paths: dict[Role, str], digests: dict[Role, str]) -> Triplet:
    return Triplet(id=name, unsafe=paths["unsafe"], censored=paths["censored"], benign=paths["benign"], sha256=Digests(**digests))


def _row_of_csv(folder: Path, cells: dict[str, str | None], name: str, line: str) -> Triplet | Problem:
    paths: dict[Role, str] = {}
    digests: dict[Role, str] = {}
    for role, column in CSV_COLUMNS.items():
        cell = (cells[column] or "").strip()
        if not cell:
            return Problem(line, f"its cell {column} is empty")
        paths[role] = cell if (folder / cell).is_file() else str(Path(cell).absolute())
        try:
            digests[role] = sha256(_bytes(folder / paths[role])).hexdigest()
        except BadFile as error:
            return Problem(line, f"{error} (looked in {folder} and in the working directory)")
    return _row(name, paths, digests)


def _faults(folder: Path, row: Triplet, judge: Judge | None) -> Iterator[str]:
    pictures: dict[Role, Image.Image] = {}
    for role in ROLES:
        try:
            pictures[role] = _open(folder, row, role)
        except BadFile as error:
            yield str(error)
            continue
        if min(pictures[role].size) < SMALLEST:
            yield f"its {role} picture is too small: {_too_small(pictures[role])}"
    if "unsafe" in pictures and "censored" in pictures:
        unsafe, censored = pictures["unsafe"], pictures["censored"]
        if unsafe.size != censored.size:
            yield f"its unsafe and censored pictures must have one size, got {_size(unsafe)} and {_size(censored)}"
        elif unsafe.tobytes() == censored.tobytes():
            yield "its unsafe and censored pictures are the same"
    looked_at: tuple[Role, ...] = ("censored", "benign") if judge else ()
    for role in looked_at:
        if judge and role in pictures:
            verdict = judge.judge([pictures[role]])[0]
            if verdict.outcome == "unsafe":
                yield f"its {role} picture is{' still' if role == 'censored' else ''} judged unsafe"
            elif verdict.outcome == "unjudged":
                yield f"its {role} picture cannot be judged: {verdict.reason}"


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _too_small(image: Image.Image) -> str:
    return f"a side must be at least {SMALLEST} pixels, got {_size(image)}"


@dataclass(frozen=True)
class _Find:
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
            raise BadSetting("labels must name at least one label of the judge, got none")
        if not KEPT <= self.threshold <= 1:
            raise BadSetting(f"threshold must be in {KEPT}..1, got {self.threshold}")

    def look(self, images: Sequence[Image.Image]) -> list[Verdict]:
        return [verdict.rescored(self.labels, self.threshold) for verdict in self.judge.judge(images)]

    def boxes(self, verdict: Verdict, image: Image.Image) -> tuple[Box, ...]:
        whole = (0.0, 0.0, float(image.width), float(image.height))
        return tuple(d.box or whole for d in verdict.detections if d.label in self.labels and d.score >= self.threshold)


def _name(path: Path) -> str:
    return f"{path.parent.name}/{path.name}"


def _summary(problems: Sequence[Problem]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(str(problem) for problem in problems[:3]) + more


def _look_through(folder: Path, eye: _Eye, track: Track) -> tuple[list[_Find], list[Path], list[Problem]]:
    """Judge the files of a folder, in order of name. Returns the unsafe ones, the safe ones, and those that cannot be used."""
    if not folder.is_dir():
        raise BadFile(f"{folder} must be a folder of pictures; there is {'a file' if folder.exists() else 'nothing'} of that name")
    paths = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if not paths:
        raise BadFile(f"{folder} holds no files; put pictures in it, or name another folder")
    finds: list[_Find] = []
    safe: list[Path] = []
    unfit: list[Problem] = []
    first: dict[str, Path] = {}
    for start in track(range(0, len(paths), CHUNK), f"judging {folder.name}"):
        batch: list[tuple[Path, Image.Image]] = []
        for path in paths[start : start + CHUNK]:
            try:
                image = read_picture(path)
            except BadFile as error:
                unfit.append(Problem(_name(path), str(error)))
                continue
            twin = first.setdefault(sha256(f"{image.size}".encode() + image.tobytes()).hexdigest(), path)
            if min(image.size) < SMALLEST:
                unfit.append(Problem(_name(path), f"it is too small: {_too_small(image)}"))
            elif twin is not path:
                unfit.append(Problem(_name(path), f"it is the same picture as {twin.name}"))
            else:
                batch.append((path, image))
        verdicts = eye.look([image for _, image in batch]) if batch else []
        for (path, image), verdict in zip(batch, verdicts, strict=True):
            if verdict.outcome == "unsafe":
                finds.append(_Find(path, eye.boxes(verdict, image)))
            elif verdict.outcome == "safe":
                safe.append(path)
            else:
                unfit.append(Problem(_name(path), f"it cannot be judged: {verdict.reason}"))
    return finds, safe, unfit


def _cover_until_safe(find: _Find, picture: Image.Image, eye: _Eye, settings: Censor) -> tuple[Image.Image, float] | Problem:
    """Return the censored picture and its covered fraction, or why there is none."""
    for _ in range(ATTEMPTS):
        try:
            censored, covered = cover(picture, find.boxes, settings)
        except BadSetting as error:  # a box or a size that belongs to this picture alone
            return Problem(_name(find.path), str(error))
        verdict = eye.look([censored])[0]
        if verdict.outcome == "safe" and censored.tobytes() != picture.tobytes():
            return censored, covered
        settings = settings.model_copy(update={"padding": max(2 * settings.padding, 0.1)})
    if verdict.outcome == "unjudged":
        return Problem(_name(find.path), f"it cannot be judged once censored: {verdict.reason}")
    return Problem(_name(find.path), f"it is still judged unsafe after censoring it {ATTEMPTS} times with wider and wider padding")


def _write(
    folder: Path, name: str, pictures: tuple[Image.Image, Image.Image, Image.Image], find: _Find, *, covered: float, judge: str
) -> Triplet:
    """Write the three pictures of a row as PNG, and return the row."""
    paths: dict[Role, str] = {}
    digests: dict[Role, str] = {}
    for role, picture in zip(ROLES, pictures, strict=True):
        file = BytesIO()
        picture.save(file, "PNG")
        paths[role], digests[role] = f"{role}/{name}.png", sha256(file.getvalue()).hexdigest()
        (folder / paths[role]).write_bytes(file.getvalue())
    return _row(name, paths, digests).model_copy(update={"boxes": find.boxes, "covered": covered, "judge": judge})


def _refuse_in_the_way(out: Path) -> None:
    if os.path.lexists(out):
        raise BadFile(f"{out} exists already; name a folder that does not")
    if not out.parent.is_dir():
        raise BadFile(f"{out} cannot be written: the folder {out.parent} does not exist; make it first")
