"""Imports are light, and every public name exists."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import safegen

HEAVY = (
    *("torch", "diffusers", "transformers", "accelerate", "safetensors", "matplotlib", "scipy"),
    *("fastapi", "uvicorn", "httpx2", "ray"),
)
TELL = f"import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
HELP = """
import runpy, sys
sys.argv = ['safegen', *{words!r}]
try: runpy.run_module('safegen', run_name='__main__')
except SystemExit: pass
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


@pytest.mark.parametrize(
    "module",
    [
        *(
            "safegen",
            "safegen.cli",
            "safegen.core.errors",
            "safegen.core.registry",
            "safegen.core.concept",
            "safegen.core.files",
            "safegen.data.prompts.prompts",
            "safegen.features.base",
            "safegen.serve.config",
        ),
        *(
            f"safegen.metrics.{name}"
            for name in (
                "rates",
                "removal",
                "asr",
                "inappropriate",
                "subject",
                "paired",
                "distances",
            )
        ),
    ],
)
def test_importing_loads_nothing_heavy(module):
    assert json.loads(python(f"import {module}; {TELL}").stdout) == []


def test_the_process_that_answers_http_loads_no_model_library():
    modules = "safegen.serve.server, safegen.serve.upstream.engine"
    loaded = json.loads(python(f"import {modules}; {TELL}").stdout)
    assert sorted(loaded) == ["fastapi", "httpx2", "uvicorn"]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["edit", "--help"],
        ["demo", "--help"],
        ["triplets", "make", "--help"],
        ["prompts", "show", "--help"],
        ["serve", "--help"],
        ["--version"],
    ],
)
def test_help_loads_nothing_heavy(words):
    assert json.loads(python(HELP.format(words=words) + TELL).stdout.splitlines()[-1]) == []


def test_help_answers_within_a_second_of_processor_time():
    spent = []
    for _ in range(3):  # minimum processor time of three runs, as the machine may be busy
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "safegen", "--help"],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        after = os.times()
        spent.append(
            after.children_user
            + after.children_system
            - before.children_user
            - before.children_system
        )
    assert 0 < min(spent) < 1
    assert "generate" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("name", sorted(safegen.__all__))
def test_every_public_name_exists_and_is_callable(name):
    assert callable(getattr(safegen, name))


def test_edit_is_one_function_with_its_real_signature():
    code = """
import inspect, safegen
first = safegen.edit
import safegen.edits.training.trainer
parameters = inspect.signature(first).parameters
print(first is safegen.edit, inspect.isfunction(first), "triplets" in parameters)
"""
    assert python(code).stdout.split() == ["True", "True", "True"]


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'edti'"):
        _ = safegen.edti
