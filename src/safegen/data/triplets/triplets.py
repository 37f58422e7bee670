"""Triplets of pictures <unsafe, censored, benign>: their rows, and how they are read. They carry no text.

A folder of triplets holds `unsafe/`, `censored/` and `benign/` with PNG files, and `manifest.jsonl`
with one `Triplet` a line. The CSV of the published SafeGen code (`nude_image_path, mos_image_path,
norm_image_path, text`) can be read too. They are made in `make.py` and checked in `check.py`.
"""

from __future__ import annotations

import csv
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from io import BytesIO, StringIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safegen.core.errors import FileError, explain
from safegen.core.files import exists, is_incomplete
from safegen.core.registry import TRIPLETS, resolve
from safegen.data.triplets.censor import Box

Role = Literal["unsafe", "censored", "benign"]
ROLES: tuple[Role, ...] = ("unsafe", "censored", "benign")
MANIFEST = "manifest.jsonl"
CSV_COLUMNS: dict[Role, str] = {
    "unsafe": "nude_image_path",
    "censored": "mos_image_path",
    "benign": "norm_image_path",
}
"""The columns of the published dialect; its `text` is not used."""

SHEET_MARK = "safegen-sheet"
"""Text key of a PNG that is a contact sheet of other pictures."""
SMALLEST = 32
"""Least width and height of a picture in pixels."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


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
class RowError:
    """Why a row or a picture cannot be used."""

    id: str
    """The row's id, the line of a broken row, or the picture's name."""
    reason: str

    def __str__(self) -> str:
        """Say it in one line."""
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True)
class Triplets:
    """A folder and its rows.

    Pictures are read when asked for, and must still be what the manifest says.
    """

    folder: Path
    rows: tuple[Triplet, ...]

    @classmethod
    def load(cls, path: str | Path) -> Triplets:
        """Read a folder with a manifest, a .csv file in the dialect of the published code, or bundled triplets named `source:concept`.

        Paths of a manifest stay inside its folder. Those of a CSV are looked for in the CSV's
        folder, then in the working directory.

        Raises:
            FileError: there is no such thing, a row is broken, or there are no rows.
            UnknownNameError: a source that is known has no such bundled triplets.
        """
        folder, rows = read_rows(Path(path))
        for row in rows:
            if isinstance(row, RowError):
                raise FileError(f"{path}: {row}")
        if not rows:
            raise FileError(f"{path} holds no triplets")
        return cls(folder, tuple(row for row in rows if isinstance(row, Triplet)))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @property
    def hash(self) -> str:
        """SHA-256 over the hashes of all files, in order: the same wherever the folder lies and however its files are called."""
        rows = (
            f"{row.sha256.unsafe} {row.sha256.censored} {row.sha256.benign}\n" for row in self.rows
        )
        return sha256("".join(rows).encode()).hexdigest()

    def images(self, i: int) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Return the unsafe, censored and benign picture of row `i`, in mode RGB.

        Raises:
            FileError: a file is missing, changed or no picture.
        """
        unsafe, censored, benign = (open_role(self.folder, self.rows[i], role) for role in ROLES)
        return unsafe, censored, benign


def read_picture(path: Path) -> Image.Image:
    """Read a picture as RGB: turned as its EXIF says, transparency laid on white, all metadata dropped.

    Raises:
        FileError: the file is missing, or no picture that can be read.
    """
    return _decode(_bytes(path), path)


def is_sheet(path: Path) -> bool:
    """Return whether a file is a contact sheet of ours; what cannot be read is none."""
    try:
        with Image.open(path) as opened:
            return SHEET_MARK in opened.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def size_of(image: Image.Image) -> str:
    """Return a picture's size in words."""
    return f"{image.width}x{image.height}"


