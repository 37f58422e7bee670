"""Guards act while a picture is made: on the prompt, its embedding, guidance, the latents or the picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, UnknownNameError, explain
from safegen.core.registry import GUARDS, resolve
from safegen.guards.core.base import (
    GeneratedImage,
    GuardConfig,
    GuardRecord,
    GuardResult,
    GuardTrace,
)

__all__ = [
    "GeneratedImage",
    "GuardResult",
    "GuardConfig",
    "GuardRecord",
    "GuardTrace",
    "make_guard",
    "read_guard",
]


def make_guard(
    name: str, preset: str = "default", *, concept: Concept | str | None = None, **settings: Any
) -> GuardConfig:
    """Return a guard's settings: a preset, what a concept gives it (its words, its judge), some of it changed.

    Raises:
        UnknownNameError: no such guard, preset, concept or setting.
        ConfigError: a setting breaks its rule or is missing, or the concept has no effect.
    """
    kind: type[GuardConfig] = resolve(GUARDS, name, "guard")
    if preset != "default" and preset not in kind.PRESETS:
        raise UnknownNameError(f"preset of the guard {name!r}", preset, ("default", *kind.PRESETS))
    known = load_concept(concept) if isinstance(concept, str) else concept
    lent = kind.defaults_from(known) if known else {}
    if known and not lent.keys() - settings.keys():
        raise ConfigError(
            f"the concept {known.name!r} has no effect on the guard {name!r}; leave it out"
        )
    try:
        return kind.model_validate({**kind.PRESETS.get(preset, {}), **lent, **settings})
    except ValidationError as error:
        raise ConfigError(f"guard {name!r}: {explain(error, kind)}") from error


def read_guard(
    value: GuardConfig | str | Mapping[str, Any], concept: Concept | str | None = None
) -> GuardConfig:
    """Return the guard that a word (`sld`, `sld-max`) or a table (`name`, `preset`, `concept`, settings) means.

    Args:
        value: what was written; a guard is itself.
        concept: given to those guards that have a use for one and name none.

    Raises:
        UnknownNameError: no such guard, preset, concept or setting.
        ConfigError: a setting breaks its rule or is missing, or a concept has no effect.
    """
    if isinstance(value, GuardConfig):
        return value
    if isinstance(value, str):
        name = max(
            (n for n in GUARDS if value == n or value.startswith(n + "-")), key=len, default=value
        )
        value = {"name": name, "preset": "default" if value == name else value[len(name) + 1 :]}
    facts = {"preset": "default", "concept": None, **value}
    name = facts.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(
            f"a guard needs a name, got {dict(value)}; known: {', '.join(sorted(GUARDS))}"
        )
    for key, kinds in (("preset", str), ("concept", str | Concept | None)):
        if not isinstance(facts[key], kinds):
            raise ConfigError(f"guard {name!r}: {key} must be a name, got {facts[key]!r}")
    if concept is not None and facts["concept"] is None:
        known = load_concept(concept) if isinstance(concept, str) else concept
        facts["concept"] = (
            known
            if resolve(GUARDS, name, "guard").defaults_from(known).keys() - facts.keys()
            else None
        )
    return make_guard(name, facts.pop("preset"), concept=facts.pop("concept"), **facts)
