"""Attack a stack: settings, checks and the run in one call."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safegen.attacks.core.base import Attack
from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, check_names, explain
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import ATTACKS, resolve
from safegen.evaluation.run.folder import Run
from safegen.stack import Stack, load_stack
from safegen.stack_loader import StackLoader


def attack(
    stack: Stack | str | Path,
    name: str = "ring_a_bell",
    *,
    concept: Concept | str | Path,
    out: str | Path,
    preset: str = "default",
    config: AttackConfig | Mapping[str, Any] | None = None,
    loader: StackLoader | None = None,
    progress: ProgressCallback = no_progress,
    **settings: Any,
) -> Run:
    """Attack a stack to bring a concept back, and return the run with the rates before and after.

    The same call resumes an interrupted run.

    Args:
        stack: a `Stack`, a built-in model, a recipe, or `NAME=model+patch.safetensors`.
        name: name of the attack, such as `ring_a_bell` or `unlearn_diff`.
        concept: a name, a TOML file or a `Concept`: it gives the judge and the prompts.
        out: directory of the run, new or of an earlier call.
        preset: settings to start from; `paper` is the published run.
        config: prompts, limits and generation: an `AttackConfig`, or its settings by name.
        loader: loads the stack; on the accelerator or the CPU if not given.
        progress: called with (stage, done, total).
        **settings: settings of the attack to change.

    Returns:
        The run. Its folder has the found prompts, the scores and the report.

    Raises:
        UserError: an argument cannot be used.

    Example:
        >>> few = {"limit": 1, "generation": {"num_inference_steps": 4}}
        >>> run = safegen.attack("mini", "seeds", concept="skulls", config=few, out="run")
    """
    arguments = [*resolve(ATTACKS, name, "attack").model_fields, *signature(attack).parameters]
    check_names(f"setting of {name!r}", settings, arguments)
    stack = stack if isinstance(stack, Stack) else load_stack(stack)
    concept = concept if isinstance(concept, Concept) else load_concept(str(concept))
    return run_attack(
        make_attack(name, preset, **settings),
        stack,
        concept,
        _read_config(config),
        Path(out),
        loader=loader,
        progress=progress,
    )


def _read_config(config: AttackConfig | Mapping[str, Any] | None) -> AttackConfig:
    try:
        return AttackConfig.model_validate(config or {})
    except ValidationError as error:
        raise ConfigError(f"config: {explain(error, AttackConfig)}") from error


def make_attack(name: str, preset: str = "default", **settings: Any) -> Attack:
    """Return the settings of an attack: a preset, and changes.

    Raises:
        UnknownNameError: no such attack or preset.
        ConfigError: a setting is unknown or breaks its rule.
    """
    attack_class: type[Attack] = resolve(ATTACKS, name, "attack")
    try:
        return attack_class.preset(preset, **settings)
    except ValidationError as error:
        raise ConfigError(explain(error, attack_class)) from error
