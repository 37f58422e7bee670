"""Permissions of the files that the workflows write: those of an ordinary new file."""

from __future__ import annotations

import os

import pytest
import torch
from PIL import Image

import safegen
from safegen.core.concept import write_template
from safegen.edits.uce import UCE
from safegen.models.image_files import save_image
from safegen.patches.lora import extract_lora, save_lora


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_web_uis_of_another_user_can_read_every_file(tmp_path):
    """safetensors writes files that only their owner can read."""
    model, before = safegen.load("mini"), os.umask(0o022)
    try:
        patch = UCE(erase=("skulls",)).apply(model)
        safegen.save_patch(patch, tmp_path / "patch.safetensors")
        lora = extract_lora(patch, model, 2)
        save_lora(lora, model, tmp_path / "lora.safetensors", dtype=torch.float16)
        for name, kind in (("model.safetensors", "single-file"), ("folder", "diffusers")):
            safegen.export(safegen.load("mini"), tmp_path / name, format=kind, patches=[patch])
        save_image(Image.new("RGB", (8, 8)), tmp_path / "image.png", {})
        write_template("smoke", tmp_path / "concept.toml")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".safetensors", ".md", ".json", ".png", ".toml"}
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o644"}
