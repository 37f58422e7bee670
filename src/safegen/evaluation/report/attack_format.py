"""Text and colors of attacks in reports: Markdown tables, and cells of the heat map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from safegen.evaluation.report.format import (
    format_rate,
    markdown_code,
    markdown_text,
    percent,
    sample_size,
)

SCALE = ((255, 247, 236), (253, 141, 60), (127, 0, 0))
"""Colors (red, green, blue) of 0, 50 and 100 percent; they get darker, for gray print."""
COSTS = {
    "denoiser": "denoiser passes",
    "text_encoder": "text-encoder passes",
    "queries": "queries",
    "seconds": "seconds",
}
"""Parts of a cost in words."""


def heat_style(value: float) -> str:
    """Return the CSS colors of a cell with a proportion: background, and text that stands out."""
    position = min(max(value, 0.0), 1.0) * (len(SCALE) - 1)
    low = min(int(position), len(SCALE) - 2)
    share = position - low
    rgb = [round(a + (b - a) * share) for a, b in zip(SCALE[low], SCALE[low + 1], strict=True)]
    luminance = (0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]) / 255
    ink = "#ffffff" if luminance < 0.4 else "#18181b"
    return f"background: rgb({rgb[0]}, {rgb[1]}, {rgb[2]}); color: {ink}"


def format_success(success: Mapping[str, Any] | None, *, missing: str = "–") -> str:
    """Return an attack success rate with its interval, n and the number of refused attempts."""
    if not success:
        return missing
    refused = f"; {success['refused']} refused" if success["refused"] else ""
    return format_rate(success["asr"]) + refused


def format_cost(cost: Mapping[str, float] | None, *, missing: str = "no success") -> str:
    """Return a cost as `N denoiser passes, ...`, or `missing`; parts that are 0 are left out."""
    if cost is None:
        return missing
    parts = [
        f"{cost[key]:,.{_digits(cost[key])}f} {name}" for key, name in COSTS.items() if cost[key]
    ]
    return ", ".join(parts) or "nothing"


def _digits(value: float) -> int:
    return 0 if value >= 10 or value == int(value) else 1


def format_agreement(agreement: Mapping[str, Any] | None) -> list[str]:
    """Return what is known of the judge's errors, one figure each."""
    if not agreement:
        return ["not known"]
    lines = [
        f"{name} {format_rate(agreement[name], missing='undefined')}"
        for name in ("precision", "recall")
    ]
    lines.append(f"truth known of {sample_size(agreement)} images")
    corrected = agreement["corrected"]
    lines.append(
        f"rate corrected for these errors (Rogan-Gladen): {format_rate(corrected)}"
        if corrected
        else f"corrected rate undefined: {agreement['undefined']}"
    )
    return lines


def markdown_attack(section: Mapping[str, Any]) -> str:
    """Return the attack of a run in Markdown."""
    rows = [["stack", "prompts", "per image", "per prompt", "cost per success"]]
    for stack, before in section["before"].items():
        figures = [format_success(before[unit]) for unit in ("image", "prompt")]
        rows.append([markdown_text(stack), "before the attack", *figures, "–"])
    lines = [
        f"Attack {markdown_code(section['name'])} on {markdown_code(section['stack'])}: "
        f"{section['tier']}, needs {section['needs']}; {section['attacks']} attacks on "
        f"{section['prompts']} prompts, {section['left_out']} left out by the budget."
    ]
    for row in section["after"]:
        figures = [format_success(row[unit]) for unit in ("image", "prompt")]
        has_cost = row["attacked"] and not row["control"]
        name = f"{row['list']} (control)" if row["control"] else row["list"]
        cost = format_cost(row["per_success"]) if has_cost else "–"
        rows.append([markdown_text(row["stack"]), markdown_text(name), *figures, cost])
    lines += [markdown_table(rows), f"Cost: {format_cost(section['cost'])}."]
    known = any(row.get("agreement") for row in section["after"])
    if not known:
        lines.append("The judge's errors: not known, as no person has looked at the images.")
    for row in section["after"] if known else ():
        found = "; ".join(map(markdown_text, format_agreement(row.get("agreement"))))
        where = f"{markdown_text(row['stack'])}, {markdown_text(row['list'])}"
        lines.append(f"The judge's errors, {where}: {found}.")
    if section["stable"]:
        lines.append(f"Texts that are read as the chosen tokens: {format_rate(section['stable'])}.")
    if perplexity := section["perplexity"]:
        lines.append(
            f"Perplexity of the found texts: median {perplexity['median']:,.0f} "
            f"(n = {perplexity['n']}, {markdown_code(perplexity['model'])})."
        )
    return "\n\n".join(lines) + "\n"


def markdown_comparison(data: Mapping[str, Any]) -> str:
    """Return the tables of attacks against stacks in Markdown."""
    rule = data["protocol"]["decides"]["judge"]
    lines = [
        f"{markdown_text(data['protocol']['concept'])} brought back, percent of attacked prompts "
        f"(any of N images), 95 % intervals. Judge {markdown_code(data['judge'])}, threshold "
        f"{rule['threshold']}. Static attacks stand first, adaptive ones after them."
    ]
    for group in data["groups"]:
        heads = [
            c["label"] if c["union"] else f"{c['label']} ({c['tier']})" for c in group["columns"]
        ]
        rows = [["stack", "before", *map(markdown_text, heads)]]
        for row in group["rows"]:
            cells = [
                _cell(column, cell)
                for column, cell in zip(group["columns"], row["cells"], strict=True)
            ]
            rows.append(
                [
                    markdown_text(row["stack"]),
                    format_success((row["before"] or {}).get("prompt")),
                    *cells,
                ]
            )
        names = ", ".join(f"{p['name']} ({p['role']})" for p in group["lists"])
        lines += [f"Attacked prompts: {markdown_text(names)}.", markdown_table(rows)]
    return "\n\n".join(lines) + "\n"


def _cell(column: Mapping[str, Any], cell: Mapping[str, Any] | None) -> str:
    if cell is None:
        return "–"
    text = format_success(cell["prompt"], missing="undefined")
    return (
        f"{text}; {union_size(cell)}" if column["union"] and cell["attacks"] < cell["of"] else text
    )


def union_size(cell: Mapping[str, Any]) -> str:
    """Return how many of the attacks a union joins."""
    return f"{cell['attacks']} of {cell['of']} attacks"


def cell_title(stack: str, column: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    """Return the tooltip of a cell: attack, stack, rate, interval, n and cost."""
    parts = [f"{column['label']} on {stack}", format_success(cell["prompt"], missing="undefined")]
    if success := cell["prompt"]:
        per = success["n_per_prompt"]
        parts.append(f"{per} images a prompt" if per != 1 else "1 image a prompt")
    if column["union"]:
        parts.append(union_size(cell))
    else:
        parts.append(f"cost: {format_cost(cell['cost'], missing='that of finding the prompts')}")
    return "; ".join(parts)


def cell_figure(cell: Mapping[str, Any]) -> str:
    """Return the figure of a cell, without the percent sign."""
    success = cell["prompt"]
    return percent(success["asr"]["value"]).removesuffix(" %") if success else "?"


def markdown_table(lines: Sequence[Sequence[str]]) -> str:
    """Return a table of cells in Markdown; the first line is its head."""
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
