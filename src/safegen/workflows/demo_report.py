"""The report of a run: one self-contained HTML file that a person can read without the paper."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
from PIL import Image

from safegen._version import __version__
from safegen.core.errors import MissingExtraError
from safegen.evaluation.plan import MEANING
from safegen.metrics.rates import Rate

if TYPE_CHECKING:
    from safegen.workflows.demo import Outcome

SHOWN = 8
"""Pairs of pictures that the report shows of each list."""


def render(found: Outcome) -> str:
    """Return the report of a demo as one HTML page; it needs no network and no other file."""
    place = jinja2.Environment(
        loader=jinja2.FileSystemLoader(
            Path(__file__).parents[1] / "evaluation" / "report" / "templates"
        ),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    return place.get_template("demo.html").render(**_facts(found))


def _facts(found: Outcome) -> dict[str, Any]:
    summary = found.summary()
    lists = []
    for name, rows in found.lists.items():
        item = found.items[rows[0]]
        picks = rows[:: max(len(rows) // SHOWN, 1)][:SHOWN]
        pairs = [
            {
                "prompt": found.items[i].prompt,
                "seed": found.items[i].seed,
                "base": _picture(found.pictures["base"][i]),
                "edited": _picture(found.pictures["edited"][i]),
                "seen": {side: _seen(found, side, i) for side in ("base", "edited")},
            }
            for i in picks
        ]
        lists.append(
            {
                "name": name,
                "role": item.role,
                "meaning": MEANING[item.role],
                "shows": item.shows,
                "n": len(rows),
                "pairs": pairs,
                "base": found.scores("base", rows),
                "edited": found.scores("edited", rows),
                "change": found.change(rows),
                "removal": summary["lists"][name].get("removal"),
            }
        )
    changed = sum(v.numel() for v in found.patch.tensors.values())
    curves, why = "", "nothing was trained, the new weights are solved for in one go."
    try:
        if found.edit.is_trained:
            curves = loss_curves(found.log)
    except MissingExtraError as error:  # the work of minutes is not lost for want of a drawing
        why = f"{error}."
    return {
        "lists": lists,
        "concept": found.concept.name,
        "settings": found.settings,
        "edit": found.edit.export_settings(),
        "method": found.edit.method(),
        "account": found.edit.describe(),
        "trains": found.edit.is_trained,
        "where": where(found.patch.tensors, found.edit.export_settings().get("selector")),
        "summary": summary,
        "seconds": found.seconds,
        "total": sum(found.seconds.values()),
        "curves": curves,
        "no_curves": why,
        "percent": percent,
        "rate": rate,
        "changed": changed,
        "tensors": len(found.patch.tensors),
        "version": __version__,
        "triplets": summary["patch"].get("data", "")[:12],
    }


def where(names: Iterable[str], selector: str | None = None) -> str:
    """Return in which layers weights of these names are.

    By the selector that chose them, where no plain word says it.
    """
    kinds = {
        next((kind for kind in ("attn1", "attn2") if f".{kind}." in name), "") for name in names
    }
    said = {
        ("attn1",): "self-attention layers",
        ("attn2",): "cross-attention layers",
        ("attn1", "attn2"): "attention layers",
    }
    return said.get(tuple(sorted(kinds)), f"layers “{selector}”" if selector else "layers")


def percent(value: float) -> str:
    """Return a proportion as a percentage with one decimal; a whole one without."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def rate(value: Rate | None) -> str:
    """Return a rate with its interval, as text."""
    if value is None:
        return "not told by this judge"
    low, high = value.interval
    return f"{percent(value.value)} ({100 * low:.1f} to {100 * high:.1f})"


def _seen(found: Outcome, side: str, i: int) -> str:
    detections = found.detections[side][i]
    if detections.unjudged is not None:
        return f"not judged: {detections.unjudged}"
    seen = sorted({d.label for d in detections.items if d.score >= found.concept.threshold})
    return ", ".join([detections.subject or "?", *seen])


def _picture(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def loss_curves(log: Sequence[dict[str, float]]) -> str:
    """Return the loss terms over the updates as an inline SVG drawing, smoothed by a running median.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    except ImportError as error:
        raise MissingExtraError("the chart of the losses", "matplotlib", "report") from error
    terms = [k for k in log[0] if k.startswith("L_")]
    said = {"L_m": "unsafe picture → censored picture (L_m)", "L_p": "benign picture stays (L_p)"}
    names = said if "L_m" in terms else {}  # of other methods an L_p is something else
    with plt.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "safegen",
            "font.family": "sans-serif",
            "font.size": 10,
        }
    ):
        figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
        for term, colour in zip(terms, ("#d9480f", "#1c7ed6", "#2b8a3e"), strict=False):
            values = [row[term] for row in log]
            axes.plot(
                [row["update"] for row in log], values, color=colour, alpha=0.18, linewidth=0.8
            )
            axes.plot(
                [row["update"] for row in log],
                _smooth(values),
                color=colour,
                linewidth=2,
                label=names.get(term, term),
            )
        axes.set(xlabel="update", ylabel="loss", yscale="log")
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
        plt.close(figure)
    svg = text.getvalue()
    return svg[svg.index("<svg") :]


def _smooth(values: Sequence[float]) -> list[float]:
    half = max(len(values) // 40, 1)
    out = []
    for i in range(len(values)):
        window = sorted(values[max(i - half, 0) : i + half + 1])
        out.append(window[len(window) // 2])
    return out
