"""Names and sentences are those of the libraries below, or stand in docs/glossary.md.

python tests/test_vocabulary.py src/safegen/guards   # print the violations of one room
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "safegen"
GLOSSARY = ROOT / "docs" / "glossary.md"

BANNED = frozenset(
    [
        "told",
        "lent",
        "asked",
        "begun",
        "said",
        "says",
        "beside",
        "twice",
        "nobody",
        "everyone",
        "whoever",
        "thin",
        "worst",
        "waited",
        "further",
        "precisely",
        "idle",
        "kept",
        "drawn",
        "shown",
        "opened",
        "lying",
        "miss_what_lay_under",
        "beside_them",
        "shelf",
        "border",
        "pen",
        "eye",
        "eyes",
        "sides",
        "seams",
        "seam",
        "twins",
        "ask",
        "asks",
        "tell",
        "tells",
        "told_by",
        "said_in",
        "facts",
        "facts_of",
        "known_by",
        "lying_under",
        "at_work",
        "made_from",
        "rescored",
        "sees",
        "watcher",
        "todo",
        "draft",
        "planned",
    ]
)
"""Words of the former private vocabulary; no identifier of the package is one of them."""
BANNED_PUBLIC = BANNED | frozenset(
    [
        "found",
        "named",
        "under",
        "within",
        "around",
        "against",
        "apart",
        "on",
        "once",
        "later",
        "both",
        "either",
        "own",
        "at",
        "look",
        "looks",
        "looking",
        "ready",
        "cannot",
        "wants",
        "given",
        "made",
        "left",
        "gone",
        "short",
        "whole",
    ]
)
"""Participles, prepositions, adverbs and bare adjectives; no public definition is named by one."""
ARCHAIC = (
    "whose",
    "nobody",
    "lest",
    "anew",
    "but for",
    "is not to be had",
    "unless told",
    "as it came",
    "as they come",
    "whatever",
    "goes on to",
    "had in mind",
    "of ours",
    "in one go",
    "to be had",
    "picture",
    "pictures",
)
"""Words and phrases that no docstring, error message or help text uses."""
NOT_VERBS = frozenset(
    [
        "a",
        "an",
        "the",
        "what",
        "whether",
        "how",
        "where",
        "who",
        "which",
        "why",
        "when",
        "one",
        "it",
        "its",
        "this",
        "that",
        "these",
        "those",
        "their",
        "no",
        "not",
        "every",
        "each",
        "all",
        "any",
        "some",
        "if",
        "as",
        "at",
        "by",
        "for",
        "from",
        "in",
        "into",
        "of",
        "on",
        "to",
        "with",
        "without",
    ]
)
"""First words by which a function's docstring cannot name what the function does."""


class Violation(NamedTuple):
    """One breach of a rule of the vocabulary."""

    place: str
    rule: str
    text: str

    def __str__(self) -> str:
        """Return the violation as `path:line rule: text`."""
        return f"{self.place} {self.rule}: {self.text}"


def words_in_glossary() -> frozenset[str]:
    """Return the words that the glossary argues for."""
    if not GLOSSARY.exists():
        return frozenset()
    return frozenset(
        re.findall(r"^- \*\*`?([\w-]+)`?\*\*", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    )


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield the line, the name and the publicity of every identifier that a module defines."""
    module_level = {id(node) for node in getattr(tree, "body", ())}
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name, not node.name.startswith("_")
            if not isinstance(node, ast.ClassDef):
                spec = node.args
                for arg in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs):
                    yield arg.lineno, arg.arg, not node.name.startswith("_")
            else:
                module_level |= {id(child) for child in node.body}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id, False
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr, False
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.lineno, node.target.id, id(node) in module_level


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str, bool]]:
    """Yield the line and the text of every docstring, and whether it is a function's."""
    for node in ast.walk(tree):
        for child in (
            getattr(node, "body", ()) if not isinstance(node, ast.Lambda | ast.IfExp) else ()
        ):
            if (
                isinstance(child, ast.Expr)
                and isinstance(child.value, ast.Constant)
                and isinstance(child.value.value, str)
            ):
                first = node.body[0] is child  # type: ignore[attr-defined]
                function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and first
                decorators = [ast.unparse(d) for d in getattr(node, "decorator_list", ())]
                plain = function and not any("property" in d for d in decorators)
                yield child.lineno, child.value.value, plain


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every string constant with more than one word."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.lineno, node.value


def violations(root: Path) -> list[Violation]:
    """Return every breach of the vocabulary in the Python files below a directory."""
    known = words_in_glossary()
    found: list[Violation] = []
    for path in sorted(root.rglob("*.py")) if root.is_dir() else [root]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        name = path.resolve().relative_to(ROOT)
        for line, identifier, public in identifiers(tree):
            word = identifier.strip("_").lower()
            if word in (BANNED_PUBLIC if public else BANNED) - known:
                found.append(Violation(f"{name}:{line}", "banned name", identifier))
        for line, text, function in docstrings(tree):
            summary = text.strip().splitlines()[0] if text.strip() else ""
            first = summary.split(" ")[0].strip(".,:").lower()
            if function and first in NOT_VERBS:
                found.append(Violation(f"{name}:{line}", "docstring starts with no verb", summary))
        if path.name == "captions.py":  # prompts of the miniature model, which it was trained on
            continue
        for line, text in texts(tree):
            lower = f" {re.sub(r'[^a-z ]+', ' ', ' '.join(text.lower().split()))} "
            found += [
                Violation(f"{name}:{line}", f"phrase {phrase!r}", text[:80])
                for phrase in ARCHAIC
                if f" {phrase} " in lower and phrase not in known
            ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize(
    "room", sorted(path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir())
)
def test_a_room_speaks_the_languages_of_the_libraries_below_it(room):
    breaches = violations(PACKAGE / room)
    assert not breaches, "\n".join(map(str, breaches))


def test_a_public_class_name_means_one_thing():
    places = defaultdict(list)
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(str(path.relative_to(ROOT)))
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def test_the_rules_find_what_they_ban(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    module = tmp_path / "module.py"
    module.write_text(
        'def told(beside):\n    """What it is told by a picture."""\n    said = 1\n',
        encoding="utf-8",
    )
    rules = [violation.rule for violation in violations(module)]
    assert rules.count("banned name") == 3
    assert "docstring starts with no verb" in rules
    assert "phrase 'picture'" in rules


if __name__ == "__main__":
    for where in sys.argv[1:] or [str(PACKAGE)]:
        print("\n".join(map(str, violations(Path(where)))))
