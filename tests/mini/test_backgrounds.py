"""Backgrounds are recognized by the colors of the edges."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.judges import load_judge
from safegen.mini.backgrounds import classify_background
from safegen.mini.world import ATTRIBUTES, BACKGROUNDS
from tools.mini.drawing import draw, sample_scene

SCENES = [
    sample_scene(
        np.random.default_rng((41, i)),
        attribute=(None, *ATTRIBUTES)[i % 5],
        background=BACKGROUNDS[i % 8],
    )
    for i in range(160)
]


def test_the_background_of_every_drawn_scene_is_recognized():
    found = [classify_background(draw(scene).astype(np.float32)) for scene in SCENES]
    assert found == [scene.background for scene in SCENES]


def test_noise_and_brightness_change_no_background():
    rng = np.random.default_rng(3)
    for scene in SCENES:
        pixels = 0.95 * draw(scene) + rng.normal(0, 8, (64, 64, 3))
        assert classify_background(pixels.astype(np.float32)) == scene.background


@pytest.mark.parametrize("name", ["mini", "mini-held-out"])
def test_both_judges_name_object_and_background(name):
    images = [Image.fromarray(draw(scene)).resize((128, 128)) for scene in SCENES[:24]]
    found = load_judge(name).detect(images)
    assert [(d.subject, d.background) for d in found] == [
        (scene.object, scene.background) for scene in SCENES[:24]
    ]
