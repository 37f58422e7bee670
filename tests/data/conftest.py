"""Folders of images with and without red, and triplets made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from red import RedJudge, safe_image, unsafe_image

from safegen.core.registry import JUDGES
from safegen.data.triplets.make import make_triplets


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Return a folder with three unsafe and two benign images."""
    for name in ("unsafe", "benign"):
        (tmp_path / name).mkdir()
    for i in range(3):
        unsafe_image(i).save(tmp_path / "unsafe" / f"u{i}.png")
    for i in range(2):
        safe_image(10 + i).save(tmp_path / "benign" / f"b{i}.png")
    return tmp_path


@pytest.fixture
def made(images: Path) -> Path:
    """Return a folder of three valid triplets."""
    make_triplets(images / "unsafe", images / "benign", RedJudge(), images / "out", labels=["red"])
    return images / "out"


@pytest.fixture
def red(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace every judge of the command line by `RedJudge`."""
    monkeypatch.setitem(JUDGES, "red", "red:RedJudge")  # names are checked first
    monkeypatch.setattr("safegen.judges.load_judge", lambda name, **_: RedJudge())
