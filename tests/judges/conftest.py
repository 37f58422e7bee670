"""Fixtures: sample photographs, a tiny CLIP configuration, and its preprocessing."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image

SIDE = 32


@pytest.fixture(scope="session")
def photo():
    """Return a function that opens a bundled sample image of scikit-image by file name."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        pytest.skip("scikit-image is not installed")
    folder = Path(spec.origin).parent / "data"

    def read(name: str) -> Image.Image:
        with Image.open(folder / name) as image:
            return image.copy()

    return read


@pytest.fixture
def to_pixels():
    """Return a function from images of one size to pixels (n, 3, h, w) in [-1, 1]."""
    import numpy as np
    import torch

    def convert(images):
        arrays = np.stack([np.array(image, np.float32) for image in images])
        pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1
        return pixels.requires_grad_()

    return convert


@pytest.fixture
def tiny_config():
    """Return the configuration of a tiny CLIP for images of 32 pixels."""
    from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

    size = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    vision = CLIPVisionConfig(image_size=SIDE, patch_size=8, **size)
    return CLIPConfig(
        text_config=CLIPTextConfig(vocab_size=64, **size).to_dict(),
        vision_config=vision.to_dict(),
        projection_dim=16,
    )


@pytest.fixture
def save_pixels():
    """Return a function that writes preprocessor_config.json for an image size in pixels."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    def save(folder: Path, side: int = SIDE) -> None:
        CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        ).save_pretrained(folder)

    return save
