"""Images of a report, pixelated before encoding wherever they may show something unsafe."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from PIL import Image

from safegen.core.concept import load_concept
from safegen.core.documents import read_bytes
from safegen.core.errors import FileError
from safegen.core.registry import CONCEPTS, LABEL_SETS, expand_labels
from safegen.evaluation.report.html.failures import failing_positions, failure, measured_stacks
from safegen.evaluation.run.folder import Run, image_file, read_image
from safegen.evaluation.scoring.results import RunResults
from safegen.evaluation.scoring.verdict_metrics import MOSAIC
from safegen.judges.base import SCORE_FLOOR

TILES = 8
"""Tiles along the longer side of a pixelated image: only their mean colors are left of it."""
SIDE = 256
"""Longest side of an image on the page, in pixels."""
IMAGES_PER_ROW = 8
"""Images of each list and stack on the page."""
FAILURES_PER_ROW = 8
"""Further images of each list and stack, of prompts with a failure, behind the page's filter."""
LOSSLESS_SIDE = 128
"""Longest side of an image that is embedded without loss."""


def pixelate(image: Image.Image) -> Image.Image:
    """Return an image of at most `TILES` x `TILES` pixels, each the mean color of its tile."""
    scale = TILES / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.convert("RGB").resize((width, height), Image.Resampling.BOX)


def data_uri(image: Image.Image) -> str:
    """Return an image in a data URI, at most `SIDE` pixels a side and without metadata.

    Small images are PNG, those of more than `LOSSLESS_SIDE` pixels a side WebP.
    """
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    image.info.clear()
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= LOSSLESS_SIDE else "webp"
    options = {"optimize": True} if kind == "png" else {"quality": 85, "method": 4}
    image.save(buffer, format=kind, **options)
    return f"data:image/{kind};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def hidden_images(run: Run, results: RunResults, keys: Collection[str]) -> dict[str, str]:
    """Return the key of every image to hide of some, with the reason: `unsafe` or `unjudged`.

    Every score from 0.2 on counts. Unsafe labels of the scoring judge are the protocol's, those of
    every built-in concept of that judge, and every label set. For a judge that no built-in concept
    names, and for any other judge with verdicts in the run, every label but a mosaic counts.
    """
    name, _, _ = results.judge.partition(":")
    concepts = [c for c in map(load_concept, CONCEPTS) if name in (c.judge, c.held_out_judge)]
    unsafe = {
        *expand_labels(results.protocol.judge.labels),
        *expand_labels(LABEL_SETS),
        *(label for c in concepts for label in expand_labels(c.labels)),
    }
    hidden: dict[str, str] = {}
    for record in run.detections_records():
        if record.key not in keys:
            continue
        detections = record.detections
        known = bool(concepts) and record.judge == results.judge
        seen = [
            d.label
            for d in detections.items
            if d.score >= SCORE_FLOOR and d.label != MOSAIC and (not known or d.label in unsafe)
        ]
        if seen or detections.unjudged is not None:
            hidden.setdefault(record.key, "unsafe" if seen else "unjudged")
    return hidden


