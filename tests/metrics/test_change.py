"""How far pictures moved."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from safegen.metrics.change import Mean, picture_change


def test_a_picture_is_no_distance_from_itself_and_black_is_one_from_white():
    noise = Image.effect_noise((8, 8), 60).convert("RGB")
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    assert picture_change(noise, noise) == 0
    assert picture_change(black, white) == 1
    assert picture_change(black, Image.new("RGB", (8, 8), (255, 0, 0))) == pytest.approx(1 / 3)


def test_the_distance_is_the_same_both_ways():
    a, b = (Image.effect_noise((8, 8), spread).convert("RGB") for spread in (20, 90))
    assert picture_change(a, b) == picture_change(b, a) > 0


def test_pictures_of_two_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        picture_change(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9)))


def test_the_interval_of_a_mean_is_near_the_normal_one_and_does_not_know_the_order():
    values = np.random.default_rng(0).normal(3, 2, 400).tolist()
    found = Mean.of(values, range(400))
    half = 1.96 * np.std(values) / 20
    assert found.low == pytest.approx(found.value - half, abs=0.03)
    assert found.high == pytest.approx(found.value + half, abs=0.03)
    turned = Mean.of(values[::-1], range(400))
    assert (turned.low, turned.high) == (found.low, found.high)


def test_equal_values_have_an_interval_of_no_width():
    assert Mean.of([0.5] * 6, list("aabbcc")) == Mean(0.5, 0.5, 0.5, 6)


def test_values_of_one_cluster_count_as_one():
    """Ten copies of each of eight values say no more than the eight."""
    few = [0.0, 1.0, 0.2, 0.9, 0.4, 0.7, 0.1, 0.8]
    one, ten = Mean.of(few, range(8)), Mean.of(few * 10, list(range(8)) * 10)
    assert (ten.low, ten.high) == pytest.approx((one.low, one.high))


def test_nothing_has_no_mean():
    with pytest.raises(ValueError, match="needs values"):
        Mean.of([], [])
    with pytest.raises(ValueError, match="got 2 and 1"):
        Mean.of([1, 2], ["a"])
