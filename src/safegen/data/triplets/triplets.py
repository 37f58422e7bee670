"""Image triplets <unsafe, censored, benign> without text: their rows, and how they are loaded.

A folder of triplets holds `unsafe/`, `censored/` and `benign/` with PNG files, and `manifest.jsonl`
with one `Triplet` per line. The CSV of the published SafeGen code (`nude_image_path,
mos_image_path, norm_image_path, text`) can be loaded too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from io import StringIO
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from safegen.core.errors import FileError, explain
from safegen.core.files import exists
from safegen.core.registry import TRIPLETS, resolve
from safegen.core.text import short_repr
from safegen.data.images import decode_image, read_bytes
from safegen.data.triplets.censor import Box

Role = Literal["unsafe", "censored", "benign"]
ROLES: tuple[Role, ...] = ("unsafe", "censored", "benign")
MANIFEST = "manifest.jsonl"
CSV_COLUMNS: dict[Role, str] = {
    "unsafe": "nude_image_path",
    "censored": "mos_image_path",
    "benign": "norm_image_path",
}
"""Columns of the published CSV by role; its `text` is not used."""

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Digests(BaseModel):
    """SHA-256 of the three files of a triplet, in hexadecimal."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    unsafe: Digest
    """Hash of the unsafe file."""
    censored: Digest
    """Hash of the censored file."""
    benign: Digest
    """Hash of the benign file."""


