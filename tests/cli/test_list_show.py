"""`safegen list` and `safegen show`: what is read from the source is what the classes say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from inspect import signature

import pytest

from safegen.cli.info.catalog import TABLES, Kind, details_of, find_kinds, names_of
from safegen.cli.info.source import Code, parameters_of, read_class
from safegen.core.registry import JUDGES, resolve

WITH_CLASSES = [(k, n) for k, table in TABLES.items() if k is not Kind.judges for n in table]
NAMES = [(k, n) for k in Kind if k is not Kind.presets for n in names_of(k)]


@pytest.mark.parametrize(("kind", "name"), WITH_CLASSES)
def test_settings_read_from_the_source_are_those_of_the_class(kind, name):
    imported = resolve(TABLES[kind], name, kind)
    read = read_class(TABLES[kind][name])
    fields = {n: f for n, f in imported.model_fields.items() if n != "name" or f.is_required()}
    assert set(read.fields()) == set(fields)
    for key, field in read.fields().items():
        assert field.description == (fields[key].description or ""), key
        assert field.is_required == fields[key].is_required(), key
        if not field.is_required and not isinstance(field.default, Code):
            assert field.default == fields[key].get_default(call_default_factory=True), key
        elif field.nested:
            assert type(fields[key].default).__name__ == field.nested.rpartition(":")[2]
            inner = read_class(field.nested).fields()
            assert set(inner) == set(type(fields[key].default).model_fields) - {"name"}
    presets = getattr(imported, "PRESETS", {})
    assert set(read.variable("PRESETS") or {}) == set(presets)
    for preset, values in (read.variable("PRESETS") or {}).items():
        for key, value in values.items():
            assert isinstance(value, Code) or value == presets[preset][key], (preset, key)
    assert (read.variable("paper") or "") == getattr(imported, "paper", "")


@pytest.mark.parametrize("name", sorted(JUDGES))
def test_options_of_a_judge_read_from_the_source_are_those_of_its_constructor(name):
    parameters = signature(resolve(JUDGES, name, "judge")).parameters
    read = {one.name: one for one in parameters_of(read_class(JUDGES[name]))}
    assert set(read) == set(parameters)
    for key, one in read.items():
        assert one.is_required == (parameters[key].default is parameters[key].empty)
        if not one.is_required and not isinstance(one.default, Code):
            assert one.default == parameters[key].default, key
        assert one.description


@pytest.mark.parametrize(("kind", "name"), NAMES)
def test_a_name_has_a_summary_a_page_and_a_sentence_for_each_setting(kind, name):
    details = details_of(kind, name)
    assert details["summary"].endswith(".")
    assert details["docs"].startswith("docs/")
    if kind is not Kind.protocols:
        assert [row["name"] for row in details.get("settings", ()) if not row["description"]] == []
    json.dumps(details)


def test_a_method_shows_its_equation_and_what_it_needs(safegen):
    code, out, err = safegen("show", "uce")
    assert code == 0, err
    assert "closed_form.py:solve_text_map" in out
    assert "eq. 7" in out
    assert "needs      the phrases of a concept (--concept NAME)" in out
    assert "lamb = 0.5 (float, > 0)" in out
    code, out, _ = safegen("show", "nudenet")
    assert 'pip install "safegen[nudenet]"' in out
    code, out, _ = safegen("show", "safegen")
    assert "training.lr = " in out
    assert "triplets of images" in out


def test_a_name_of_several_kinds_means_the_first_and_says_the_others(safegen):
    code, out, err = safegen("show", "mini")
    assert code == 0, err
    assert out.startswith("mini (models)")
    assert "safegen show mini --kind judges" in out
    _, out, _ = safegen("show", "mini", "--kind", "judges")
    assert out.startswith("mini (judges)")


def test_a_guard_with_a_preset_is_shown_as_its_guard(safegen):
    _, out, _ = safegen("show", "sld-max")
    assert out.startswith("sld (guards)")
    assert find_kinds("sld-max") == [Kind.guards]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["show", "esdd"], "Did you mean 'esd' or 'sdd'? See: safegen list"),
        (["show", "mini-smok"], "Did you mean 'mini-smoke'"),
        (["show", "esd", "--kind", "guards"], "See: safegen list guards"),
        (["list", "method"], "is not one of 'models', 'methods'"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest(safegen, words, says):
    code, out, err = safegen(*words)
    assert (code, out) == (2, "")
    assert says in err.replace("'sdd' or 'esd'", "'esd' or 'sdd'")
    assert err.count("\n") == 1


def test_json_is_one_value(safegen):
    _, out, _ = safegen("list", "--json")
    assert set(json.loads(out)) == {k.value for k in Kind} - {"presets"}
    _, out, _ = safegen("list", "presets", "--json")
    assert "esd paper" in json.loads(out)
    _, out, _ = safegen("show", "mini", "--json")
    assert json.loads(out)["also"] == ["judges"]


def test_lists_fit_eighty_columns(safegen, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["list"], *(["list", kind.value] for kind in Kind), ["show", "shielddiff"]):
        _, out, _ = safegen(*words)
        long = [line for line in out.splitlines() if len(line) > 80 and " " in line.strip()]
        assert long == []


def test_list_and_show_load_no_torch():
    code = (
        "import sys; from safegen.cli import main\n"
        "for words in (['list'], ['list', 'presets'], ['show', 'esd'], ['show', 'skulls']):\n"
        "    sys.argv = ['safegen', *words]\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
