"""The tree of our exceptions.

SafegenError
├── UserError          something the caller gave us is wrong; the CLI prints it as one line and
exits with 2 │   ├── UnknownNameError    no such model, edit, judge, concept, prompt list ... │   ├──
FileError        a file or folder is missing, corrupt, of the wrong kind, or in the way │   ├──
ConfigError     a value breaks its rule, or has no effect here │   ├── PatchError       a patch does
not fit the model │   └── MissingExtraError   an optional library is not installed ├── DivergedError
a loss or a weight became NaN or infinite └── Stopped            the user stopped a run that can be
resumed
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from difflib import get_close_matches


class SafegenError(Exception):
    """Anything this package raises on purpose."""


class UserError(SafegenError):
    """The caller can mend this: the message says what, the rule, the value and the way out."""


class UnknownNameError(UserError):
    """A name is not in its table."""

    def __init__(self, noun: str, name: str, known: Iterable[str]) -> None:
        """Word the message: the name, the nearest known one, all known ones."""
        names = sorted(known)
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        super().__init__(f"no {noun} named {name!r}.{hint} Known: {', '.join(names)}.")


class FileError(UserError):
    """A file or folder cannot be used."""


class ConfigError(UserError):
    """A setting breaks its rule or would be ignored."""


class PatchError(UserError):
    """A patch cannot be used: it does not fit the model, changes nothing, or has values that are not finite."""


class MissingExtraError(UserError):
    """An optional library is needed."""

    def __init__(self, need: str, library: str, extra: str) -> None:
        """Word the message so that it ends in the command that helps."""
        super().__init__(f'{need} needs {library}; install it with: pip install "safegen[{extra}]"')


class DivergedError(SafegenError):
    """A number that must be finite is not."""


class InterruptedRunError(SafegenError):
    """A run was stopped and left a state that `resume` continues from."""


class NoEffectWarning(UserWarning):
    """A setting, a concept or a guard has no effect here."""


def is_out_of_memory(error: BaseException | str) -> bool:
    """Return whether an error, or the words that are left of one, is a want of memory, as Python, or torch on any device, says it."""
    said = str(error).lower()
    words = (
        "memoryerror",
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "failed to allocate memory",
    )
    return isinstance(error, MemoryError) or any(word in said for word in words)


class UnusedSettingWarning(UserWarning):
    """A setting has no effect with the other settings."""


def warn_unused(settings: Iterable[tuple[str, str]]) -> None:
    """Warn of settings without effect, given by name and reason ("alpha", "without rank").

    Warns:
        UnusedSettingWarning: one for each setting.
    """
    for name, reason in settings:
        warnings.warn(f"{name} has no effect {reason}", UnusedSettingWarning, stacklevel=3)
