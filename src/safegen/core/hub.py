"""Files of the Hugging Face hub. They are fetched only where the user writes `hub:`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from safegen.core.errors import FileError, UnknownNameError, first_line
from safegen.core.files import exists
from safegen.core.registry import MODELS

HUB = "hub:"
"""Prefix of the names that are fetched from the hub."""
CHECKPOINTS = (".safetensors", ".ckpt")
"""Endings of one-file checkpoints."""
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_repo_id(name: str) -> bool:
    """Return whether a name has the form owner/name of the hub's repositories."""
    return bool(_REPO_ID.fullmatch(name))


def check_model_name(name: str) -> None:
    """Check that a model is built in, of the hub, or the path of something; nothing is opened.

    Raises:
        FileError: there is no such folder, and the hub may have a model of that name; or there is
            no such checkpoint.
        UnknownNameError: it is neither a known model nor a path.
    """
    if name in MODELS or name.startswith(HUB) or exists(name):
        return
    if name.endswith(CHECKPOINTS):
        raise FileError(f"the checkpoint {name[:200]!r} does not exist. Correct its path.")
    if is_repo_id(name):
        raise FileError(
            f"the folder {name!r} does not exist. To download a model of the hub, name it "
            f"{HUB}{name}"
        )
    raise UnknownNameError("model (nor a folder of that name)", name, MODELS)


def fetch_snapshot(name: str, *, select: Callable[[Sequence[str]], Sequence[str]]) -> Path:
    """Return the local folder of a model repository, downloaded unless it is in the hub's cache.

    Where the hub cannot be asked, the folder has what was downloaded before.

    Args:
        name: `hub:owner/name`.
        select: returns glob patterns of the files to download, given the names of all.

    Raises:
        FileError: the name has another form, or the files are neither cached nor available.
    """
    repo_id = name.removeprefix(HUB)
    if not is_repo_id(repo_id):
        raise FileError(f"a model of the hub must be named hub:owner/name, got {name!r}")
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(repo_id)
    except Exception as error:  # no network, no such repository, no right to it
        try:
            return Path(snapshot_download(repo_id, local_files_only=True))
        except Exception:
            raise _fetch_error(name, error) from error
    try:
        return Path(snapshot_download(repo_id, allow_patterns=list(select(names))))
    except Exception as error:
        raise _fetch_error(name, error) from error


def fetch_file(name: str) -> Path:
    """Return the local path of one file of a data-set repository, downloaded unless it is cached.

    Args:
        name: `hub:owner/name/path/in/repo.csv`.

    Raises:
        FileError: the name has another form, or the file is neither cached nor available.
    """
    parts = name.removeprefix(HUB).split("/", 2)
    if len(parts) != 3 or not all(parts):
        raise FileError(
            f"a file of the hub must be named hub:owner/name/path/in/repo.csv, got {name!r}"
        )
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{parts[0]}/{parts[1]}", parts[2], repo_type="dataset"))
    except Exception as error:
        raise _fetch_error(name, error) from error


def _fetch_error(name: str, error: Exception) -> FileError:
    """Return the one error for all failures of the hub's client, which raises a dozen types."""
    from huggingface_hub import constants

    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else first_line(error)
    return FileError(
        f"{name} is not in the cache {constants.HF_HUB_CACHE} and cannot be fetched: {reason}. "
        "Fetch it where there is a network; "
        "if it is gated, accept its terms and run: hf auth login"
    )
