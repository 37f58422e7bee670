"""Guards act during generation: on the prompt, its embeddings, guidance, latents or the image."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, UnknownNameError, UnusedSettingWarning, explain
from safegen.core.registry import GUARDS, resolve
from safegen.guards.core.base import GuardConfig
from safegen.guards.core.result import GeneratedImage, GuardRecord, GuardResult, GuardTrace

__all__ = [
    "GeneratedImage",
    "GuardConfig",
    "GuardRecord",
    "GuardResult",
    "GuardTrace",
    "make_guard",
    "read_guard",
]


def make_guard(
    name: str, preset: str = "default", *, concept: Concept | str | None = None, **settings: Any
) -> GuardConfig:
    """Return the settings of a guard: a preset, then the concept's defaults, then `settings`.

    Raises:
        UnknownNameError: no such guard, preset, concept or setting.
        ConfigError: a setting is invalid or missing.
    """
    kind: type[GuardConfig] = resolve(GUARDS, name, "guard")
    if preset != "default" and preset not in kind.PRESETS:
        raise UnknownNameError(f"preset of the guard {name!r}", preset, ("default", *kind.PRESETS))
    concept = load_concept(concept) if isinstance(concept, str) else concept
    defaults = kind.defaults_from(concept) if concept else {}
    if concept and not defaults.keys() - settings.keys():
        warnings.warn(
            f"the concept {concept.name!r} has no effect on the guard {name!r}",
            UnusedSettingWarning,
            stacklevel=2,
        )
    try:
        return kind.model_validate({**kind.PRESETS.get(preset, {}), **defaults, **settings})
    except ValidationError as error:
        hint = "" if concept else _concept_hint(kind, error)
        raise ConfigError(f"guard {name!r}: {explain(error, kind)}{hint}") from error


def read_guard(
    value: GuardConfig | str | Mapping[str, Any], concept: Concept | str | None = None
) -> GuardConfig:
    """Return the guard settings of a name (`sld`, `sld-max`) or a table (`name`, `preset`, ...).

    Args:
        value: name or table; settings are returned unchanged.
        concept: default concept of guards that use one and name none.

    Raises:
        UnknownNameError: no such guard, preset, concept or setting.
        ConfigError: a setting is invalid or missing.
    """
    if isinstance(value, GuardConfig):
        return value
    if isinstance(value, str):
        value = _split_name(value)
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"a guard must be a name, a table or settings, got {type(value).__name__}. "
            f"Known: {', '.join(sorted(GUARDS))}."
        )
    table = {"preset": "default", "concept": None, **value}
    name = table.pop("name", None)
    if not isinstance(name, str):
        known = ", ".join(sorted(GUARDS))
        raise ConfigError(f"a guard must have a name, got {dict(value)}. Known: {known}.")
    for key, kinds in (("preset", str), ("concept", str | Concept | None)):
        if not isinstance(table[key], kinds):
            raise ConfigError(f"guard {name!r}: {key} must be a name, got {table[key]!r}")
    if concept is not None and table["concept"] is None:
        concept = load_concept(concept) if isinstance(concept, str) else concept
        kind: type[GuardConfig] = resolve(GUARDS, name, "guard")
        if kind.defaults_from(concept).keys() - table.keys():
            table["concept"] = concept
    return make_guard(name, table.pop("preset"), concept=table.pop("concept"), **table)


def _concept_hint(kind: type[GuardConfig], error: ValidationError) -> str:
    """Return a hint if a concept would give a setting that is missing."""
    missing = {each["loc"][0] for each in error.errors() if each["type"] == "missing"}
    given = kind.defaults_from(load_concept("skulls")).keys()  # any concept gives the same
    return ". A concept gives it" if missing & given else ""


def _split_name(value: str) -> dict[str, str]:
    """Return the guard and the preset of a name such as `sld-max`."""
    names = [name for name in GUARDS if value == name or value.startswith(f"{name}-")]
    name = max(names, key=len, default=value)
    return {"name": name} if name == value else {"name": name, "preset": value[len(name) + 1 :]}
