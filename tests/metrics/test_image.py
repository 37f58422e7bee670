"""Mean absolute pixel difference."""

from __future__ import annotations

import pytest
from PIL import Image

from safegen.metrics.image import mean_pixel_mae, pixel_mae


def test_equal_images_give_0_and_black_against_white_gives_1():
    noise = Image.effect_noise((8, 8), 60).convert("RGB")
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    assert pixel_mae(noise, noise) == 0
    assert pixel_mae(black, white) == 1
    assert pixel_mae(black, Image.new("RGB", (8, 8), (255, 0, 0))) == pytest.approx(1 / 3)


def test_the_difference_is_symmetric():
    a, b = (Image.effect_noise((8, 8), spread).convert("RGB") for spread in (20, 90))
    assert pixel_mae(a, b) == pixel_mae(b, a) > 0


def test_different_sizes_are_refused():
    with pytest.raises(ValueError, match="one size"):
        pixel_mae(Image.new("RGB", (8, 8)), Image.new("RGB", (8, 9)))


def test_the_mean_counts_pairs_and_prompts():
    black, white, red = (Image.new("RGB", (4, 4), c) for c in ("black", "white", "red"))
    found = mean_pixel_mae([black] * 4, [black, white, red, red], ["a", "a", "b", "c"])
    assert found.value == pytest.approx((0 + 1 + 1 / 3 + 1 / 3) / 4)
    assert (found.n, found.clusters) == (4, 3)
    assert found.low < found.value < found.high


def test_an_empty_mean_is_refused():
    with pytest.raises(ValueError, match="value"):
        mean_pixel_mae([], [], [])
