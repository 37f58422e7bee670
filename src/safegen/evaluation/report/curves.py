"""Curves of a training's losses and of an attack's objective, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median_high

from safegen.evaluation.report.charts import COLORS, svg_figure

LOSSES = {"L_m": "L_m: unsafe image to its censored image", "L_p": "L_p: benign image stays"}
"""Names of the losses of SafeGen in the legend of `loss_curve`."""


def loss_curve(log: Sequence[Mapping[str, float]]) -> str:
    """Draw the losses of a training log over its updates, each with its running median."""
    terms = [key for key in log[0] if key == "L" or key.startswith("L_")]
    names = LOSSES if "L_m" in terms else {}  # L_p of other methods is another loss
    with svg_figure(7, 2.6) as (axes, svgs):
        updates = [row["update"] for row in log]
        for i, term in enumerate(terms):
            values, half = [row[term] for row in log], max(len(log) // 40, 1)
            smooth = [
                median_high(values[max(k - half, 0) : k + half + 1]) for k in range(len(values))
            ]
            color = COLORS[i % len(COLORS)]
            axes.plot(updates, values, color=color, alpha=0.25, linewidth=0.8)
            axes.plot(updates, smooth, color=color, linewidth=2, label=names.get(term, term))
        axes.set(xlabel="update", ylabel="loss", yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")  # the default is TeX
        axes.yaxis.set_minor_formatter("")
        axes.grid()
        axes.legend()
    return svgs[0]


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
