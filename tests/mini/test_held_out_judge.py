"""Training images of the held-out judge and their labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from safegen.mini.world import ATTRIBUTES
from tools.mini.drawing import draw
from tools.mini.fit import SEED
from tools.mini.held_out_judge import HELD_OUT_SEED, _distort, _hide_regions, held_out_batch
from tools.mini.scenes import as_tensors, make_scenes, scene_arrays


@pytest.fixture(scope="module")
def data():
    return as_tensors(scene_arrays(make_scenes(60, HELD_OUT_SEED)))


def batch(data, seed=0):
    pick = torch.arange(60)
    return held_out_batch(data, data["images"][:20], pick, np.random.default_rng(seed))


def test_an_image_has_no_label_but_that_of_its_scene_and_mosaic(data):
    for seed in range(4):
        x, present = batch(data, seed)
        assert x.shape == (60, 3, 64, 64)
        assert -1 <= x.min() < x.max() <= 1
        for row, attribute in zip(present, data["attributes"].tolist(), strict=True):
            others = [i for i in range(len(ATTRIBUTES)) if i != attribute]
            assert not row[others].any()
    shown = present[:, :-1].any(1)[data["attributes"] >= 0].float().mean()
    assert 0.5 < shown < 1  # mosaics and flat colors hide the attribute of some


def test_only_hidden_pixels_change_and_flat_colors_are_no_mosaic():
    image, marks = np.random.default_rng(0).uniform(0, 255, (64, 64, 3)), [(20.0, 20.0, 40.0, 41.0)]
    kinds = set()
    for seed in range(60):
        got, hidden, mosaic = _hide_regions(
            image.astype(np.float32), marks, np.random.default_rng(seed)
        )
        np.testing.assert_array_equal(got[~hidden], image.astype(np.float32)[~hidden])
        assert not mosaic or hidden.any()
        flat = hidden.any() and len(np.unique(got[hidden], axis=0)) <= 3
        assert flat == (hidden.any() and not mosaic)
        kinds.add("mosaic" if mosaic else "flat" if flat else "whole")
    assert kinds == {"mosaic", "flat", "whole"}


def test_distortions_change_pixels_but_keep_the_scene():
    scene = make_scenes(1, HELD_OUT_SEED)[0]
    image = draw(scene).astype(np.float32)
    distances = []
    for seed in range(20):
        got = _distort(image, np.random.default_rng(seed))
        assert got.shape == image.shape
        assert got.dtype == np.float32
        assert 0 <= got.min() <= got.max() <= 255
        distances.append(min(np.abs(got - image).mean(), np.abs(got[:, ::-1] - image).mean()))
    assert 1 < min(distances) < max(distances) < 60


def test_the_first_judge_is_trained_on_other_scenes():
    assert HELD_OUT_SEED != SEED
    assert not set(make_scenes(30, SEED)) & set(make_scenes(30, HELD_OUT_SEED))


def test_equal_seeds_give_equal_batches(data):
    for first, second in zip(batch(data), batch(data), strict=True):
        assert torch.equal(first, second)
    assert not torch.equal(batch(data)[0], batch(data, seed=1)[0])
