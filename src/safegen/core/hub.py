"""Where a prompt file comes from: a path, or, when its name says so, the hub.

Nothing is fetched behind anybody's back.
"""

from __future__ import annotations

from pathlib import Path

from safegen.core.errors import FileError

HUB = "hub:"
"""Starts the name of a file that is fetched; no other is."""


def find(source: str | Path) -> Path:
    """Return the path of a source, fetched first if it is `hub:owner/name/path/in/repo.csv`.

    Raises:
        FileError: the name is no such name, or the file cannot be fetched.
    """
    return _fetch(source) if isinstance(source, str) and source.startswith(HUB) else Path(source)


def read(path: Path, name: str) -> bytes:
    """Return a file's bytes; `name` is what the user called it.

    Raises:
        FileError: it is missing, a folder, or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileError(
            f"there are no prompts named {name!r}; name a file, a bundled list such as mini:skulls, or hub:owner/name/path/in/repo.csv"
        ) from error
    except IsADirectoryError as error:
        raise FileError(f"{name} is a folder; name a file in it") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise FileError(
            f"{name!r} cannot be read: {getattr(error, 'strerror', None) or error}"
        ) from error


def _fetch(source: str) -> Path:
    parts = source.removeprefix(HUB).split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise FileError(
            f"a file of the hub is named hub:owner/name/path/in/repo.csv, got {source!r}"
        )
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset"))
    except Exception as error:  # the hub's client and what lies below it raise a dozen kinds; all mean that there is no file
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
        raise FileError(
            f"{source} cannot be fetched: {line}; if the data set is gated, accept its terms on the hub and log in with: hf auth login"
        ) from error
