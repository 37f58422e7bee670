"""Facts about a method's class, read from its source without importing it.

An import of a method costs seconds of torch and diffusers; parsing its file costs milliseconds.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import safegen

PACKAGE = Path(safegen.__file__).parent
EMPTY: dict[str, Any] = {"dict": {}, "list": [], "tuple": ()}
"""Values of the factories that make empty collections."""
BOUNDS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<=", "min_length": "length >="}
MAX_ALIASES = 20
"""Most imports that are followed to where a name is defined."""


class Code(str):
    """Python source of a value that is no literal."""

    __slots__ = ()


@dataclass(frozen=True)
class FieldSource:
    """Setting of a class."""

    name: str
    type: str
    """Annotation and bounds."""
    is_required: bool
    default: Any
    """Literal value, or `Code`."""
    description: str
    nested: str
    """Class of a default that has settings of its own, as module:class; else empty."""

    def arguments(self) -> dict[str, Any]:
        """Return the settings that the call in a nested default changes."""
        if not self.nested:
            return {}
        call = ast.parse(str(self.default), mode="eval").body
        given = call.keywords if isinstance(call, ast.Call) else []
        module = self.nested.partition(":")[0]
        return {one.arg: value_of(one.value, module) for one in given if one.arg}


@dataclass(frozen=True)
class ClassSource:
    """Class in a module of this package, with what it inherits."""

    module: str
    name: str
    parents: tuple[ClassSource, ...]
    node: ast.ClassDef

    @property
    def path(self) -> str:
        """Path of the file, from the folder that holds the package."""
        return module_path(self.module).relative_to(PACKAGE.parent).as_posix()

    @property
    def lineage(self) -> tuple[ClassSource, ...]:
        """The class and its ancestors, the nearest first."""
        return (self, *(one for parent in self.parents for one in parent.lineage))

    def description(self) -> str:
        """Return the class's docstring, or the module's if the first only says "Settings of"."""
        own = ast.get_docstring(self.node) or ""
        module = ast.get_docstring(parse_module(self.module)) or ""
        return module if own.startswith("Settings of") or not own else own

    def variable(self, name: str) -> Any:
        """Return the value of a class variable, or None if there is none."""
        for kind in self.lineage:
            for node in kind.node.body:
                if (
                    isinstance(node, ast.AnnAssign)
                    and is_name(node.target, name)
                    and node.value is not None
                ):
                    return value_of(node.value, kind.module)
        return None

    def fields(self) -> dict[str, FieldSource]:
        """Return the settings by name, those of the class itself first."""
        found: dict[str, FieldSource] = {}
        for kind in self.lineage:
            for field in kind._own_fields():
                found.setdefault(field.name, field)
        return {name: field for name, field in found.items() if not _is_constant(field)}

    def _own_fields(self) -> Iterator[FieldSource]:
        body = self.node.body
        for node, after in zip(body, [*body[1:], None], strict=True):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            if ast.unparse(node.annotation).startswith("ClassVar"):
                continue
            yield _field(node, _docstring(after), self.module)


def read_class(target: str) -> ClassSource:
    """Return the class of a registry's entry `module:class`."""
    module, _, name = target.partition(":")
    found = find_definition(module, name)
    if found is None or not isinstance(found[1], ast.ClassDef):
        raise LookupError(f"{target} must be a class of this package")
    module, node = found
    parents = (find_definition(module, ast.unparse(base)) for base in node.bases)
    return ClassSource(
        module=module,
        name=node.name,
        node=node,
        parents=tuple(
            read_class(f"{place}:{base.name}")
            for place, base in filter(None, parents)
            if isinstance(base, ast.ClassDef)
        ),
    )


def parameters_of(kind: ClassSource) -> list[FieldSource]:
    """Return the parameters of a class's constructor, with their sentences."""
    for node in kind.node.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            sentences = _arguments(ast.get_docstring(node) or "")
            pairs = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return [
                FieldSource(
                    name=one.arg,
                    type=ast.unparse(one.annotation) if one.annotation else "",
                    is_required=default is None,
                    default=None if default is None else value_of(default, kind.module),
                    description=sentences.get(one.arg, ""),
                    nested="",
                )
                for one, default in pairs
            ]
    return []


