"""Errors and warnings of the package, and the one-line text of a pydantic error.

SafegenError
├── UserError               wrong input; the CLI prints one line and exits with 2
│   ├── UnknownNameError    no such model, edit, judge, concept, prompt list ...
│   ├── FileError           a file or folder is missing, damaged, of the wrong kind, or in the way
│   ├── ConfigError         a setting breaks its rule
│   ├── PatchError          a patch does not fit the model
│   └── MissingExtraError   an optional library is not installed
├── DivergedError           a loss or a weight became NaN or infinite
└── InterruptedRunError     the user stopped a run that can be resumed

SafegenWarning              the CLI prints each message once, in one line
└── UnusedSettingWarning    a setting has no effect
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

P = ParamSpec("P")
T = TypeVar("T")

UNION_PARTS = ("tuple[", "list[", "dict[", "literal[")
"""Starts of the names that pydantic gives to the members of a union in the path of an error."""


class SafegenError(Exception):
    """Base class of every error that this package raises on purpose.

    Example:
        >>> try:
        ...     model = safegen.load("minni")
        ... except safegen.SafegenError as error:
        ...     print(error)
        no model (nor a folder of that name) named 'minni'. Did you mean 'mini'? Known: mini.
    """


class UserError(SafegenError):
    """Wrong input. The message names the setting, its rule, the value, and the way out."""


class UnknownNameError(UserError):
    """Name that is not in its table."""

    def __init__(self, noun: str, name: str, known: Iterable[str], more: str = "") -> None:
        """Build a message with the nearest known name, all known names and a way out."""
        names = sorted(known)
        near = nearest_name(name, names)
        hint = f" Did you mean {near!r}?" if near else ""
        listing = f" Known: {', '.join(names)}." if names else ""
        way_out = f" {more}" if more else ""
        super().__init__(f"no {noun} named {name!r}.{hint}{listing}{way_out}")


def nearest_name(name: str, known: Sequence[str]) -> str | None:
    """Return the known name that is most like a name, or has such a word; None if there is none."""
    words = {word: other for other in known for word in re.split("[_.-]", other) if len(word) > 3}
    near = get_close_matches(name, known, n=1) or [
        words[word] for word in get_close_matches(name, words, n=1, cutoff=0.8)
    ]
    return near[0] if near else None


class FileError(UserError):
    """File or folder that cannot be used."""


class ConfigError(UserError):
    """Setting that breaks its rule."""


class PatchError(UserError):
    """Patch that does not fit the model, changes nothing, or has values that are not finite."""


class MissingExtraError(UserError):
    """Optional library that is not installed."""

    def __init__(self, need: str, library: str, extra: str) -> None:
        """Build a message that ends with the pip command."""
        super().__init__(f'{need} needs {library}; install it with: pip install "safegen[{extra}]"')


class DivergedError(SafegenError):
    """Loss or weight that became NaN or infinite."""

    is_resumable = False
    """Whether the checkpoint stays, as a resumed run may go on."""


class InterruptedRunError(SafegenError):
    """Run that was stopped and left a checkpoint to resume from."""


class SafegenWarning(UserWarning):
    """Base class of every warning of this package.

    Example:
        >>> import warnings
        >>> warnings.simplefilter("error", safegen.SafegenWarning)
    """


class UnusedSettingWarning(SafegenWarning):
    """Setting, concept or guard that has no effect."""


def check_names(noun: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Check that all names are known.

    Raises:
        UnknownNameError: one is not; the message has the nearest known name and all of them.
    """
    table = list(known)
    for name in names:
        if name not in table:
            raise UnknownNameError(noun, name, table)


def check_keywords(function: Callable[P, T]) -> Callable[P, T]:
    """Return a function that answers an unknown keyword with the nearest name.

    Raises:
        UnknownNameError: the call has a keyword that the function does not take.
    """
    parameters = signature(function).parameters

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        check_names(f"argument of {function.__name__}", kwargs, parameters)
        return function(*args, **kwargs)

    return checked


def explain(error: ValidationError, settings: type[BaseModel] | None = None) -> str:
    """Return a pydantic error as one line: path, rule and value of each setting that is wrong.

    Args:
        error: the validation error.
        settings: class that was validated; an unknown setting is answered with its nearest name.
    """
    return "; ".join(dict.fromkeys(_explanations(error, settings)))


def _explanations(error: ValidationError, settings: type[BaseModel] | None) -> Iterator[str]:
    for detail in error.errors(include_url=False):
        parts = map(str, detail["loc"])
        path = ".".join(part for part in parts if not part.startswith(UNION_PARTS))
        message, kind = detail["msg"].removeprefix("Value error, "), detail["type"]
        _, should, rule = message.partition(" should ")
        if kind == "extra_forbidden":
            group = path.rpartition(".")[0]
            names = [n for n in setting_names(settings) if n.rpartition(".")[0] == group]
            yield str(UnknownNameError("setting", path, names))
        elif kind == "missing":
            yield f"{path} is required"
        elif kind == "union_tag_invalid":
            given, names = (detail["ctx"][key] for key in ("tag", "expected_tags"))
            yield f"{path} must be one of {names}, got {given!r}"
        elif kind == "value_error" or not should:
            yield f"{path}: {message}" if path else message
        else:
            value = repr(detail["input"])
            value = value if len(value) <= 100 else f"{value[:97]}..."
            if kind == "tuple_type":
                rule = "be a list"
            yield f"{path or 'value'} must {rule}, got {value}"


def setting_names(settings: type[BaseModel] | None, prefix: str = "") -> Iterator[str]:
    """Yield the name of every setting of a class, nested ones with dots."""
    for name, field in settings.model_fields.items() if settings else ():
        yield prefix + name
        kind = field.annotation
        if isinstance(kind, type) and hasattr(kind, "model_fields"):
            yield from setting_names(kind, f"{prefix}{name}.")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, cut to 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def is_out_of_memory(error: BaseException | str) -> bool:
    """Return whether an error or its text means that memory ran out, in Python or torch."""
    text = str(error).lower()
    signs = (
        "memoryerror",
        "out of memory",
        "not enough memory",
        "can't allocate memory",
        "cannot allocate memory",
        "bad_alloc",
        "status_alloc_failed",
        "storage size calculation overflowed",
        "failed to allocate memory",
    )
    return isinstance(error, MemoryError) or any(sign in text for sign in signs)
