"""Folders of red and other pictures, and triplets made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from red import RedJudge, safe_picture, unsafe_picture

from safegen.data.triplets.make import make


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three unsafe and two benign pictures."""
    for name in ("unsafe", "benign"):
        (tmp_path / name).mkdir()
    for i in range(3):
        unsafe_picture(i).save(tmp_path / "unsafe" / f"u{i}.png")
    for i in range(2):
        safe_picture(10 + i).save(tmp_path / "benign" / f"b{i}.png")
    return tmp_path


@pytest.fixture
def made(pictures: Path) -> Path:
    """A folder of three good triplets."""
    make(pictures / "unsafe", pictures / "benign", RedJudge(), pictures / "out", labels=["red"])
    return pictures / "out"


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `--judge` mean the judge of these tests."""
    monkeypatch.setattr("safegen.judges.load_judge", lambda name, **_: RedJudge())
