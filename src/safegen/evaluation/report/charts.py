"""Charts of a report as inline SVG.

They take their ink from the page, so that they are read in the dark and on paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safegen.core.errors import MissingExtraError
from safegen.evaluation.run.folder import Line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9", "#c2255c", "#0c8599", "#868e96", "#a6761d")
"""Told apart on white and on near-black; a marker goes with each, for those who see no colours."""
MARKERS = "osD^vPX*"
INK = "#010203"
"""Stands for the page's ink until the drawing is text, where it becomes `currentColor`."""


def charts(facts: Line) -> list[dict[str, str]]:
    """Return the charts of a report: `title`, `say` (how to read it), and `svg`, or `why` there is none."""
    out = []
    clip = "clip_score" in facts["protocol"]["decides"]["metrics"]
    for title, say, draw in [*CHARTS[:1], *([CLIP_CHART] if clip else []), *CHARTS[1:]]:
        try:
            out.append({"title": title, "say": say, "svg": draw(facts), "why": ""})
        except (ValueError, MissingExtraError) as error:
            out.append({"title": title, "say": say, "svg": "", "why": f"{error}."})
    return out


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Yield axes to draw on, and a list that holds the drawing afterwards.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a chart", "matplotlib", "report") from error
    ink = {f"{k}.color": INK for k in ("text", "xtick", "ytick")} | {
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.labelcolor": INK,
    }
    plain = {
        "svg.fonttype": "none",
        "svg.hashsalt": "safegen",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.size": 9.5,
    }
    with matplotlib.rc_context(
        ink | plain | {"legend.frameon": False, "grid.color": INK, "grid.alpha": 0.15}
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes, out = figure.subplots(), list[str]()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, out
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = text.getvalue().replace(INK, "currentColor")
    out.append(re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :]))


def _style(i: int) -> dict[str, Any]:
    return {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}


def _arms(rate: Mapping[str, float], scale: float = 100) -> list[list[float]]:
    return [
        [max(rate["value"] - rate["low"], 0) * scale],
        [max(rate["high"] - rate["value"], 0) * scale],
    ]


def pareto(facts: Line) -> str:
    """Draw safety against utility, a point a stack, with both intervals.

    Raises:
        ValueError: no stack has both.
    """
    use = {r["label"]: (r["roles"].get("benign") or {}).get("subject") for r in facts["stacks"]}
    if not any(use[r["label"]] and r["asked"] for r in facts["stacks"]):
        raise ValueError(
            "no stack has both prompts that ask for the concept and benign prompts whose object the judge can name"
        )
    return _pareto(facts, use, "right object on benign prompts, %", scale=100, xlim=(-4, 104))


def pareto_clip(facts: Line) -> str:
    """Draw safety against the CLIP score of benign prompts, a point a stack, with both intervals.

    Raises:
        ValueError: no stack has both.
    """
    use = {}
    for r in facts["stacks"]:
        found = ((r["roles"].get("benign") or {}).get("clip_score") or {}).get("mean")
        use[r["label"]] = found and found | {
            key: found["value"] if found[key] is None else found[key] for key in ("low", "high")
        }
    if not any(use[r["label"]] and r["asked"] for r in facts["stacks"]):
        raise ValueError(
            "no stack has both prompts that ask for the concept and benign prompts with a CLIP score"
        )
    return _pareto(facts, use, "CLIP score on benign prompts, 100 cos", scale=1)


def _pareto(
    facts: Line, use: Mapping[str, Any], xlabel: str, *, scale: float, **limits: tuple[float, float]
) -> str:
    points = [
        (i, r["label"], r["asked"], use[r["label"]])
        for i, r in enumerate(facts["stacks"])
        if r["asked"] and use[r["label"]]
    ]
    with _figure(4.2, 3.3 + 0.17 * len(points)) as (axes, out):
        for i, name, asked, x in points:
            y = {"value": 1 - asked["value"], "low": 1 - asked["high"], "high": 1 - asked["low"]}
            axes.errorbar(
                x["value"] * scale,
                y["value"] * 100,
                xerr=_arms(x, scale),
                yerr=_arms(y),
                label=name,
                capsize=2,
                elinewidth=1,
                markersize=7,
                linestyle="",
                **_style(i),
            )
        axes.set(xlabel=xlabel, ylabel="concept not seen, %", ylim=(-4, 104), **limits)
        axes.grid()
        _name(axes)
    return out[0]


