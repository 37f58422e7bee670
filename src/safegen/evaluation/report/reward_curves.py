"""Curves of a training by reward, as inline SVG, and its first and last rollout as numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safegen.core.errors import MissingExtraError
from safegen.evaluation.report.charts import COLORS, MARKERS, svg_figure
from safegen.evaluation.report.format import percent
from safegen.evaluation.run.training_log import KINDS
from safegen.metrics.rates import wilson_interval

Log = Sequence[Mapping[str, float]]
PROMPTS = dict(zip(KINDS, ("prompts of the concept", "benign prompts"), strict=True))
JUDGES = {"judge": "judge that rewards", "held_out": "held-out judge"}
LINES = dict(zip(KINDS, ("-", "--"), strict=True))
"""Line style by kind of prompts."""
DISTANCES = {"L_kl": "prompts of the concept", "L_keep": "benign prompts"}
VARIETY = {"diversity": "distance within groups", "alignment_benign": "fit of benign images"}


def has_rewards(log: Log) -> bool:
    """Return whether a log is of a training by reward."""
    return any(key.startswith("reward_") for row in log for key in row)


def reward_charts(log: Log) -> list[dict[str, str]]:
    """Return the charts of a training by reward: `title`, `say`, and `svg` or `why` not."""
    made = []
    for title, say, draw in CHARTS:
        try:
            made.append({"title": title, "say": say, "svg": draw(log), "why": ""})
        except (ValueError, MissingExtraError) as error:
            made.append({"title": title, "say": say, "svg": "", "why": f"{error}."})
    return made


def reward_table(log: Log) -> list[tuple[str, str, str]]:
    """Return name, first and last value of each figure of the rollouts."""
    distances = {key: f"distance to the original model, {name}" for key, name in DISTANCES.items()}
    names = _rate_names(log) | _reward_names(log) | distances | VARIETY
    rows = []
    for key, name in names.items():
        values = [_format(row, key) for row in log if key in row]
        if values:
            rows.append((name, values[0], values[-1]))
    return rows


def _format(row: Mapping[str, float], key: str) -> str:
    """Return a figure as text: a rate as percent of its images, others with three digits."""
    if "_unsafe_" not in key:
        return f"{row[key]:.3g}"
    images = f" of {row[f'{key}_n']:.0f} images" if f"{key}_n" in row else ""
    return f"{percent(row[key])}{images}"


def _rate_names(log: Log) -> dict[str, str]:
    return {
        f"{judge}_unsafe_{kind}": f"{who}, {PROMPTS[kind]}"
        for judge, who in JUDGES.items()
        for kind in KINDS
        if any(f"{judge}_unsafe_{kind}" in row for row in log)
    }


def _reward_names(log: Log) -> dict[str, str]:
    keys = dict.fromkeys(key for row in log for key in row if key.startswith("reward_"))
    names = {}
    for key in sorted(keys, key=lambda key: (_stem(key), key.endswith("benign"))):
        reward, _, kind = key.removeprefix("reward_").rpartition("_")
        if kind in PROMPTS:
            names[key] = f"reward {reward}, {PROMPTS[kind]}"
    return names


def _draw(log: Log, names: Mapping[str, str], ylabel: str, *, scale: float = 1, **axis: Any) -> str:
    """Draw some figures of a log over the network passes, or over the updates without them.

    Raises:
        ValueError: the log has none of the figures.
    """
    series = {
        key: [(row.get("passes", row["update"]), row[key] * scale) for row in log if key in row]
        for key in names
    }
    series = {key: points for key, points in series.items() if points}
    if not series:
        raise ValueError("the log has no such figure")
    stems = list(dict.fromkeys(map(_stem, series)))  # one color for both kinds of prompts
    with svg_figure(4.2, 2.9 + 0.17 * len(series)) as (axes, svgs):
        from matplotlib.ticker import EngFormatter

        for i, (key, points) in enumerate(series.items()):
            x, y = zip(*points, strict=True)
            color = COLORS[stems.index(_stem(key)) % len(COLORS)]
            axes.plot(
                x,
                y,
                label=names[key],
                color=color,
                marker=MARKERS[i % len(MARKERS)],
                markevery=(i, max(len(x) // 8, 1)) if len(x) > 8 else 1,
                markersize=4.5,
                linewidth=1.6,
                linestyle=LINES["benign" if "benign" in key or key == "L_keep" else "concept"],
            )
            if band := _band(log, key, scale):
                axes.fill_between(x, *band, color=color, alpha=0.12, linewidth=0)
        passes = any("passes" in row for row in log)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set(xlabel="network passes" if passes else "update", ylabel=ylabel, **axis)
        axes.grid()
        figure = axes.get_figure(root=True)
        figure.legend(loc="outside lower center", ncols=1)
    return svgs[0]


def _band(log: Log, key: str, scale: float) -> tuple[list[float], list[float]] | None:
    """Return the ends of the 95 % intervals of a rate; None without numbers of images."""
    rows = [(row[key], round(row.get(f"{key}_n", 0))) for row in log if key in row]
    if any(n < 1 or not 0 <= value <= 1 for value, n in rows):
        return None
    ends = [wilson_interval(round(value * n), n) for value, n in rows]
    return [scale * low for low, _ in ends], [scale * high for _, high in ends]


def _stem(key: str) -> str:
    return key.removesuffix("_concept").removesuffix("_benign")


def unsafe_curve(log: Log) -> str:
    """Draw the share of images with the concept in each rollout, by judge and kind of prompts."""
    return _draw(log, _rate_names(log), "images with the concept, %", scale=100, ylim=(-4, 104))


def reward_curve(log: Log) -> str:
    """Draw the mean of each reward by kind of prompts."""
    return _draw(log, _reward_names(log), "mean reward")


def distance_curve(log: Log) -> str:
    """Draw the distances to the original model by kind of prompts."""
    return _draw(log, DISTANCES, "squared difference of predictions", ylim=(0, None))


def variety_curve(log: Log) -> str:
    """Draw the distance of images within groups, and the fit of benign images to captions."""
    return _draw(log, VARIETY, "1 - cosine; cosine", ylim=(0, None))


CHARTS: Sequence[tuple[str, str, Callable[[Log], str]]] = (
    (
        "Images with the concept in rollouts",
        "Both judges should fall together: where only the one that rewards falls, the training "
        "deceives it. Images of the training, not an evaluation; bands are 95 % intervals.",
        unsafe_curve,
    ),
    (
        "Rewards",
        "Up is better. The reward “judge” is minus the sum of the judge's scores, “clip” the "
        "cosine of an image and its caption without the concept.",
        reward_curve,
    ),
    (
        "Distance to the original model",
        "Low on benign prompts is less harm done. The original model is the one that the training "
        "started from.",
        distance_curve,
    ),
    (
        "Variety and fit",
        "A fall of the distance within groups to half is collapse: images of one prompt become "
        "alike. A fall of the fit says that benign images lose their subject.",
        variety_curve,
    ),
)
"""Title, how to read it, and the function that draws it."""
