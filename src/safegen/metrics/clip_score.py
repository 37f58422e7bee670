"""CLIP score: how well images match their prompts, as 100 times a cosine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safegen.metrics.bootstrap import Mean, bootstrap_mean

SCALE = "100*cos"
"""Scale of published tables with values near 31 (ViT-B/32) or 26 (ViT-L/14).

Other scales in use: cos (0.31), and 2.5 max(cos, 0) of Hessel et al. (0.78).
"""


def clip_scores(images: NDArray[Any], texts: NDArray[Any]) -> NDArray[np.float64]:
    """Return 100 cos(image, text) of each pair, (n,).

    Hessel et al. 2021 (arXiv:2104.08718) without their factor of 2.5 and their clamp at 0.

    Args:
        images: (n, d) image embeddings.
        texts: (n, d) prompt embeddings in the same order; the encoder truncates long prompts.

    Raises:
        ValueError: shapes differ, n is 0, values are not finite, or an embedding is zero.
    """
    x, y = np.asarray(images, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape or not x.size:
        raise ValueError(
            "image and text embeddings must have one shape (n, d), n > 0, "
            f"got {x.shape} and {y.shape}"
        )
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise ValueError("an embedding must be finite and not zero")
    scores: NDArray[np.float64] = 100 * (x * y).sum(1) / lengths
    return scores


def clip_score(
    images: NDArray[Any],
    texts: NDArray[Any],
    prompts: Sequence[Hashable],
    *,
    model: str,
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return the mean CLIP score with a bootstrap interval over prompts.

    Scores of different CLIP models are not comparable, so the scale of the mean names the model.

    Raises:
        ValueError: see `clip_scores`; or `prompts` has another length.
    """
    scores = clip_scores(images, texts).tolist()
    return bootstrap_mean(scores, prompts, scale=f"{SCALE}, {model}", seed=seed, draws=draws)