def _name(axes: Axes) -> None:
    """Put the legend under a chart: in two columns where names are short enough for the page, and with room of its own."""
    names = axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, names), default=0) > 20 else 2
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + 0.19 * max(-(-len(names) // columns) - 2, 0))
    figure.legend(loc="outside lower center", ncols=columns)


def forest(facts: Line) -> str:
    """Draw each stack's difference from its base, with the interval.

    Raises:
        ValueError: nothing is held against a base.
    """
    rows = [
        (i, r["label"], r["difference"])
        for i, r in enumerate(facts["stacks"])
        if r.get("difference")
    ]
    if not rows:
        raise ValueError("no stack is held against a base on prompts that ask for the concept")
    with _figure(4.2, 0.9 + 0.36 * len(rows)) as (axes, out):
        for y, (i, _, d) in enumerate(rows):
            axes.errorbar(d["value"] * 100, y, xerr=_arms(d), capsize=3, linestyle="", **_style(i))
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.set(
            xlabel="pictures that show it, minus base, percentage points",
            yticks=range(len(rows)),
            xlim=(-104, 104),
        )
        axes.set_yticklabels([name for _, name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.label.set_horizontalalignment("right")
        axes.xaxis.label.set_x(1.0)
    return out[0]


def removal(facts: Line) -> str:
    """Draw what is removed of each label by each stack.

    Raises:
        ValueError: the base shows no label.
    """
    rows = [
        (i, r["label"], {k: v for k, v in r["labels"].items() if v["value"] is not None})
        for i, r in enumerate(facts["stacks"])
        if r.get("labels")
    ]
    names = list(dict.fromkeys(label for _, _, table in rows for label in table))
    if not names:
        raise ValueError(
            "the base model shows no label of the concept on prompts that ask for it, so there is nothing to remove"
        )
    if names[-1] == "total" and len(names) == 2:
        names = names[:1]  # one label is the total
    with _figure(4.2, 1.1 + 0.19 * len(rows) * (len(names) + 0.6)) as (axes, out):
        step = 0.8 / len(rows)
        low = 0.0
        for k, (i, stack, table) in enumerate(rows):
            for j, label in enumerate(names):
                if label in table:
                    rate, y = table[label], j - 0.4 + step * (k + 0.5)
                    low = min(low, rate["low"])
                    named = (
                        {"label": stack} if label == next(n for n in names if n in table) else {}
                    )
                    axes.errorbar(
                        rate["value"] * 100,
                        y,
                        xerr=_arms(rate),
                        capsize=2,
                        linestyle="",
                        **named,
                        **_style(i),
                    )
        axes.set(
            xlabel="removed, %", yticks=range(len(names)), xlim=(max(low * 100, -100) - 4, 104)
        )
        axes.set_yticklabels(names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.grid(axis="x")
        _name(axes)
    return out[0]


def heat(facts: Line) -> str:
    """Draw lists against stacks: how often the concept is seen.

    Raises:
        ValueError: there is no such rate.
    """
    from math import isnan, nan

    lists = [p["name"] for p in facts["lists"]]
    table = {r["label"]: [_seen(facts, r, name) for name in lists] for r in facts["stacks"]}
    if not any(v is not None for column in table.values() for v in column):
        raise ValueError("this protocol does not ask how often the concept is seen")
    with _figure(max(4.2, 1.6 + 0.62 * len(table)), 1.5 + 0.36 * len(lists)) as (axes, out):
        values = [
            [nan if (v := column[i]) is None else v * 100 for column in table.values()]
            for i in range(len(lists))
        ]
        edges = [k - 0.5 for k in range(len(table) + 1)], [k - 0.5 for k in range(len(lists) + 1)]
        axes.pcolormesh(
            *edges, values, cmap="YlOrRd", vmin=0, vmax=100, edgecolors="white", linewidth=1
        )
        for i, line in enumerate(values):
            for j, v in enumerate(line):
                axes.text(
                    j,
                    i,
                    "–" if isnan(v) else f"{v:.0f}",
                    ha="center",
                    va="center",
                    color=INK if isnan(v) else "#ffffff" if v > 60 else "#1a1a1a",
                )
        axes.set(xticks=range(len(table)), yticks=range(len(lists)))
        axes.set_xticklabels(list(table), rotation=35, ha="right")
        axes.set_yticklabels(lists)
        axes.set_ylim(len(lists) - 0.5, -0.5)
        axes.tick_params(length=0)
    return out[0]


def _seen(facts: Line, row: Line, name: str) -> float | None:
    rate = facts["scores"][row["run"]]["stacks"][row["name"]]["lists"][name].get("concept")
    return None if rate is None else float(rate["value"])


def sweep(facts: Line) -> str:
    """Draw how often the concept is seen against the judge's threshold.

    Raises:
        ValueError: no prompt asks for the concept.
    """
    rows = [(i, r["label"], r["sweep"]) for i, r in enumerate(facts["stacks"]) if r["sweep"]]
    if not rows:
        raise ValueError("no judged picture is of a prompt that asks for the concept")
    with _figure(4.2, 2.9 + 0.17 * len(rows)) as (axes, out):
        for i, name, points in rows:
            x, y = [p["threshold"] for p in points], [p["value"] * 100 for p in points]
            axes.fill_between(
                x,
                [p["low"] * 100 for p in points],
                [p["high"] * 100 for p in points],
                color=COLOURS[i % len(COLOURS)],
                alpha=0.12,
                linewidth=0,
            )
            axes.plot(x, y, label=name, linewidth=1.5, markersize=5, **_style(i))
        axes.axvline(
            facts["protocol"]["decides"]["judge"]["threshold"],
            color=INK,
            linewidth=0.8,
            linestyle=":",
        )
        axes.set(
            xlabel="least score that counts", ylabel="pictures that show it, %", ylim=(-4, 104)
        )
        axes.grid()
        _name(axes)
    return out[0]


CLIP_CHART: tuple[str, str, Callable[[Line], str]] = (
    "Safety against CLIP score",
    "As above, with how well benign pictures fit their prompts as the measure of use; its scale is the CLIP model's own.",
    pareto_clip,
)
"""Drawn after the first where the protocol asks for the CLIP score."""
CHARTS: Sequence[tuple[str, str, Callable[[Line], str]]] = (
    (
        "Safety against utility",
        "Up is safer, right is less harm done; a stack is better than another only where the crosses of their intervals stand apart.",
        pareto,
    ),
    (
        "Held against the base",
        "Left of the dashed line a stack shows the concept less often than the base, prompt by prompt; a bar across it shows nothing.",
        forest,
    ),
    (
        "Removed, label by label",
        "100 % is all gone, 0 none, below 0 more than before; a label that the base model never shows is left out.",
        removal,
    ),
    (
        "Lists and stacks",
        "Per cent of pictures in which the judge sees the concept: darker is more; rows of harmless prompts should be pale throughout.",
        heat,
    ),
    (
        "Other thresholds",
        "Lines that keep their order from left to right: the result does not hang on the threshold (dotted). Bands are 95 % intervals.",
        sweep,
    ),
)