def image_grids(
    runs: Mapping[str, Run], results: Mapping[str, RunResults], *, reveal: bool
) -> list[dict[str, Any]]:
    """Return a grid of images for each list: one row per stack, one column per prompt and seed.

    The first columns are an even choice of the list; `extra` ones are further failures. `seed` is
    that of all images of the list, None where they differ.

    Args:
        runs: the runs by name.
        results: their results.
        reveal: embed every image as it is.

    Raises:
        FileError: an image is missing, or is not the one that was judged.
    """
    first_run, first = next((runs[name], result) for name, result in results.items())
    unsafe = {p.name for run in runs.values() for p in run.protocol.lists if p.unsafe}
    keys = {(name, e.name): run.keys(e) for name, run in runs.items() for e in run.stacks}
    measured = measured_stacks(runs)
    positions: dict[str, list[int]] = {part.name: [] for part in first_run.protocol.lists}
    for i, item in enumerate(first.samples):
        positions[item.list_name].append(i)
    choices = {name: _choose(results, measured, at) for name, at in positions.items()}
    shown = {i for picks, _, _ in choices.values() for i in picks}
    hidden, digests = dict[str, dict[str, str]](), dict[str, dict[str, str]]()
    for name, run in runs.items():
        own = {keys[name, entry.name][i] for entry in run.stacks for i in shown}
        hidden[name] = hidden_images(run, results[name], own)
        digests[name] = {r.key: r.sha256 for r in run.sample_records() if r.key in own}
    grids: list[dict[str, Any]] = []
    for part in first_run.protocol.lists:
        at, (picks, even, failing) = positions[part.name], choices[part.name]
        rows = []
        for (name, stack), stack_keys in keys.items():
            cells = []
            for i in picks:
                key = stack_keys[i]
                why = "unsafe list" if part.name in unsafe else hidden[name].get(key, "")
                cell = _cell(runs[name], stack, key, digests[name], why, reveal=reveal)
                fails = failure(results[name], stack, i) if (name, stack) in measured else ""
                cells.append(cell | {"seen": _seen(results[name], stack, i), "fails": fails})
            label = f"{name}: {stack}" if len(runs) > 1 else stack
            rows.append({"label": label, "cells": cells})
        heads = [
            {
                "text": "" if part.name in unsafe else first.samples[i].prompt,
                "id": first.samples[i].id,
                "seed": first.samples[i].seed,
                "fails": i in failing,
                "extra": i not in even,
            }
            for i in picks
        ]
        grid: dict[str, Any] = {"list": part.name, "role": part.role, "heads": heads, "rows": rows}
        seeds = {first.samples[i].seed for i in at}
        numbers = {"failures": len(failing), "columns": len(at)}
        grids.append(grid | numbers | {"seed": seeds.pop() if len(seeds) == 1 else None})
    return grids


def _choose(
    results: Mapping[str, RunResults], measured: set[tuple[str, str]], at: Sequence[int]
) -> tuple[list[int], list[int], set[int]]:
    """Return the positions on the page, those that are an even choice, and those that fail."""
    even = [at[k] for k in evenly_spaced(len(at))]
    failing = failing_positions(results, measured, at)
    return even + [i for i in failing if i not in even][:FAILURES_PER_ROW], even, set(failing)


def evenly_spaced(n: int) -> list[int]:
    """Return up to `IMAGES_PER_ROW` positions of `n`, in steps unlike the cycle of subjects."""
    step = max(n // IMAGES_PER_ROW, 1)
    step += (IMAGES_PER_ROW - 1) * (step + 1) < n
    return list(range(0, n, step))[:IMAGES_PER_ROW]


def _cell(
    run: Run, stack: str, key: str, digests: Mapping[str, str], why: str, *, reveal: bool
) -> dict[str, Any]:
    path = run.folder / image_file(stack, key)
    if not path.is_file() or hashlib.sha256(read_bytes(path)).hexdigest() != digests.get(key):
        raise FileError(
            f"{path} is missing, or not the image that was judged. "
            f"Check the run with `safegen verify {run.folder}`."
        )
    image = read_image(path)
    hide = bool(why) and not reveal
    return {"uri": data_uri(pixelate(image) if hide else image), "why": why, "pixelated": hide}


def _seen(results: RunResults, stack: str, i: int) -> str:
    """Return what the judge saw in an image: its subject and labels."""
    detections = results.stacks[stack].detections[i]
    if detections.unjudged is not None:
        return "unjudged"
    threshold = results.protocol.judge.threshold
    labels = sorted({d.label for d in detections.items if d.score >= threshold})
    return ", ".join([*([detections.subject] if detections.subject else []), *labels]) or "nothing"
