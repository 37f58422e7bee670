"""Attack of a run in its report: rates before and after, cost, and what the attack chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from safegen.core.files import display_name
from safegen.evaluation.report.format import format_rate, percent
from safegen.evaluation.run.attack_records import FIELDS, AttackRecord, AttackRun, Cost
from safegen.evaluation.scoring.results import RunResults

HIDDEN = "(hidden)"
"""Text in place of a setting that may repeat an unsafe prompt."""
CURVE_POINTS = 100
"""Most points of a curve."""
ACCESS = {
    "queries": "images on request",
    "text_encoder": "the text encoder",
    "weights": "all weights",
}
"""What an attacker needs, in words."""


class PerplexityModel(Protocol):
    """Language model that tells how natural a text is."""

    id: str
    """Name and hash of the weights."""

    def perplexities(self, texts: Sequence[str]) -> list[float | None]:
        """Return the perplexity of each text; None where it has none."""
        ...


def attack_section(
    results: RunResults, scores: Mapping[str, Any], perplexity: PerplexityModel | None = None
) -> dict[str, Any] | None:
    """Return what a report says about the attack of a run; None if the run made no attack.

    No text that the attack found is in it.

    Args:
        results: results of the run.
        scores: their scores.
        perplexity: measures the texts.
    """
    attack = results.attack
    if attack is None:
        return None
    unsafe = any(part.unsafe for part in results.protocol.lists)
    texts = [record.prompt for record in attack.records] if attack.changes_prompts else []
    return {
        **scores["attack"],
        "needs": ACCESS[attack.settings.access],
        "settings": public_settings(attack.settings.attack, unsafe=unsafe),
        "budget": {k: v for k, v in attack.settings.config.budget.items() if v is not None},
        "repeat": attack.settings.config.repeat,
        "hidden": unsafe,
        "after": [
            row | {"per_success": _cost_per_success(row, attack)}
            for row in scores["attack"]["after"]
        ],
        "cost": sum((record.cost for record in attack.records), Cost()).model_dump(),
        "curve": objective_points(attack.records),
        "perplexity": perplexity and text_perplexity(perplexity, texts),
    }


def _cost_per_success(row: Mapping[str, Any], attack: AttackRun) -> dict[str, float] | None:
    """Return the cost of a row's form of the attack by prompt that it breaks; None if none.

    Only attacked stacks have one.
    """
    hits = row["prompt"]["unsafe"] if row["prompt"] else 0
    if not hits or not row["attacked"] or row["control"]:
        return None
    # an attack that writes no prompts has one row for all of its forms
    own = [r.cost for r in attack.records if r.variant == row["variant"] or not row["variant"]]
    cost = sum(own, Cost())
    return {name: getattr(cost, name) / hits for name in FIELDS}


def public_settings(settings: Mapping[str, Any], *, unsafe: bool) -> dict[str, Any]:
    """Return the settings of an attack, with paths reduced to file names.

    Args:
        settings: settings as plain values.
        unsafe: hide everything but numbers, since a text may repeat a prompt.
    """

    def public(value: Any) -> Any:
        if isinstance(value, str):
            return HIDDEN if unsafe else display_name(value)
        if isinstance(value, list):
            return [public(entry) for entry in value]
        if isinstance(value, Mapping):
            return HIDDEN if unsafe else {key: public(entry) for key, entry in value.items()}
        return value

    return {key: public(value) for key, value in settings.items() if key != "name"}


def objective_points(records: Sequence[AttackRecord]) -> list[dict[str, float]]:
    """Return the mean and the quartiles of the best objective so far, by step.

    An attack that has ended keeps its last value.
    """
    histories = [record.history for record in records if record.history]
    if not histories:
        return []
    steps = max(map(len, histories))
    picks = sorted({round(k) for k in np.linspace(0, steps - 1, min(steps, CURVE_POINTS))})
    table = np.array([[history[min(k, len(history) - 1)] for k in picks] for history in histories])
    low, high = np.quantile(table, [0.25, 0.75], axis=0)
    return [
        {
            "step": k + 1,
            "mean": float(mean),
            "low": float(bottom),
            "high": float(top),
            "n": len(histories),
        }
        for k, mean, bottom, top in zip(picks, table.mean(axis=0), low, high, strict=True)
    ]


def text_perplexity(model: PerplexityModel, texts: Sequence[str]) -> dict[str, Any] | None:
    """Return the median perplexity of texts with its quartiles; None if no text has one."""
    values = [value for value in model.perplexities(texts) if value is not None]
    if not values:
        return None
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75])
    spread = {"median": float(median), "low": float(low), "high": float(high)}
    return {"model": model.id, "n": len(values)} | spread


def attack_headline(section: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the headline cards (title, value, detail) of an attack of one form; else none."""
    rows = [row for row in section["after"] if row["attacked"] and not row["control"]]
    if len(rows) != 1:
        return []
    cards = []
    for when, row in (("before", section["before"][section["stack"]]), ("after", rows[0])):
        success = row["prompt"]
        value = percent(success["asr"]["value"]) if success else "undefined"
        detail = format_rate(success["asr"]) if success else row["undefined"]["prompt"]
        detail = detail.partition(" (")[2].removesuffix(")") if success else detail
        title = f"attacked prompts that show it, {when}"
        cards.append({"title": title, "value": value, "detail": detail})
    per, cost = rows[0]["per_success"], section["cost"]
    unit = next((unit for unit in ("denoiser", "text_encoder") if cost[unit]), "")
    if not unit:
        return cards
    value = f"{per[unit]:,.0f}" if per else "no success"
    detail = f"{cost[unit]:,} in all, {cost['queries']:,} queries"
    title = f"{unit.replace('_', '-')} passes per success"
    return [*cards, {"title": title, "value": value, "detail": detail}]
