"""Names that a user can give, by kind, and what is known of each; nothing heavy is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any

from safegen.cli.info.references import extras_of, references_of
from safegen.cli.info.source import PACKAGE, ClassSource, Code, parameters_of, read_class
from safegen.core import registry
from safegen.core.errors import UserError


class Kind(StrEnum):
    """Kind of a name; a name of several kinds means the first of them."""

    models = "models"
    methods = "methods"
    guards = "guards"
    attacks = "attacks"
    judges = "judges"
    adversaries = "adversaries"
    concepts = "concepts"
    protocols = "protocols"
    presets = "presets"


TABLES: Mapping[Kind, Mapping[str, str]] = {
    Kind.methods: registry.EDITS,
    Kind.guards: registry.GUARDS,
    Kind.attacks: registry.ATTACKS,
    Kind.judges: registry.JUDGES,
    Kind.adversaries: registry.ADVERSARIES,
}
"""Kinds with a class for each name."""
PAGES = {
    Kind.models: "docs/reference/mini.md",
    Kind.methods: "docs/reference/edits/{}.md",
    Kind.guards: "docs/reference/guards/{}.md",
    Kind.attacks: "docs/reference/attacks/{}.md",
    Kind.judges: "docs/reference/judges.md",
    Kind.adversaries: "docs/reference/adversaries.md",
    Kind.concepts: "docs/tutorials/own-concept.md",
    Kind.protocols: "docs/reference/protocols.md",
}
"""Page of the documentation by kind."""
INPUTS = {
    "triplets": "triplets of images (--triplets DIR, see `safegen triplets make`)",
    "words": "the phrases of a concept (--concept NAME)",
    "both": "triplets of images (--triplets DIR) and the phrases of a concept (--concept NAME)",
}
ACCESS = {
    "queries": "images of the attacked stack, on request",
    "text_encoder": "the attacked stack's text encoder",
    "weights": "all weights of the attacked stack",
}
CONCEPT_FOLDER, PROTOCOL_FOLDER = PACKAGE / "core/concepts", PACKAGE / "evaluation/protocols"


def names_of(kind: Kind) -> tuple[str, ...]:
    """Return the names of a kind; of presets, as `METHOD PRESET`."""
    if kind is Kind.models:
        return tuple(registry.MODELS)
    if kind is Kind.concepts:
        return tuple(registry.CONCEPTS)
    if kind is Kind.protocols:
        return tuple(registry.PROTOCOLS)
    if kind is Kind.presets:
        return tuple(f"{method} {name}" for method, name, _ in _presets())
    return tuple(TABLES[kind])


def summaries_of(kind: Kind) -> dict[str, str]:
    """Return one line about each name of a kind."""
    if kind is Kind.presets:
        return {f"{method} {name}": changes(given) for method, name, given in _presets()}
    return {name: str(details_of(kind, name)["summary"]) for name in names_of(kind)}


def changes(preset: Mapping[str, Any]) -> str:
    """Return the settings that a preset changes, in one line."""
    return ", ".join(f"{name}={literal(value)}" for name, value in preset.items()) or "the defaults"


def literal(value: Any) -> str:
    """Return a value as text: a text value is quoted, source code is not."""
    return str(value) if isinstance(value, Code) else repr(value)


def find_kinds(name: str, kind: Kind | None = None) -> list[Kind]:
    """Return the kinds of which a name is one, the one that it means first.

    Raises:
        UserError: no kind has it; the message says the nearest names.
    """
    kinds = [kind] if kind else [one for one in Kind if one is not Kind.presets]
    known = {one: names_of(one) for one in kinds}
    found = [one for one in kinds if name in known[one] or _guard_of(name, one)]
    if not found:
        near = get_close_matches(name, {n for names in known.values() for n in names})
        hint = f"Did you mean {' or '.join(map(repr, near))}? " if near else ""
        where = f"safegen list {kind}" if kind else "safegen list"
        raise UserError(
            f"name must be one of {kind or 'the names of this package'}, got {name!r}. "
            f"{hint}See: {where}"
        )
    return found


def details_of(kind: Kind, name: str) -> dict[str, Any]:
    """Return everything known of a name: plain values, and the settings as a list of tables."""
    if kind is Kind.presets:
        kind, name = Kind.methods, name.partition(" ")[0]
    name = _guard_of(name, kind) or name
    details: dict[str, Any] = {"kind": kind.value, "name": name, "docs": PAGES[kind].format(name)}
    if kind is Kind.models:
        return details | _model()
    if kind is Kind.concepts:
        return details | _concept(name)
    if kind is Kind.protocols:
        return details | _protocol(name)
    source = read_class(TABLES[kind][name])
    about = source.description().split("\n\n")
    details |= {
        "summary": " ".join(about[0].split()),
        "description": [" ".join(part.split()) for part in about[1:]],
        "source": source.path,
        "needs": _needs(kind, source),
    }
    if kind is Kind.judges:
        return details | {"settings": _table(parameters_of(source))}
    return details | {
        "paper": source.variable("paper") or "",
        "code": source.variable("code_url") or "",
        "equations": references_of(source),
        "presets": source.variable("PRESETS") or {},
        "settings": _table(source.fields().values()),
    }


def _guard_of(name: str, kind: Kind) -> str:
    """Return the guard of a name with a preset, such as `sld-max`; else an empty text."""
    if kind is not Kind.guards or name in registry.GUARDS:
        return ""
    for guard, target in registry.GUARDS.items():
        preset = name.removeprefix(f"{guard}-")
        if preset != name and preset in (read_class(target).variable("PRESETS") or {}):
            return guard
    return ""


def _presets() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield method, preset and changed settings of every edit, guard and attack."""
    for kind in (Kind.methods, Kind.guards, Kind.attacks):
        for name, target in TABLES[kind].items():
            for preset, given in (read_class(target).variable("PRESETS") or {}).items():
                yield name, preset, given


