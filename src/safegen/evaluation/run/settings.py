"""Settings of the workflow that makes a run: a second call in the same folder resumes it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegen.core.errors import FileError
from safegen.evaluation.compare import differences
from safegen.evaluation.run.folder import SETTINGS, write_json


def claim_directory(out: Path, settings: Mapping[str, Any]) -> None:
    """Write a workflow's settings into a new directory, or check that it was made with the same ones.

    Args:
        out: directory of the run, new or of an earlier call.
        settings: everything that decides the results, as plain values.

    Raises:
        FileError: `out` holds something else or was made with other settings, or cannot be written.
    """
    path, wanted = out / SETTINGS, json.loads(json.dumps(settings))
    try:
        if path.is_file():
            gaps = differences(json.loads(path.read_text(encoding="utf-8")), wanted)
            if gaps:
                raise FileError(
                    f"{out} was made with other settings (then and now): {'; '.join(gaps)}. "
                    "Name another directory with --out."
                )
            return
        if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
            raise FileError(f"{out} already exists. Name another directory with --out.")
        out.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    except ValueError as error:
        raise FileError(f"{path} is damaged: {error}. Remove {out} and start again.") from error
    except OSError as error:
        raise FileError(f"{out} cannot be written: {error.strerror or error}") from error
