"""Commands that a reader of a report may want next, ready to paste."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from safegen.core.registry import CONCEPTS, MODELS

OTHER_THRESHOLD = 0.7
"""Threshold of the suggested report under another rule; 0.3 where the run's is as high."""
MINI_NOTE = "The miniature model knows 32 objects, such as a castle, a car, a tree and a whale."
PHRASE = re.compile(r"[\w ,.-]+ [\w ,.-]+")
"""Words with spaces that mean the same in double quotes in every shell."""


@dataclass(frozen=True)
class NextStep:
    """Command to run next."""

    title: str
    """What it does."""
    command: str
    note: str = ""
    """What to know beforehand."""


def next_steps(data: Mapping[str, Any]) -> list[NextStep]:
    """Return the commands that fit what the runs of a report are.

    Paths start in the folder that holds the runs.

    Args:
        data: data of the report.
    """
    names = {name: f"./{name}" if name.startswith("-") else name for name in data["runs"]}
    data = {**data, "runs": {names[name]: run for name, run in data["runs"].items()}}
    steps = [step for name in data["runs"] for step in _stack_steps(data, name)]
    return [*steps, *_run_steps(data)]


def _command(*words: str) -> str:
    """Return a command line; a word with spaces is quoted so that shells of Windows take it too."""
    quoted = [f'"{word}"' if PHRASE.fullmatch(word) else shlex.quote(word) for word in words]
    return " ".join(["safegen", *quoted])


def _stack_steps(data: Mapping[str, Any], name: str) -> Iterator[NextStep]:
    """Yield what to do with the measured stack of a run, if it is one model with patches alone."""
    run = data["runs"][name]
    given = [stack for stack in run["stacks"] if stack["kind"] == "given"]
    if len(given) != 1 or len(data["runs"]) > 1:
        return
    (stack,) = given
    patches = [patch["file"] for patch in stack["patches"]]
    if not patches or stack["guards"] or stack["loras"] or stack["embeddings"]:
        return
    is_inside = run["workflow"] == "demo"
    if is_inside:
        patches = [f"{name}/patches/{file}" for file in patches]
    options = [word for patch in patches for word in ("--patch", patch)]
    note = "" if is_inside else f"Put in the path of {' and '.join(patches)}."
    model, concept = stack["model"], data["protocol"]["concept"]
    if not data["attacks"]:
        words = ("generate", model, *options, "--prompt", _prompt(data), "--out", "pictures")
        known = MINI_NOTE if model in MODELS else ""
        say = " ".join(filter(None, (note, known)))
        yield NextStep("Draw your own prompts with the patch", _command(*words), say)
        words = ("export", model, *options, "--out", f"{stack['name']}-model.safetensors")
        yield NextStep("Export one file for a web UI", _command(*words), note)
    spec = f"{stack['name']}={model}+{'+'.join(patches)}"
    if data["attacks"] or concept not in CONCEPTS:
        return
    words = ("evaluate", model, "--stack", spec, "--prompts", "my.csv", "--concept", concept)
    say = "my.csv has one prompt a row, in a column named prompt."
    say = " ".join(filter(None, (note, say)))
    title = "Measure it on your own prompts, beside cheap baselines"
    yield NextStep(title, _command(*words, "--out", "evaluated"), say)
    words = ("attack", "ring_a_bell", "--stack", spec, "--concept", concept)
    words += ("--limit", "8", "--out", "attacked")
    yield NextStep("Try to bring the concept back", _command(*words), note)


def _run_steps(data: Mapping[str, Any]) -> Iterator[NextStep]:
    """Yield what to do with the runs themselves."""
    names = list(data["runs"])
    for name in names:
        yield NextStep("Check every hash, count and score", _command("verify", name))
    if data["attacks"]:
        title = "Measure the judge's errors: what a person sees in a sample of the images"
        note = "Fill in true or false, then give the file to `safegen score --truth`."
        command = _command("report", names[0], "--truth-sheet", "truth.csv")
        yield NextStep(title, command, note)
    if len(names) == 1 and not data["attacks"]:
        tables = ("--csv", "results.csv", "--latex", "results.tex", "--plots", "plots")
        yield NextStep("Write tables and plots for a paper", _command("report", *names, *tables))
    threshold = data["protocol"]["decides"]["judge"]["threshold"]
    other = OTHER_THRESHOLD if threshold < OTHER_THRESHOLD else 0.3
    words = ("report", *names, "--threshold", str(other), "--out", "report-other-threshold")
    note = "Nothing is drawn or judged again."
    yield NextStep("See whether the result depends on the threshold", _command(*words), note)


def _prompt(data: Mapping[str, Any]) -> str:
    """Return a prompt to try: the object of a harmless prompt with the concept."""
    return f"a castle covered in {data['protocol']['concept']}"
