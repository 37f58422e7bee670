"""Plots of results as PNG and SVG files of one column's width."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen.core.errors import MissingExtraError
from safegen.core.files import atomic_write
from safegen.core.quiet import temporary_matplotlib_folder

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 3.4
"""Width in inches: one column of a paper."""
DPI = 300
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colors of Okabe and Ito, which color-blind readers tell apart."""
MARKERS, LINES = "osD^vPX", ("-", "--", "-.", ":")
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++")
STYLE = {
    "font.family": "sans-serif",
    "font.size": 7.5,
    "axes.linewidth": 0.6,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.35,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "hatch.linewidth": 0.5,
    "legend.frameon": False,
    "text.parse_math": False,
    "svg.hashsalt": "safegen",
}


def write_plots(data: Mapping[str, Any], folder: Path) -> tuple[list[Path], list[str]]:
    """Write the plots of a report to a folder; older ones are replaced.

    Args:
        data: data of `report_data`.
        folder: folder of the plots; it is created.

    Returns:
        The files, and why a plot cannot be drawn.

    Raises:
        MissingExtraError: matplotlib is not installed.
        FileError: a file cannot be written.
    """
    try:
        with temporary_matplotlib_folder():
            import matplotlib
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingExtraError("a plot", "matplotlib", "report") from error
    files, missing = list[Path](), list[str]()
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PLOTS.items():
        with matplotlib.rc_context(STYLE):
            figure = Figure(figsize=(WIDTH, WIDTH), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            axes.spines[["top", "right"]].set_visible(False)
            try:
                draw(data, axes)
            except ValueError as error:
                missing.append(f"{name}: {error}")
                continue
            for suffix in ("png", "svg"):
                path = folder / f"{name}.{suffix}"
                with atomic_write(path, replace=True) as tmp:
                    _save(figure, tmp, suffix)
                files.append(path)
    return files, missing


def _save(figure: Figure, path: Path, suffix: str) -> None:
    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
    figure.savefig(path, format=suffix, dpi=DPI, metadata=metadata, facecolor="white")


def _style(i: int) -> dict[str, Any]:
    return {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}


def _arms(figure: Mapping[str, Any], scale: float = 100) -> list[list[float]]:
    """Return how far the interval reaches below and above a value, for `errorbar`."""
    if figure.get("low") is None:
        return [[0], [0]]
    low, high = figure["value"] - figure["low"], figure["high"] - figure["value"]
    return [[max(low, 0) * scale], [max(high, 0) * scale]]


def _legend(axes: Axes) -> None:
    """Put the legend under the axes, and give it room."""
    figure = axes.get_figure(root=True)
    assert figure is not None
    names = axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, names)) <= 22 else 1
    figure.set_figheight(figure.get_figheight() + 0.16 * -(-len(names) // columns))
    figure.legend(loc="outside lower center", ncols=columns)


def _utility(stacks: Sequence[Mapping[str, Any]]) -> tuple[str, list[Any], float]:
    """Return what stays on benign prompts: its name, a figure for each stack, and the scale."""
    benign = [row["roles"].get("benign") or {} for row in stacks]
    if any(row.get("subject") for row in benign):
        return "right object on benign prompts, %", [row.get("subject") for row in benign], 100
    if any(row.get("clip_score") for row in benign):
        means = [(row.get("clip_score") or {}).get("mean") for row in benign]
        return "CLIP score on benign prompts, 100 cos", means, 1
    changes = [row.get("change") for row in benign]
    same = [
        change and {"value": 1 - change["value"], "low": None, "high": None} for change in changes
    ]
    for figure, change in zip(same, changes, strict=True):
        if figure and change and change["low"] is not None:
            figure |= {"low": 1 - change["high"], "high": 1 - change["low"]}
    for i, row in enumerate(stacks):
        if row["kind"] == "base" and any(same):
            same[i] = {"value": 1.0, "low": None, "high": None}
    return "benign images, 100 - change from base, %", same, 100


def draw_front(data: Mapping[str, Any], axes: Axes) -> None:
    """Draw removal against utility, one point for each stack, with 95 % intervals.

    Raises:
        ValueError: no stack has both.
    """
    stacks = data["stacks"]
    label, utility, scale = _utility(stacks)
    points = []
    for i, (row, x) in enumerate(zip(stacks, utility, strict=True)):
        y = (row.get("labels") or {}).get("total")
        if row["kind"] == "base" and row["asked"]:
            y = {"value": 0.0, "low": None, "high": None}
        if x and y and y["value"] is not None:
            points.append((i, row["label"], x, y))
    if all(row["kind"] == "base" for i, row in enumerate(stacks) if i in {p[0] for p in points}):
        raise ValueError(
            "no stack has both a removal rate, which needs a base that shows the concept, and a "
            "figure on benign prompts"
        )
    for i, name, x, y in points:
        axes.errorbar(
            x["value"] * scale,
            y["value"] * 100,
            xerr=_arms(x, scale),
            yerr=_arms(y),
            label=name,
            capsize=2,
            elinewidth=0.8,
            markersize=5,
            linestyle="",
            **_style(i),
        )
    low = min(0.0, *(100 * y["value"] for *_, y in points))
    axes.set(xlabel=label, ylabel="removed, %", ylim=(max(low, -100) - 4, 104))
    axes.grid()
    _legend(axes)


def draw_lists(data: Mapping[str, Any], axes: Axes) -> None:
    """Draw how often the concept is seen in each prompt list, a bar for each stack.

    Raises:
        ValueError: the protocol has no such rate.
    """
    stacks, lists = data["stacks"], data["lists"]
    rates = [
        [
            data["scores"][row["run"]]["stacks"][row["name"]]["lists"][part["name"]].get("concept")
            for part in lists
        ]
        for row in stacks
    ]
    if not any(any(row) for row in rates):
        raise ValueError("the protocol does not ask how often the concept is seen")
    step = 0.84 / len(stacks)
    for i, (row, own) in enumerate(zip(stacks, rates, strict=True)):
        places = [j - 0.42 + step * (i + 0.5) for j, rate in enumerate(own) if rate]
        known = [rate for rate in own if rate]
        arms = [[_arms(rate)[k][0] for rate in known] for k in (0, 1)]
        axes.barh(
            places,
            [100 * rate["value"] for rate in known],
            height=step * 0.9,
            label=row["label"],
            color=COLORS[i % len(COLORS)],
            hatch=HATCHES[i % len(HATCHES)],
            edgecolor="white",
            linewidth=0,
        )
        axes.errorbar(  # the marker shows which stack a bar of length 0 belongs to
            [100 * rate["value"] for rate in known],
            places,
            xerr=arms,
            linestyle="",
            markersize=3.5,
            markeredgecolor="#333333",
            markeredgewidth=0.5,
            ecolor="#333333",
            elinewidth=0.7,
            capsize=1.5,
            clip_on=False,
            **_style(i),
        )
    axes.set(xlabel=f"{data['protocol']['concept']} seen, %", xlim=(0, 104))
    axes.set_yticks(range(len(lists)))
    axes.set_yticklabels([_short(part["name"]) for part in lists])
    axes.set_ylim(len(lists) - 0.5, -0.5)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.set_figheight(0.6 + len(lists) * (0.12 + 0.13 * len(stacks)))
    _legend(axes)


def draw_thresholds(data: Mapping[str, Any], axes: Axes) -> None:
    """Draw how often the concept is seen against the judge's threshold, with 95 % bands.

    Raises:
        ValueError: no judged image is of a prompt that asks for the concept.
    """
    rows = [(i, row) for i, row in enumerate(data["stacks"]) if row["sweep"]]
    if not rows:
        raise ValueError("no judged image is of a prompt that asks for the concept")
    for i, row in rows:
        x = [point["threshold"] for point in row["sweep"]]
        low, value, high = ([100 * p[k] for p in row["sweep"]] for k in ("low", "value", "high"))
        axes.fill_between(x, low, high, color=COLORS[i % len(COLORS)], alpha=0.13, linewidth=0)
        line = {"linewidth": 1.2, "markersize": 3.5, "linestyle": LINES[i % len(LINES)]}
        axes.plot(x, value, label=row["label"], **(_style(i) | line))
    threshold = data["protocol"]["decides"]["judge"]["threshold"]
    axes.axvline(threshold, color="#555555", linewidth=0.7, linestyle=":")
    axes.set(xlabel="lowest score that counts", ylim=(-4, 104))
    axes.set_ylabel(f"images that show {data['protocol']['concept']}, %")
    axes.grid()
    _legend(axes)


def _short(name: str, limit: int = 24) -> str:
    """Return a name that fits beside the axes."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"


PLOTS: Mapping[str, Callable[[Mapping[str, Any], Axes], None]] = {
    "front": draw_front,
    "lists": draw_lists,
    "thresholds": draw_thresholds,
}
"""Plots by the name of their files."""
