"""Equations and extras that a method's source names, read without importing it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from typing import Any

from safegen.cli.info.source import (
    PACKAGE,
    ClassSource,
    find_definition,
    is_name,
    module_path,
    parse_module,
)

CITATION = re.compile(r"arXiv:\d{4}\.\d{5}|(?:\beqs?\.|\bequations?) \d")
"""Start of a reference to a paper or to an equation."""


def references_of(kind: ClassSource) -> dict[str, str]:
    """Return the equations of a method: the functions that it uses and that cite a source.

    Returns:
        Citation by place, which is `file.py:function`.
    """
    found: dict[str, str] = {}
    for module, function in _functions(kind.module, kind.node, set()):
        text = " ".join((ast.get_docstring(function) or "").split())
        if CITATION.search(text):
            place = module_path(module).relative_to(PACKAGE.parent).as_posix()
            found[f"{place}:{function.name}"] = _citation(text)
    return found


def _functions(module: str, node: ast.AST, seen: set[str]) -> Iterator[tuple[str, Any]]:
    """Yield the functions of the method's room that a statement uses, directly or not."""
    room = ".".join(module.split(".")[:2])
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
            found = find_definition(_module_of(module, part.value.id), part.attr)
        elif isinstance(part, ast.Name):
            found = find_definition(module, part.id)
        else:
            continue
        if found is None or not found[0].startswith(room):
            continue
        place, target = found
        key = f"{place}:{getattr(target, 'name', '')}"
        if key in seen or not isinstance(target, ast.FunctionDef | ast.ClassDef):
            continue
        if isinstance(target, ast.ClassDef) and place != module:
            continue  # its own methods cite what they use
        seen.add(key)
        if isinstance(target, ast.FunctionDef):
            yield place, target
        if place == module:
            yield from _functions(module, target, seen)


def _module_of(module: str, name: str) -> str:
    """Return the module that a name stands for in another module, or an empty text."""
    for node in parse_module(module).body:
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return f"{node.module}.{alias.name}"
    return ""


def extras_of(kind: ClassSource) -> list[str]:
    """Return the extras of this package that a class's module names."""
    found: dict[str, None] = {}
    for node in ast.walk(parse_module(kind.module)):
        if isinstance(node, ast.keyword) and node.arg == "extra":
            if isinstance(node.value, ast.Constant) and node.value.value != "forbid":
                found[str(node.value.value)] = None
        elif isinstance(node, ast.Call) and is_name(node.func, "MissingExtraError"):
            *_, last = [None, *node.args]
            if isinstance(last, ast.Constant) and isinstance(last.value, str):
                found[last.value] = None
    return list(found)


def _citation(text: str) -> str:
    """Return the part of a docstring that names the equation, or its first sentence."""
    for part in re.findall(r"\(([^()]*)\)", text):
        if CITATION.search(part):
            return str(part)
    return text.split(". ", maxsplit=1)[0].rstrip(".")
