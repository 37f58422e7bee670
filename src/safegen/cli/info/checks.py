"""Checks of the names and files that a command is given, before it imports torch.

A mistyped name costs milliseconds this way, and seconds once the command imports its libraries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from safegen.cli.info.source import read_class
from safegen.core import registry
from safegen.core.concept import load_concept
from safegen.core.device import resolve_dtype
from safegen.core.errors import FileError, UnknownNameError
from safegen.core.files import check_output, exists
from safegen.core.hub import HUB, check_model_name

P = ParamSpec("P")
T = TypeVar("T")


def with_checks(command: Callable[P, T]) -> Callable[P, T]:
    """Return a command that checks its arguments first, by the names of its parameters."""

    @wraps(command)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        if command.__name__ not in RESUMABLE:
            check_new_output(kwargs)
        check_arguments(kwargs)
        return command(*args, **kwargs)

    return checked


RESUMABLE = ("attack", "card_", "demo", "evaluate", "make_safe", "report")
"""Commands that resume an output, or write it again."""


def check_new_output(arguments: Mapping[str, Any]) -> None:
    """Check that the output of a command, and its model card, can be written.

    Raises:
        FileError: see `check_output`.
    """
    out = arguments.get("out")
    if out is None:
        return
    check_output(out)
    is_file = str(arguments.get("format_")) != "diffusers"
    if arguments.get("no_card") is False and is_file and out.name:
        check_output(out.with_name(out.name + ".md"))


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Check the names and files among the arguments of a command; others are not looked at.

    Args:
        arguments: values by parameter. None is an option that is not given.

    Raises:
        UserError: there is no such name or file.
    """
    for name, check in CHECKS.items():
        for value in _as_list(arguments.get(name)):
            check(value)
    if (preset := arguments.get("preset")) is not None:
        if (method := arguments.get("method")) is not None:
            _check_preset(registry.EDITS, method, preset, "")
        elif (attack := arguments.get("name")) in registry.ATTACKS:
            _check_preset(registry.ATTACKS, str(attack), preset, "")


def _as_list(value: Any) -> Iterable[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)


def _check_model(name: Any) -> None:
    source, _, part = str(name).partition(":")
    is_mix_up = part and source in registry.TRIPLETS  # triplets, which the command explains
    if "=" not in str(name) and not is_mix_up:  # NAME=MODEL, which the command reads
        check_model_name(str(name))


def _check_method(name: str) -> None:
    if name not in registry.EDITS:
        raise UnknownNameError("edit", name, registry.EDITS)


def _check_judge(name: str) -> None:
    if name.partition(":")[0] not in registry.JUDGES:  # an id has the name before the colon
        raise UnknownNameError("judge", name, registry.JUDGES)


def _check_guard(name: str) -> None:
    guards = [g for g in registry.GUARDS if name == g or name.startswith(f"{g}-")]
    if not guards:
        raise UnknownNameError("guard", name, registry.GUARDS)
    guard = max(guards, key=len)
    if name != guard:
        of_guard = f" of the guard {guard!r}"
        _check_preset(registry.GUARDS, guard, name.removeprefix(f"{guard}-"), of_guard)


def _check_preset(table: Mapping[str, str], method: str, preset: str, of_guard: str) -> None:
    """Raise if a method has no such preset; guards have `default` besides those they list."""
    listed = read_class(table[method]).variable("PRESETS") or {}
    known = ("default", *listed) if of_guard else tuple(listed)
    if preset not in known:
        raise UnknownNameError(f"preset{of_guard or f' of {method}'}", preset, known)


def _check_concept(name: str) -> None:
    load_concept(str(name))


def _check_protocol(name: str) -> None:
    from safegen.evaluation.protocol_file import read_protocol

    read_protocol(name)


def _check_stack(spec: Any) -> None:
    from safegen.stack import load_stack

    stack = load_stack(spec)
    check_model_name(stack.model)
    for patch in stack.patches:
        _check_file(patch)


def _check_file(path: Any) -> None:
    # a model in the place of a file is a mix-up that the command explains
    if str(path) not in registry.MODELS and not exists(path):
        raise FileError(f"{str(path)!r} does not exist")


def _check_data(path: Any) -> None:
    """Raise if triplets are neither a path nor bundled, as `source:concept`."""
    source, _, part = str(path).partition(":")
    if not (part and source in registry.TRIPLETS) and not str(path).startswith(HUB):
        _check_file(path)


CHECKS: Mapping[str, Callable[[Any], object]] = {
    "model": _check_model,
    "base": _check_model,
    "method": _check_method,
    "concept": _check_concept,
    "protocol": _check_protocol,
    "judge": _check_judge,
    "guard": _check_guard,
    "stack": _check_stack,
    "dtype": resolve_dtype,
    "patch": _check_file,
    "patches": _check_file,
    "first": _check_file,
    "second": _check_file,
    "from_": _check_file,
    "triplets": _check_data,
}
"""Check of a value, by the parameter that every command has for it, in this order."""
