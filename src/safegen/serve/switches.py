"""Switches by which clients of other servers turn guards off. Here they are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from safegen.core.errors import ConfigError
from safegen.core.text import cut_text

GUARD_SWITCHES = frozenset(
    {
        "guardrails",
        "use_guardrails",
        "enable_guardrails",
        "guards",
        "safety_checker",
        "use_safety_checker",
        "enable_safety_checker",
        "enable_safety_check",
        "enable_safety_checks",
        "enable_safety",
        "requires_safety_checker",
        "safety_check",
        "safety",
        "safe",
        "safe_mode",
        "filter_nsfw",
        "nsfw_filter",
        "nsfw_check",
        "nsfw_checker",
        "content_filter",
    }
)
"""Fields that turn a guard on or off: vLLM-Omni, SGLang, diffusers, fal, web UIs ..."""
BYPASS_SWITCHES = frozenset(
    {
        "disable_guardrails",
        "disable_safety",
        "disable_safety_check",
        "disable_safety_checks",
        "disable_safety_checker",
        "disable_nsfw_filter",
        "no_safety_checker",
        "skip_safety_check",
        "skip_safety_checker",
        "bypass_safety",
        "allow_nsfw",
    }
)
"""Fields that turn a guard off if they are true."""
OFF = frozenset({"false", "off", "no", "none", "disable", "disabled", "0", "[]", "{}"})
"""Texts that mean false."""
MAX_PATH = 80
"""Most characters of the path of a field in an error."""
MAX_DEPTH = 8
"""Deepest objects of a request in which switches are looked for."""


def check_switches(fields: Mapping[str, Any]) -> None:
    """Check that no field of a request asks to turn a guard off, in objects inside it too.

    Nothing obeys these fields. Refusing them tells the client so.

    Raises:
        ConfigError: one does.
    """
    for path, value in _values(fields):
        name = path.rpartition(".")[2].lower().replace("-", "_")
        shown = cut_text(path, MAX_PATH)
        if name in GUARD_SWITCHES and value is not None and _is_off(value):
            raise ConfigError(
                f"{shown} must not turn a guard off, got {value!r}. Only the operator of "
                "the server chooses its guards. Leave it out."
            )
        if name in BYPASS_SWITCHES and value is not None and not _is_off(value):
            raise ConfigError(
                f"{shown} must not turn a guard off, got {str(value)[:40]!r}. Only the operator of "
                "the server chooses its guards. Leave it out."
            )


def _is_off(value: object) -> bool:
    """Return whether a value means false."""
    return not value or (isinstance(value, str) and value.strip().lower() in OFF)


def _values(fields: Mapping[str, Any], prefix: str = "", depth: int = 0) -> Iterator[Any]:
    """Yield the path and the value of each field, those of objects too."""
    for name, value in fields.items():
        path = f"{prefix}{name}"
        yield path, value
        if isinstance(value, Mapping) and depth < MAX_DEPTH:
            yield from _values(value, f"{path}.", depth + 1)
