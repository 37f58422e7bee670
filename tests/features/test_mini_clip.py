"""The miniature CLIP separates images of the miniature world and matches them to their prompts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from safegen.core.errors import ConfigError
from safegen.features.base import (
    DifferentiableExtractor,
    list_differentiable_extractors,
    load_extractor,
)
from safegen.metrics.clip_score import clip_scores
from safegen.metrics.distances import cmmd, fid, kid
from safegen.mini import captions, world
from tools.mini import drawing

N = 64
OBJECTS = world.OBJECTS


@pytest.fixture(scope="module")
def clip():
    return load_extractor("mini-clip")


def images_with(attribute, seed=5):
    rows = [
        drawing.sample_scene(
            np.random.default_rng((seed, i)), attribute=attribute, objects=[OBJECTS[i % 32]]
        )
        for i in range(N)
    ]
    return [Image.fromarray(drawing.draw(s)) for s in rows]


def test_an_image_matches_its_own_caption_best(clip):
    images = clip.features(images_with(None))
    texts = clip.texts([captions.caption("benign", 0, OBJECTS[i % 32]) for i in range(N)])
    right, wrong = clip_scores(images, texts), clip_scores(images, np.roll(texts, 1, axis=0))
    assert (right > wrong).mean() > 0.9
    assert right.mean() > wrong.mean() + 10


@pytest.mark.parametrize("distance", [fid, kid, cmmd])
def test_images_with_skulls_are_farther_from_clean_images_than_other_clean_images(clip, distance):
    clean, others, skulls = (
        clip.features(images_with(a, s)) for a, s in ((None, 1), (None, 2), ("skulls", 3))
    )
    assert distance(skulls, clean, reference_kind="real").value > 2 * abs(
        distance(others, clean, reference_kind="real").value
    )


def test_images_are_scaled_to_64_pixels(clip):
    small = images_with("fire")[:4]
    big = [p.resize((192, 192), Image.Resampling.NEAREST).convert("RGBA") for p in small]
    assert clip.features(big) == pytest.approx(clip.features(small), abs=1e-4)


@pytest.mark.parametrize("side", [64, 128])
def test_the_features_of_pixels_are_those_of_images_and_have_a_gradient(clip, side):
    images = [image.resize((side, side), Image.Resampling.NEAREST) for image in images_with("fire")]
    pixels = torch.stack([torch.from_numpy(np.array(i, np.float32)) for i in images[:4]])
    pixels = (pixels.permute(0, 3, 1, 2) / 127.5 - 1).requires_grad_()
    embeddings = clip.embed(pixels)
    assert isinstance(clip, DifferentiableExtractor)
    assert "mini-clip" in list_differentiable_extractors()
    assert embeddings.detach().numpy() == pytest.approx(clip.features(images[:4]), abs=1e-4)
    embeddings.sum().backward()
    assert float(pixels.grad.abs().max()) > 1e-4


def test_other_weights_are_refused():
    with pytest.raises(ConfigError, match="has its own weights, got 'some/folder'"):
        load_extractor("mini-clip", weights="some/folder")
