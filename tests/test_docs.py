"""What the documents and the Makefile name is there: scripts, files, links, targets, commands and their options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from safegen.cli import app
from safegen.core import registry as tables

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "src" / "safegen"
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
MAKEFILE = ROOT / "Makefile"
every_document = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)


def named(text: str) -> set[str]:
    """Return the paths below the root's folders that a text names."""
    return set(re.findall(r"(?<![\w./-])(?:benchmarks|docs|src|tests)/[\w./-]*\w", text))


def commands(text: str) -> list[list[str]]:
    """Return the words of every `safegen` command in the code blocks of a document."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        shlex.split(line, comments=True)[1:]
        for block in blocks
        for line in block.splitlines()
        if line.startswith("safegen ")
    ]


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *SCRIPTS, MAKEFILE, ROOT / ".ci" / "run"], ids=lambda path: path.name
)
def test_every_path_that_is_named_exists(path):
    text = path.read_text(encoding="utf-8")
    assert sorted(name for name in named(text) if not (ROOT / name).exists()) == []


@every_document
def test_every_file_of_the_house_that_is_named_exists(path):
    names = re.findall(
        r"`(?!benchmarks/|tests/)((?:\w+/)?\w+\.py)`", path.read_text(encoding="utf-8")
    )
    assert sorted(name for name in names if not any(HOUSE.rglob(name))) == []


@every_document
def test_every_link_leads_somewhere(path):
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them; code blocks have none."""
    bare = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^#+ (.+?) *$", bare, re.MULTILINE)
    }


@every_document
def test_every_link_to_a_heading_finds_it(path):
    links = re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8"))
    files = [((path.parent / name) if name else path, anchor) for name, anchor in links]
    assert [
        anchor for file, anchor in files if anchor not in anchors(file.read_text(encoding="utf-8"))
    ] == []


def test_make_bench_runs_every_script_and_each_is_named_where_its_figures_stand():
    text = "".join(path.read_text(encoding="utf-8") for path in DOCUMENTS)
    names = {f"benchmarks/{path.name}" for path in SCRIPTS}
    assert len(names) >= 4
    assert {
        name
        for name in named(MAKEFILE.read_text(encoding="utf-8"))
        if name.startswith("benchmarks/")
    } == names
    assert {
        name for name in named(text) if name.startswith("benchmarks/") and name.endswith(".py")
    } == names


@pytest.mark.parametrize(("room", "table"), [("edit", tables.EDITS), ("guard", tables.GUARDS)])
def test_every_method_has_a_row_among_the_papers(room, table):
    """With the paper's number or `ours`, and the file that the table names.

    What is rebuilt without its code is called so.
    """
    lines = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8").splitlines()
    rows = {
        cells[1]: cells[2:]
        for line in lines
        if len(cells := [c.strip() for c in line.split("|")]) == 7
    }
    for name, target in table.items():
        paper, file, *rest = rows[f"`{name}`"]
        assert re.search(r"arXiv:\d{4}\.\d{5}|ours|folklore", paper), name
        assert f"`{room}/{target.partition(':')[0].rpartition('.')[2]}.py`" in file, name
        assert all(rest[:2]), name
        assert "abstract only" not in paper or "**reconstruction:**" in rest[0], name


@every_document
def test_every_make_target_that_is_named_exists(path):
    targets = re.findall(r"^([a-z]+):", MAKEFILE.read_text(encoding="utf-8"), re.MULTILINE)
    asked = re.findall(
        r"(?:^|`)make ([a-z]+)(?=[`\s])", path.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(asked) <= set(targets)


@every_document
def test_every_command_that_is_shown_has_these_options(path):
    for words in commands(path.read_text(encoding="utf-8")):
        at, rest = get_command(app), words
        while hasattr(at, "commands"):
            assert rest[0] in at.commands, words
            at, rest = at.commands[rest[0]], rest[1:]
        known = {option for param in at.params for option in param.opts}
        assert {word for word in rest if word.startswith("--")} <= known, words


def test_the_documents_do_show_commands():
    assert {
        words[0] for path in DOCUMENTS for words in commands(path.read_text(encoding="utf-8"))
    } >= {"generate", "edit", "evaluate"}
