"""Numbers of every settings class: each is used as it is or refused by a rule that names it."""

from __future__ import annotations

import importlib
import inspect
import json
import math
import pkgutil
from contextlib import suppress
from typing import get_args

import pytest
from pydantic import ValidationError

import safegen
from safegen.core.errors import ConfigError, MissingExtraError, UserError, explain
from safegen.core.settings import MAX_NUMBER, MAX_SEED, BaseSettings

EXTREMES = (math.nan, math.inf, -math.inf, 1e308, -1e308, -1, 0, 2**64, -(2**64), "nan", "1e999")
REQUIRED = {
    "concept": "skulls",
    "name": "mini",
    "words": ["a skull"],
    "counterpart": ["a ghost"],
    "judge": "mini",
    "labels": ["skulls"],
    "role": "explicit",
    "source": "mini:skulls",
    "sha256": "0" * 64,
    "seeds": [1],
    "extractor": "mini-clip",
    "trunk": "trunk.pt",
    "heads": "heads.pt",
    "weights": "w.safetensors",
    "file": "lora.safetensors",
    "model": "mini",
    "prompt": "a castle",
    "seed": 1,
    "phrases": ["a skull"],
    "concepts": ["a skull"],
    "unsafe": ["a skull"],
    "safe": ["a castle"],
    "text": "a skull",
    "stack": "mini",
    "lists": [{"role": "explicit", "name": "s", "source": "mini:skulls", "sha256": "0" * 64}],
    "generation": {},
    "metrics": ["concept"],
    "url": "http://localhost",
    "index": 1,
    "count": 1,
}
"""A value for each required setting."""
OWN = {
    "Protocol": {"judge": {"name": "mini", "labels": ["skulls"]}},
    "PromptList": {"source": "mini:skulls", "sha256": "0" * 64},
    "PromptFilterConfig": {"words": ["skull"]},
    "ServerConfig": {"stacks": ("mini",)},
    "TreeSearch": {"rewriter": "chat", "base_url": "http://localhost/v1", "model": "m"},
}
"""Values that differ by class."""


def settings_classes():
    """Return every concrete settings class of the package."""
    for module in pkgutil.walk_packages(safegen.__path__, "safegen."):
        if not module.name.endswith("__main__"):
            with suppress(MissingExtraError):
                importlib.import_module(module.name)

    def below(parent):
        for child in parent.__subclasses__():
            yield child
            yield from below(child)

    found = {c for c in below(BaseSettings) if c.__module__.startswith("safegen.")}
    return sorted((c for c in found if not inspect.isabstract(c)), key=lambda c: c.__name__)


def names_number(annotation):
    """Return whether an annotation takes a number."""
    return annotation in (int, float) or any(map(names_number, get_args(annotation)))


def example(settings):
    """Return values for the required settings of a class."""
    names = [name for name, field in settings.model_fields.items() if field.is_required()]
    literal = {n: get_args(settings.model_fields[n].annotation) for n in names}
    values = {n: literal[n][0] if literal[n][:1] == ("x",) else REQUIRED[n] for n in names}
    if "name" in settings.model_fields:
        default = settings.model_fields["name"].default
        values |= {"name": default} if isinstance(default, str) else {}
    return values | OWN.get(settings.__name__, {})


def test_every_number_of_every_settings_class_is_legal_or_refused_by_name():
    tried = 0
    for settings in settings_classes():
        base = example(settings)
        settings(**base)
        for name, field in settings.model_fields.items():
            if not names_number(field.annotation):
                continue
            for extreme in EXTREMES:
                for value in (extreme, [extreme], {"a skull": extreme}):
                    tried += 1
                    check(settings, base, name, value)
    assert tried > 1000


def check(settings, base, name, value):
    """Check that a value is finite and of use, or is refused by a message that names it."""
    try:
        made = settings(**(base | {name: value}))
    except (ValidationError, UserError) as error:
        text = explain(error, settings) if isinstance(error, ValidationError) else str(error)
        assert name in text, (settings, name, value, text)
        assert "\n" not in text
        return
    kept = json.loads(made.model_dump_json())[name]
    for number in numbers(kept):
        assert math.isfinite(number), (settings, name, value)
        limit = MAX_SEED if isinstance(number, int) else MAX_NUMBER
        assert abs(number) <= limit, (settings, name, value)


def numbers(value):
    """Yield the numbers in a JSON value."""
    if isinstance(value, int | float):
        yield value
    for part in value.values() if isinstance(value, dict) else value if type(value) is list else ():
        yield from numbers(part)


@pytest.mark.parametrize("bad", [-1, 2**63, 2**64, 1.5])
def test_a_seed_is_a_non_negative_63_bit_integer(bad):
    from safegen.core.generation import Sample

    with pytest.raises(ConfigError, match="seed"):
        Sample(prompt="a castle", seed=bad)
