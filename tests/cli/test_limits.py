"""Numbers and outputs that cannot be used are refused in one line, before anything is loaded."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

NUMBERS = {
    "generate mini --prompt x --out o": {
        "seed": ["-1", 2**63, 2**64, "1.5", "nan"],
        "steps": ["0", "-1", "1001", 10**9],
        "guidance": ["nan", "inf", "-inf", "0", "1e308"],
        "batch": ["0", "-1", 10**9, 2**64],
        "threads": ["0", "-1", 10**9],
    },
    "demo --out o": {"prompts": ["0", "-3", 10**9], "seeds": ["0", 10**6, 2**64], "threads": ["0"]},
    "attack seeds --stack mini --concept skulls --out o": {
        "limit": ["0", 10**9],
        "repeat": ["0", 10**6],
        "steps": ["0", "1001"],
        "batch-size": ["0", 10**6],
        "seed": ["-1", 2**64],
        "threads": ["0"],
    },
    "patch extract-lora mini p --out o": {"rank": ["0", "-1", 10**6]},
    "patch from-lora mini p --out o": {"scale": ["nan", "inf", "1e38"]},
    "triplets make --unsafe u --judge mini --out o": {
        "threshold": ["nan", "-1", "2", "inf"],
        "tile": ["nan", "0", "-1", "2", "inf"],
        "padding": ["nan", "-1", "1e9", "inf"],
    },
    "triplets check d --judge mini": {"threshold": ["nan", "-1", "2"]},
    "score run": {"threshold": ["nan", "0.1", "2", "-inf"]},
    "report run": {"threshold": ["nan", "0.1", "2"]},
    "prompts show mini:skulls": {"limit": ["-1", "nan"]},
}
SCRIPT = """
import contextlib, io, json, sys
from safegen.cli import main

found = []
for words in json.loads(sys.argv[1]):
    sys.argv, err, code = ["safegen", *words], io.StringIO(), 0
    with contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = end.code
    found.append([words, code, err.getvalue(), "torch" in sys.modules])
print(json.dumps(found))
"""


def test_numbers_out_of_range_are_refused_before_torch_is_imported(tmp_path):
    cases = [
        [*command.split(), f"--{option}={value}"]
        for command, options in NUMBERS.items()
        for option, values in options.items()
        for value in values
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(cases)],
        capture_output=True,
        check=True,
        cwd=tmp_path,
    )
    found = json.loads(done.stdout)
    assert len(found) == len(cases) > 60
    for words, code, err, has_torch in found:
        option = words[-1].partition("=")[0]
        assert code == 2, (words, err)
        assert option.removeprefix("--") in err, (words, err)
        assert err.count("\n") == 1, (words, err)
        assert not has_torch, words
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["NaN", "Infinity", "1e999", "-1", "1e308"])
@pytest.mark.parametrize(
    "name", ["training.clip", "training.lr", "weight_mosaic", "training.batch"]
)
def test_settings_out_of_range_are_refused_before_the_model_is_loaded(
    safegen, tmp_path, name, value
):
    words = ["edit", tmp_path, "--triplets", "mini:skulls", "--out", tmp_path / "p.safetensors"]
    code, _, err = safegen(*words, "--set", f"{name}={value}")
    assert code == 2
    assert name in err
    assert err.count("\n") == 1
    assert "model" not in err.replace("safegen: ", "").split(name)[0]


WRITERS = {
    "edit": "edit no-model --method uce --concept skulls",
    "export": "export no-model",
    "folder": "export no-model --format diffusers",
    "generate": "generate no-model --prompt x",
    "merge": "patch merge no.safetensors",
    "rebase": "patch rebase no-model no-model no.safetensors",
    "extract": "patch extract-lora no-model no.safetensors",
    "from": "patch from-lora no-model no.safetensors",
    "triplets": "triplets make --unsafe no-folder --judge mini",
    "score": "score no-run",
}


@pytest.mark.parametrize("place", ["link", "link/o"])
@pytest.mark.parametrize("command", WRITERS)
def test_a_link_to_nothing_at_the_output_is_found_first(safegen, tmp_path, command, place):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    code, _, err = safegen(*WRITERS[command].split(), "--out", tmp_path / place)
    assert code == 2
    assert "already exists" in err or "is a link to nothing" in err
    assert err.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("command", ["demo --fast", "evaluate --protocol mini-smoke --stack mini"])
@pytest.mark.parametrize("place", ["link", "link/o"])
def test_a_run_at_a_link_to_nothing_is_refused(safegen, tmp_path, command, place):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    code, _, err = safegen(*command.split(), "--out", tmp_path / place)
    assert code == 2
    lines = [line for line in err.splitlines() if line.startswith("safegen: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == ["link"]


@pytest.mark.parametrize("length", [253, 255, 256, 5000])
@pytest.mark.parametrize("command", ["edit", "export", "merge", "from", "score"])
def test_a_long_name_is_refused_at_once_or_fits(safegen, tmp_path, monkeypatch, command, length):
    monkeypatch.chdir(tmp_path)
    code, _, err = safegen(*WRITERS[command].split(), "--out", "n" * length)
    fits = length <= (255 if command == "score" else 252)  # a model card ends in .md
    assert code == 2
    assert ("255 bytes" in err) is not fits
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["/", "."])
@pytest.mark.parametrize("command", ["edit", "export", "merge", "from"])
def test_an_output_without_a_name_is_refused_in_one_line(safegen, command, out):
    code, _, err = safegen(*WRITERS[command].split(), "--out", out)
    assert code == 2
    assert err.endswith("already exists. Choose another path or remove it.\n")
    assert err.count("\n") == 1


def test_a_card_of_a_folder_is_refused_in_one_line(safegen):
    code, _, err = safegen("patch", "card", "/")
    assert (code, err.count("\n")) == (2, 1)
    assert "must be a regular file, got a folder" in err


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("lamb=" + "[" * 5000, "nested too deeply"),
        ("lamb=" + "[" * 101 + "]" * 101, "nested too deeply"),
        ("lamb=" + "9" * 5000, "4300 digits"),
        ("lamb=1" + "0" * 400, "must be"),
        ("lamb=NaN", "finite numbers"),
        ('erase=["\\ud800"]', "surrogates not allowed"),
    ],
)
def test_a_value_that_is_no_plain_json_is_refused_in_one_line(safegen, tmp_path, value, says):
    code, _, err = safegen(
        *("edit", "mini", "--method", "uce", "--set", 'erase=["skull"]', "--set", value),
        *("--out", tmp_path / "o"),
    )
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert len(err) < 400


@pytest.mark.parametrize("value", ["[" * 5000, "9" * 5000, "1" + "0" * 400, '"\\ud800"'])
def test_an_option_of_a_judge_that_is_no_plain_json_is_refused(safegen, tmp_path, value):
    code, _, err = safegen(
        *("evaluate", "--protocol", "mini-smoke", "--stack", "mini", "--judge", "mini"),
        *("--judge-option", f"x={value}", "--out", tmp_path / "o"),
    )
    lines = [line for line in err.splitlines() if line.startswith("safegen: ")]
    assert (code, len(lines)) == (2, 1)
    assert len(err) < 1000
