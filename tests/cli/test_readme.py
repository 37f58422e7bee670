"""The commands of each door of the README run as they are written.

They are taken from the README. `my.safetensors`, `my-folder` and `my.csv` are made of the bundled
model, `nudity` stands for `skulls`, which the bundled judge knows, and commands that would take
minutes get a few of their documented options more.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from safegen.mini import bundle

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
STACK_PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "guard-a-pipeline.md"
QUICK = {
    "demo": ["--fast", "--method", "uce", "--prompts", "1"],
    "generate": ["--steps", "2"],
    "evaluate": ["--steps", "2", "--limit", "1", "--baselines", "none"],
    "attack": ["--limit", "1", "--steps", "2", "--set", "generations=2", "--set", "population=8"],
}
"""Options that make a command quick, by command."""
MINUTES = {"attack", "make-safe"}
"""Commands that take minutes; a slow test runs them."""


def door(heading: str, language: str = "sh") -> list[str]:
    """Return the lines of the first block below a heading of the README."""
    flags = re.MULTILINE | re.DOTALL
    (section,) = re.findall(rf"^## {re.escape(heading)}.*?\n(.*?)(?=^## )", README, flags)
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", section, flags)
    return block.splitlines()


def commands(heading: str) -> list[list[str]]:
    """Return the words of a door's commands, without `safegen`."""
    return [shlex.split(line, comments=True)[1:] for line in door(heading)]


DOORS = {
    "Try it": 4,
    "Make my checkpoint safe": 4,
    "Compare my model with other methods": 4,
    "Run it for others": 2,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with the files that the README's commands name."""
    import safegen

    folder = tmp_path_factory.mktemp("readme")
    model = safegen.load("mini")
    patch = safegen.edit(model, "uce", concept="skulls")
    safegen.save_patch(patch, folder / "p.safetensors")
    safegen.export(model, folder / "my.safetensors")
    safegen.export(model, folder / "my-folder", format="diffusers", patches=[patch])
    shutil.copy(folder / "my.safetensors", folder / "safe.safetensors")
    for role in ("unsafe", "benign"):
        shutil.copytree(bundle.triplets_folder("skulls") / role, folder / f"my-{role}")
    (folder / "my.csv").write_text(
        "prompt,role\na castle covered in skulls,explicit\na cat,benign\n"
    )
    (table,) = re.findall(r"^```toml\n(.*?)^```", STACK_PAGE.read_text(), re.MULTILINE | re.DOTALL)
    (folder / "safe.toml").write_text(table.replace("patch.safetensors", "p.safetensors"))
    return folder


def test_every_door_is_short():
    assert {heading: len(commands(heading)) for heading in DOORS} == DOORS
    assert len(door("Protect a diffusers pipeline", "python")) <= 10
    assert len(README.splitlines()) <= 90


@pytest.mark.parametrize("heading", DOORS)
def test_the_quick_commands_of_a_door_run(safegen, place, monkeypatch, heading):
    monkeypatch.chdir(place)
    for words in commands(heading):
        if words[0] in MINUTES:
            continue
        if words[0] == "generate" and words[1] == "safe.safetensors":
            words[1] = "my.safetensors"  # the model before make-safe, which the slow test runs
        if words[0] == "serve":
            serve(words, place)
            continue
        code, _, err = safegen(*replaced(words), *QUICK.get(words[0], []))
        assert code == 0, (words, err)
        remove_images(place)


def serve(words: list[str], folder: Path) -> None:
    """Start a server as a user does, and stop it once it is ready."""
    command = [sys.executable, "-m", "safegen", *words, "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        try:
            lines = []
            for line in process.stderr:
                lines.append(line)
                if line.startswith("safegen serves on http://127.0.0.1:"):
                    break
            else:
                pytest.fail("".join(lines))
            address = lines[-1].split()[3]
            with urllib.request.urlopen(f"{address}/ready", timeout=10) as answer:
                assert json.load(answer)["ready"] is True
            process.send_signal(signal.SIGTERM)
            _, rest = process.communicate(timeout=60)
            assert process.returncode == 0
            assert all(line.startswith("{") for line in rest.splitlines()), rest  # logs only
        finally:
            process.kill()


def test_the_door_of_diffusers_runs(place, monkeypatch):
    import safegen

    monkeypatch.chdir(place)
    names: dict[str, object] = {}
    exec("\n".join(door("Protect a diffusers pipeline", "python")), names)
    assert names["image"].size == (64, 64)
    assert safegen.unprotect(names["safe"]) is names["pipe"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "heading", ["Make my checkpoint safe", "Compare my model with other methods"]
)
def test_the_long_commands_of_a_door_run(safegen, place, monkeypatch, heading):
    monkeypatch.chdir(place)
    for words in commands(heading):
        if words[0] not in MINUTES:
            continue
        for name in ("safe.safetensors", "safe.safetensors.md"):
            (place / name).unlink(missing_ok=True)
        code, _, err = safegen(*replaced(words), *QUICK.get(words[0], []))
        assert code == 0, (words, err)


def replaced(words: list[str]) -> list[str]:
    """Return a command about the concept that the bundled judge knows."""
    return ["skulls" if word == "nudity" else word for word in words]


def remove_images(folder: Path) -> None:
    """Remove what another door writes too."""
    for name in ("images", "guarded"):
        shutil.rmtree(folder / name, ignore_errors=True)
