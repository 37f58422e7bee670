"""Distances between two sets of pictures, from their features: FID, KID and CMMD.

The number of pictures is part of the answer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Against = Literal["real", "base"]
"""What the reference is: real pictures, or the base model's of the same prompts.

The two are never comparable, hence two names.
"""
NAMES = {"real": "{}_real", "base": "{}_to_base"}


@dataclass(frozen=True)
class Distance:
    """A distance between `n` pictures and `n_reference` others.

    Two of them compare only if all but the values are equal.
    """

    name: str
    """fid_real, fid_to_base, kid_real ..."""
    value: float
    n: int
    n_reference: int
    width: int
    """Numbers per picture; the published FID has 2048."""
    estimator: str
    scale: float = 1.0
    """What the value was multiplied with."""
    extractor: str = ""
    """Id of what made the features."""
    subsets: int | None = None
    subset_size: int | None = None
    spread: float | None = None
    """Standard deviation over subsets (not a standard error: subsets share pictures)."""
    seed: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        return asdict(self)


def fid(
    features: NDArray[Any], reference: NDArray[Any], *, against: Against, extractor: str = ""
) -> Distance:
    """Return the Frechet inception distance |m1 - m2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)) (Heusel et al. 2017, arXiv:1706.08500, eq. 6).

    S1 = A'A and S2 = B'B with A, B the centred features over sqrt(n - 1), so the eigenvalues of S1
    S2 are the squared singular values of A B', and the trace of the root is their sum. No matrix
    root, no imaginary part, right also where n is under the width. The estimate is biased upwards
    and falls with n: compare only at one n, and under some 2,000 pictures read KID or CMMD.

    Args:
        features: (n, d), n >= 2; for the published FID the 2048 of `inception`.
        reference: (m, d), m >= 2.
        against: what the reference is.
        extractor: id of what made the features.

    Raises:
        ValueError: too few rows, other widths, or values that are not finite.
    """
    x, y = _checked(features, reference, least=2)
    value = frechet(x.mean(0), _root(x), y.mean(0), _root(y))
    return Distance(
        _name("fid", against),
        value,
        len(x),
        len(y),
        x.shape[1],
        "covariance with n - 1",
        extractor=extractor,
    )


def frechet(m1: Array, a: Array, m2: Array, b: Array) -> float:
    """Return the Frechet distance of two Gaussians with means m1, m2 and covariances a'a, b'b (Dowson & Landau 1982).

    Args:
        m1: (d,).
        a: (any, d), a root of the covariance.
        m2: (d,).
        b: (any, d).
    """
    cross = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return max(0.0, float(((m1 - m2) ** 2).sum() + (a * a).sum() + (b * b).sum() - 2 * cross))


def covariance_root(covariance: NDArray[Any]) -> Array:
    """Return r (d, d) with r'r = covariance, for published statistics that hold a mean and a covariance instead of features.

    Raises:
        ValueError: not square, not finite, not symmetric, or with an eigenvalue clearly under 0.
    """
    s = np.asarray(covariance, dtype=np.float64)
    if (
        s.ndim != 2
        or s.shape[0] != s.shape[1]
        or not np.isfinite(s).all()
        or not np.allclose(s, s.T, rtol=1e-6, atol=1e-12)
    ):
        raise ValueError(f"a covariance must be square, finite and symmetric, got shape {s.shape}")
    values, vectors = np.linalg.eigh((s + s.T) / 2)
    if values[0] < -1e-6 * max(values[-1], 0.0) - 1e-12:
        raise ValueError(f"a covariance has no eigenvalue under 0, got {values[0]:.3g}")
    root: Array = np.sqrt(values.clip(0))[:, None] * vectors.T
    return root


def kid(
    features: NDArray[Any],
    reference: NDArray[Any],
    *,
    against: Against,
    paired: bool = False,
    subsets: int = 100,
    subset_size: int | None = None,
    seed: int = 0,
    extractor: str = "",
) -> Distance:
    """Return the kernel inception distance: the unbiased MMD^2 with kernel (x.y / d + 1)^3 (Binkowski et al. 2018, arXiv:1801.01401).

    The mean over random subsets drawn without replacement from either side; one, where a subset is
    the whole of both. It has no bias at any n and may be negative. Where row i of both sides is one
    prompt, seed and noise, the two resemble each other as no other rows do, and would press it far
    under 0: `paired` leaves them out of the sum between the sides, as a row with itself is left out
    within one (the U-statistic of Gretton et al. 2012, JMLR 13, eq. 4; as unbiased on independent
    rows).

    Args:
        features: (n, d), n >= 2.
        reference: (m, d), m >= 2.
        against: what the reference is.
        paired: whether rows belong together; then n = m, and subsets take the same rows of both.
        subsets: how many.
        subset_size: pictures from either side in each; 1000 or what there is when None.
        seed: of the draws.
        extractor: id of what made the features.

    Raises:
        ValueError: too few rows, other widths, values that are not finite, subsets larger than the
            sets, or pairs that are none.
    """
    x, y = _checked(features, reference, least=2)
    if paired and len(x) != len(y):
        raise ValueError(f"pairs need as many pictures on either side, got {len(x)} and {len(y)}")
    most = min(len(x), len(y))
    size = min(1000, most) if subset_size is None else subset_size
    if not 2 <= size <= most or subsets < 1:
        raise ValueError(
            f"KID takes 1 or more subsets of 2..{most} pictures (the smaller set), got {subsets} of {size}"
        )
    if size == len(x) == len(y):
        subsets = 1  # all of them would be the same pictures
    rng, width = np.random.default_rng(seed), x.shape[1]

    def cubic(p: Array, q: Array) -> Array:
        k: Array = p @ q.T / width + 1
        return k * k * k  # far faster than a power

    found = []
    for _ in range(subsets):
        rows = rng.choice(len(x), size, replace=False)
        others = rows if paired else rng.choice(len(y), size, replace=False)
        found.append(mmd2(x[rows], y[others], cubic, unbiased=True, paired=paired))
    name, estimator = (
        _name("kid", against),
        "unbiased, cubic kernel" + (", pairs left out" if paired else ""),
    )
    return Distance(
        name,
        float(np.mean(found)),
        len(x),
        len(y),
        width,
        estimator,
        1.0,
        extractor,
        subsets,
        size,
        float(np.std(found)),
        seed,
    )


def cmmd(
    features: NDArray[Any],
    reference: NDArray[Any],
    *,
    against: Against,
    unbiased: bool = False,
    sigma: float = 10.0,
    extractor: str = "",
) -> Distance:
    """Return CMMD: 1000 times the MMD^2 of unit-length CLIP embeddings with kernel exp(-|x - y|^2 / (2 sigma^2)).

    Jayasumana et al. 2024, arXiv:2401.09603. Their program keeps the diagonal (the biased,
    minimum-variance estimator), which lifts it by about 1000 (1 - mean kernel) (1/n + 1/m);
    `unbiased` leaves it out. Rows are scaled to length 1 here, as in their program.

    Args:
        features: (n, d) CLIP image embeddings; published with ViT-L/14 at 336 pixels.
        reference: (m, d).
        against: what the reference is.
        unbiased: leave the diagonal out; may then be negative.
        sigma: width of the kernel, > 0; 10 as published.
        extractor: id of what made the features.

    Raises:
        ValueError: too few rows, other widths, values that are not finite, a row of zeros, or
            `sigma` not positive.
    """
    x, y = (_unit(v) for v in _checked(features, reference, least=2 if unbiased else 1))
    if not sigma > 0:
        raise ValueError(f"sigma must be > 0, got {sigma}")

    def rbf(p: Array, q: Array) -> Array:
        apart = (p * p).sum(1)[:, None] + (q * q).sum(1)[None] - 2 * p @ q.T
        out: Array = np.exp(-apart.clip(0) / (2 * sigma * sigma))
        return out

    value = 1000 * mmd2(x, y, rbf, unbiased=unbiased)
    estimator = f"{'unbiased' if unbiased else 'biased'}, Gaussian kernel, sigma {sigma:g}"
    return Distance(
        _name("cmmd", against), value, len(x), len(y), x.shape[1], estimator, 1000.0, extractor
    )


def mmd2(
    x: Array,
    y: Array,
    kernel: Callable[[Array, Array], Array],
    *,
    unbiased: bool,
    paired: bool = False,
) -> float:
    """Return the squared maximum mean discrepancy (Gretton et al. 2012, JMLR 13, eq. 3 unbiased, eq. 5 biased), in blocks of rows.

    Args:
        x: (n, d).
        y: (m, d).
        kernel: (a, d), (b, d) -> (a, b), symmetric.
        unbiased: leave out the pairs of a row with itself.
        paired: leave out the pairs of row i with row i of the other side too; then n = m.
    """

    def within(z: Array) -> float:
        total, diagonal, n = *_sums(z, z, kernel), len(z)
        return (total - diagonal) / (n * (n - 1)) if unbiased else total / n**2

    total, diagonal = _sums(x, y, kernel)
    between = (total - diagonal) / (len(x) * (len(x) - 1)) if paired else total / (len(x) * len(y))
    return within(x) + within(y) - 2 * between


def _sums(x: Array, y: Array, kernel: Callable[[Array, Array], Array]) -> tuple[float, float]:
    """Return the sum of all entries of kernel(x, y), and of those on its diagonal."""
    total = diagonal = 0.0
    for i in range(0, len(x), 1024):
        block = kernel(x[i : i + 1024], y)
        total, diagonal = total + float(block.sum()), diagonal + float(block.trace(i))
    return total, diagonal


def _name(metric: str, against: str) -> str:
    if against not in NAMES:
        raise ValueError(f"a distance is against {' or '.join(NAMES)}, got {against!r}")
    return NAMES[against].format(metric)


def _root(x: Array) -> Array:
    """Return a root (min(n, d), d) of the covariance of the rows."""
    centred = (x - x.mean(0)) / np.sqrt(len(x) - 1)
    if len(x) <= x.shape[1]:
        return centred
    return np.asarray(np.linalg.qr(centred, mode="r"))


def _unit(x: Array) -> Array:
    length = np.linalg.norm(x, axis=1, keepdims=True)
    if not length.all():
        raise ValueError("an embedding of length 0 has no direction")
    out: Array = x / length
    return out


def _checked(features: NDArray[Any], reference: NDArray[Any], *, least: int) -> tuple[Array, Array]:
    x, y = np.asarray(features, dtype=np.float64), np.asarray(reference, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or x.shape[1] == 0:
        raise ValueError(
            f"features must be two tables (n, d) and (m, d) of one width, got {x.shape} and {y.shape}"
        )
    if min(len(x), len(y)) < least:
        raise ValueError(
            f"a distance needs at least {least} pictures on either side, got {len(x)} and {len(y)}"
        )
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        raise ValueError("features must be finite, got NaN or infinity")
    return x, y
