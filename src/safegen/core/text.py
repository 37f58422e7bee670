"""Texts in one line: control characters as escapes, long values cut."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"
"""Format characters that only join letters and emoji."""
MAX_REPR = 200
"""Most characters of an object's `repr`."""
MAX_VALUE = 60
"""Most characters of one value in it."""


def escape_control(text: str) -> str:
    r"""Return text with control, direction, line-break and undecodable characters as escapes.

    An escape is written as in Python source: ESC becomes `\x1b`, a line feed `\n`.
    """
    if not has_control(text):
        return text
    return "".join(repr(char)[1:-1] if is_control(char) else char for char in text)


def one_line(text: str) -> str:
    """Return text as one printable line, each run of white space as one space."""
    return escape_control(" ".join(text.split()))


def has_control(text: str) -> bool:
    """Return whether text has a character that `escape_control` would escape."""
    return not (text.isascii() and text.isprintable()) and any(map(is_control, text))


def is_control(char: str) -> bool:
    """Return whether a character is Cc, Cf, Cs, Zl or Zp in Unicode; joiners are not."""
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") and char not in JOINERS


def cut_text(text: str, limit: int = MAX_REPR) -> str:
    """Return text with at most `limit` characters; what is cut off the middle becomes `...`."""
    if len(text) <= limit:
        return text
    end = min(20, limit // 4)
    return f"{text[: limit - end - 3]}...{text[-end:]}"


def short_repr(kind: type, *parts: str, **values: object) -> str:
    """Return the `repr` of an object in one short line: `Kind(part, name=value)`.

    Args:
        kind: its class.
        parts: texts that stand as they are.
        values: values that stand with their name; those that are None are left out.
    """
    named = [f"{k}={cut_text(repr(v), MAX_VALUE)}" for k, v in values.items() if v is not None]
    return cut_text(one_line(f"{kind.__name__}({', '.join([*parts, *named])})"))