def _table(fields: Any, prefix: str = "") -> list[dict[str, Any]]:
    """Return settings as plain tables; those of a nested group have a dot in their name."""
    rows = []
    for field in fields:
        row = {"name": prefix + field.name, "type": field.type}
        row |= {"required": True} if field.is_required else {"default": field.default}
        rows.append(row | {"description": " ".join(field.description.split())})
        if field.nested and not prefix:
            given, inner = field.arguments(), read_class(field.nested).fields().values()
            changed = (replace(one, default=given.get(one.name, one.default)) for one in inner)
            rows += _table(changed, f"{field.name}.")
    return rows


def _needs(kind: Kind, source: ClassSource) -> list[str]:
    """Return what a method needs besides a model."""
    fields = {one.name: one for one in parameters_of(source)} if kind is Kind.judges else {}
    fields |= source.fields() if kind is not Kind.judges else {}
    needs = []
    if inputs := source.variable("inputs"):
        needs.append(INPUTS[inputs])
    if access := source.variable("access"):
        needs.append(ACCESS[access])
    if "judge" in fields and kind is not Kind.judges:
        needs.append("a judge (default: that of the concept)")
    needs += [
        f"the setting `{name}` (a concept can supply phrases)"
        for name in ("text", "words", "phrases", "concepts", "unsafe", "safe")
        if name in fields and fields[name].is_required
    ]
    if "weights" in fields and (fields["weights"].is_required or not extras_of(source)):
        needs.append(f"weights: {' '.join(fields['weights'].description.split()).rstrip('.')}")
    needs += [f'the extra {extra}: pip install "safegen[{extra}]"' for extra in extras_of(source)]
    return needs


def _model() -> dict[str, Any]:
    return {
        "summary": "Bundled miniature model: 64 px, 32 objects, with judges and triplets, offline.",
        "description": [
            "Where a MODEL is asked for, you can also give a diffusers folder, a single-file "
            "checkpoint (.safetensors, as A1111 and ComfyUI use it) or hub:owner/name."
        ],
        "needs": [],
    }


def _concept(name: str) -> dict[str, Any]:
    from safegen.core.concept import load_concept

    concept = load_concept(name)
    words = f"{len(concept.words)} phrase{'s' * (len(concept.words) != 1)}"
    fields = type(concept).model_fields
    bundled = "bundled triplets and prompts" if concept.triplets else "no triplets bundled"
    return {
        "summary": f"{words}, judge {concept.judge}, {bundled}.",
        "source": (CONCEPT_FOLDER / f"{name}.toml").relative_to(PACKAGE.parent).as_posix(),
        "needs": [f"the judge {concept.judge} (see `safegen show {concept.judge} --kind judges`)"],
        "settings": [
            {
                "name": key,
                "type": "",
                "default": value,
                "description": " ".join((fields[key].description or "").split()),
            }
            for key, value in concept.model_dump(mode="json").items()
            if value
        ],
    }


def _protocol(name: str) -> dict[str, Any]:
    from safegen.core.documents import read_toml

    path: Path = PROTOCOL_FOLDER / f"{name}.toml"
    given = read_toml(path)
    about = " ".join(str(given.get("about", "")).split())
    summary, *rest = re.split(r"(?<!al)\. (?=[A-Z])", about, maxsplit=1)
    needs = [
        f"prompts for the list {part['name']} (--prompts {part['name']}=FILE): {part['requires']}"
        for part in given["lists"]
        if part.get("requires")
    ]
    needs.append(f"the judge {given['judge']['name']}")
    return {
        "summary": summary.rstrip(".") + ".",
        "description": rest,
        "source": path.relative_to(PACKAGE.parent).as_posix(),
        "needs": needs,
        "settings": [
            {"name": key, "type": "", "default": given[key], "description": ""}
            for key in ("concept", "seeds", "metrics", "generation", "judge", "lists")
            if key in given
        ],
    }
