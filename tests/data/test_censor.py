"""Laws of covering boxes, and the values that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import ConfigError
from safegen.data.triplets.censor import Box, Censor, censor

STYLES = [Censor(), Censor(style="blur"), Censor(style="solid", colour=(0, 128, 0))]
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
def test_without_a_box_the_picture_stays_the_same(
    settings: Censor, rng: np.random.Generator
) -> None:
    picture = noise(rng)
    censored, covered = censor(picture, [], settings)
    assert same(censored, picture)
    assert covered == 0


@pytest.mark.parametrize("settings", STYLES, ids=lambda s: s.style)
@pytest.mark.parametrize("size", SIZES)
def test_only_what_is_counted_as_covered_changes_and_the_picture_given_does_not(
    settings: Censor, size: tuple[int, int], rng: np.random.Generator
) -> None:
    for _ in range(10):
        picture, boxes = noise(rng, size), some_boxes(rng, size)
        before = np.asarray(picture).copy()
        censored, covered = censor(picture, boxes, settings)
        changed = (np.asarray(censored) != before).any(axis=-1)
        assert censored.size == size
        assert 0 < covered <= 1
        assert changed.mean() <= covered
        assert changed.mean() > 0.9 * covered  # noise hardly ever equals its cover
        assert np.array_equal(np.asarray(picture), before)


@pytest.mark.parametrize("style", ["blur", "solid"])
def test_a_blur_and_a_solid_cover_end_with_the_padded_box(
    style: Any, rng: np.random.Generator
) -> None:
    picture = noise(rng)
    censored, covered = censor(picture, [(20, 10, 30, 30)], Censor(style=style, padding=0.1))
    outside = np.ones((64, 64), dtype=bool)
    outside[8:32, 19:31] = False
    assert np.array_equal(np.asarray(censored)[outside], np.asarray(picture)[outside])
    assert covered == 24 * 12 / 64**2


def test_a_solid_cover_has_the_colour_asked_for(rng: np.random.Generator) -> None:
    censored, _ = censor(noise(rng), [(20, 10, 30, 30)], Censor(style="solid", colour=(1, 2, 3)))
    assert (np.asarray(censored)[10:30, 20:30] == (1, 2, 3)).all()


def test_a_mosaic_covers_every_tile_that_a_padded_box_touches_and_no_other(
    rng: np.random.Generator,
) -> None:
    picture = noise(rng)
    censored, covered = censor(
        picture, [(10, 20, 16, 24)], Censor(padding=0.5)
    )  # grows to 7..19 by 18..26: tiles 0..2 by 2..3
    outside = np.ones((64, 64), dtype=bool)
    outside[16:32, 0:24] = False
    assert np.array_equal(np.asarray(censored)[outside], np.asarray(picture)[outside])
    assert covered == 6 / 64


def test_a_mosaic_keeps_the_mean_colour_of_every_tile(rng: np.random.Generator) -> None:
    picture = noise(rng)
    censored, _ = censor(picture, [(0, 0, 64, 64)], Censor())
    before, after = (
        np.asarray(i, dtype=np.float64).reshape(8, 8, 8, 8, 3) for i in (picture, censored)
    )
    assert (after == after[:, :1, :, :1]).all()
    np.testing.assert_allclose(after[:, 0, :, 0], before.mean(axis=(1, 3)), atol=0.5)


@pytest.mark.parametrize("size", SIZES)
def test_a_second_mosaic_over_the_same_boxes_changes_nothing(
    size: tuple[int, int], rng: np.random.Generator
) -> None:
    for _ in range(10):
        picture, boxes = noise(rng, size), some_boxes(rng, size)
        once, covered = censor(picture, boxes, Censor())
        twice, covered_again = censor(once, boxes, Censor())
        assert same(once, twice)
        assert covered == covered_again


def test_mosaics_of_overlapping_boxes_agree_in_any_order(rng: np.random.Generator) -> None:
    for _ in range(10):
        picture, boxes = noise(rng, (100, 64)), some_boxes(rng, (100, 64))
        together, _ = censor(picture, boxes, Censor())
        one_by_one = picture
        for box in reversed(boxes):
            one_by_one, _ = censor(one_by_one, [box], Censor())
        assert same(together, one_by_one)


@pytest.mark.parametrize("size", SIZES)
def test_tiles_are_of_the_size_asked_for_up_to_the_edge(
    size: tuple[int, int], rng: np.random.Generator
) -> None:
    censored = np.asarray(censor(noise(rng, size), [(0, 0, *size)], Censor(tile=1 / 4))[0])
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
            censor(noise(rng), box, settings.model_copy(update={"padding": p}))[1]
            for p in (0, 0.1, 0.5, 2, 100)
        ]
        assert fractions == sorted(fractions)
        assert fractions[-1] <= 1


def test_a_box_over_the_edge_or_without_area_is_covered_as_far_as_it_is_in_the_picture(
    rng: np.random.Generator,
) -> None:
    assert censor(noise(rng), [(-500, -500, 500, 500)], Censor())[1] == 1
    assert censor(noise(rng), [(5, 5, 5, 5)], Censor())[1] == 1 / 64


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
            {"style": "solid", "colour": (0, 0, 256)},
            "colour.2 must be less than or equal to 255, got 256",
        ),
        (
            {"style": "solid", "tile": 0.5},
            "tile has no effect with the style 'solid', got 0.5; leave it out, or choose mosaic or blur",
        ),
        (
            {"colour": (1, 2, 3)},
            "colour has no effect with the style 'mosaic', got (1, 2, 3); leave it out, or choose solid",
        ),
    ],
)
def test_a_bad_setting_is_refused_in_one_line(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        Censor(**values)
    assert str(refusal.value) == words


def test_a_misspelt_setting_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no setting named 'color'\. Did you mean 'colour'\?"):
        Censor.model_validate({"color": (0, 0, 0)})


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ((30, 10, 20, 20), "left <= right"),
        ((10, 30, 20, 20), "top <= bottom"),
        ((10, 10, float("nan"), 20), "finite"),
        ((10, 10, float("inf"), 20), "finite"),
        ((64, 10, 80, 20), "must touch the picture of 64x64 pixels"),
        ((10, -20, 20, -10), "must touch the picture of 64x64 pixels"),
    ],
)
@pytest.mark.parametrize("settings", STYLES, ids=lambda s: s.style)
def test_a_box_that_covers_nothing_is_refused(
    box: Box, words: str, settings: Censor, rng: np.random.Generator
) -> None:
    with pytest.raises(ConfigError, match=words):
        censor(noise(rng), [box], settings)


@pytest.mark.parametrize("style", ["mosaic", "blur"])
def test_a_tile_too_small_to_hide_anything_is_refused(style: Any, rng: np.random.Generator) -> None:
    with pytest.raises(ConfigError, match=r"a tile must be at least 2 pixels, got 1\.28"):
        censor(noise(rng), [(0, 0, 9, 9)], Censor(style=style, tile=0.02))


def test_a_picture_in_another_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="must be in mode RGB, got 'L'"):
        censor(Image.new("L", (64, 64)), [], Censor())
