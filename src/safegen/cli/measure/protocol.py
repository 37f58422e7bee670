"""Protocols on the command line: read with the user's files, and printed before a run."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from safegen.cli.console import echo, echo_status, plural
from safegen.core.errors import ConfigError

if TYPE_CHECKING:
    from safegen.evaluation.protocol import Protocol

MAX_LINES = 20
"""Unusable prompts that are printed one by one; protocol.json of the run lists all."""


class Precision(StrEnum):
    """Arithmetic of the denoiser."""

    fp32 = "fp32"
    bf16 = "bf16"


def load_rules(name: str | None, prompts: list[str], precision: Precision | None) -> Protocol:
    """Return the protocol that the options name, with the user's files of prompts."""
    from safegen.evaluation.protocol_file import load_protocol

    if name is None:
        raise ConfigError("no protocol is given. Use --protocol.")
    files = {}
    for pair in prompts:
        part, _, file = pair.partition("=")
        if not (part and file):
            raise ConfigError(f"--prompts must be NAME=FILE, got {pair!r}")
        files[part] = file
    protocol = load_protocol(name, prompts=files)
    return protocol.with_precision(precision.value) if precision else protocol


def print_protocol(protocol: Protocol, device: str) -> None:
    """Print the protocol of a run to stderr: its ID, its lists, and notes on its prompts."""
    config, seeds = protocol.generation, protocol.seeds
    count = (
        "the rows' seeds"
        if seeds == "rows"
        else f"{len(seeds)} seeds"
        if len(seeds) > 1
        else "1 seed"
    )
    echo_status(
        f"protocol {protocol.name} ({protocol.id}): {count}, {config.num_inference_steps} steps, "
        f"guidance {config.guidance_scale:g}, {config.precision}, judge {protocol.judge.name}"
    )
    for part in protocol.lists:
        echo_status(f"  {part.role}: {part.name}, {plural(part.prompts or 0, 'prompt')}")
    print_notes(protocol, device)


def print_notes(protocol: Protocol, device: str) -> None:
    """Print which prompts cannot be used, and whether the run will be slow."""
    from safegen.core.device import resolve_device
    from safegen.core.generation import preferred_precision

    for part in protocol.lists:
        lines = [f"left out of {part.name}: {line}" for line in part.left_out[:MAX_LINES]]
        if len(part.left_out) > MAX_LINES:
            rest = len(part.left_out) - MAX_LINES
            lines.append(f"left out of {part.name}: {rest} more, listed in protocol.json")
        for line in [*(f"note on {part.name}: {note}" for note in part.notes), *lines]:
            echo(line, err=True)
    if protocol.generation.precision == "bf16" and preferred_precision(device) != "bf16":
        echo(
            f"note: {protocol.name} generates in bf16, which this {resolve_device(device)} "
            "emulates slowly. --precision fp32 is faster and has another protocol ID.",
            err=True,
        )
