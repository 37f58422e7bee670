"""The `list` and `show` commands."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Annotated, Any

import typer

from safegen.cli.console import echo, echo_json
from safegen.cli.info.catalog import (
    Kind,
    changes,
    details_of,
    find_kinds,
    literal,
    names_of,
    summaries_of,
)
from safegen.cli.options import AsJson

MAX_WIDTH = 100
"""Most columns of a paragraph."""


def list_(
    kind: Annotated[
        Kind | None, typer.Argument(help="What to list. Default: the names of every kind.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List the names that commands take: methods, presets, guards, judges, attacks and others."""
    kinds = [kind] if kind else [one for one in Kind if one is not Kind.presets]
    if as_json:
        found = {one.value: summaries_of(one) for one in kinds}
        echo_json(found[kind.value] if kind else found)
        return
    if kind is None:
        for one in kinds:
            _print_pair(one.value, ", ".join(names_of(one)), indent=13)
        echo("safegen list KIND says what each one is; safegen show NAME says all about it.")
        return
    summaries = summaries_of(kind)
    width = max(map(len, summaries))
    for name, text in summaries.items():
        _print_pair(name, text, indent=min(width, 24) + 2)


def show(
    name: Annotated[str, typer.Argument(help="Name from `safegen list`, such as esd or sld-max.")],
    kind: Annotated[
        Kind | None, typer.Option(help="Kind of the name, if several kinds have it.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show what a method, guard, judge, attack, concept, protocol or model is and needs.

    Its paper and equations, its settings with defaults, its presets, and what it needs to run.
    """
    first, *others = find_kinds(name, kind)
    details = details_of(first, name)
    if as_json:
        echo_json(details | {"also": [one.value for one in others]})
        return
    for line in _lines(details):
        echo(line)
    for one in others:
        echo(f"{name} is also one of the {one}: safegen show {name} --kind {one}")


def _lines(details: Mapping[str, Any]) -> Iterator[str]:
    """Yield the lines about a name."""
    yield f"{details['name']} ({details['kind']})"
    yield from _paragraph(details["summary"])
    for text in details.get("description", ()):
        yield ""
        yield from _paragraph(text)
    yield ""
    for key in ("paper", "code", "source", "docs"):
        if value := details.get(key):
            yield from _pair(key, value, indent=11)
    for place, source in details.get("equations", {}).items():
        yield from _pair("equation", f"{place} ({source})", indent=11)
    for text in details["needs"] or ["nothing else"]:
        yield from _pair("needs", text, indent=11)
    if presets := details.get("presets"):
        yield ""
        yield "presets"
        for preset, given in presets.items():
            yield from _pair(f"  {preset}:", changes(given), indent=4)
    if settings := details.get("settings"):
        yield ""
        yield "settings"
        for row in settings:
            value = "(required)" if row.get("required") else f"= {literal(row['default'])}"
            kind = f" ({row['type']})" if row["type"] else ""
            yield from _pair(f"  {row['name']}", f"{value}{kind}", indent=4)
            yield from (f"      {line}" for line in _paragraph(row["description"], room=6))


def _print_pair(name: str, text: str, *, indent: int) -> None:
    for line in _pair(name, text, indent=indent):
        echo(line)


def _pair(name: str, text: str, *, indent: int) -> Iterator[str]:
    """Yield a name and its text, which continues on indented lines."""
    head = name.ljust(indent - 1) + " "
    lines = wrap(text, _width() - indent, break_long_words=False, break_on_hyphens=False)
    if len(head) > indent and lines and len(head) + len(lines[0]) > _width():
        lines = ["", *lines]
    yield (head + (lines[0] if lines else "")).rstrip()
    yield from (" " * indent + line for line in lines[1:])


def _paragraph(text: str, *, room: int = 0) -> list[str]:
    return wrap(text, _width() - room, break_long_words=False, break_on_hyphens=False)


def _width() -> int:
    return max(40, min(MAX_WIDTH, shutil.get_terminal_size().columns))
