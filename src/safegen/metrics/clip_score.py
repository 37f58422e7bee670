"""The CLIP score: how well pictures fit their prompts, as 100 times a cosine."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from safegen.metrics.bootstrap import Mean, mean

SCALE = "100*cos"
"""The scale of the tables that say 31 (ViT-B/32) or 26 (ViT-L/14).

Others: cos (0.31), and Hessel's 2.5 max(cos, 0) (0.78).
"""


def clip_scores(images: NDArray[Any], texts: NDArray[Any]) -> NDArray[np.float64]:
    """Return 100 cos(image, text) of each pair, (n,); not cut at 0 (Hessel et al. 2021, arXiv:2104.08718, without their factor and cut).

    Args:
        images: (n, d) image embeddings.
        texts: (n, d) embeddings of the prompts, in the same order. Prompts over 77 tokens were cut
            by the encoder.

    Raises:
        ValueError: shapes differ, nothing is there, values are not finite, or an embedding is zero.
    """
    x, y = np.asarray(images, dtype=np.float64), np.asarray(texts, dtype=np.float64)
    if x.ndim != 2 or x.shape != y.shape or not x.size:
        raise ValueError(
            f"image and text embeddings must be two tables of one shape (n, d), n > 0, got {x.shape} and {y.shape}"
        )
    lengths = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    if not np.isfinite(lengths).all() or not lengths.all():
        raise ValueError("an embedding must be finite and not zero")
    out: NDArray[np.float64] = 100 * (x * y).sum(1) / lengths
    return out


def clip_score(
    images: NDArray[Any],
    texts: NDArray[Any],
    prompts: Sequence[Hashable],
    *,
    model: str,
    seed: int = 0,
    draws: int = 2000,
) -> Mean:
    """Return the mean CLIP score with a bootstrap interval over prompts; its scale names the model, without which it says nothing.

    Raises:
        ValueError: see `clip_scores`; or `prompts` has another length.
    """
    scores = clip_scores(images, texts).tolist()
    return mean(scores, prompts, scale=f"{SCALE}, {model}", seed=seed, draws=draws)
