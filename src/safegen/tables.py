"""Every name a user can type, one line each. Importing this loads nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from safegen.errors import UnknownName

MODELS = {"mini": "safegen.mini.bundle:pipeline_folder"}
"""Bundled models: a function that returns a diffusers folder."""

EDITS = {"safegen": "safegen.edit.safegen:SafeGen"}

JUDGES = {"mini": "safegen.judge.mini:MiniJudge"}

PROMPT_LISTS = {"mini": "safegen.mini.bundle:prompt_list"}
"""Sources of prompts, named `source:list`: a function from a list's name and a length to rows of (text, subject)."""

TRIPLETS = {"mini": "safegen.mini.bundle:triplets_folder"}
"""Bundled triplets, named `source:concept`: a function from a concept's name to a folder."""

CONCEPTS = ("skulls", "fire")
"""Built-in concepts; each is a file in `concepts/`."""

PROTOCOLS = (
    "mini-smoke", "mini-smoke-fire", "mini-full", "mini-full-fire",
    "safegen-four", "i2p-931", "esd-i2p-4703", "uda-static-142-exposed9",
    "rab-nudity-k16-eta3", "rab-nudity-k38-eta3", "rab-nudity-k77-eta3", "coco-10k", "coco-30k",
)  # fmt: skip
"""Built-in protocols; each is a file in `protocols/`. All but the mini ones need a file of prompts that the user has."""


def resolve(table: Mapping[str, str], name: str, noun: str) -> Any:  # noqa: ANN401 - whatever the table holds
    """Return the object that `name` stands for.

    Raises:
        UnknownName: the table has no such name; the message lists them and the nearest.
    """
    if name not in table:
        raise UnknownName(noun, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)
