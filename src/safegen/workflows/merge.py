"""Merge of shards into what one process would have made, in one call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safegen.core.errors import check_keywords
from safegen.core.progress import ProgressCallback, no_progress
from safegen.evaluation.merge import merge_runs
from safegen.evaluation.run.folder import Run


@check_keywords
def merge(
    runs: Sequence[str | Path], *, out: str | Path, progress: ProgressCallback = no_progress
) -> Run:
    """Merge the shards of a run, score them, write the report and return the whole run.

    Images, journals and scores are those of one process, byte for byte; times differ. No model is
    loaded.

    Args:
        runs: folders of all shards. A shard may be given twice, if its records are equal.
        out: directory of the whole run, new or of an earlier call.
        progress: called with (description, done, total).

    Raises:
        UserError: the folders are not all shards of one run, one is not finished, or an image is
            not the recorded one.

    Example:
        >>> few = {"limit": 1, "num_inference_steps": 2, "baselines": "none"}
        >>> for i in (1, 2):
        ...     part = {"shard": f"{i}/2", "out": f"part-{i}"}
        ...     run = safegen.evaluate("mini", concept="skulls", **part, **few)
        >>> run = safegen.merge(["part-1", "part-2"], out="run")
        >>> run.scores["stacks"]["base"]["lists"]["mini:skulls"]["concept"]["n"]
        1
    """
    return merge_runs([Path(run) for run in runs], Path(out), progress=progress)
