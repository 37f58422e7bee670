"""Escape characters that would control a terminal or reorder a line."""

from __future__ import annotations

import unicodedata

JOINERS = "\u200c\u200d"
"""Format characters that only join letters and emoji."""


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
