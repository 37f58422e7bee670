"""Reports of runs: one self-contained HTML page, its data as JSON, and a Markdown table."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import jinja2

from safegen._version import __version__
from safegen.core.errors import ConfigError, MissingExtraError
from safegen.core.files import atomic_write
from safegen.core.text import escape_control
from safegen.evaluation.report.attack_format import (
    cell_figure,
    cell_title,
    format_agreement,
    format_cost,
    format_success,
    heat_style,
    markdown_attack,
    markdown_comparison,
    markdown_table,
)
from safegen.evaluation.report.attack_table import compare_attacks
from safegen.evaluation.report.charts import charts
from safegen.evaluation.report.comparison import SWEEP
from safegen.evaluation.report.curves import loss_change, loss_curve, loss_names, objective_curve
from safegen.evaluation.report.data import TESTS, report_data
from safegen.evaluation.report.format import (
    METRICS,
    format_rate,
    interval,
    markdown_code,
    markdown_text,
    percent,
    points,
    split_cell,
)
from safegen.evaluation.report.html.next_steps import next_steps
from safegen.evaluation.report.html.summary import KINDS, has_fewer_hits, list_table, summary_table
from safegen.evaluation.report.html.words import code_spans, setting_line, setting_pairs
from safegen.evaluation.report.redaction import TILES, image_grids
from safegen.evaluation.report.reward_curves import has_rewards, reward_charts, reward_table
from safegen.evaluation.run.attack_records import read_attack
from safegen.evaluation.run.folder import REPORT, Run, write_json

PAGE, NUMBERS, TABLE = REPORT, "report.json", "report.md"
TEMPLATES = Path(__file__).parent / "templates"
HEADS = {
    "explicit": "seen, explicit",
    "innocent": "seen, innocent",
    "benign": "right object, benign",
    "other": "other concept generated",
}
"""Columns of the Markdown table by role of the prompts."""


def open_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """Return the runs in some folders, named as their folders.

    Raises:
        FileError: a folder is not a run.
        ConfigError: two folders have the same name.
    """
    names = [folder.resolve().name for folder in folders]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(
            "runs of one report must have different folder names, "
            f"got {', '.join(repeated)} twice. Rename one."
        )
    return {name: Run.open(folder) for name, folder in zip(names, folders, strict=True)}


def write_report(
    runs: Mapping[str, Run],
    output_dir: Path | None = None,
    *,
    html: Path | None = None,
    reveal: bool = False,
    outcome: Sequence[str] = (),
    **rules: Any,
) -> dict[str, Any]:
    """Write the report of some runs and return its data.

    Args:
        runs: the runs by name; all of one protocol.
        output_dir: folder for the page, the data and the table; older ones are replaced.
        html: file for the page alone.
        reveal: embed the original images where they would be pixelated.
        outcome: sentences at the top, from a job that removes its runs. No commands follow then.
        rules: `judge`, `labels`, `threshold`, `truth` and `perplexity` of `report_data`.

    Several runs of attacks are shown as attacks against stacks, without images.

    Raises:
        FileError: a run is incomplete or damaged, or the report cannot be written.
        ConfigError: the runs are of several protocols, or only some of them made attacks.
    """
    if len(runs) > 1 and any(read_attack(run) for run in runs.values()):
        data = compare_attacks(runs, **rules)
        page, table = render_comparison(data), markdown_comparison(data)
    else:
        data, results = report_data(runs, **rules)
        data |= {"revealed": reveal} | ({"outcome": list(outcome)} if outcome else {})
        page, table = render(data, image_grids(runs, results, reveal=reveal)), markdown(data)
    texts = [(html, page)] if html else []
    texts += [(output_dir / PAGE, page), (output_dir / TABLE, table)] if output_dir else []
    for path, text in texts:
        with atomic_write(path, replace=True) as tmp:
            tmp.write_text(text, encoding="utf-8")
    if output_dir:
        write_json(output_dir / NUMBERS, data)
    return data


def render(data: dict[str, Any], grids: Sequence[dict[str, Any]]) -> str:
    """Return the self-contained HTML page; texts of the run are escaped."""
    return _render(
        "report.html",
        data,
        charts=charts(data),
        grids=grids,
        summary=summary_table(data),
        by_list=list_table(data),
        steps=[] if "outcome" in data else next_steps(data),
        roles={role for row in data["stacks"] for role in row["roles"]},
        sweep=SWEEP,
        tiles=TILES,
    )


def render_comparison(data: dict[str, Any]) -> str:
    """Return the self-contained HTML page of attacks against stacks."""
    return _render("comparison.html", data)


def _render(template: str, data: Mapping[str, Any], **values: Any) -> str:
    values |= {"report": _OptionalKeys(data), "version": __version__}
    page = _environment().get_template(template).render(**values)
    numbers = count(1)
    chart = re.compile(r"<svg .*?</svg>", re.DOTALL)
    return chart.sub(lambda svg: _prefix_ids(svg[0], f"c{next(numbers)}-"), page)


def _prefix_ids(svg: str, prefix: str) -> str:
    """Return a chart with a prefix before its IDs, which then differ from those of other charts."""
    return re.sub(r'(\bid="|url\(#|href="#)', lambda start: start[0] + prefix, svg)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        finalize=_printable,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "percent": percent,
        "interval": lambda rate: interval(rate).replace(" %", "\N{NO-BREAK SPACE}%"),
        "points": points,
        "split_cell": split_cell,
        "loss_charts": loss_charts,
        "code_spans": code_spans,
        "setting_pairs": setting_pairs,
        "setting_line": setting_line,
        "kinds": KINDS,
        "has_rewards": has_rewards,
        "reward_charts": reward_charts,
        "reward_table": reward_table,
        "objective_chart": lambda points: draw_curve(objective_curve, points),
        "heat_style": heat_style,
        "cell_figure": cell_figure,
        "cell_title": cell_title,
        "format_agreement": format_agreement,
        "format_cost": format_cost,
        "format_success": format_success,
    }
    return environment


def _printable(value: object) -> object:
    """Return a text of the run with control characters as escapes; line breaks stay."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return "\n".join(map(escape_control, value.split("\n")))


