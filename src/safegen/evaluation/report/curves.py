"""Curves of a training's losses and of an attack's objective, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median_high
from typing import Any

from safegen.evaluation.report.charts import COLORS, svg_figure

LOSSES = {"L_m": "L_m: unsafe image to its censored image", "L_p": "L_p: benign image stays"}
"""Names of the losses of SafeGen in `loss_curve`."""
WIDE = 30
"""Ratio of the largest to the smallest running median from which an axis is logarithmic."""


def loss_curve(log: Sequence[Mapping[str, float]], term: str) -> str:
    """Draw a loss of a training log over its updates, with its running median.

    The axis spans the values of the loss, so that a small change is seen; it is logarithmic if the
    running median spans `WIDE` or more.

    Args:
        log: rows of the log.
        term: name of the loss.
    """
    color = COLORS[list(loss_names(log)).index(term) % len(COLORS)]
    updates, values = [row["update"] for row in log], [row[term] for row in log]
    smooth = running_median(values)
    with svg_figure(4.2, 2.4) as (axes, svgs):
        axes.plot(updates, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(updates, smooth, color=color, linewidth=2)
        axes.set(xlabel="update", ylabel="loss", **loss_axis(values, smooth))
        axes.yaxis.set_major_formatter("{x:g}")  # the default is TeX
        axes.yaxis.set_minor_formatter("")
        axes.locator_params(axis="x", integer=True)
        axes.grid()
    return svgs[0]


def loss_names(log: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """Return the losses of a log and their names for a reader."""
    terms = [key for key in log[0] if key == "L" or key.startswith("L_")]
    names = LOSSES if "L_m" in terms else {}  # L_p of other methods is another loss
    return {term: names.get(term, term) for term in terms}


def loss_change(log: Sequence[Mapping[str, float]], term: str) -> str:
    """Return the mean of a loss over the first and over the last tenth of a log's rows, as text."""
    tenth, values = max(len(log) // 10, 1), [row[term] for row in log]
    first, last = fmean(values[:tenth]), fmean(values[-tenth:])
    change = f", {100 * (last / first - 1):+.0f} %" if first > 0 else ""
    return f"First tenth {first:.3g}, last tenth {last:.3g}{change}."


def running_median(values: Sequence[float]) -> list[float]:
    """Return the running median of some values, over a twentieth of them."""
    half = max(len(values) // 40, 1)
    return [median_high(values[max(k - half, 0) : k + half + 1]) for k in range(len(values))]


def loss_axis(values: Sequence[float], smooth: Sequence[float]) -> dict[str, Any]:
    """Return the settings of the axis of a loss that make its range visible.

    Args:
        values: the loss of each update.
        smooth: their running median.
    """
    low, high = min(smooth), max(smooth)
    if low > 0 and high >= WIDE * low:
        return {"yscale": "log"}
    ordered = sorted(values)
    rest = len(ordered) // 20
    bottom, top = min(low, ordered[rest]), max(high, ordered[-1 - rest])
    margin = 0.08 * (top - bottom)
    return {"ylim": (bottom - margin, top + margin)} if margin else {}


def objective_curve(curve: Sequence[Mapping[str, float]]) -> str:
    """Draw the mean of an attack's best objective by step, with the quartiles."""
    with svg_figure(4.6, 2.4) as (axes, svgs):
        steps = [point["step"] for point in curve]
        low, mean, high = ([p[key] for p in curve] for key in ("low", "mean", "high"))
        axes.fill_between(steps, low, high, color=COLORS[0], alpha=0.15, linewidth=0)
        marker = "o" if len(steps) == 1 else ""
        axes.plot(steps, mean, color=COLORS[0], linewidth=2, marker=marker)
        axes.set(xlabel="step of the attack", ylabel="best objective so far")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.locator_params(axis="x", integer=True)
        axes.grid()
    return svgs[0]
