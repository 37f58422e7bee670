"""The CLIP score is 100 times a cosine and names its model."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import cosine

from safegen.metrics.clip_score import clip_score, clip_scores


def _pairs(n: int = 12, d: int = 5):
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, d)), rng.normal(size=(n, d))


def test_the_score_is_scipys_cosine_times_100():
    x, y = _pairs()
    assert clip_scores(x, y) == pytest.approx(
        [100 * (1 - cosine(a, b)) for a, b in zip(x, y, strict=True)]
    )


def test_equal_directions_score_100_and_opposite_ones_minus_100():
    x, _ = _pairs()
    assert clip_scores(x, 3 * x) == pytest.approx(100)
    assert clip_scores(x, -x) == pytest.approx(-100)


def test_the_mean_has_an_interval_over_prompts_and_names_the_model():
    x, y = _pairs()
    found = clip_score(x, y, [n // 3 for n in range(12)], model="mini-clip:00")
    assert found.value == pytest.approx(clip_scores(x, y).mean())
    assert found.low <= found.value <= found.high
    assert (found.scale, found.n, found.clusters) == ("100*cos, mini-clip:00", 12, 4)


@pytest.mark.parametrize("bad", [np.ones((3, 4)), np.ones(5), np.empty((0, 5))])
def test_different_shapes_are_refused(bad):
    with pytest.raises(ValueError, match="one shape"):
        clip_scores(bad, _pairs()[1] if bad.size else bad)


@pytest.mark.parametrize("value", [0, np.nan])
def test_a_zero_or_nan_embedding_is_refused(value):
    x, y = _pairs()
    with pytest.raises(ValueError, match="finite and not zero"):
        clip_scores(np.full_like(x, value), y)
