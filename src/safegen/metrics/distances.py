"""Distances between the features of two sets of images: FID, KID and CMMD."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from safegen.metrics.rates import Result

Array = NDArray[np.float64]
ReferenceKind = Literal["real", "base"]
"""Reference images: real ones, or those of the base model for the same prompts.

Distances to the two are not comparable, so their names differ.
"""
NAMES = {"real": "{}_real", "base": "{}_to_base"}


@dataclass(frozen=True)
class Distance(Result):
    """Distance between `n` images and `n_reference` reference images.

    Two distances are comparable only if all their fields but the values are equal.
    """

    name: str
    """Name such as fid_real, fid_to_base or kid_real."""
    value: float
    n: int
    n_reference: int
    width: int
    """Number of features per image; 2048 in the published FID."""
    estimator: str
    scale: float = 1.0
    """Factor of the value."""
    extractor: str = ""
    """Id of the feature extractor."""
    subsets: int | None = None
    subset_size: int | None = None
    spread: float | None = None
    """Standard deviation over subsets; not a standard error, because subsets share images."""
    seed: int | None = None


def fid(
    features: NDArray[Any],
    reference: NDArray[Any],
    *,
    reference_kind: ReferenceKind,
    extractor: str = "",
) -> Distance:
    """Return the Frechet inception distance.

    FID = |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    S1 = A'A and S2 = B'B for the centered features A and B over sqrt(n - 1). The eigenvalues of
    S1 S2 are the squared singular values of A B', and the trace of the root is the sum of the
    singular values. This needs no matrix root and holds also if n is less than d. The estimate is
    biased upward and falls with n: compare at equal n only, and prefer KID or CMMD below 2,000
    images.

    Args:
        features: (n, d), n >= 2; the published FID uses the 2048 features of `inception`.
        reference: (m, d), m >= 2.
        reference_kind: `real` or `base`.
        extractor: id of the feature extractor.

    Raises:
        ValueError: too few rows, different widths, or values that are not finite.
    """
    x, y = _checked(features, reference, least=2)
    value = frechet(x.mean(0), _root(x), y.mean(0), _root(y))
    return Distance(
        _name("fid", reference_kind),
        value,
        len(x),
        len(y),
        x.shape[1],
        "covariance with n - 1",
        extractor=extractor,
    )


def frechet(m1: Array, a: Array, m2: Array, b: Array) -> float:
    """Return the Frechet distance of two Gaussians (Dowson & Landau 1982).

    Args:
        m1: mean of the first, (d,).
        a: root of its covariance a'a, (any, d).
        m2: mean of the second, (d,).
        b: root of its covariance b'b, (any, d).
    """
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, float(((m1 - m2) ** 2).sum() + (a * a).sum() + (b * b).sum() - 2 * cross))


def kid(
    features: NDArray[Any],
    reference: NDArray[Any],
    *,
    reference_kind: ReferenceKind,
    paired: bool = False,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
    extractor: str = "",
) -> Distance:
    """Return the kernel inception distance: the unbiased MMD^2 with kernel (x.y / d + 1)^3.

    Mean over random subsets without replacement (Binkowski et al. 2018, arXiv:1801.01401). It is
    unbiased at any n and may be negative. If row i of both sets has the same prompt, seed and
    noise, the two rows are similar and push the estimate far below 0. `paired` excludes such pairs
    from the sum between the sets, as rows are excluded from the sum with themselves (U-statistic of
    Gretton et al. 2012, JMLR 13, eq. 4).

    Args:
        features: (n, d), n >= 2.
        reference: (m, d), m >= 2.
        reference_kind: `real` or `base`.
        paired: whether row i of both sets belongs together; then n = m.
        subsets: number of subsets; 1 is used if a subset holds all rows of both sets.
        subset_size: rows of each set in a subset. Default: 1000, or all if there are fewer.
        seed: seed of the subsets.
        extractor: id of the feature extractor.

    Raises:
        ValueError: too few rows, different widths, values that are not finite, subsets larger than
            the sets, or unpaired sets with `paired`.
    """
    x, y = _checked(features, reference, least=2)
    if paired and len(x) != len(y):
        raise ValueError(f"paired sets must be equally long, got {len(x)} and {len(y)}")
    most = min(len(x), len(y))
    size = min(1000, most) if subset_size is None else subset_size
    if not 2 <= size <= most or subsets < 1:
        raise ValueError(
            f"KID needs 1 or more subsets of 2 to {most} images, got {subsets} of {size}"
        )
    if size == len(x) == len(y):
        subsets = 1  # all subsets would be equal
    rng, width = np.random.default_rng(seed), x.shape[1]

    def cubic(p: Array, q: Array) -> Array:
        k: Array = p @ q.T / width + 1
        return k * k * k  # much faster than a power

    values = []
    for _ in range(subsets):
        rows = rng.choice(len(x), size, replace=False)
        others = rows if paired else rng.choice(len(y), size, replace=False)
        values.append(mmd2(x[rows], y[others], cubic, unbiased=True, paired=paired))
    name, estimator = (
        _name("kid", reference_kind),
        "unbiased, cubic kernel" + (", pairs left out" if paired else ""),
    )
    return Distance(
        name,
        float(np.mean(values)),
        len(x),
        len(y),
        width,
        estimator,
        1.0,
        extractor,
        subsets,
        size,
        float(np.std(values)),
        seed,
    )


def cmmd(
    features: NDArray[Any],
    reference: NDArray[Any],
    *,
    reference_kind: ReferenceKind,
    unbiased: bool = False,
    sigma: float = 10.0,
    extractor: str = "",
) -> Distance:
    """Return CMMD: 1000 times the MMD^2 of unit-length CLIP embeddings with a Gaussian kernel.

    Kernel exp(-|x - y|^2 / (2 sigma^2)) (Jayasumana et al. 2024, arXiv:2401.09603). The authors'
    code keeps the diagonal (the biased, minimum-variance estimator), which raises the value by
    about 1000 (1 - mean kernel) (1/n + 1/m); `unbiased` drops it. Rows are scaled to length 1, as
    in that code.

    Args:
        features: (n, d) CLIP image embeddings; published with ViT-L/14 at 336 pixels.
        reference: (m, d).
        reference_kind: `real` or `base`.
        unbiased: drop the diagonal; the value may then be negative.
        sigma: width of the kernel, > 0; 10 as published.
        extractor: id of the feature extractor.

    Raises:
        ValueError: too few rows, different widths, values that are not finite, a row of zeros, or
            `sigma` not positive.
    """
    x, y = (_unit(v) for v in _checked(features, reference, least=2 if unbiased else 1))
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")

    def rbf(p: Array, q: Array) -> Array:
        squared = (p * p).sum(1)[:, None] + (q * q).sum(1)[None] - 2 * p @ q.T
        k: Array = np.exp(-squared.clip(0) / (2 * sigma * sigma))
        return k

    value = 1000 * mmd2(x, y, rbf, unbiased=unbiased)
    estimator = f"{'unbiased' if unbiased else 'biased'}, Gaussian kernel, sigma {sigma:g}"
    return Distance(
        _name("cmmd", reference_kind),
        value,
        len(x),
        len(y),
        x.shape[1],
        estimator,
        1000.0,
        extractor,
    )


def mmd2(
    x: Array,
    y: Array,
    kernel: Callable[[Array, Array], Array],
    *,
    unbiased: bool,
    paired: bool = False,
) -> float:
    """Return the squared maximum mean discrepancy, computed in blocks of rows.

    Gretton et al. 2012, JMLR 13, eq. 3 (unbiased) and eq. 5 (biased).

    Args:
        x: (n, d).
        y: (m, d).
        kernel: symmetric function (a, d), (b, d) -> (a, b).
        unbiased: exclude the pairs of a row with itself.
        paired: also exclude the pairs of row i of `x` with row i of `y`; then n = m.
    """

    def mean_kernel(z: Array) -> float:
        total, diagonal, n = *_sums(z, z, kernel), len(z)
        return (total - diagonal) / (n * (n - 1)) if unbiased else total / n**2

    total, diagonal = _sums(x, y, kernel)
    between = (total - diagonal) / (len(x) * (len(x) - 1)) if paired else total / (len(x) * len(y))
    return mean_kernel(x) + mean_kernel(y) - 2 * between


def _sums(x: Array, y: Array, kernel: Callable[[Array, Array], Array]) -> tuple[float, float]:
    """Return the sum of all entries of kernel(x, y), and the sum of its diagonal."""
    total = diagonal = 0.0
    for i in range(0, len(x), 1024):
        block = kernel(x[i : i + 1024], y)
        total, diagonal = total + float(block.sum()), diagonal + float(block.trace(i))
    return total, diagonal


def _name(metric: str, reference_kind: str) -> str:
    if reference_kind not in NAMES:
        raise ValueError(f"reference_kind must be {' or '.join(NAMES)}, got {reference_kind!r}")
    return NAMES[reference_kind].format(metric)


def _root(x: Array) -> Array:
    """Return a root (min(n, d), d) of the covariance of the rows."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    if len(x) <= x.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _unit(x: Array) -> Array:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        raise ValueError("an embedding must not be zero")
    unit: Array = x / length
    return unit


def _checked(features: NDArray[Any], reference: NDArray[Any], *, least: int) -> tuple[Array, Array]:
    x, y = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"features must have shapes (n, d) and (m, d), got {x.shape} and {y.shape}"
        )
    if min(len(x), len(y)) < least:
        raise ValueError(f"both sets must have at least {least} images, got {len(x)} and {len(y)}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features must be finite, got NaN or infinity")
    return x, y
