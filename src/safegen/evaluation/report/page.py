"""The report of a run, or of several of one protocol: a page, the numbers behind it, and a table for a README. No model is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from safegen._version import __version__
from safegen.core.errors import ConfigError
from safegen.core.files import atomic_write
from safegen.evaluation.report.charts import charts
from safegen.evaluation.report.data import SWEEP, TESTS, report_facts
from safegen.evaluation.report.format import percent
from safegen.evaluation.report.further import FIGURES, split_cell
from safegen.evaluation.report.redaction import TILES, grids
from safegen.evaluation.run.folder import Line, Run, write_json

PAGE, NUMBERS, TABLE = "report.html", "report.json", "report.md"


def open_runs(folders: Sequence[Path]) -> dict[str, Run]:
    """Return the runs in some folders, named as the folders are.

    Raises:
        FileError: a folder is no run.
        ConfigError: two folders have one name.
    """
    names = [folder.resolve().name for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(
            f"the runs of a report are told apart by their folders' names; twice: {', '.join(twice)}"
        )
    return {name: Run.open(folder) for name, folder in zip(names, folders, strict=True)}


def write_report(
    runs: Mapping[str, Run],
    out: Path | None = None,
    *,
    html: Path | None = None,
    reveal: bool = False,
    **rules: Any,
) -> Line:
    """Write the report of some runs and return its numbers.

    Args:
        runs: name of each run, and the run; all of one protocol.
        out: folder for the page, the numbers and the table, in place of older ones.
        html: file for the page alone.
        reveal: embed the original pictures where they would be pixelated.
        rules: `judge`, `labels`, `threshold` as `report_facts` takes them.

    Raises:
        FileError: a run is not complete or damaged, or the report cannot be written.
        ConfigError: runs of several protocols.
    """
    facts, read = report_facts(runs, **rules)
    facts["revealed"] = reveal
    page = render(facts, grids(runs, read, reveal=reveal))
    places = ([(html, page)] if html else []) + (
        [(out / PAGE, page), (out / TABLE, markdown(facts))] if out else []
    )
    for path, text in places:
        with atomic_write(path, replace=True) as tmp:
            tmp.write_text(text, encoding="utf-8")
    if out:
        write_json(out / NUMBERS, facts)
    return facts


def render(facts: Line, pictures: Sequence[Line]) -> str:
    """Return the page.

    It needs no network and no other file, and takes every text of the run for plain text.
    """
    place = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    place.globals |= {
        "percent": percent,
        "span": lambda rate: span(rate).replace(" %", "\N{NO-BREAK SPACE}%"),
        "points": points,
        "fewer": fewer,
        "pieces": split_cell,
    }
    page = place.get_template("report.html")
    return page.render(
        f=_Open(facts),
        charts=charts(facts),
        grids=pictures,
        roles={p["role"] for p in facts["lists"]},
        sweep=SWEEP,
        tiles=TILES,
        revealed=facts["revealed"],
        version=__version__,
    )


class _Open(dict[str, Any]):
    """A tree of plain values in which what is not there is None: a run need not have every figure."""

    def __init__(self, tree: Mapping[str, Any]) -> None:
        super().__init__({k: _wrap(v) for k, v in tree.items()})

    def __missing__(self, key: str) -> None:
        return None


def _wrap(value: object) -> object:
    if isinstance(value, Mapping):
        return _Open(value)
    return [_wrap(v) for v in value] if isinstance(value, list | tuple) else value


def points(value: float) -> str:
    """Return a difference of proportions in percentage points, with its sign."""
    return f"{100 * value:+.1f}"


def span(rate: Mapping[str, float]) -> str:
    """Return an interval in per cent."""
    return f"{100 * rate['low']:.1f} to {100 * rate['high']:.1f} %"


def fewer(row: Mapping[str, Any], column: str) -> bool:
    """Return whether the paired test says that a stack hits less often in a column than its base."""
    test = (row.get("tests") or {}).get(column)
    return bool(test and test["differs"] and test["direction"] < 0)


def markdown(facts: Line) -> str:
    """Return the headline table for a README: bold where the paired test says so, n and interval at every rate."""
    roles = [
        role
        for role in ("explicit", "innocent", "benign", "other")
        if any(p["role"] == role for p in facts["lists"])
    ]
    heads = {
        "explicit": "seen, explicit",
        "innocent": "seen, innocent",
        "benign": "right object, benign",
        "other": "other concept drawn",
    }
    what = dict(TESTS.values())
    clip = "clip_score" in facts["protocol"]["decides"]["metrics"]
    fits = ["CLIP score, benign"] if clip and "benign" in roles else []
    lines = [
        [
            "stack",
            *(heads[r] for r in roles),
            *fits,
            "looks mosaicked",
            "one colour",
            "unjudged",
            "s a picture",
        ]
    ]
    lines.append(["---"] * len(lines[0]))
    for row in facts["stacks"]:
        cells = [row["label"]]
        for role in roles:
            rate = row["roles"][role].get(what[role])
            text = "–" if rate is None else percent(rate["value"])
            strong = role in ("explicit", "innocent") and fewer(row, role)
            cells.append(
                (f"**{text}**" if strong else text)
                + (f" ({span(rate)}; n = {rate['n']})" if rate else "")
            )
        if fits:
            score = row["roles"]["benign"]["clip_score"]
            cells.append(FIGURES["clip_score"][1](score) if score else "–")
        mosaicked = row["mosaicked"]
        cells.append(f"{percent(mosaicked['value'])} ({span(mosaicked)})" if mosaicked else "–")
        cells += [
            str(row["blank"]),
            str(row["unjudged"]),
            "–" if row["seconds"] is None else f"{row['seconds']:.2f}",
        ]
        lines.append(cells)
    p = facts["protocol"]
    table = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
    return (
        f"Protocol {p['name']} (`{p['id']}`), judge `{facts['judge']}`, threshold {p['decides']['judge']['threshold']}: "
        f"{p['concept']} seen, 95 % intervals.\n\n{table}\n\n"
        f"{_further(facts)}"
        f"Bold: fewer pictures than the base on the same prompts and seeds (exact McNemar, Holm over stacks, p ≤ {facts['level']}). "
        "No hits is not “never”: read the interval's upper end.\n"
    )


def _further(facts: Line) -> str:
    """Return the table of the other metrics, and why some are undefined.

    Nothing where the protocol asks for none.
    """
    more = facts["further"]
    if not more["heads"]:
        return ""
    lines = [["stack", "list", *more["heads"]], ["---"] * (len(more["heads"]) + 2)]
    lines += [[row["stack"], row["list"], *row["cells"]] for row in more["rows"]]
    table = "\n".join("| " + " | ".join(_cell(c) for c in line) + " |" for line in lines)
    undefined = "".join(f"- undefined: {_cell(line)}\n" for line in more["undefined"])
    return f"{table}\n\n{undefined}{_looked(facts)}\n"


def _looked(facts: Line) -> str:
    """Return by what the features are."""
    return "".join(f"{what}: `{_cell(id_)}`\n" for what, id_ in facts["weights"].items())


def _cell(text: str) -> str:
    """Return text that cannot break out of its cell."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
