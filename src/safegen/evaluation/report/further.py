"""The figures of every list beside the headline, as a table of texts for the page and the README."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from safegen.evaluation.run.folder import Line

Cell = Callable[[Mapping[str, Any]], str]


def further(facts: Line) -> Line:
    """Return the table of what else the protocol asks for: `heads`, `rows` (stack, list, cells), and `undefined`, a reason each.

    Every rate has its interval and n; every distance its n, for two of unlike n are not comparable.
    """
    wanted = [m for m in FIGURES if m in facts["protocol"]["decides"]["metrics"]]
    rows, undefined = [], dict[str, None]()
    for stack in facts["stacks"]:
        lists = facts["scores"][stack["run"]]["stacks"][stack["name"]]["lists"]
        for name, row in lists.items():
            cells = [FIGURES[m][1](row[m]) if row.get(m) else "–" for m in wanted]
            if any(cell != "–" for cell in cells):
                rows.append({"stack": stack["label"], "list": name, "cells": cells})
            reasons = row.get("undefined", {})
            undefined |= dict.fromkeys(
                f"{FIGURES[m][0]}, {stack['label']}, {name}: {reasons[m]}"
                for m in wanted
                if m in reasons
            )
    heads = [FIGURES[m][0] for m in wanted]
    return {"heads": heads if rows else [], "rows": rows, "undefined": list(undefined)}


def split_cell(cell: str) -> list[str]:
    """Return a cell's number, then what stands in brackets or after a semicolon: a line each on the page."""
    return [part for part in re.split(r" \(|\)[;,]? ?|; ", cell) if part]


def _share(rate: Mapping[str, Any]) -> str:
    low, high = (f"{100 * rate[key]:.1f}" for key in ("low", "high"))
    n = f"n = {rate['n']}" if "n" in rate else f"{rate['prompts']} prompts, {rate['k']} drawn"
    return f"{100 * rate['value']:.1f} % ({low} to {high} %; {n})"


def _attack(found: Mapping[str, Any]) -> str:
    besides = [f"{found[key]} {key}" for key in ("refused", "unjudged") if found[key]]
    return "; ".join(
        [
            f"{_share(found['asr'])}, {found['n_per_prompt'] or 'unlike numbers of'} a prompt",
            *besides,
        ]
    )


def _mean(found: Mapping[str, Any], digits: int = 1) -> str:
    text = f"{found['value']:.{digits}f}"
    spread = (
        "" if found["low"] is None else f"{found['low']:.{digits}f} to {found['high']:.{digits}f}; "
    )
    return f"{text} ({spread}n = {found['n']})"


def _clip(found: Mapping[str, Any]) -> str:
    far = found.get("to_base")
    return _mean(found["mean"]) + (f"; minus base {far['value']:+.1f}{_to(far)}" if far else "")


def _to(far: Mapping[str, Any]) -> str:
    return "" if far["low"] is None else f" ({far['low']:+.1f} to {far['high']:+.1f})"


def _distance(found: Mapping[str, Any]) -> str:
    return f"{found['value']:.3g} (n = {found['n']}, {found['n_reference']})"


FIGURES: dict[str, tuple[str, Cell]] = {
    "asr": ("attack success, a picture", _attack),
    "asr_any": ("attack success, any of N", _attack),
    "inappropriate": ("inappropriate probability", _share),
    "expected_maximum": ("expected maximum", _share),
    "over_censoring": ("over-censored", _share),
    "coherence": ("coherent", _share),
    "coherence_kept": ("coherence kept", _share),
    "clip_score": ("CLIP score, 100 cos", _clip),
    "lpips": ("LPIPS to base", lambda found: _mean(found, 3)),
    "fid_to_base": ("FID to base", _distance),
    "kid_to_base": ("KID to base", _distance),
    "cmmd_to_base": ("CMMD to base", _distance),
}
"""Metric: its head, and how it is written."""
