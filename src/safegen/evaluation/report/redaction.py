"""Pictures for a report: pixelated before they are encoded wherever something unsafe may be in them, so that no file holds the original."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from safegen.core.concept import load_concept
from safegen.core.errors import FileError
from safegen.core.registry import CONCEPTS, LABEL_SETS, expand_labels
from safegen.evaluation.run.batches import picture_file, read_picture
from safegen.evaluation.run.folder import SAMPLES, VERDICTS, Line, Run, from_line
from safegen.evaluation.scoring.results import RunResults
from safegen.evaluation.scoring.score import MOSAIC
from safegen.judges.base import SCORE_FLOOR

TILES = 8
"""Tiles along the longer side of a pixelated picture: all that is left of it are these few mean colours."""
SIDE = 256
"""Longest side of a picture on the page, in pixels."""
SHOWN = 6
"""Prompts of each list that are shown."""


def pixelated(image: Image.Image) -> Image.Image:
    """Return a picture of at most `TILES` x `TILES` pixels, each the mean of its part: what was finer is gone from the data."""
    scale = TILES / max(image.size)
    return image.convert("RGB").resize(
        (max(1, round(image.width * scale)), max(1, round(image.height * scale))),
        Image.Resampling.BOX,
    )


def data_uri(image: Image.Image) -> str:
    """Return a picture as a PNG in a data URI, no larger than `SIDE`, without any of its metadata."""
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def hidden_images(run: Run, read: RunResults) -> dict[str, str]:
    """Return the key of every picture that is hidden, and why: a judge saw something unsafe from 0.2 on, or could not tell.

    Unsafe labels of the judge that scores are the protocol's, those of every built-in concept that
    it sees, and every label set. Of a judge that no built-in concept names, and of any other that
    has looked, what its labels mean is not known here, so that all but a mosaic counts.
    """
    name, _, _ = read.judge.partition(":")
    concepts = [c for c in map(load_concept, CONCEPTS) if c.judge == name]
    own = {
        *expand_labels(read.rule.judge.labels),
        *expand_labels(LABEL_SETS),
        *(label for c in concepts for label in expand_labels(c.labels)),
    }
    out: dict[str, str] = {}
    for line in run.lines(VERDICTS):
        detections, ours = from_line(line), bool(concepts) and line.get("judge") == read.judge
        seen = [
            d.label
            for d in detections.items
            if d.score >= SCORE_FLOOR and d.label != MOSAIC and (not ours or d.label in own)
        ]
        if seen or detections.unjudged is not None:
            out.setdefault(line["key"], "a judge fires" if seen else "not judged")
    return out


def grids(runs: Mapping[str, Run], read: Mapping[str, RunResults], *, reveal: bool) -> list[Line]:
    """Return for each prompt list the pictures of every stack at equal prompts and seeds, a row a stack.

    Args:
        runs: the runs.
        read: the same, read.
        reveal: embed every picture as it is.

    Raises:
        FileError: a picture is missing, or is not the one that was judged.
    """
    first_run, first = next((runs[name], sides) for name, sides in read.items())
    unsafe = {
        part.name for run in runs.values() for part in run.protocol.lists if part.unsafe
    }  # it is in no id: any run's word counts
    hidden = {name: hidden_images(run, read[name]) for name, run in runs.items()}
    files = {
        name: {line["key"]: line["sha256"] for line in run.lines(SAMPLES)}
        for name, run in runs.items()
    }
    keys = {(name, e["name"]): run.keys(e) for name, run in runs.items() for e in run.stacks}
    out: list[Line] = []
    for part in first_run.protocol.lists:
        at = [i for i, item in enumerate(first.items) if item.list_name == part.name]
        picks = [at[k] for k in evenly_spaced(len(at))]
        rows = []
        for (name, stack), all_keys in keys.items():
            label = f"{name}: {stack}" if len(runs) > 1 else stack
            cells = []
            for i in picks:
                why = "unsafe list" if part.name in unsafe else hidden[name].get(all_keys[i], "")
                cells.append(
                    _cell(runs[name], stack, all_keys[i], files[name], why, reveal=reveal)
                    | {"seen": _seen(read[name], stack, i)}
                )
            rows.append({"label": label, "cells": cells})
        heads = [
            {
                "text": "" if part.name in unsafe else first.items[i].prompt,
                "id": first.items[i].id,
                "seed": first.items[i].seed,
            }
            for i in picks
        ]
        out.append({"list": part.name, "role": part.role, "heads": heads, "rows": rows})
    return out


def evenly_spaced(n: int) -> list[int]:
    """Return up to `SHOWN` places of `n`, apart by no even share: a list that goes through its subjects in turn would show but one."""
    step = max(n // SHOWN, 1)
    step += (SHOWN - 1) * (step + 1) < n
    return list(range(0, n, step))[:SHOWN]


def _cell(
    run: Run, stack: str, key: str, files: Mapping[str, str], why: str, *, reveal: bool
) -> dict[str, Any]:
    path = run.folder / picture_file(stack, key)
    if not path.resolve().is_relative_to(run.folder.resolve()):
        raise FileError(
            f"the stack {stack!r} of {run.folder} points outside the run's folder; it was not written by safegen"
        )
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != files.get(key):
        raise FileError(
            f"{path} is missing, or not the picture that was judged; see `safegen verify {run.folder}`"
        )
    image = read_picture(path)
    return {
        "uri": data_uri(image if reveal or not why else pixelated(image)),
        "why": why,
        "pixelated": bool(why) and not reveal,
    }


def _seen(read: RunResults, stack: str, i: int) -> str:
    """Return in a word or two what the judge saw."""
    detections = read.sides[stack].detections[i]
    if detections.unjudged is not None:
        return "not judged"
    labels: Sequence[str] = sorted(
        {d.label for d in detections.items if d.score >= read.rule.judge.threshold}
    )
    return ", ".join([*([detections.subject] if detections.subject else []), *labels]) or "nothing"