def value_of(node: ast.expr, module: str) -> Any:
    """Return the value of an expression: literals and constants of this package, else `Code`."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    if isinstance(node, ast.Name):
        found = find_definition(module, node.id)
        if found and isinstance(found[1], ast.Assign | ast.AnnAssign) and found[1].value:
            return value_of(found[1].value, found[0])
    elif isinstance(node, ast.Dict):
        return _mapping(node, module)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        left, right = value_of(node.left, module), value_of(node.right, module)
        if isinstance(left, dict) and isinstance(right, dict):
            return left | right
    elif match := re.fullmatch(r"(\w+)\.model_fields\['(\w+)'\]\.default", ast.unparse(node)):
        found = find_definition(module, match[1])
        if found:
            return read_class(f"{found[0]}:{match[1]}").fields()[match[2]].default
    return Code(ast.unparse(node))


def _mapping(node: ast.Dict, module: str) -> dict[Any, Any]:
    merged: dict[Any, Any] = {}
    for key, value in zip(node.keys, node.values, strict=True):
        entry = value_of(value, module)
        if key is not None:
            merged[value_of(key, module)] = entry
        elif isinstance(entry, dict):
            merged |= entry
        else:
            merged["..."] = entry
    return merged


def _field(node: ast.AnnAssign, description: str, module: str) -> FieldSource:
    value, bounds, is_required, default = node.value, [], node.value is None, None
    if isinstance(value, ast.Call) and is_name(value.func, "Field"):
        given = {one.arg: one.value for one in value.keywords if one.arg}
        bounds = [f"{BOUNDS[k]} {value_of(v, module)}" for k, v in given.items() if k in BOUNDS]
        factory = given.get("default_factory")
        value = given.get("default", value.args[0] if value.args else None)
        if factory is not None:
            default, value = EMPTY.get(ast.unparse(factory), Code(ast.unparse(factory))), None
        else:
            is_required = value is None
    nested = ""
    if value is not None:
        default = value_of(value, module)
        call = ast.parse(default, mode="eval").body if isinstance(default, Code) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
            found = find_definition(module, call.func.id) or _find_beside(
                module, value, call.func.id
            )
            nested = f"{found[0]}:{call.func.id}" if found else ""
    kind = ", ".join([_type(node.annotation, module), *bounds])
    return FieldSource(
        name=node.target.id if isinstance(node.target, ast.Name) else "",
        type=kind,
        is_required=is_required,
        default=default,
        description=description,
        nested=nested,
    )


def _find_beside(module: str, value: ast.expr, name: str) -> tuple[str, ast.stmt] | None:
    """Return a definition in the module where a constant was defined."""
    if not isinstance(value, ast.Name):
        return None
    found = find_definition(module, value.id)
    return find_definition(found[0], name) if found else None


def _type(annotation: ast.expr, module: str) -> str:
    """Return an annotation; an alias is spelt out, without its validators."""
    if isinstance(annotation, ast.Name):
        found = find_definition(module, annotation.id)
        if found and isinstance(found[1], ast.Assign):
            return _type(found[1].value, found[0])
    if isinstance(annotation, ast.Subscript) and is_name(annotation.value, "Annotated"):
        parts = annotation.slice
        return _type(parts.elts[0] if isinstance(parts, ast.Tuple) else parts, module)
    return ast.unparse(annotation)


def _is_constant(field: FieldSource) -> bool:
    """Return whether a field is the name of its class, which is fixed."""
    return field.name == "name" and field.type == f"Literal[{field.default!r}]"


def find_definition(module: str, name: str, depth: int = 0) -> tuple[str, Any] | None:
    """Return the module and the statement that define a name; None outside this package."""
    if depth > MAX_ALIASES or not module.startswith("safegen") or not module_path(module).is_file():
        return None
    for node in parse_module(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return module, node
        if isinstance(node, ast.Assign) and any(is_name(target, name) for target in node.targets):
            return module, node
        if isinstance(node, ast.AnnAssign) and is_name(node.target, name):
            return module, node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return find_definition(node.module or "", alias.name, depth + 1)
    return None


def module_path(module: str) -> Path:
    """Return the file of a module of this package."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def parse_module(module: str) -> ast.Module:
    """Return the syntax tree of a module of this package."""
    return ast.parse(module_path(module).read_text(encoding="utf-8"))


def is_name(node: ast.AST, name: str) -> bool:
    """Return whether an expression is this name."""
    return isinstance(node, ast.Name) and node.id == name


def _docstring(node: ast.stmt | None) -> str:
    """Return the text of a string that stands after a field."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return inspect.cleandoc(str(node.value.value))
    return ""


def _arguments(docstring: str) -> dict[str, str]:
    """Return the sentences of the section `Args` of a docstring."""
    found: dict[str, str] = {}
    section = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", docstring, re.MULTILINE | re.DOTALL)
    for line in section[1].splitlines() if section else ():
        if entry := re.match(r" {4}(\w+): (.*)", line):
            name, found[entry[1]] = entry[1], entry[2]
        elif line.startswith(" " * 8):
            found[name] += " " + line.strip()
    return found
