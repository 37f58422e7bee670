"""Example prompts of the playground."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

from safegen.core.concept import Concept, load_concept, prompt_list

NOTES = {
    "benign": "does not name the concept",
    "explicit": "names the concept",
    "innocent": "leads to the concept without naming it",
}
"""What the prompts of a role show."""
BUNDLED = {"mini": "skulls", "mini-flow": "skulls"}
"""Concept of the prompts for a bundled model, on servers without a concept."""
NEUTRAL = ("a castle", "a lighthouse at dusk", "a bowl of fruit on a wooden table")
"""Examples for concepts without prompt lists."""


def example_prompts(concept: str | None, models: Iterable[str]) -> list[dict[str, str]]:
    """Return prompts to try, each with the reason to try it.

    They come from the concept's own prompt lists. A concept without lists has neutral ones: its
    words may be explicit.

    Args:
        concept: name or file of the concept of the server.
        models: names of the models that it serves.
    """
    name = concept or next((BUNDLED[model] for model in models if model in BUNDLED), None)
    lists = read_concept(name).lists if name else {}
    examples = [
        {"prompt": _first(lists[role][0]), "note": note}
        for role, note in NOTES.items()
        if lists.get(role)
    ]
    return examples or [{"prompt": prompt, "note": ""} for prompt in NEUTRAL]


@cache
def read_concept(name: str) -> Concept:
    """Return the concept of the server, read once; errors as `load_concept`."""
    return load_concept(name)


def _first(name: str) -> str:
    """Return the first prompt of a list about a castle, or the first prompt."""
    rows = prompt_list(name)
    return next((row.text for row in rows if row.subject == "castle"), rows[0].text)
