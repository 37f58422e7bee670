"""`--json` prints one value and nothing else on stdout; the exit status is that of the text."""

from __future__ import annotations

import json

import pytest

from safegen.cli.console import plural
from safegen.mini import bundle


@pytest.fixture
def patches(tiny_model, tmp_path):
    """Return the files of two patches of the tiny model that differ."""
    import torch

    from safegen.models.checkpoint.metadata import PatchMetadata
    from safegen.patches.patch import Patch

    key, value = next(iter(tiny_model.denoiser.named_parameters()))
    paths = [tmp_path / "p.safetensors", tmp_path / "q.safetensors"]
    for number, path in enumerate(paths):
        metadata = PatchMetadata(method="uce", model="tiny", settings={})
        Patch({key: torch.full_like(value, number + 1.0)}, metadata).save(path)
    return paths


def test_patches_answer_in_json(safegen, patches):
    code, out, err = safegen("patch", "info", patches[0], "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["metadata"]["method"] == "uce"
    code, out, _ = safegen("patch", "diff", *patches, "--json")
    assert (code, json.loads(out)["unequal"]) == (1, 1)
    code, out, _ = safegen("patch", "diff", patches[0], patches[0], "--json")
    assert (code, json.loads(out)["same"]) == (0, True)


def test_triplets_answer_in_json(safegen, triplets, tmp_path):
    code, out, err = safegen("triplets", "check", triplets.folder, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"triplets": 6, "hash": triplets.hash, "problems": []}
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    code, out, _ = safegen("triplets", "check", tmp_path, "--json")
    assert code == 1
    assert len(json.loads(out)["problems"]) == 1
    images = bundle.triplets_folder("skulls")
    words = ["--unsafe", images / "unsafe", "--benign", images / "benign", "--judge", "mini"]
    code, out, _ = safegen("triplets", "make", *words, "--out", tmp_path / "t", "--json")
    assert code == 0
    assert json.loads(out)["triplets"] > 10


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 images"), (1, "1 image"), (1500, "1,500 images")]
)
def test_a_noun_follows_its_number(count, text):
    assert plural(count, "image") == text
