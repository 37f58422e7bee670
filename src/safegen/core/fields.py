"""Types of fields that schemas share: counts, hashes, and names with one rule each."""

from __future__ import annotations

from pathlib import PurePath, PureWindowsPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from safegen.core.documents import check_plain

FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Pattern of a name that is also the name of a folder, such as a stack's."""
MAX_NAME = 200
"""Most characters of a name."""


def check_name(name: str) -> str:
    """Return a name if it can stand in a line of output.

    Raises:
        ValueError: it is empty or too long, or has a control character or half a surrogate pair.
    """
    if not (name.strip() and name.isprintable() and len(name) <= MAX_NAME):
        raise ValueError(
            f"names must have 1 to {MAX_NAME} printable characters, got {name[:MAX_NAME]!r}"
        )
    return name


def check_file_name(name: str) -> str:
    """Return a name if it is the name of a file, without a folder.

    Raises:
        ValueError: it is a path, or no name.
    """
    check_name(name)
    if name in (".", "..") or PurePath(name).name != name or PureWindowsPath(name).name != name:
        raise ValueError(f"a file name must have no folder in it, got {name!r}")
    return name


Name = Annotated[str, AfterValidator(check_name)]
"""Name of a list, a protocol, a concept or a judge."""
FolderName = Annotated[str, Field(pattern=f"^{FOLDER_NAME}$")]
"""Name that is also the name of a folder."""
FileName = Annotated[str, AfterValidator(check_file_name)]
"""Name of a file, without a folder."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal digits."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""Number of something."""
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
"""Time in seconds."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""Part of a whole: a rate, a score or a distance."""
Number = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
"""Finite number."""
JsonObject = Annotated[dict[str, Any], AfterValidator(check_plain)]
"""Plain values that no schema describes."""
