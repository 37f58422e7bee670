"""`safegen doctor` tells a working installation from a broken one."""

from __future__ import annotations

import json
from importlib.util import find_spec

from safegen.cli.info import doctor


def test_a_working_installation_is_ok(safegen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "EXTRAS", {"report": {"no_such_library": "charts"}})
    code, out, err = safegen("doctor", "--json")
    assert (code, err) == (0, "")
    value = json.loads(out)
    assert value["ok"] is True
    found = {check["name"]: check for check in value["checks"]}
    assert "one image of mini in" in found["self-test"]["detail"]
    assert found["extra report"]["status"] == "missing"
    assert 'pip install "safegen[report]"' in found["extra report"]["detail"]
    assert {"torch", "device auto", "working folder"} <= set(found)
    assert list(tmp_path.iterdir()) == []


def test_what_is_needed_and_broken_exits_with_1(safegen, monkeypatch):
    monkeypatch.setattr(doctor, "LIBRARIES", ("torch", "no-such-library"))

    def fail():
        raise RuntimeError("no kernel image for this device\nsecond line")

    monkeypatch.setattr(doctor, "_self_test", fail)
    code, out, _ = safegen("doctor")
    assert code == 1
    assert "broken   no-such-library  not installed; pip install no-such-library" in out
    assert "broken   self-test        RuntimeError: no kernel image for this device\n" in out
    assert out.endswith("something is broken\n")


def test_the_libraries_of_the_extras_have_these_names():
    modules = {name for libraries in doctor.EXTRAS.values() for name in libraries}
    assert {name for name in modules if find_spec(name)} >= {"matplotlib", "onnxruntime"}
    assert [name for name in modules if not find_spec(name)] == []
