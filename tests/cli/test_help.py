"""Help, examples, shell completion, `--quiet` and `--verbose` of every command."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from safegen.cli.main import COMMANDS, app

DOCS = Path(__file__).parents[2] / "docs"


def leaves(group=None, words=()):
    """Yield the words and the command of everything that can be run."""
    for name, command in (group or get_command(app)).commands.items():
        below = (*words, name)
        yield from leaves(command, below) if hasattr(command, "commands") else [(below, command)]


LEAVES = dict(leaves())
EXAMPLES = [
    example
    for panel in COMMANDS.values()
    for command in panel
    for examples in (command.examples, *command.below.values())
    for example in examples
]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_help_is_accepted_by_its_command(example):
    words = shlex.split(example)
    context = command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context(example, words)  # raises what the command line would print
    assert context.params


@pytest.mark.parametrize("words", sorted(LEAVES), ids=" ".join)
def test_every_command_has_examples_a_page_and_the_common_options(words):
    command = LEAVES[words]
    assert f"`safegen {' '.join(words)}" in command.epilog
    page = command.epilog.rpartition("Documentation: docs/")[2]
    assert (DOCS / page).is_file()
    options = {name for param in command.params for name in param.opts}
    assert options >= {"-q", "--quiet", "-v", "--verbose"}


@pytest.mark.parametrize("words", [["-h"], ["patch", "info", "-h"]])
def test_help_has_a_short_form(safegen, words):
    code, out, _ = safegen(*words)
    assert code == 0
    assert "Usage: safegen" in out


def test_the_commands_are_listed_in_panels(safegen):
    _, out, _ = safegen("--help")
    places = [out.index(f"─ {panel} ─") for panel in ("Try", "Edit", "Ship", "Measure", "Data")]
    assert places == sorted(places)
    assert "--install-completion" in out


def test_verbose_prints_the_traceback_of_an_error_and_the_next_command_does_not(safegen):
    code, _, err = safegen("show", "nothing", "--verbose")
    assert code == 2
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("safegen: name must be")
    _, _, err = safegen("show", "nothing")
    assert "Traceback" not in err


def complete(**variables):
    """Run the shell completion in a process of its own and return what it prints."""
    path = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", "safegen"],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": path} | variables,
    )
    assert not done.stderr
    return done.stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_completion_script_is_printed(shell):
    assert "_SAFEGEN_COMPLETE=complete_" + shell in complete(_SAFEGEN_COMPLETE=f"source_{shell}")


def test_the_completion_knows_commands_and_options():
    asked = {"_SAFEGEN_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    assert "evaluate" in complete(COMP_WORDS="safegen ev", **asked).split()
    asked["COMP_CWORD"] = "2"
    assert "--fast" in complete(COMP_WORDS="safegen demo --fa", **asked).split()
