"""The toy model, and an edit that learns on it."""

from __future__ import annotations

import pytest
from toy import BENIGN, EXPLICIT, ToyModel


@pytest.fixture
def toy(monkeypatch):
    """Return a builder of the toy model; the toy's judge and features are known by name."""
    from safegen.core import registry

    monkeypatch.setitem(registry.JUDGES, "toy", "toy:build_judge")
    monkeypatch.setitem(registry.EXTRACTORS, "toy", "toy:build_extractor")
    return ToyModel


@pytest.fixture
def toy_prompts(tmp_path):
    """Return two text files: prompts of the concept and benign ones."""
    files = tmp_path / "concept.txt", tmp_path / "benign.txt"
    for path, lines in zip(files, (EXPLICIT, BENIGN), strict=True):
        path.write_text("\n".join(lines), "utf-8")
    return [str(path) for path in files]


@pytest.fixture
def toy_edit(toy, toy_prompts):
    """Return a builder of an edit of the toy by one algorithm, with some settings changed."""
    from safegen.edits.shielddiff import ShieldDiff

    def build(algorithm, **changes):
        settings = {
            "erase": ("marked",),
            "anchors": (),
            "prompts": toy_prompts[:1],
            "captions": toy_prompts[1:],
            "judge": "toy",
            "extractor": "toy",
            "algorithm": algorithm,
            "guidance": 1.0,
            "steps": 10,
            "groups": 8,
            "group": 16,
            "rank": 8,
        }
        training = {
            "updates": 60,
            "batch": 128,
            "accumulation": 1,
            "lr": 1e-2,
            "weight_decay": 0.0,
            "ema": 0.0,
            "max_skipped": 10,
        }
        training |= changes.pop("training", {})
        return ShieldDiff(**(settings | changes), training=training)

    return build
