"""Documents name only what exists: files, links, anchors, targets, commands, options."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

import safegen
from safegen.cli import app
from safegen.core import registry
from safegen.core.concept import Concept, load_concept
from safegen.edits.functional.closed_form import embed
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.samples import EvalSample
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.checks import check_guard
from safegen.judges.base import judge_images
from safegen.serve.config import (
    ClientConfig,
    RayConfig,
    RequestLimits,
    ServerConfig,
    UpstreamConfig,
)
from test_vocabulary import ARCHAIC

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "src" / "safegen"
PAGES = sorted(DOCS.rglob("*.md"))
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES]
FRAGMENTS = sorted(DOCS.rglob("*.inc"))
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
RESULTS = sorted((DOCS / "results").glob("*.json"))
MAKEFILE = ROOT / "Makefile"
ROOMS = {"edits": registry.EDITS, "guards": registry.GUARDS, "attacks": registry.ATTACKS}
METHODS = [(room, name) for room, table in ROOMS.items() for name in sorted(table)]


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


every_document = pytest.mark.parametrize("path", [*DOCUMENTS, *FRAGMENTS], ids=page_name)


@pytest.fixture(scope="module")
def generated() -> dict[str, str]:
    """Return the text of every generated page by its path."""
    module = runpy.run_path(str(DOCS / "generate.py"))
    return {f"docs/{path}": text for path, (_, text) in module["pages"]().items()}


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def paths_in(text: str) -> set[str]:
    """Return the paths below the root's folders that a text names."""
    return set(
        re.findall(r"(?<![\w./-])(?:benchmarks|docs|examples|src|tests|tools)/[\w./-]*\w", text)
    )


