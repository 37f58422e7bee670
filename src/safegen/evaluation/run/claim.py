"""Claim on the directory of a run: one process at a time, and nothing is left of a refused run."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safegen.core.errors import DivergedError, UserError
from safegen.core.files import claim_folder, is_unfinished
from safegen.evaluation.run import folder as files

OWN = (
    files.CARD,
    files.PLAN,
    files.SETTINGS,
    files.PROTOCOL_FILE,
    files.PROMPT_FILES,
    files.SHARD,
    files.PATCHES,
    files.ATTACK,
    files.ATTACK_FILES,
    files.CONTROLS,
    files.PROMPTS,
    files.IMAGES,
    files.SAMPLES,
    files.JUDGES,
    files.DETECTIONS,
    files.CHANGES,
    files.FEATURES,
    files.TIMINGS,
)
"""What a run writes into its directory before it is finished."""
RESULTS = (".png", ".safetensors")
"""Endings of files that take time to make."""


@contextmanager
def claim_run(directory: Path) -> Iterator[None]:
    """Keep other processes from working in a run's directory.

    Where the block is refused before it made an image, a weight or a record of an attack, or its
    training diverges, what it wrote into a new directory is removed. Otherwise the same call
    resumes.

    Raises:
        FileError: another process works there, or the directory cannot be written.
    """
    is_new = not directory.is_dir() or all(map(is_unfinished, directory.iterdir()))
    with claim_folder(directory):
        try:
            yield
        except (UserError, DivergedError) as error:
            if is_new and (isinstance(error, DivergedError) or not _has_results(directory)):
                _remove(directory)
            raise


def _has_results(directory: Path) -> bool:
    attack = directory / files.ATTACK
    is_begun = attack.is_file() and attack.stat().st_size > 0
    return is_begun or any(path.suffix in RESULTS for path in directory.rglob("*"))


def _remove(directory: Path) -> None:
    for name in OWN:
        path = directory / name
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
