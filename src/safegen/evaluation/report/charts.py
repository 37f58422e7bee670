"""Charts of a report as inline SVG; text takes the color of the page, for dark mode and paper."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from safegen.core.errors import MissingExtraError
from safegen.core.quiet import temporary_matplotlib_folder
from safegen.core.text import escape_control

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORS = ("#1c7ed6", "#e8590c", "#2f9e44", "#ae3ec9", "#c2255c", "#0c8599", "#868e96", "#a6761d")
"""Distinct on white and on near-black; each has a marker too."""
MARKERS = "osD^vPX*"
INK = "#010203"
"""Color that becomes `currentColor` in the SVG."""
STYLE = {
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "safegen",
}


def charts(data: dict[str, Any]) -> list[dict[str, str]]:
    """Return the charts of a report: `title`, `say` (how to read it), `svg` or `why` not."""
    has_clip = "clip_score" in data["protocol"]["decides"]["metrics"]
    unwanted = [] if has_clip else [pareto_clip]
    unwanted += [] if any(part["rung"] for part in data["lists"]) else [ladder]
    made = []
    for title, say, draw in (chart for chart in CHARTS if chart[2] not in unwanted):
        try:
            made.append({"title": title, "say": say, "svg": draw(data), "why": ""})
        except (ValueError, MissingExtraError) as error:
            made.append({"title": title, "say": say, "svg": "", "why": f"{error}."})
    return made


@contextmanager
def svg_figure(width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Yield axes, and a list that holds the SVG text afterwards.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        with temporary_matplotlib_folder():
            import matplotlib
            from matplotlib.backends.backend_svg import FigureCanvasSVG
            from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a chart", "matplotlib", "report") from error
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # the browser has fonts of its own; a long name may leave no room for the axes
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes, svgs = figure.subplots(), list[str]()
        axes.spines[["top", "right"]].set_visible(False)
        yield axes, svgs
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    svg = "\n".join(map(escape_control, text.getvalue().split("\n")))
    svg = svg.replace(INK, "currentColor")
    svgs.append(re.sub(r'<g id="[^"]*">', "<g>", svg[svg.index("<svg") :]))


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _arms(rate: Mapping[str, float], scale: float = 100) -> list[list[float]]:
    low, high = rate["value"] - rate["low"], rate["high"] - rate["value"]
    return [[max(low, 0) * scale], [max(high, 0) * scale]]


def _legend(axes: Axes) -> None:
    """Put the legend under a chart, in two columns where the names are short enough."""
    names = axes.get_legend_handles_labels()[1]
    columns = 1 if max(map(len, names), default=0) > 20 else 2
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(figure.get_figheight() + 0.19 * max(-(-len(names) // columns) - 2, 0))
    figure.legend(loc="outside lower center", ncols=columns)


def pareto(data: dict[str, Any]) -> str:
    """Draw safety against the right object on benign prompts, one point per stack.

    Raises:
        ValueError: no stack has both.
    """
    utility = {r["label"]: (r["roles"].get("benign") or {}).get("subject") for r in data["stacks"]}
    return _pareto(data, utility, "right object on benign prompts, %", scale=100, xlim=(-4, 104))


def pareto_clip(data: dict[str, Any]) -> str:
    """Draw safety against the CLIP score of benign prompts, one point per stack.

    Raises:
        ValueError: no stack has both.
    """
    utility = {}
    for row in data["stacks"]:
        mean = ((row["roles"].get("benign") or {}).get("clip_score") or {}).get("mean")
        spread = mean and {
            key: mean["value"] if mean[key] is None else mean[key] for key in ("low", "high")
        }
        utility[row["label"]] = mean and mean | spread
    return _pareto(data, utility, "CLIP score on benign prompts, 100 cos", scale=1)


def _pareto(
    data: dict[str, Any], utility: Mapping[str, Any], xlabel: str, *, scale: float, **limits: Any
) -> str:
    rows = [
        (i, row, utility[row["label"]])
        for i, row in enumerate(data["stacks"])
        if row["asked"] and utility[row["label"]]
    ]
    if not rows:
        raise ValueError(
            "no stack has both prompts that ask for the concept and benign prompts with a utility"
        )
    with svg_figure(4.2, 3.3 + 0.17 * len(rows)) as (axes, svgs):
        for i, row, x in rows:
            seen = row["asked"]
            y = {"value": 1 - seen["value"], "low": 1 - seen["high"], "high": 1 - seen["low"]}
            axes.errorbar(
                x["value"] * scale,
                y["value"] * 100,
                xerr=_arms(x, scale),
                yerr=_arms(y),
                label=row["label"],
                capsize=2,
                elinewidth=1,
                markersize=7,
                linestyle="",
                **_style(i),
            )
        axes.set(xlabel=xlabel, ylabel="concept not seen, %", ylim=(-4, 104), **limits)
        axes.grid()
        _legend(axes)
    return svgs[0]


def forest(data: dict[str, Any]) -> str:
    """Draw each stack's difference from its base, with the interval.

    Raises:
        ValueError: no stack is compared with a base.
    """
    stacks = data["stacks"]
    rows = [(i, r["label"], r["difference"]) for i, r in enumerate(stacks) if r.get("difference")]
    if not rows:
        raise ValueError("no stack is compared with a base on prompts that ask for the concept")
    with svg_figure(4.2, 0.9 + 0.36 * len(rows)) as (axes, svgs):
        for y, (i, _, d) in enumerate(rows):
            axes.errorbar(d["value"] * 100, y, xerr=_arms(d), capsize=3, linestyle="", **_style(i))
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        xlabel = "images that show it, minus base, percentage points"
        axes.set(xlabel=xlabel, yticks=range(len(rows)), xlim=(-104, 104))
        axes.set_yticklabels([name for _, name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.xaxis.label.set_horizontalalignment("right")
        axes.xaxis.label.set_x(1.0)
    return svgs[0]


def removal(data: dict[str, Any]) -> str:
    """Draw the removal rate of each label by each stack.

    Raises:
        ValueError: the base shows no label.
    """
    rows = [
        (i, r["label"], {k: v for k, v in r["labels"].items() if v["value"] is not None})
        for i, r in enumerate(data["stacks"])
        if r.get("labels")
    ]
    names = list(dict.fromkeys(label for _, _, table in rows for label in table))
    if not names:
        raise ValueError(
            "the base model shows no label of the concept on prompts that ask for it, "
            "so there is nothing to remove"
        )
    if names[-1] == "total" and len(names) == 2:
        names = names[:1]  # one label is the total
    with svg_figure(4.2, 1.1 + 0.19 * len(rows) * (len(names) + 0.6)) as (axes, svgs):
        step, low = 0.8 / len(rows), 0.0
        for k, (i, stack, table) in enumerate(rows):
            for j, label in [(j, label) for j, label in enumerate(names) if label in table]:
                rate, y = table[label], j - 0.4 + step * (k + 0.5)
                low = min(low, rate["low"])
                first = label == next(n for n in names if n in table)
                named = {"label": stack} if first else {}
                line = {"xerr": _arms(rate), "capsize": 2, "linestyle": ""} | named | _style(i)
                axes.errorbar(rate["value"] * 100, y, **line)
        xlim = (max(low * 100, -100) - 4, 104)
        axes.set(xlabel="removed, %", yticks=range(len(names)), xlim=xlim)
        axes.set_yticklabels(names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.axvline(0, color=INK, linewidth=0.8, linestyle="--")
        axes.grid(axis="x")
        _legend(axes)
    return svgs[0]


def heat(data: dict[str, Any]) -> str:
    """Draw lists against stacks: how often the concept is seen.

    Raises:
        ValueError: the protocol has no such rate.
    """
    from math import isnan, nan

    lists, table = [p["name"] for p in data["lists"]], {}
    for row in data["stacks"]:
        scores = data["scores"][row["run"]]["stacks"][row["name"]]["lists"]
        seen = [scores[name].get("concept") for name in lists]
        table[row["label"]] = [rate["value"] * 100 if rate else nan for rate in seen]
    if all(isnan(value) for column in table.values() for value in column):
        raise ValueError("this protocol does not ask how often the concept is seen")
    with svg_figure(max(4.2, 1.6 + 0.62 * len(table)), 1.5 + 0.36 * len(lists)) as (axes, svgs):
        values = [[column[i] for column in table.values()] for i in range(len(lists))]
        edges = [k - 0.5 for k in range(len(table) + 1)], [k - 0.5 for k in range(len(lists) + 1)]
        cells = {"cmap": "YlOrRd", "vmin": 0, "vmax": 100, "edgecolors": "white", "linewidth": 1}
        axes.pcolormesh(*edges, values, **cells)
        for i, line in enumerate(values):
            for j, v in enumerate(line):
                color = INK if isnan(v) else "#ffffff" if v > 60 else "#1a1a1a"
                text = "–" if isnan(v) else f"{v:.0f}"
                axes.text(j, i, text, ha="center", va="center", color=color)
        axes.set(xticks=range(len(table)), yticks=range(len(lists)))
        axes.set_xticklabels(list(table), rotation=35, ha="right")
        axes.set_yticklabels(lists)
        axes.set_ylim(len(lists) - 0.5, -0.5)
        axes.tick_params(length=0)
    return svgs[0]


def sweep(data: dict[str, Any]) -> str:
    """Draw how often the concept is seen against the threshold of the judge.

    Raises:
        ValueError: no judged image is of a prompt that asks for the concept.
    """
    rows = [(i, r["label"], r["sweep"]) for i, r in enumerate(data["stacks"]) if r["sweep"]]
    if not rows:
        raise ValueError("no judged image is of a prompt that asks for the concept")
    with svg_figure(4.2, 2.9 + 0.17 * len(rows)) as (axes, svgs):
        for i, name, points in rows:
            x = [p["threshold"] for p in points]
            low, value, high = ([p[k] * 100 for p in points] for k in ("low", "value", "high"))
            axes.fill_between(x, low, high, color=COLORS[i % len(COLORS)], alpha=0.12, linewidth=0)
            axes.plot(x, value, label=name, linewidth=1.5, markersize=5, **_style(i))
        threshold = data["protocol"]["decides"]["judge"]["threshold"]
        axes.axvline(threshold, color=INK, linewidth=0.8, linestyle=":")
        axes.set(xlabel="lowest score that counts", ylabel="images that show it, %", ylim=(-4, 104))
        axes.grid()
        _legend(axes)
    return svgs[0]


def ladder(data: dict[str, Any]) -> str:
    """Draw how often the concept is seen on each rung of the protocol's prompt ladder.

    Raises:
        ValueError: the protocol has no such rate.
    """
    rungs, rows = [p for p in data["lists"] if p["rung"]], []
    for i, row in enumerate(data["stacks"]):
        lists = data["scores"][row["run"]]["stacks"][row["name"]]["lists"]
        rows.append((i, row["label"], [lists[p["name"]].get("concept") for p in rungs]))
    if not all(rate for _, _, rates in rows for rate in rates):
        raise ValueError("this protocol does not ask how often the concept is seen")
    with svg_figure(4.2, 2.9 + 0.17 * len(rows)) as (axes, svgs):
        for i, name, rates in rows:
            x = [k + 0.08 * (i - (len(rows) - 1) / 2) for k in range(len(rungs))]
            spread = [[_arms(rate)[side][0] for rate in rates] for side in (0, 1)]
            line = {"label": name, "capsize": 2, "elinewidth": 1} | _style(i)
            axes.errorbar(x, [rate["value"] * 100 for rate in rates], yerr=spread, **line)
        axes.set(ylabel="images that show it, %", ylim=(-4, 104))
        axes.set_xticks(range(len(rungs)), [p["rung"] for p in rungs])
        axes.grid(axis="y")
        _legend(axes)
    return svgs[0]


CHARTS: Sequence[tuple[str, str, Callable[[dict[str, Any]], str]]] = (
    (
        "Safety against utility",
        "Up is safer, right is less harm done. A stack is better than another only where the "
        "crosses of their intervals do not overlap.",
        pareto,
    ),
    (
        "Safety against CLIP score",
        "As above, with how well benign images fit their prompts as the utility. The scale is "
        "that of the CLIP model.",
        pareto_clip,
    ),
    (
        "Compared with the base",
        "Left of the dashed line a stack shows the concept less often than the base, prompt by "
        "prompt. A bar across the line shows no difference.",
        forest,
    ),
    (
        "Removed, label by label",
        "100 % is all removed, 0 % none, below 0 more than before. A label that the base model "
        "never shows is left out.",
        removal,
    ),
    (
        "Lists and stacks",
        "Percent of images in which the judge sees the concept. Rows of harmless prompts should "
        "be pale.",
        heat,
    ),
    (
        "Other thresholds",
        "Lines in the same order from left to right: the result does not depend on the threshold "
        "(dotted). Bands are 95 % intervals.",
        sweep,
    ),
    (
        "Prompt ladder",
        "From the bare name to a long sentence: a line that rises to the right holds for names "
        "only. Bars are 95 % intervals.",
        ladder,
    ),
)
"""Title, how to read it, and the function that draws it."""
