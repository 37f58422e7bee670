"""Laws of censoring boxes, and invalid settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.data.triplets.censor import Box, Censor, censor_image

STYLES = [Censor(), Censor(style="blur"), Censor(style="solid", color=(0, 128, 0))]
SIZES = [(64, 64), (100, 64), (61, 97), (33, 250)]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def noise(rng: np.random.Generator, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def some_boxes(rng: np.random.Generator, size: tuple[int, int], n: int = 3) -> list[Box]:
    corners = np.sort(rng.uniform(0, 1, (n, 2, 2)), axis=1) * size
    return [(float(a[0]), float(a[1]), float(b[0]), float(b[1])) for a, b in corners]


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("settings", STYLES, ids=lambda s: s.style)
def test_without_a_box_the_image_does_not_change(
    settings: Censor, rng: np.random.Generator
) -> None:
    image = noise(rng)
    censored, covered = censor_image(image, [], settings)
    assert same(censored, image)
    assert covered == 0


@pytest.mark.parametrize("settings", STYLES, ids=lambda s: s.style)
@pytest.mark.parametrize("size", SIZES)
def test_only_covered_pixels_change_and_the_input_does_not(
    settings: Censor, size: tuple[int, int], rng: np.random.Generator
) -> None:
    for _ in range(10):
        image, boxes = noise(rng, size), some_boxes(rng, size)
        before = np.asarray(image).copy()
        censored, covered = censor_image(image, boxes, settings)
        changed = (np.asarray(censored) != before).any(axis=-1)
        assert censored.size == size
        assert 0 < covered <= 1
        assert changed.mean() <= covered
        assert changed.mean() > 0.9 * covered  # noise hardly ever equals its cover
        assert np.array_equal(np.asarray(image), before)


@pytest.mark.parametrize("style", ["blur", "solid"])
def test_a_blur_and_a_solid_cover_end_with_the_padded_box(
    style: Any, rng: np.random.Generator
) -> None:
    image = noise(rng)
    censored, covered = censor_image(image, [(20, 10, 30, 30)], Censor(style=style, padding=0.1))
    outside = np.ones((64, 64), dtype=bool)
    outside[8:32, 19:31] = False
    assert np.array_equal(np.asarray(censored)[outside], np.asarray(image)[outside])
    assert covered == 24 * 12 / 64**2


def test_a_solid_cover_has_its_color(rng: np.random.Generator) -> None:
    censored, _ = censor_image(
        noise(rng), [(20, 10, 30, 30)], Censor(style="solid", color=(1, 2, 3))
    )
    assert (np.asarray(censored)[10:30, 20:30] == (1, 2, 3)).all()


def test_a_mosaic_covers_every_tile_that_a_padded_box_touches_and_no_other(
    rng: np.random.Generator,
) -> None:
    image = noise(rng)
    censored, covered = censor_image(
        image, [(10, 20, 16, 24)], Censor(padding=0.5)
    )  # grows to 7..19 by 18..26: tiles 0..2 by 2..3
    outside = np.ones((64, 64), dtype=bool)
    outside[16:32, 0:24] = False
    assert np.array_equal(np.asarray(censored)[outside], np.asarray(image)[outside])
    assert covered == 6 / 64


def test_a_mosaic_keeps_the_mean_color_of_every_tile(rng: np.random.Generator) -> None:
    image = noise(rng)
    censored, _ = censor_image(image, [(0, 0, 64, 64)], Censor())
    before, after = (
        np.asarray(i, dtype=np.float64).reshape(8, 8, 8, 8, 3) for i in (image, censored)
    )
    assert (after == after[:, :1, :, :1]).all()
    np.testing.assert_allclose(after[:, 0, :, 0], before.mean(axis=(1, 3)), atol=0.5)


@pytest.mark.parametrize("size", SIZES)
def test_a_second_mosaic_over_the_same_boxes_changes_nothing(
    size: tuple[int, int], rng: np.random.Generator
) -> None:
    for _ in range(10):
        image, boxes = noise(rng, size), some_boxes(rng, size)
        once, covered = censor_image(image, boxes, Censor())
        twice, covered_again = censor_image(once, boxes, Censor())
        assert same(once, twice)
        assert covered == covered_again


def test_mosaics_of_overlapping_boxes_agree_in_any_order(rng: np.random.Generator) -> None:
    for _ in range(10):
        image, boxes = noise(rng, (100, 64)), some_boxes(rng, (100, 64))
        together, _ = censor_image(image, boxes, Censor())
        one_by_one = image
        for box in reversed(boxes):
            one_by_one, _ = censor_image(one_by_one, [box], Censor())
        assert same(together, one_by_one)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_have_the_chosen_size_up_to_the_edge(
    size: tuple[int, int], rng: np.random.Generator
) -> None:
    censored = np.asarray(censor_image(noise(rng, size), [(0, 0, *size)], Censor(tile=1 / 4))[0])
    side = min(size) / 4
    for axis in (0, 1):
        change = (np.diff(censored.astype(int), axis=axis) != 0).any(axis=(1 - axis, 2))
        widths = np.diff([0, *(np.flatnonzero(change) + 1), censored.shape[axis]])
        assert widths.min() > side - 1
        assert widths.max() < 2 * side


def test_wider_padding_never_covers_less(rng: np.random.Generator) -> None:
    for settings in STYLES:
        box = some_boxes(rng, (64, 64), 1)
        fractions = [
            censor_image(noise(rng), box, settings.model_copy(update={"padding": p}))[1]
            for p in (0, 0.1, 0.5, 2, 100)
        ]
        assert fractions == sorted(fractions)
        assert fractions[-1] <= 1


def test_a_box_over_the_edge_or_without_area_is_covered_inside_the_image(
    rng: np.random.Generator,
) -> None:
    assert censor_image(noise(rng), [(-500, -500, 500, 500)], Censor())[1] == 1
    assert censor_image(noise(rng), [(5, 5, 5, 5)], Censor())[1] == 1 / 64


def test_settings_survive_json() -> None:
    for settings in STYLES:
        assert Censor.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"style": "pixel"}, "style must be 'mosaic', 'blur' or 'solid', got 'pixel'"),
        ({"tile": 0}, "tile must be greater than 0, got 0"),
        ({"tile": 1.5}, "tile must be less than or equal to 1, got 1.5"),
        ({"tile": float("nan")}, "tile must be a finite number, got nan"),
        ({"padding": -0.1}, "padding must be greater than or equal to 0, got -0.1"),
        ({"padding": float("inf")}, "padding must be a finite number, got inf"),
        ({"padding": 1e308}, "padding must be less than or equal to 100, got 1e+308"),
        (
            {"style": "solid", "color": (0, 0, 256)},
            "color.2 must be less than or equal to 255, got 256",
        ),
    ],
)
def test_an_invalid_setting_is_refused_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Censor(**values)
    assert str(refusal.value) == words


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"style": "solid", "tile": 0.5}, "tile has no effect with style 'solid'"),
        ({"color": (1, 2, 3)}, "color has no effect with style 'mosaic'"),
    ],
)
def test_a_setting_without_effect_warns(values: dict[str, Any], message: str) -> None:
    with pytest.warns(UnusedSettingWarning, match=message):
        Censor(**values)


def test_a_misspelled_setting_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match=r"no setting named 'colour'\. Did you mean 'color'\?"):
        Censor.model_validate({"colour": (0, 0, 0)})


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((30, 10, 20, 20), "left <= right"),
        ((10, 30, 20, 20), "top <= bottom"),
        ((10, 10, float("nan"), 20), "finite"),
        ((10, 10, float("inf"), 20), "finite"),
        ((64, 10, 80, 20), "must touch the image of 64x64 pixels"),
        ((10, -20, 20, -10), "must touch the image of 64x64 pixels"),
    ],
)
@pytest.mark.parametrize("settings", STYLES, ids=lambda s: s.style)
def test_a_box_that_covers_nothing_is_refused(
    box: Box, words: str, settings: Censor, rng: np.random.Generator
) -> None:
    with pytest.raises(ConfigError, match=words):
        censor_image(noise(rng), [box], settings)


@pytest.mark.parametrize("style", ["mosaic", "blur"])
def test_a_tile_too_small_to_hide_anything_is_refused(style: Any, rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match=r"a tile must be at least 2 pixels, got 1\.28"):
        censor_image(noise(rng), [(0, 0, 9, 9)], Censor(style=style, tile=0.02))


def test_an_image_in_another_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be in mode RGB, got 'L'"):
        censor_image(Image.new("L", (64, 64)), [], Censor())
