"""Texts of the page: settings in words, without Python, and code in sentences."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup, escape

from safegen.core.text import one_line

UNSET = "not set"


def setting_text(value: Any) -> str:
    """Return the value of a setting as text: yes, no, a number, or names with commas between."""
    if value is None or value in ("", [], (), {}):
        return UNSET
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        return setting_line(value)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(setting_text, value))
    return str(value)


def setting_pairs(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return name and text of some settings; one pair at the end names those that are not set."""
    pairs = [(name, setting_text(value)) for name, value in settings.items()]
    unset = [name for name, text in pairs if text == UNSET]
    shown = [(name, text) for name, text in pairs if text != UNSET]
    return shown + ([(UNSET, ", ".join(unset))] if unset else [])


def setting_line(settings: Mapping[str, Any]) -> str:
    """Return some settings as one line: `name value; name (name value); not set: name`."""
    parts = []
    for name, text in setting_pairs(settings):
        if name == UNSET:
            parts.append(f"{UNSET}: {text}")
        else:
            nested = isinstance(settings[name], Mapping)
            parts.append(f"{name} ({text})" if nested else f"{name} {text}")
    return "; ".join(parts)


def code_spans(text: str) -> Markup:
    """Return an escaped sentence as HTML, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(one_line(text)))))  # noqa: S704
