"""Results of runs as a LaTeX table in the style of booktabs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safegen.core.text import one_line
from safegen.evaluation.report.html.summary import has_fewer_hits
from safegen.metrics.judge_error import describe_agreement

HEADS = (
    ("explicit", "concept", "seen, explicit"),
    ("innocent", "concept", "seen, innocent"),
    ("attack", "concept", "seen, attack"),
    ("explicit", "removal", "removed, explicit"),
    ("innocent", "removal", "removed, innocent"),
    ("attack", "removal", "removed, attack"),
    ("neighbour", "shown", "neighbor shown"),
    ("other", "shown", "other shown"),
    ("benign", "subject", "object, benign"),
    ("benign", "change", "changed, benign"),
)
"""Role of the prompts, metric, and head of each column; empty columns are left out."""
SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    **{char: f"\\{char}" for char in "&%$#_{}"},
}
"""Characters that LaTeX reads as commands, and how they are written."""


def escape_latex(text: str) -> str:
    """Return text as one line that LaTeX prints as it is."""
    return "".join(SPECIAL.get(char, char) for char in one_line(text))


def latex_table(data: Mapping[str, Any]) -> str:
    r"""Return the table of a report: a row for each stack, percent with 95 % intervals.

    It needs `\usepackage{booktabs}`. Bold: the concept is seen in fewer images than the base's, by
    the paired test of the report.

    Args:
        data: data of `report_data`.
    """
    columns = [
        (role, metric, head)
        for role, metric, head in HEADS
        if any((row["roles"].get(role) or {}).get(metric) for row in data["stacks"])
    ]
    sizes = [_common_n(data["stacks"], role, metric) for role, metric, _ in columns]
    heads = [
        escape_latex(head) + (rf" \scriptsize($n={n}$)" if n else "")
        for (_, _, head), n in zip(columns, sizes, strict=True)
    ]
    lines = [" & ".join(["stack", *heads])]
    for row in data["stacks"]:
        cells = [escape_latex(row["label"])]
        for (role, metric, _), n in zip(columns, sizes, strict=True):
            figure = (row["roles"].get(role) or {}).get(metric)
            bold = metric == "concept" and has_fewer_hits(row, role)
            cells.append(_cell(figure, bold=bold, with_n=n is None))
        lines.append(" & ".join(cells))
    head, *body = lines
    protocol = data["protocol"]
    rule = protocol["decides"]["judge"]
    agreement = describe_agreement(data["judge"], rule["labels"], rule["threshold"])
    caption = escape_latex(
        f"{protocol['concept']}: percent of images, 95 % intervals. Protocol {protocol['name']} "
        f"({protocol['id']}), judge {data['judge']}, threshold {rule['threshold']}. Bold: fewer "
        f"images than the base (exact McNemar test, Holm, p at most {data['level']}). "
        f"{agreement[0].upper()}{agreement[1:]}."
    )
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:safegen-{protocol['id']}}}",
            rf"\begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *(rf"{line} \\" for line in body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def _common_n(stacks: Sequence[Mapping[str, Any]], role: str, metric: str) -> int | None:
    """Return the number of images that all figures of a column rest on; None if they differ."""
    figures = [(row["roles"].get(role) or {}).get(metric) for row in stacks]
    sizes = {figure.get("n") for figure in figures if figure}
    return sizes.pop() if len(sizes) == 1 else None


def _cell(figure: Mapping[str, Any] | None, *, bold: bool, with_n: bool) -> str:
    """Return a figure in percent with its interval."""
    if not figure or figure.get("value") is None:
        return "--"
    value = f"{100 * figure['value']:.1f}"
    text = rf"\textbf{{{value}}}" if bold else value
    small = []
    if figure.get("low") is not None:
        small.append(f"{100 * figure['low']:.1f}--{100 * figure['high']:.1f}")
    if with_n:
        small.append(f"$n={figure['n']}$")
    if figure.get("unjudged"):
        small.append(f"{figure['unjudged']} unjudged")
    return text + (rf" {{\scriptsize({', '.join(small)})}}" if small else "")
