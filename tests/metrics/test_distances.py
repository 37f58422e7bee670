"""FID, KID and CMMD against closed forms, brute force and torchmetrics."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from scipy.linalg import sqrtm

from safegen.metrics.distances import cmmd, fid, frechet, kid

CALLS = {"fid": fid, "kid": kid, "cmmd": cmmd}


def _sets(n: int = 40, m: int = 50, d: int = 6, shift: float = 0.5, seed: int = 0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + shift, rng.normal(size=(m, d)) + 0.1


def _gaussian(mean, std, n: int = 64):
    """Return rows whose mean and covariance (with n - 1) are exactly `mean` and diag(std^2)."""
    raw = np.random.default_rng(0).normal(size=(n, len(mean)))
    q, _ = np.linalg.qr(raw - raw.mean(0))
    return q * np.sqrt(n - 1) * np.asarray(std) + np.asarray(mean)


def test_fid_of_gaussians_along_the_axes_has_a_closed_form():
    found = fid(
        _gaussian([0, 1, 2], [1, 2, 3]), _gaussian([3, 1, 0], [2, 2, 0.5]), reference_kind="real"
    )
    assert found.value == pytest.approx(
        (9 + 0 + 4) + (1 + 0 + 6.25), rel=1e-10
    )  # |m1 - m2|^2 + sum (s1 - s2)^2
    assert (found.name, found.n, found.n_reference, found.width) == ("fid_real", 64, 64, 3)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 50, 6), (100, 7, 5), (300, 200, 20)])
def test_fid_is_the_formula_with_scipys_matrix_root(n, m, d):
    x, y = _sets(n, m, d)
    s, t = np.cov(x.T), np.cov(y.T)
    oracle = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert fid(x, y, reference_kind="real").value == pytest.approx(oracle, rel=1e-6)


def test_fid_with_fewer_images_than_features_is_that_of_their_span():
    x, y = _sets(10, 12, 6)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(64, 6)))[0]
    assert fid(x @ basis.T, y @ basis.T, reference_kind="base").value == pytest.approx(
        fid(x, y, reference_kind="base").value, rel=1e-10
    )


def test_moments_give_the_same_fid_as_the_features():
    x, y = _sets()

    def root(z):
        return np.real(sqrtm(np.cov(z.T)))

    assert frechet(x.mean(0), root(x), y.mean(0), root(y)) == pytest.approx(
        fid(x, y, reference_kind="real").value, rel=1e-9
    )


def test_fid_is_biased_at_small_n_and_kid_is_not():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(100, 64)), rng.normal(size=(100, 64))) for _ in range(20)]
    kids = [kid(x, y, reference_kind="real", subsets=1).value for x, y in pairs]
    assert min(fid(x, y, reference_kind="real").value for x, y in pairs) > 5
    assert abs(np.mean(kids)) < 3 * np.std(kids) / np.sqrt(20)


@pytest.mark.parametrize("call", [fid, cmmd])
def test_a_distance_is_zero_to_itself_and_symmetric(call):
    x, y = _sets()
    assert call(x, x, reference_kind="base").value == pytest.approx(0, abs=1e-9)
    assert call(x, y, reference_kind="base").value == pytest.approx(
        call(y, x, reference_kind="base").value, rel=1e-9
    )
    assert call(x, y, reference_kind="base").value > 0


@pytest.mark.parametrize("name", ["fid", "cmmd"])
def test_a_distance_is_invariant_to_order_and_rotation(name):
    x, y = _sets()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    found = CALLS[name](x, y, reference_kind="real").value
    assert CALLS[name](x[::-1] @ turn, y @ turn, reference_kind="real").value == pytest.approx(
        found, rel=1e-9
    )


def test_kid_on_one_full_subset_is_the_u_statistic_by_brute_force():
    x, y = _sets(9, 9)

    def k(a, b):
        return (a @ b / 6 + 1) ** 3

    within = [
        sum(k(s[i], s[j]) for i, j in product(range(9), range(9)) if i != j) / 72 for s in (x, y)
    ]
    oracle = sum(within) - 2 * sum(k(a, b) for a, b in product(x, y)) / 81
    found = kid(x, y, reference_kind="base")
    assert found.value == pytest.approx(oracle, rel=1e-10)
    assert (found.name, found.subsets, found.subset_size, found.spread) == ("kid_to_base", 1, 9, 0)


def test_paired_kid_excludes_each_pair_and_is_zero_for_equal_sets():
    x, y = _sets(9, 9)

    def k(a, b):
        return (a @ b / 6 + 1) ** 3

    apart = [(i, j) for i, j in product(range(9), range(9)) if i != j]
    oracle = (
        sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in apart) / 72
    )
    found = kid(x, y, reference_kind="base", paired=True)
    assert found.value == pytest.approx(oracle, rel=1e-10)
    assert found.estimator == "unbiased, cubic kernel, pairs left out"
    assert kid(x, x, reference_kind="base", paired=True).value == pytest.approx(0, abs=1e-10)
    assert kid(x, x, reference_kind="base").value < -0.1  # what pairing does otherwise
    halves = kid(x, x + 0.5, reference_kind="base", paired=True, subset_size=4)
    assert halves.value > 0
    with pytest.raises(ValueError, match="paired sets must be equally long, got 9 and 8"):
        kid(x, y[:8], reference_kind="base", paired=True)


def test_kid_over_subsets_depends_on_the_seed_only_and_estimates_the_full_kid():
    x, y = _sets(60, 60)
    found = kid(x, y, reference_kind="real", subset_size=20, seed=1)
    assert found == kid(x, y, reference_kind="real", subset_size=20, seed=1)
    assert found != kid(x, y, reference_kind="real", subset_size=20, seed=2)
    assert found.value == pytest.approx(
        kid(x, y, reference_kind="real", subsets=1).value, abs=4 * found.spread / 10
    )
    assert (found.subsets, found.subset_size, found.seed) == (100, 20, 1)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_is_brute_force_on_unit_vectors_times_1000(unbiased):
    x, y = _sets(7, 11)
    u, v = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (x, y))

    def k(a, b):
        return np.exp(-((a - b) ** 2).sum() / 200)

    def within(s):
        pairs = [
            k(s[i], s[j])
            for i, j in product(range(len(s)), range(len(s)))
            if not (unbiased and i == j)
        ]
        return sum(pairs) / len(pairs)

    oracle = 1000 * (within(u) + within(v) - 2 * np.mean([k(a, b) for a, b in product(u, v)]))
    found = cmmd(x, y, reference_kind="real", unbiased=unbiased)
    assert found.value == pytest.approx(oracle, rel=1e-9)
    assert (found.scale, found.estimator.split(",")[0]) == (
        1000,
        "unbiased" if unbiased else "biased",
    )


def test_cmmd_depends_on_directions_only():
    x, y = _sets()
    stretch = np.random.default_rng(3).uniform(0.1, 10, size=(40, 1))
    assert cmmd(x * stretch, y, reference_kind="real").value == pytest.approx(
        cmmd(x, y, reference_kind="real").value, rel=1e-9
    )
    with pytest.raises(ValueError, match="must not be zero"):
        cmmd(np.zeros((2, 6)), y, reference_kind="real")
    with pytest.raises(ValueError, match="sigma must be > 0"):
        cmmd(x, y, reference_kind="real", sigma=0)


def test_sets_of_several_blocks_are_summed_completely():
    x, y = _sets(1100, 1030, 2)
    u, v = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (x, y))

    def k(a, b):
        return np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200)

    within = [(k(s, s).sum() - len(s)) / (len(s) * (len(s) - 1)) for s in (u, v)]
    oracle = 1000 * (sum(within) - 2 * k(u, v).mean())
    assert cmmd(x, y, reference_kind="real", unbiased=True).value == pytest.approx(oracle, rel=1e-7)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_half_precision_features_are_computed_in_float64(name):
    x, y = (s.astype(np.float16) for s in _sets())
    assert CALLS[name](x, y, reference_kind="real") == CALLS[name](
        x.astype(np.float64), y.astype(np.float64), reference_kind="real"
    )


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_result_names_the_reference_and_the_extractor(name):
    x, y = _sets()
    real, base = (
        CALLS[name](x, y, reference_kind=a, extractor="mini-clip:00") for a in ("real", "base")
    )
    assert (real.name, base.name) == (f"{name}_real", f"{name}_to_base")
    row = json.loads(json.dumps(real.to_json()))
    assert (row["value"], row["n"], row["n_reference"], row["extractor"]) == (
        real.value,
        40,
        50,
        "mini-clip:00",
    )
    with pytest.raises(ValueError, match="real or base, got 'coco'"):
        CALLS[name](x, y, reference_kind="coco")


@pytest.mark.parametrize("name", sorted(CALLS))
def test_invalid_features_are_refused(name):
    x, y = _sets()
    for few in (x[:1], x[:0]) if name != "cmmd" else (x[:0],):
        with pytest.raises(ValueError, match="both sets must have at least"):
            CALLS[name](few, y, reference_kind="real")
    for bad in (x[:, :3], x[0], x[:, :0]):
        with pytest.raises(ValueError, match="must have shapes"):
            CALLS[name](bad, y, reference_kind="real")
    with pytest.raises(ValueError, match="finite"):
        CALLS[name](np.where(np.eye(40, 6), np.nan, x), y, reference_kind="real")


@pytest.mark.parametrize(("subsets", "size"), [(0, 10), (1, 1), (1, 41)])
def test_invalid_subsets_are_refused(subsets, size):
    x, y = _sets()
    with pytest.raises(ValueError, match=rf"subsets of 2 to 40 images, got {subsets} of {size}"):
        kid(x, y, reference_kind="real", subsets=subsets, subset_size=size)


def _torchmetrics(kind: str, **options):
    """Return torchmetrics' value for the two sets.

    Its feature network is a toy that reads the rows out of pictures.
    """
    pytest.importorskip("torchmetrics")
    import torch

    image = pytest.importorskip("torchmetrics.image." + kind, exc_type=ImportError)

    class Rows(torch.nn.Module):
        num_features = 6

        def forward(self, x):
            return x.flatten(1)

    x, y = (torch.from_numpy(s).reshape(-1, 1, 2, 3) for s in _sets(40, 40))
    metric = {"fid": "FrechetInceptionDistance", "kid": "KernelInceptionDistance"}[kind]
    given = (
        {"feature": Rows(), "normalize": True, "input_img_size": (1, 2, 3)}
        if kind == "fid"
        else {"feature": Rows(), "normalize": True}
    )
    judge = getattr(image, metric)(**given, **options)
    judge = judge.set_dtype(torch.float64)
    judge.update(x, real=False)
    judge.update(y, real=True)
    return judge.compute()


def test_fid_is_torchmetrics():
    x, y = _sets(40, 40)
    assert fid(x, y, reference_kind="real").value == pytest.approx(
        float(_torchmetrics("fid")), rel=1e-6
    )


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kid_is_torchmetrics():
    x, y = _sets(40, 40)
    value, _ = _torchmetrics("kid", subsets=1, subset_size=40)
    assert kid(x, y, reference_kind="real", subsets=1).value == pytest.approx(
        float(value), rel=1e-6
    )
