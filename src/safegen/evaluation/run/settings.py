"""Settings of the workflow that makes a run: a second call in the same folder resumes it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from safegen.core.documents import read_json_object
from safegen.core.errors import FileError
from safegen.core.files import is_unfinished
from safegen.core.settings import Name
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.run.folder import SETTINGS, check_links, write_json


class WorkflowSettings(BaseModel):
    """Settings of the workflow that made a run, of which a report reads the workflow's name."""

    model_config = ConfigDict(frozen=True, extra="allow")

    workflow: Name | None = None
    """Name of the workflow."""


def claim_directory(output_dir: Path, settings: Mapping[str, Any]) -> None:
    """Write a workflow's settings into a new directory, or check those that it has.

    Args:
        output_dir: directory of the run, new or of an earlier call.
        settings: everything that decides the results, as plain values.

    Raises:
        FileError: `output_dir` holds something else or was made with other settings, or cannot be
            written.
    """
    path, wanted = output_dir / SETTINGS, json.loads(json.dumps(settings))
    try:
        if os.path.lexists(path):
            check_links(output_dir)
            gaps = differences(read_json_object(path), wanted)
            if gaps:
                raise FileError(
                    f"{output_dir} was made with other settings (then and now): {join_gaps(gaps)}. "
                    "Name another directory with --out."
                )
            return
        if output_dir.is_symlink() or (
            output_dir.exists()
            and (
                not output_dir.is_dir()
                or any(not is_unfinished(path) for path in output_dir.iterdir())
            )
        ):
            raise FileError(f"{output_dir} already exists. Name another directory with --out.")
        output_dir.mkdir(parents=True, exist_ok=True)
        write_json(path, wanted)
    except OSError as error:
        raise FileError(f"{output_dir} cannot be written: {error.strerror or error}") from error