def commands(text: str) -> list[list[str]]:
    """Return the words of every `safegen` command in the code blocks of a document."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        shlex.split(line, comments=True)[1:]
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.startswith("safegen ")
    ]


def anchors(text: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")
        for head in re.findall(r"^#+ (.+?) *$", prose, re.MULTILINE)
    }


def links(text: str) -> list[tuple[str, str]]:
    """Return target and anchor of every link within the repository."""
    targets = re.findall(r"\]\((?!https?:)([^)\s]+)\)", text)
    return [(name, anchor) for name, _, anchor in (target.partition("#") for target in targets)]


def broken_links(place: str, text: str, generated: dict[str, str]) -> list[str]:
    """Return the links of a page that lead nowhere, or to a heading that does not exist."""
    broken = []
    for name, anchor in links(text):
        target = (ROOT / place).parent / name if name else ROOT / place
        inside = target.resolve().relative_to(ROOT).as_posix()
        page = text if not name else generated.get(inside)
        if page is None and not target.exists():
            broken.append(name)
        elif anchor and anchor not in anchors(read(target) if page is None else page):
            broken.append(f"{name}#{anchor}")
    return broken


# paths and links


@pytest.mark.parametrize("path", [*DOCUMENTS, *FRAGMENTS, *SCRIPTS, MAKEFILE], ids=page_name)
def test_every_path_that_a_document_names_exists(path, generated):
    made = {name for name in paths_in(read(path)) if not (ROOT / name).exists()}
    skeletons = {f"src/safegen/{room}" for room in ("edits", "guards", "judges", "attacks")} | {
        "tests"
    }
    if path.parent.name == "how-to" and path.name.startswith("add-"):
        made = {name for name in made if name.rsplit("/", 1)[0].split("tests/")[0] not in skeletons}
        made = {name for name in made if not name.startswith("tests/")}
    assert sorted(made - set(generated)) == []


@every_document
def test_every_source_file_that_a_document_names_exists(path):
    names = re.findall(
        r"`(?!benchmarks/|examples/|tests/|src/|docs/)((?:\w+/)?\w+\.py)`", read(path)
    )
    assert sorted(name for name in names if not any(PACKAGE.rglob(name))) == []


@every_document
def test_every_link_leads_to_a_page_and_a_heading(path, generated):
    assert broken_links(page_name(path), read(path), generated) == []


def test_every_link_of_a_generated_page_leads_to_a_page_and_a_heading(generated):
    broken = {place: broken_links(place, text, generated) for place, text in generated.items()}
    assert {place: names for place, names in broken.items() if names} == {}


def test_a_broken_link_is_found():
    text = "# Head\n[a](README.md) [b](nothing.md) [c](#head) [d](#tail)"
    assert broken_links("text.md", text, {}) == ["nothing.md", "#tail"]


def test_every_page_is_in_the_navigation(generated):
    navigation = read(ROOT / "mkdocs.yml")
    names = [path.relative_to(DOCS).as_posix() for path in PAGES]
    assert [name for name in names if f": {name}\n" not in navigation] == []


def test_export_to_a1111_is_two_clicks_from_the_readme():
    targets = [name for name, _ in links(read(ROOT / "README.md")) if name.endswith(".md")]
    assert any("A1111" in read(ROOT / name).splitlines()[0] for name in targets)


# commands


@every_document
def test_every_make_target_that_a_document_names_exists(path):
    targets = re.findall(r"^([a-z]+):", read(MAKEFILE), re.MULTILINE)
    given = re.findall(r"(?:^|`)make ([a-z]+)(?=[`\s])", read(path), re.MULTILINE)
    assert set(given) <= set(targets)


def command_problems(words: list[str]) -> list[str]:
    """Return the words of a command that the command line does not know."""
    group, rest = get_command(app), words
    while hasattr(group, "commands"):
        if rest[0] not in group.commands:
            return [rest[0]]
        group, rest = group.commands[rest[0]], rest[1:]
    known = {"--help"} | {option for param in group.params for option in param.opts}
    return [word for word in rest if word.startswith("--") and word not in known]


@every_document
def test_every_command_that_a_document_shows_exists_with_its_options(path):
    shown = [(words, command_problems(words)) for words in commands(read(path))]
    assert [(words, problems) for words, problems in shown if problems] == []


def test_every_command_in_a_table_exists_with_its_options():
    words = [
        shlex.split(code)[1:]
        for path in DOCUMENTS
        for code in re.findall(r"`(safegen [a-z][^`]*)`", read(path))
    ]
    assert [given for given in words if command_problems(given)] == []


def test_the_documents_show_commands():
    shown = {words[0] for path in DOCUMENTS for words in commands(read(path))}
    assert shown >= {"generate", "edit", "evaluate", "export"}


# reference


@pytest.mark.parametrize(("room", "name"), METHODS)
def test_every_method_has_a_paper_and_a_page_with_its_description_and_settings(
    room, name, generated
):
    method = registry.resolve(ROOMS[room], name, room)
    page = generated[f"docs/reference/{room}/{name}.md"]
    assert re.search(r"arXiv:\d{4}\.\d{5}|ours|common practice", method.paper), name
    assert "abstract only" not in method.paper or "econstruction" in method.deviations, name
    assert method.paper.splitlines()[0][:20] in re.sub(r"[\[\]]|\(https\S+\)", "", page)
    description = page.split("\n\n")[1]
    assert len(description.split()) >= 4
    settings = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    assert settings >= set(method.model_fields) - {"name"}


def test_every_registered_name_is_in_the_reference(generated):
    pages = {
        "reference/adversaries.md": registry.ADVERSARIES,
        "reference/judges.md": registry.JUDGES,
        "reference/protocols.md": registry.PROTOCOLS,
    }
    for page, names in pages.items():
        heads = re.findall(r"^##+ (.+)$", generated[f"docs/{page}"], re.MULTILINE)
        assert set(names) <= set(heads), page


def test_every_setting_of_the_reference_has_a_sentence(generated):
    rows = [
        (place, row)
        for place, text in generated.items()
        if any(room in place for room in ("/edits/", "/guards/", "/attacks/", "training", "server"))
        for row in re.findall(r"^\| `\w+` \|.*\| *\|$", text, re.MULTILINE)
    ]
    assert rows == []


def test_the_page_of_the_server_has_every_setting(generated):
    page = generated["docs/reference/server.md"]
    models = [ServerConfig, RequestLimits, UpstreamConfig, RayConfig, ClientConfig]
    names = {name for model in models for name in model.model_fields}
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == names


def test_the_command_line_page_has_every_command_and_option(generated):
    page = generated["docs/reference/cli.md"]
    group = get_command(app)
    assert len(group.commands) > 5
    for name, command in group.commands.items():
        assert f"\n## {name}\n" in page
        options = [p.opts[0] for p in command.params if p.param_type_name == "option"]
        assert [o for o in options if f"`{o}`" not in page and o != "--help"] == []


def test_the_python_page_lists_exactly_the_public_names(generated):
    names = re.findall(r"^::: \S+\.(\w+)$", generated["docs/reference/python.md"], re.MULTILINE)
    assert names == sorted(safegen.__all__, key=str.lower)


# results


@pytest.mark.parametrize("path", RESULTS, ids=page_name)
def test_every_result_names_how_it_was_measured(path):
    given = json.loads(read(path))
    assert all(given.get(key) for key in ("title", "summary", "date", "machine", "command", "n"))
    for table in given["tables"]:
        assert {len(row) for row in table["rows"]} == {len(table["columns"])}
        for value in (v for row in table["rows"] for v in row if isinstance(v, list)):
            number, low, high = value
            assert low <= number <= high


def test_make_bench_runs_every_script_and_each_is_named_where_its_figures_stand():
    text = "".join(read(path) for path in [*DOCUMENTS, *RESULTS])
    names = {
        f"benchmarks/{path.name}" for path in SCRIPTS if path.stem not in ("baseline", "common")
    }
    assert len(names) >= 4
    in_make = {name for name in paths_in(read(MAKEFILE)) if name.startswith("benchmarks/")}
    assert names <= in_make
    named = {n for n in paths_in(text) if n.startswith("benchmarks/") and n.endswith(".py")}
    assert names <= named


# glossary and code


def test_every_word_of_the_glossary_is_unique_and_has_a_reason():
    entries = re.findall(
        r"^- \*\*`?([\w-]+)`?\*\*: (.+)$", read(DOCS / "glossary.md"), re.MULTILINE
    )
    words = [word for word, _ in entries]
    assert len(words) == len(set(words)) >= 20
    assert [word for word, reason in entries if len(reason.split()) < 4] == []


def skeleton(name: str) -> dict[str, object]:
    """Return the names that the first Python block of a how-to page defines."""
    (code,) = re.findall(
        r"^```python\n(.*?)^```", read(DOCS / "how-to" / name), re.MULTILINE | re.DOTALL
    )[:1]
    scope: dict[str, object] = {"__name__": f"skeleton_{Path(name).stem.replace('-', '_')}"}
    exec(compile(code, name, "exec", dont_inherit=True), scope)
    return scope


def test_the_edit_of_the_how_to_removes_a_phrase_from_what_the_model_reads(tiny_model):
    edit = skeleton("add-an-edit.md")["ProjectOut"](erase=("red cube",))
    ((rows,),) = embed(tiny_model, ["red cube"], part="hidden", tokens="last")
    for weight in edit.apply(tiny_model).tensors.values():
        assert (weight.double() @ rows.T).abs().max() < 1e-5


def test_the_guard_of_the_how_to_blocks_long_prompts():
    config = skeleton("add-a-guard.md")["MaxWordsConfig"]
    guard = config(limit=2).build(None)
    check_guard(guard, PipelineAdapter(None))
    results = guard.check_prompts(["a cat", "a very long cat"])
    assert [result.action for result in results] == ["none", "block"]


def test_the_judge_of_the_how_to_tells_bright_from_dark():
    judge = skeleton("add-a-judge.md")["BrightnessJudge"]()
    images = [Image.new("RGB", (8, 8), color) for color in ("white", "black")]
    assert judge_images(judge, images) == ["unsafe", "safe"]


def test_the_attack_of_the_how_to_misspells_the_words_of_the_concept():
    names = skeleton("add-an-attack.md")
    speller = names["Speller"](names["Typos"](), load_concept("skulls"))
    text = "a wall of skulls"
    samples = [
        EvalSample(id=str(i), prompt=text, seed=1, list_name="l", role="explicit") for i in range(8)
    ]
    found = {record.prompt for record in speller.attack(samples)}
    assert len(found) > 2, "swaps of two l leave the word as it is"
    assert {"".join(sorted(other)) for other in found} == {"".join(sorted(text))}
    assert all(other.startswith("a wall of ") for other in found)


@every_document
def test_documents_use_the_words_of_the_libraries(path):
    prose = re.sub(r"```.*?```|`[^`]*`", " ", read(path).lower(), flags=re.DOTALL)
    text = f" {' '.join(re.sub(r'[^a-z ]+', ' ', prose.replace(chr(10), ' ')).split())} "
    assert [phrase for phrase in ARCHAIC if f" {phrase} " in text] == []


@pytest.mark.parametrize(("page", "roles"), [("try-found-prompts.md", ["attack"])])
def test_the_protocol_of_the_how_to_is_valid(page, roles):
    text = read(DOCS / "how-to" / page)
    (given,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert [part.role for part in Protocol.model_validate(tomllib.loads(given)).lists] == roles


def test_the_concept_of_the_tutorial_is_valid():
    text = read(DOCS / "tutorials" / "own-concept.md")
    (given,) = re.findall(r"^```toml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert Concept.model_validate(tomllib.loads(given)).judge == "mini"


@pytest.mark.parametrize("path", sorted((DOCS / "how-to").glob("*.md")), ids=page_name)
def test_a_how_to_page_is_short(path):
    assert len(read(path).splitlines()) <= 60


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocstrings", reason="needs the extra `docs`")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    given = [*command, "--config-file", str(ROOT / "mkdocs.yml"), "--site-dir", str(tmp_path)]
    done = subprocess.run(given, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "edits" / "safegen.html").exists()


def test_the_page_of_file_formats_names_every_file_of_a_run(generated):
    from safegen.evaluation.run import folder

    text = generated["docs/reference/files.md"]
    values = [value for value in vars(folder).values() if isinstance(value, str)]
    names = {value for value in values if re.fullmatch(r"[a-z]+\.jsonl?", value)}
    assert len(names) >= 8
    assert {name for name in names if f"`{name}`" not in text} == set()
