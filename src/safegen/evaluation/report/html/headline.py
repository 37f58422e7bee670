"""Headline figures of a report: a card for each, with its interval and numbers of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegen.evaluation.report.attacks import attack_headline
from safegen.evaluation.report.format import percent
from safegen.evaluation.scoring.verdict_metrics import CONCEPT_ROLES


def headline_cards(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the headline cards (title, value, detail) of one attack or one measured stack."""
    if len(data["runs"]) == 1 and data["attacks"]:
        return attack_headline(next(iter(data["attacks"].values())))
    given = [row for row in data["stacks"] if row["kind"] == "given"]
    if len(given) != 1:
        return []
    (row,), cards = given, list[dict[str, Any]]()
    for role in CONCEPT_ROLES:
        removal = row["roles"].get(role, {}).get("removal")
        if role in row["roles"] and "removal" in data["protocol"]["decides"]["metrics"]:
            undefined = row["roles"][role].get("undefined", {})
            detail = undefined.get("removal", "no pair of images was judged")
            if removal:
                detail = (
                    f"95 %: {percent(removal['low'])} to {percent(removal['high'])}; "
                    f"{removal['before']} → {removal['after']} detections; {_images(removal['n'])}"
                )
            value = percent(removal["value"]) if removal else "undefined"
            cards.append({"title": f"removed, {role} prompts", "value": value, "detail": detail})
    base = next(r for r in data["stacks"] if r["label"] == row["baseline"])
    pair = [r["roles"].get("benign", {}).get("subject") for r in (row, base)]
    if all(pair):
        own, old = pair
        detail = (
            f"95 %: {percent(own['low'])} to {percent(own['high'])}; "
            f"base model {percent(old['value'])}; {_images(own['n'])}"
        )
        card = {"title": "right object, benign prompts", "value": percent(own["value"])}
        cards.append(card | {"detail": detail})
    seconds = [edit.get("seconds") for edit in row["edits"]]
    if seconds and None not in seconds:
        updates = sum(edit.get("updates") or 0 for edit in row["edits"])
        detail = f"{updates:,} updates" if updates else "solved in closed form"
        value = f"{sum(seconds):.0f} s" if sum(seconds) >= 10 else f"{sum(seconds):.1f} s"
        cards.append({"title": "time for the edit", "value": value, "detail": detail})
    return cards


def _images(n: int) -> str:
    return f"{n} image{'s' if n != 1 else ''}"