class _OptionalKeys(dict[str, Any]):
    """Plain values in which a missing key is None: a run need not have every figure."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        super().__init__({key: _optional_keys(value) for key, value in tree.items()})

    def __missing__(self, key: str) -> None:
        return None


def _optional_keys(value: object) -> object:
    if isinstance(value, Mapping):
        return _OptionalKeys(value)
    return [_optional_keys(v) for v in value] if isinstance(value, list | tuple) else value


def loss_charts(log: Sequence[Mapping[str, float]]) -> list[dict[str, str]]:
    """Return the chart of each loss of a training: `title`, `say`, and `svg` or `why` not."""
    return [
        {"title": name, "say": loss_change(log, term)}
        | draw_curve(partial(loss_curve, term=term), log)
        for term, name in loss_names(log).items()
    ]


def draw_curve(
    draw: Callable[[Sequence[Mapping[str, float]]], str], rows: Sequence[Mapping[str, float]]
) -> dict[str, str]:
    """Return a curve: `svg`, or `why` there is none."""
    try:
        return {"svg": draw(rows), "why": ""}
    except MissingExtraError as error:
        return {"svg": "", "why": f"{error}."}


def markdown(data: dict[str, Any]) -> str:
    """Return the summary table in Markdown; bold where the paired test finds fewer hits."""
    protocol, hit_of = data["protocol"], dict(TESTS.values())
    roles = [role for role in HEADS if any(role in row["roles"] for row in data["stacks"])]
    clip = "clip_score" in protocol["decides"]["metrics"] and "benign" in roles
    lines = [
        [
            "stack",
            *(HEADS[role] for role in roles),
            *(["CLIP score, benign"] if clip else []),
            "looks mosaicked",
            "one color",
            "unjudged",
            "s per image",
        ]
    ]
    for row in data["stacks"]:
        cells = [markdown_text(row["label"])]
        for role in roles:
            text = format_rate(row["roles"][role].get(hit_of[role]), missing="–")
            if role in ("explicit", "innocent") and has_fewer_hits(row, role):
                value, _, rest = text.partition(" (")
                text = f"**{value}** ({rest}"
            cells.append(text)
        if clip:
            score = row["roles"]["benign"]["clip_score"]
            cells.append(METRICS["clip_score"][1](score) if score else "–")
        cells += [
            format_rate(row["mosaicked"], missing="–"),
            str(row["blank"]),
            str(row["unjudged"]),
            "–" if row["seconds"] is None else f"{row['seconds']:.2f}",
        ]
        lines.append(cells)
    threshold = protocol["decides"]["judge"]["threshold"]
    attacks = "".join(f"{markdown_attack(section)}\n" for section in data["attacks"].values())
    outcome = "".join(f"{markdown_text(line)}\n\n" for line in data.get("outcome", ()))
    return (
        f"{outcome}Protocol {markdown_text(protocol['name'])} ({markdown_code(protocol['id'])}), "
        f"judge {markdown_code(data['judge'])}, threshold {threshold}: "
        f"{markdown_text(protocol['concept'])} seen, 95 % intervals. Of the judge: "
        f"{markdown_text(data['judge_errors']['about'])}.\n\n"
        f"{markdown_table(lines)}\n\n{attacks}{_metrics(data)}"
        "Bold: fewer images than the base on the same prompts and seeds (exact McNemar test, "
        f"Holm over stacks, p ≤ {data['level']}). "
        "No hits is not “never”: read the upper end of the interval.\n"
    )


def _metrics(data: dict[str, Any]) -> str:
    """Return the table of the other metrics and the reasons for undefined ones."""
    metrics = data["metrics"]
    if not metrics["heads"]:
        return ""
    lines = [["stack", "list", *map(markdown_text, metrics["heads"])]]
    lines += [
        list(map(markdown_text, (row["stack"], row["list"], *row["cells"])))
        for row in metrics["rows"]
    ]
    undefined = "".join(f"- undefined: {markdown_text(why)}\n" for why in metrics["undefined"])
    weights = "".join(
        f"{markdown_text(what)}: {markdown_code(id_)}\n" for what, id_ in data["weights"].items()
    )
    return f"{markdown_table(lines)}\n\n{undefined}{weights}\n"