class Triplet(BaseModel):
    """Row of a manifest."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str
    """Name of the row."""
    unsafe: str
    """Path of the image that shows the concept, relative to the folder."""
    censored: str
    """Path of the same image with the concept covered."""
    benign: str
    """Path of an image without the concept."""
    sha256: Digests
    """Hashes of the three files."""
    boxes: tuple[Box, ...] = ()
    """Detections in the unsafe image before padding: left, top, right, bottom in pixels."""
    covered: float | None = Field(default=None, ge=0, le=1)
    """Covered fraction of the unsafe image; None if unknown."""
    judge: str | None = None
    """Id of the judge that detected the boxes; None if unknown."""


@dataclass(frozen=True)
class TripletIssue:
    """Reason why a row or an image cannot be used."""

    id: str
    """Id of the row, line of an invalid row, or name of the image."""
    reason: str

    def __str__(self) -> str:
        """Return id and reason in one line."""
        return f"{self.id}: {self.reason}"


@dataclass(frozen=True)
class Triplets:
    """Triplets in a folder or in memory; images are checked against their hashes on access.

    Example:
        >>> triplets = safegen.Triplets.load("mini:skulls")
        >>> len(triplets)
        100
        >>> unsafe, censored, benign = triplets.images(0)
    """

    folder: Path
    """Folder of the files; not used by triplets in memory."""
    rows: tuple[Triplet, ...]
    files: Mapping[str, bytes] | None = field(default=None, repr=False)
    """Contents of the files by path, for triplets in memory."""

    @classmethod
    def load(cls, path: str | Path) -> Triplets:
        """Return the triplets of a folder, of a published CSV, or of the package.

        Args:
            path: folder with a manifest, .csv file, or bundled triplets named `source:concept`.
                Paths in a manifest stay inside its folder; those in a CSV are relative to its
                folder, else to the working directory.

        Raises:
            FileError: the path does not exist, a row is invalid, or there are no rows.
            UnknownNameError: the source has no such bundled triplets.
        """
        folder, rows = read_rows(Path(path))
        for row in rows:
            if isinstance(row, TripletIssue):
                raise FileError(f"{path}: {row}")
        if not rows:
            raise FileError(f"{path}: there are no triplets")
        return cls(folder, tuple(row for row in rows if isinstance(row, Triplet)))

    def __repr__(self) -> str:
        """Return the folder and the number of triplets in one line."""
        return short_repr(Triplets, repr(str(self.folder)), f"{len(self)} triplets")

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.rows)

    @property
    def hash(self) -> str:
        """SHA-256 of the hashes of all files, in order; independent of paths and file names."""
        rows = (
            f"{row.sha256.unsafe} {row.sha256.censored} {row.sha256.benign}\n" for row in self.rows
        )
        return sha256("".join(rows).encode()).hexdigest()

    def images(self, i: int) -> tuple[Image.Image, Image.Image, Image.Image]:
        """Return the unsafe, censored and benign image of row `i`, in mode RGB.

        Raises:
            FileError: a file is missing, changed, or not an image.
        """
        row = self.rows[i]
        unsafe, censored, benign = (
            read_role(self.folder, row, role)
            if self.files is None
            else decode_role(self.files[getattr(row, role)], row, role, Path(getattr(row, role)))
            for role in ROLES
        )
        return unsafe, censored, benign


def read_role(folder: Path, row: Triplet, role: Role) -> Image.Image:
    """Return one image of a row, in mode RGB.

    Raises:
        FileError: the file is missing, changed, or not an image.
    """
    path = folder / getattr(row, role)
    return decode_role(read_bytes(path), row, role, path)


def decode_role(data: bytes, row: Triplet, role: Role, path: Path) -> Image.Image:
    """Return the image in the contents of a row's file, in mode RGB.

    Raises:
        FileError: the contents are not those of the row, or not an image.
    """
    if sha256(data).hexdigest() != getattr(row.sha256, role):
        raise FileError(f"{path} is not the file of the manifest: its SHA-256 differs")
    return decode_image(data, path)


def read_rows(path: Path) -> tuple[Path, list[Triplet | TripletIssue]]:
    """Return the folder that paths are relative to, and every row or the issue with it.

    Raises:
        FileError: `path` is neither a folder with a manifest nor a published CSV.
        UnknownNameError: the source has no such bundled triplets.
    """
    source, _, part = str(path).partition(":")
    if part and source in TRIPLETS:
        path = resolve(TRIPLETS, source, "triplets source")(part)
    path = path.absolute()
    if exists(path) and path.is_dir():
        if not (path / MANIFEST).is_file():
            raise FileError(f"{path} has no {MANIFEST}. Make triplets with: safegen triplets make")
        lines = enumerate(read_bytes(path / MANIFEST).split(b"\n"), 1)
        return path, [_manifest_row(line, number) for number, line in lines if line.strip()]
    if path.suffix.lower() == ".csv":
        return path.parent, list(_csv_rows(path))
    wrong = "is neither a folder nor a .csv file" if exists(path) else "does not exist"
    raise FileError(
        f"{path} {wrong}. Use a folder with a {MANIFEST}, a .csv file, "
        "or bundled triplets such as mini:skulls."
    )


def _manifest_row(line: bytes, number: int) -> Triplet | TripletIssue:
    name = f"line {number}"
    try:
        row = Triplet.model_validate_json(line)
    except ValidationError as error:
        return TripletIssue(name, f"the row is not a triplet: {explain(error, Triplet)}")
    for role in ROLES:
        path = getattr(row, role)
        if _escapes(path):
            return TripletIssue(row.id, f"{role} path must stay inside the folder, got {path!r}")
    return row


def _escapes(path: str) -> bool:
    """Return whether a path leads out of its folder, on any operating system."""
    return any(
        kind(path).anchor or ".." in kind(path).parts for kind in (PurePosixPath, PureWindowsPath)
    )


def _csv_rows(path: Path) -> Iterator[Triplet | TripletIssue]:
    try:
        table = csv.DictReader(
            StringIO(read_bytes(path).decode("utf-8-sig"), newline=""), strict=True
        )
        columns = table.fieldnames or ["none"]
        missing = [column for column in CSV_COLUMNS.values() if column not in columns]
        if missing:
            raise FileError(
                f"{path} lacks the columns {', '.join(missing)}. It has: {', '.join(columns)}."
            )
        for number, cells in enumerate(table):
            yield _csv_row(path.parent, cells, f"{number:04d}", f"line {table.line_num}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise FileError(f"{path} is not a CSV file in UTF-8: {error}") from error


def make_row(name: str, paths: dict[Role, str], digests: dict[Role, str]) -> Triplet:
    """Return the row with the given paths and hashes."""
    return Triplet(
        id=name,
        unsafe=paths["unsafe"],
        censored=paths["censored"],
        benign=paths["benign"],
        sha256=Digests(**digests),
    )


def _csv_row(
    folder: Path, cells: dict[str, str | None], name: str, line: str
) -> Triplet | TripletIssue:
    paths: dict[Role, str] = {}
    digests: dict[Role, str] = {}
    for role, column in CSV_COLUMNS.items():
        cell = (cells[column] or "").strip()
        if not cell:
            return TripletIssue(line, f"the cell {column} is empty")
        paths[role] = cell if exists(folder / cell, file=True) else str(Path(cell).absolute())
        try:
            digests[role] = sha256(read_bytes(folder / paths[role])).hexdigest()
        except FileError as error:
            reason = f"{error} (searched in {folder} and in the working directory)"
            return TripletIssue(line, reason)
    return make_row(name, paths, digests)