def too_small(image: Image.Image) -> str | None:
    """Return why a picture is too small to be used, or None."""
    return (
        f"a side must be at least {SMALLEST} pixels, got {size_of(image)}"
        if min(image.size) < SMALLEST
        else None
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise FileError(
            f"{path} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _decode(data: bytes, path: Path) -> Image.Image:
    try:
        with Image.open(BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith(("I", "F")):
                raise FileError(
                    f"{path} has pixels of more than 8 bits ({image.mode}); convert it to 8 bits a channel first"
                )
            if image.has_transparency_data:
                image = Image.alpha_composite(
                    Image.new("RGBA", image.size, "white"), image.convert("RGBA")
                )
            return Image.fromarray(
                np.asarray(image.convert("RGB"))
            )  # new from bare pixels: no EXIF, profile or text comes along
    except UnidentifiedImageError as error:
        raise FileError(f"{path} is no picture of a known kind") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        raise FileError(
            f"{path} is a picture that cannot be read: {' '.join(str(error).split())}"
        ) from error


def open_role(folder: Path, row: Triplet, role: Role) -> Image.Image:
    """Return one picture of a row, in mode RGB.

    Raises:
        FileError: the file is missing, changed or no picture.
    """
    path = folder / getattr(row, role)
    data = _bytes(path)
    if sha256(data).hexdigest() != getattr(row.sha256, role):
        raise FileError(f"{path} is not the file of the manifest: its SHA-256 differs")
    return _decode(data, path)


def read_rows(path: Path) -> tuple[Path, list[Triplet | RowError]]:
    """Return the folder that paths are relative to, and every row or what is wrong with it.

    Raises:
        FileError: `path` is neither a folder with a manifest nor a CSV in the published dialect.
        UnknownNameError: it begins with a source of bundled triplets, which has none of that name.
    """
    source, _, part = str(path).partition(":")
    if part and source in TRIPLETS:
        path = resolve(TRIPLETS, source, "triplets source")(part)
    path = path.absolute()
    if exists(path) and path.is_dir():
        if is_incomplete(path, last=MANIFEST):
            raise FileError(
                f"{path} holds unfinished triplets: their making was killed, or still goes on; remove it and make them again"
            )
        if not (path / MANIFEST).is_file():
            raise FileError(
                f"{path} has no {MANIFEST}; triplets are made with: safegen triplets make"
            )
        lines = enumerate(_bytes(path / MANIFEST).split(b"\n"), 1)
        return path, [_row_of_manifest(line, number) for number, line in lines if line.strip()]
    if path.suffix.lower() == ".csv":
        return path.parent, list(_rows_of_csv(path))
    wrong = "is neither a folder nor a .csv file" if exists(path) else "does not exist"
    raise FileError(
        f"{path} {wrong}; triplets are a folder with a {MANIFEST}, a .csv file, or bundled ones such as mini:skulls"
    )


def _row_of_manifest(line: bytes, number: int) -> Triplet | RowError:
    name = f"line {number}"
    try:
        row = Triplet.model_validate_json(line)
    except ValidationError as error:
        return RowError(name, f"it is not a triplet: {explain(error, Triplet)}")
    for role in ROLES:
        if _escapes(getattr(row, role)):
            return RowError(
                row.id, f"its {role} path must stay inside the folder, got {getattr(row, role)!r}"
            )
    return row


def _escapes(path: str) -> bool:
    """Return whether a path leads out of its folder, here or on another system."""
    return any(
        kind(path).anchor or ".." in kind(path).parts for kind in (PurePosixPath, PureWindowsPath)
    )


def _rows_of_csv(path: Path) -> Iterator[Triplet | RowError]:
    try:
        table = csv.DictReader(StringIO(_bytes(path).decode("utf-8-sig"), newline=""), strict=True)
        lacking = [
            column for column in CSV_COLUMNS.values() if column not in (table.fieldnames or ())
        ]
        if lacking:
            raise FileError(
                f"{path} lacks the columns {', '.join(lacking)}; it has: {', '.join(table.fieldnames or ['none'])}"
            )
        for number, cells in enumerate(table):
            yield _row_of_csv(path.parent, cells, f"{number:04d}", f"line {table.line_num}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} is not a CSV file in UTF-8: {error}") from error


def as_row(name: str, paths: dict[Role, str], digests: dict[Role, str]) -> Triplet:
    """Return the row of three files."""
    return Triplet(
        id=name,
        unsafe=paths["unsafe"],
        censored=paths["censored"],
        benign=paths["benign"],
        sha256=Digests(**digests),
    )


def _row_of_csv(
    folder: Path, cells: dict[str, str | None], name: str, line: str
) -> Triplet | RowError:
    paths: dict[Role, str] = {}
    digests: dict[Role, str] = {}
    for role, column in CSV_COLUMNS.items():
        cell = (cells[column] or "").strip()
        if not cell:
            return RowError(line, f"its cell {column} is empty")
        paths[role] = cell if exists(folder / cell, file=True) else str(Path(cell).absolute())
        try:
            digests[role] = sha256(_bytes(folder / paths[role])).hexdigest()
        except FileError as error:
            return RowError(line, f"{error} (looked in {folder} and in the working directory)")
    return as_row(name, paths, digests)
