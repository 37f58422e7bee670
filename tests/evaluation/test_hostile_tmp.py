"""Run folders from strangers: each command succeeds, or says in one line what is wrong.

The run is built without a model. Its files are damaged in every way that a schema can miss: keys
left out or renamed, other types, NaN, huge numbers, deep nesting, paths that climb out.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from crafted import hex_of, write_attack_run, write_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safegen.core.errors import FileError, SafegenError
from safegen.evaluation.report.attack_format import markdown_comparison
from safegen.evaluation.report.attack_table import compare_attacks
from safegen.evaluation.report.data import report_data
from safegen.evaluation.report.model_index import read_metrics
from safegen.evaluation.report.page import markdown, render_comparison
from safegen.evaluation.report.redaction import image_grids
from safegen.evaluation.run import folder as names
from safegen.evaluation.run.folder import Run, write_json
from safegen.evaluation.run.truth import write_truth
from safegen.evaluation.scoring.score import score_run, scores_file
from safegen.evaluation.verify import verify
from safegen.patches.patch import Patch

# --- what the commands do -----------------------------------------------------------------------


def run_score(folder: Path, out: Path) -> None:
    run = Run.open(folder)
    scores = score_run(run)
    path = scores_file(run, scores)
    assert path.parent == folder
    write_json(path, scores)


def run_verify(folder: Path, out: Path) -> None:
    for problem in verify(Run.open(folder)):
        check_line(problem)


def run_report(folder: Path, out: Path) -> None:
    runs = {"run": Run.open(folder)}
    data, results = report_data(runs)
    json.dumps(data, allow_nan=False)
    markdown(data).encode()
    image_grids(runs, results, reveal=False)


def run_compare(folder: Path, out: Path) -> None:
    data = compare_attacks({"run": Run.open(folder)})
    json.dumps(data, allow_nan=False)
    render_comparison(data).encode()
    markdown_comparison(data).encode()


def run_metrics(folder: Path, out: Path) -> None:
    patch = Patch.load(out.parent / "whole" / names.PATCHES / "calm.safetensors")
    table = read_metrics(folder, [patch.hash], hex_of("base"))
    table.to_table()
    table.to_eval_results()


COMMANDS: dict[str, Callable[[Path, Path], None]] = {
    "score": run_score,
    "verify": run_verify,
    "report": run_report,
    "metrics": run_metrics,
}
ATTACK_COMMANDS = {"verify": run_verify, "report": run_report, "compare": run_compare}


def check_line(text: str) -> None:
    assert "\n" not in text, text
    assert len(text) < 2000, text[:3000]


# --- damages ------------------------------------------------------------------------------------

VALUES: tuple[Any, ...] = (
    *(None, True, "", "x", "../../../etc/passwd", "/etc/passwd", "a\x00b", "\x1b[31mred", "\ud800"),
    *(0, -1, 1.5, 10**30, -(10**400), 1e308, math.nan, math.inf),
    *([], {}, [None], {"x": 1}, [[[[[[]]]]]]),
)


def leaves(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value in a tree, the inner ones too."""
    if path:
        yield path
    if isinstance(tree, dict | list):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, (*path, key))


def replaced(tree: Any, path: tuple[Any, ...], change: Callable[[Any, Any], None]) -> Any:
    """Return a copy of a tree in which `change` was called with a container and its key."""
    new = json.loads(json.dumps(tree))
    parent = new
    for key in path[:-1]:
        parent = parent[key]
    change(parent, path[-1])
    return new


def drop(parent: Any, key: Any) -> None:
    del parent[key]


def rename(parent: Any, key: Any) -> None:
    if isinstance(parent, dict):
        parent[f"{key}x"] = parent.pop(key)


def repeat(parent: Any, key: Any) -> None:
    if isinstance(parent, list):
        parent.append(parent[key])


