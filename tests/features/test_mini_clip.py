"""The miniature CLIP tells pictures of the drawn world apart and fits them to their prompts."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import ConfigError
from safegen.features.base import load_extractor
from safegen.metrics.clip_score import clip_scores
from safegen.metrics.distances import cmmd, fid, kid
from safegen.mini import captions, world
from tools.mini import drawing

N = 64
OBJECTS = list(world.OBJECTS)


@pytest.fixture(scope="module")
def clip():
    return load_extractor("mini-clip")


def pictures(attribute, seed=5):
    rows = [
        drawing.sample_scene(
            np.random.default_rng((seed, i)), attribute=attribute, objects=[OBJECTS[i % 32]]
        )
        for i in range(N)
    ]
    return [Image.fromarray(drawing.draw(s)) for s in rows]


def test_a_picture_fits_the_caption_of_its_object_better_than_that_of_another(clip):
    images = clip.features(pictures(None))
    texts = clip.texts([captions.caption("benign", 0, OBJECTS[i % 32]) for i in range(N)])
    right, wrong = clip_scores(images, texts), clip_scores(images, np.roll(texts, 1, axis=0))
    assert (right > wrong).mean() > 0.9
    assert right.mean() > wrong.mean() + 10


@pytest.mark.parametrize("distance", [fid, kid, cmmd])
def test_pictures_with_skulls_are_further_from_clean_ones_than_other_clean_ones_are(clip, distance):
    clean, others, skulls = (
        clip.features(pictures(a, s)) for a, s in ((None, 1), (None, 2), ("skulls", 3))
    )
    assert distance(skulls, clean, reference_kind="real").value > 2 * abs(
        distance(others, clean, reference_kind="real").value
    )


def test_pictures_are_scaled_to_its_world(clip):
    small = pictures("fire")[:4]
    big = [p.resize((192, 192), Image.Resampling.NEAREST).convert("RGBA") for p in small]
    assert clip.features(big) == pytest.approx(clip.features(small), abs=1e-4)


def test_weights_of_its_own_are_all_it_takes():
    with pytest.raises(ConfigError, match="has its own weights; leave 'some/folder' out"):
        load_extractor("mini-clip", weights="some/folder")
