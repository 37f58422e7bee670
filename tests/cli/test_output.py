"""What the commands print cannot control the terminal, whatever a file holds."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import unicodedata

import pytest
from PIL import Image

HOSTILE = "\x1b]0;x\x07[red]a[/][/b]<script>x</script></details>|`\x9b31m\r\n# b\u202ec\u2028"
"""Terminal commands, rich markup, HTML, Markdown, line breaks and a direction override."""
MARKUP = "[red]a[/][/b]<script>x</script></details>|`"
"""The same without control characters, which names in metadata must not have."""


def assert_printable(text):
    """Check that text has no characters that control a terminal, except line feeds."""
    bad = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")}
    assert bad <= {"\n"}, (bad, text)


@pytest.fixture
def hostile_patch(tiny_model, tmp_path):
    """Return a function that writes a patch of the tiny model with hostile metadata."""
    import torch

    from safegen.models.checkpoint.metadata import ParentRef, PatchMetadata
    from safegen.patches.patch import Patch

    def write(name, add=0.0):
        own = dict(tiny_model.denoiser.named_parameters())
        key = next(iter(own))
        path = tmp_path / name
        settings = {"erase": [HOSTILE], HOSTILE: HOSTILE, "debias": {}}
        metadata = PatchMetadata(
            method=MARKUP,
            model=MARKUP,
            settings=settings,
            description=HOSTILE,
            parents=(ParentRef(method=MARKUP, hash="0" * 64),),
            **{HOSTILE: HOSTILE},
        )
        values = torch.full_like(own[key], 0.5 + add)
        Patch({key: values, MARKUP: values.clone()}, metadata).save(path)
        return path

    return write


def test_a_patch_header_does_not_reach_the_terminal_raw(safegen, hostile_patch, tmp_path):
    first, second = hostile_patch("a[red][/].safetensors"), hostile_patch("b\x1b.safetensors", 1)
    for words in (
        ["info", first],
        ["info", first, "--json"],
        ["diff", first, second],
        ["merge", first, second, "--out", tmp_path / "new.safetensors"],
        ["merge", first, second, "--overlap", "last", "--out", tmp_path / "\x1bnew.safetensors"],
        ["card", second],
        ["extract-lora", "mini", first, "--out", tmp_path / "l.safetensors"],
    ):
        _, out, err = safegen("patch", *words)
        assert_printable(out + err)
        assert out + err
    code, out, err = safegen("patch", "info", first)
    assert code == 0, err
    assert "method: [red]a[/][/b]<script>" in out
    assert r"description: \x1b]0;x" in out
    assert all(": " in line for line in out.splitlines())  # no line of its own


def test_an_error_with_a_hostile_name_is_one_printable_line(safegen, tmp_path):
    name = f"no{HOSTILE}.safetensors".replace("/", "_")
    for words in (
        ["patch", "info", name],
        ["generate", name, "--prompt", "x", "--out", tmp_path / "o"],
        ["generate", "mini", "--guard", name, "--prompt", "x", "--out", tmp_path / "o"],
        ["edit", "mini", "--method", name, "--out", tmp_path / "p"],
        ["edit", "mini", f"--set={name}=1", "--out", tmp_path / "p"],
        ["evaluate", "--protocol", name, "--stack", "mini", "--out", tmp_path / "o"],
        ["report", name],
        ["prompts", "show", name],
        ["triplets", "check", name],
        [name],
        ["generate", f"--{name}"],
        ["export", "mini", "--format", name, "--out", "x"],
    ):
        code, out, err = safegen(*words)
        assert code == 2, (words, err)
        assert_printable(out + err)
        assert err.startswith("safegen: ")
        assert err.count("\n") == 1, err


def test_prompt_files_and_triplets_do_not_reach_the_terminal_raw(safegen, tmp_path):
    rows = tmp_path / "rows\x1b[red][.jsonl"
    row = {"prompt": f"a castle {HOSTILE}", "id": HOSTILE, "categories": HOSTILE}
    rows.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "", "id": HOSTILE}) + "\n")
    code, out, err = safegen("prompts", "show", rows, "--reveal", "--column", "prompt")
    assert_printable(out + err)
    assert code == 0, err
    folder = tmp_path / "unsafe"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "\x1b[31m[red].png")
    (folder / "broken\x1b[red.png").write_bytes(b"no image")
    words = ["--unsafe", folder, "--judge", "mini", "--out", tmp_path / "out"]
    _, out, err = safegen("triplets", "make", *words)
    assert_printable(out + err)


def test_the_progress_bar_shows_markup_as_text(capsys):
    from safegen.cli.progress import show_progress

    with show_progress() as progress:
        progress(f"[red]judging[/] {HOSTILE}", 1, 1)
    text = capsys.readouterr().err
    assert_printable(text)
    assert "[red]judging[/]" in text


def test_a_warning_is_one_printable_line(safegen, monkeypatch, capsys):
    import warnings

    from safegen.cli.options import show_warnings
    from safegen.core.errors import SafegenWarning

    with warnings.catch_warnings():
        show_warnings()
        warnings.warn(HOSTILE, SafegenWarning, stacklevel=1)
    text = capsys.readouterr().err
    assert_printable(text)
    assert text.count("\n") == 1


def run(words, **options):
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "safegen", *words]
    return subprocess.run(command, capture_output=True, check=False, timeout=300, **options)


ASCII = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.parametrize("extra", [{}, {"PYTHONIOENCODING": "ascii:strict"}])
def test_a_locale_without_utf_8_replaces_characters(tmp_path, extra):
    import os

    (tmp_path / "p.txt").write_text("a café\n", encoding="utf-8")
    environment = os.environ | ASCII | extra
    words = ["prompts", "show", "p.txt", "--reveal"]
    done = run(words, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert b"a caf\\xe9" in done.stdout
    done = run(["--help"], env=environment)
    assert done.returncode == 0, done.stderr


def test_an_argument_that_cannot_be_decoded_is_one_line():
    done = run(["generate", "mini", "--prompt", b"caf\xe9", "--out", "x"])
    assert done.returncode == 2
    assert done.stderr.startswith(b"safegen: arguments must be text in the encoding utf-8, got ")
    assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize(
    ("redirect", "code"),
    [("| head -c 1", 141), (">&-", 0), ("2>&-", 0), (">&- 2>&- <&-", 0), (">/dev/full", 1)],
)
@pytest.mark.parametrize("words", ["prompts show mini:skulls --limit 1000", "--help"])
def test_a_closed_output_ends_without_a_traceback(tmp_path, words, redirect, code):
    line = f"{sys.executable} -m safegen {words} {redirect}; echo ${{PIPESTATUS[0]}}>code"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, check=False, timeout=300
    )
    status = int((tmp_path / "code").read_text())
    # rich ends with 1 when the reader of the help is gone; a short output may fit into the pipe
    assert status in ((code, 0, 1) if "head" in redirect else (code,))
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr
    assert done.stderr.count(b"\n") == (redirect == ">/dev/full")


def test_a_lack_of_memory_is_one_line(safegen, monkeypatch):
    import torch

    monkeypatch.setattr("safegen.models.loading.load", lambda *_, **__: torch.empty(2**50))
    code, _, err = safegen("export", "mini", "--out", "x.safetensors")
    assert code == 1
    assert err.startswith("safegen: memory does not suffice: ")
    assert err.count("\n") == 1


def test_every_command_prints_through_the_console():
    from pathlib import Path

    import safegen

    for path in Path(safegen.__file__).parent.rglob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        text = "\n".join(line for line in lines if not re.match(r"\s*(>>>|\.\.\.)", line))
        for call in (" print(", "sys.stdout.write(", "sys.stderr.write(", "typer.echo("):
            allowed = {" print(": "console.py", "typer.echo(": "__init__.py"}.get(call)
            assert call not in text or path.name == allowed, (path, call)