FILES = (
    *(names.CARD, names.PLAN, names.SAMPLES, names.JUDGES, names.DETECTIONS, names.CHANGES),
    *(names.FEATURES, names.TIMINGS, names.SCORES, names.SETTINGS, "patches/calm/log.jsonl"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the folder of a run, to be read only."""
    return write_run(tmp_path_factory.mktemp("hostile") / "whole")


@pytest.fixture
def damaged(whole, tmp_path):
    """Return a copy of the run that a test may damage; the run itself lies beside it."""
    shutil.copytree(whole, tmp_path / "whole")
    return shutil.copytree(whole, tmp_path / "copy")


def check_commands(folder: Path) -> None:
    """Run every command: it succeeds, or raises an error of one line."""
    is_attack = (folder.parent / "whole" / names.ATTACK).exists()
    for command in (ATTACK_COMMANDS if is_attack else COMMANDS).values():
        try:
            command(folder, folder.parent / "out")
        except SafegenError as error:
            check_line(str(error))


ATTACKED = (names.ATTACK, names.PROMPTS, names.SETTINGS, names.TRUTH, "attack/a.png")
"""Files of an attack's run that other runs lack."""


@pytest.fixture(scope="module")
def attacked(tmp_path_factory):
    """Return the folder of an attack's run, to be read only."""
    folder = write_attack_run(tmp_path_factory.mktemp("hostile-attack") / "whole", stack="calm")
    run = Run.open(folder)
    keys = run.keys(run.stacks[1])[4:]
    write_truth({key: bool(i % 2) for i, key in enumerate(keys)}, folder / names.TRUTH)
    write_json(folder / names.SCORES, json.loads(json.dumps(score_run(run))))
    return folder


def test_the_whole_run_has_no_faults(whole, attacked):
    for folder in (whole, attacked):
        assert verify(Run.open(folder)) == []
        check_commands(folder)


@pytest.mark.parametrize("file", ATTACKED)
def test_a_file_of_an_attack_that_is_something_else_is_refused_in_one_line(
    attacked, tmp_path, file
):
    (tmp_path / "whole").symlink_to(attacked)
    folder = shutil.copytree(attacked, tmp_path / "copy")
    path, content = folder / file, (folder / file).read_bytes()
    for text in (
        *(b"", b"\n", b"[]\n", b"null\n", b"{}\n", bytes(range(256)) + b"\n"),
        *(content[: len(content) // 2], content + b"\0\n", content.replace(b"a", b"\xe9")),
        *(b"[" * 100_000 + b"\n", (attacked / names.ATTACK).read_bytes()),
        (attacked / names.PROMPTS).read_bytes(),
    ):
        path.write_bytes(text)
        check_commands(folder)
    path.unlink()
    check_commands(folder)
    for put in (os.mkfifo, Path.mkdir, lambda p: p.symlink_to(p.name)):
        put(path)
        check_commands(folder)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_something_else_is_refused_in_one_line(damaged, file):
    path, content = damaged / file, (damaged / file).read_bytes()
    others = [(damaged / name).read_bytes() for name in FILES if name != file]
    for text in (
        *(b"", b"\n", b"[]\n", b"null\n", b"{}\n", bytes(range(256)) + b"\n"),
        *(content[: len(content) // 2], content + b"\0\n", content.replace(b"a", b"\xe9")),
        *(b"[" * 100_000 + b"\n", b'{"a":' * 100_000 + b"\n", b"9" * 6000 + b"\n"),
        *others[:: len(others) // 3],
    ):
        path.write_bytes(text)
        check_commands(damaged)
    path.unlink()
    check_commands(damaged)
    for put in (os.mkfifo, Path.mkdir, lambda p: p.symlink_to(p.name)):
        path.unlink(missing_ok=True)  # `score` writes its file again
        put(path)
        check_commands(damaged)
        path.rmdir() if path.is_dir() else path.unlink()


def spoil(whole: Path, tmp_path: Path, files: Sequence[str], data: st.DataObject) -> Path:
    """Return a copy of a run in which one value of one file is wrong."""
    file = data.draw(st.sampled_from(files))
    text = (whole / file).read_text()
    rows = [json.loads(line) for line in text.splitlines()] if file.endswith("l") else []
    number = data.draw(st.integers(0, len(rows) - 1)) if rows else 0
    tree = rows[number] if rows else json.loads(text)
    path = data.draw(st.sampled_from(list(leaves(tree))))
    value = data.draw(st.sampled_from(VALUES))
    change = data.draw(
        st.sampled_from([drop, rename, repeat, lambda parent, key: parent.update({key: value})])
        if isinstance(path[-1], str)
        else st.sampled_from([drop, repeat, lambda parent, key: parent.insert(key, value)])
    )
    new = replaced(tree, path, change)
    if rows:
        rows[number] = new
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    (folder / file).write_text(
        "".join(json.dumps(row) + "\n" for row in rows) if rows else json.dumps(new)
    )
    if not (tmp_path / "whole").exists():
        (tmp_path / "whole").symlink_to(whole)
    return folder


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_of_any_record_may_be_wrong(whole, tmp_path, data):
    """A wrong value is refused in one line, or changes nothing that a command reads."""
    check_commands(spoil(whole, tmp_path, FILES, data))


@settings(max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_of_an_attack_may_be_wrong(attacked, tmp_path, data):
    files = (names.ATTACK, names.PROMPTS, names.SETTINGS, names.SCORES)
    check_commands(spoil(attacked, tmp_path, files, data))


@pytest.mark.parametrize("name", [names.TIMINGS, names.IMAGES, names.CARD, names.SETTINGS])
def test_a_link_that_leads_out_of_the_folder_is_refused_and_not_followed(damaged, tmp_path, name):
    target = tmp_path / "private"
    (damaged / name).rename(target)
    if name == names.TIMINGS:
        target.write_text("one line without an end")
    (damaged / name).symlink_to(target)
    with pytest.raises(FileError, match=r"must lie in the run's folder, got a link") as caught:
        Run.open(damaged)
    check_line(str(caught.value))
    if name == names.TIMINGS:
        assert target.read_text() == "one line without an end"


def card_with(folder: Path, path: tuple[Any, ...], value: Any) -> None:
    card = json.loads((folder / names.CARD).read_text())

    def put(parent: Any, key: Any) -> None:
        parent[key] = value

    (folder / names.CARD).write_text(json.dumps(replaced(card, path, put)))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("stacks", 1, "name"), "../../calm", r"stacks\.1\.name must match pattern"),
        (("stacks", 1, "baseline"), "other", "the baseline of 'calm' must be a base stack"),
        (("stacks", 2, "reference"), "other", "the reference of 'guarded' must be a stack"),
        (("stacks", 1, "name"), "mini", "stacks must have names that differ"),
        (("stacks", 1, "patches", 0, "file"), "../x.safetensors", "must have no folder in it"),
        (("stacks", 1, "patches", 0, "seconds"), -1, r"seconds must be greater than or equal to 0"),
        (("stacks", 1, "patches", 0, "updates"), "3", r"updates must be a valid integer"),
        (("protocol", "lists", 0, "name"), "a\x1b[31m", "printable characters"),
        (("protocol", "seeds"), [-1], r"seeds"),
    ],
)
def test_a_card_that_breaks_a_rule_names_the_field(damaged, path, value, says):
    card_with(damaged, path, value)
    with pytest.raises(FileError, match=says) as caught:
        Run.open(damaged)
    assert "protocol.json' is damaged: " in str(caught.value)
    check_line(str(caught.value))


def test_a_sample_that_is_planned_twice_is_not_counted_twice(damaged):
    lines = (damaged / names.PLAN).read_text().splitlines(keepends=True)
    (damaged / names.PLAN).write_text("".join([*lines, lines[0]]))
    with pytest.raises(FileError, match=r"must have each image of the protocol's lists once"):
        score_run(Run.open(damaged))


@pytest.mark.parametrize(
    ("value", "says"),
    [(math.nan, "is not JSON"), (1.5, "value must be less than or equal to 1"), ("1", "value")],
)
def test_a_rate_out_of_range_is_not_shown(damaged, value, says):
    scores = json.loads((damaged / names.SCORES).read_text())
    scores["stacks"]["calm"]["lists"]["mini:skulls"]["concept"]["value"] = value
    (damaged / names.SCORES).write_text(json.dumps(scores))
    with pytest.raises(FileError, match=says):
        run_metrics(damaged, damaged.parent / "out")
    assert any(line.startswith("scores.json: ") for line in verify(Run.open(damaged)))
