"""FID, KID and CMMD against closed forms, brute force and torchmetrics; n is part of the answer."""

from __future__ import annotations

import json
from itertools import product

import numpy as np
import pytest
from scipy.linalg import sqrtm

from safegen.metrics.distances import cmmd, covariance_root, fid, frechet, kid

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
    found = fid(_gaussian([0, 1, 2], [1, 2, 3]), _gaussian([3, 1, 0], [2, 2, 0.5]), against="real")
    assert found.value == pytest.approx(
        (9 + 0 + 4) + (1 + 0 + 6.25), rel=1e-10
    )  # |m1 - m2|^2 + sum (s1 - s2)^2
    assert (found.name, found.n, found.n_reference, found.width) == ("fid_real", 64, 64, 3)


@pytest.mark.parametrize(("n", "m", "d"), [(40, 50, 6), (100, 7, 5), (300, 200, 20)])
def test_fid_is_the_formula_with_scipys_matrix_root(n, m, d):
    x, y = _sets(n, m, d)
    s, t = np.cov(x.T), np.cov(y.T)
    oracle = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s + t - 2 * np.real(sqrtm(s @ t)))
    assert fid(x, y, against="real").value == pytest.approx(oracle, rel=1e-6)


def test_fid_with_fewer_pictures_than_numbers_is_that_of_the_space_they_span():
    x, y = _sets(10, 12, 6)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(64, 6)))[0]
    assert fid(x @ basis.T, y @ basis.T, against="base").value == pytest.approx(
        fid(x, y, against="base").value, rel=1e-10
    )


def test_published_moments_give_the_same_fid_as_the_features():
    x, y = _sets()
    found = frechet(
        x.mean(0), covariance_root(np.cov(x.T)), y.mean(0), covariance_root(np.cov(y.T))
    )
    assert found == pytest.approx(fid(x, y, against="real").value, rel=1e-9)


@pytest.mark.parametrize(
    "bad",
    [np.ones((2, 3)), np.array([[1.0, 2], [0, 1]]), np.diag([1.0, -1]), np.diag([1.0, np.nan])],
)
def test_what_is_no_covariance_is_refused(bad):
    with pytest.raises(ValueError, match="a covariance"):
        covariance_root(bad)


def test_fid_is_biased_at_small_n_and_kid_is_not():
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(100, 64)), rng.normal(size=(100, 64))) for _ in range(20)]
    kids = [kid(x, y, against="real", subsets=1).value for x, y in pairs]
    assert min(fid(x, y, against="real").value for x, y in pairs) > 5
    assert abs(np.mean(kids)) < 3 * np.std(kids) / np.sqrt(20)


@pytest.mark.parametrize("call", [fid, cmmd])
def test_a_set_is_at_no_distance_from_itself_and_distances_go_both_ways(call):
    x, y = _sets()
    assert call(x, x, against="base").value == pytest.approx(0, abs=1e-9)
    assert call(x, y, against="base").value == pytest.approx(
        call(y, x, against="base").value, rel=1e-9
    )
    assert call(x, y, against="base").value > 0


@pytest.mark.parametrize("name", ["fid", "cmmd"])
def test_the_order_of_the_pictures_and_a_rotation_are_irrelevant(name):
    x, y = _sets()
    turn = np.linalg.qr(np.random.default_rng(2).normal(size=(6, 6)))[0]
    found = CALLS[name](x, y, against="real").value
    assert CALLS[name](x[::-1] @ turn, y @ turn, against="real").value == pytest.approx(
        found, rel=1e-9
    )


def test_kid_on_one_whole_subset_is_the_u_statistic_by_brute_force():
    x, y = _sets(9, 9)
    k = lambda a, b: (a @ b / 6 + 1) ** 3
    within = [
        sum(k(s[i], s[j]) for i, j in product(range(9), range(9)) if i != j) / 72 for s in (x, y)
    ]
    oracle = sum(within) - 2 * sum(k(a, b) for a, b in product(x, y)) / 81
    found = kid(x, y, against="base")
    assert found.value == pytest.approx(oracle, rel=1e-10)
    assert (found.name, found.subsets, found.subset_size, found.spread) == ("kid_to_base", 1, 9, 0)


def test_paired_kid_leaves_each_pair_out_and_is_nothing_between_equal_sides():
    x, y = _sets(9, 9)
    k = lambda a, b: (a @ b / 6 + 1) ** 3
    apart = [(i, j) for i, j in product(range(9), range(9)) if i != j]
    oracle = (
        sum(k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in apart) / 72
    )
    found = kid(x, y, against="base", paired=True)
    assert found.value == pytest.approx(oracle, rel=1e-10)
    assert found.estimator == "unbiased, cubic kernel, pairs left out"
    assert kid(x, x, against="base", paired=True).value == pytest.approx(0, abs=1e-10)
    assert kid(x, x, against="base").value < -0.1  # what pairing does otherwise
    halves = kid(x, x + 0.5, against="base", paired=True, subset_size=4)
    assert halves.value > 0
    with pytest.raises(ValueError, match="pairs need as many pictures on either side, got 9 and 8"):
        kid(x, y[:8], against="base", paired=True)


def test_kid_over_subsets_is_a_matter_of_the_seed_alone_and_estimates_the_whole():
    x, y = _sets(60, 60)
    found = kid(x, y, against="real", subset_size=20, seed=1)
    assert found == kid(x, y, against="real", subset_size=20, seed=1)
    assert found != kid(x, y, against="real", subset_size=20, seed=2)
    assert found.value == pytest.approx(
        kid(x, y, against="real", subsets=1).value, abs=4 * found.spread / 10
    )
    assert (found.subsets, found.subset_size, found.seed) == (100, 20, 1)


@pytest.mark.parametrize("unbiased", [False, True])
def test_cmmd_is_brute_force_on_unit_vectors_times_1000(unbiased):
    x, y = _sets(7, 11)
    u, v = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (x, y))
    k = lambda a, b: np.exp(-((a - b) ** 2).sum() / 200)

    def within(s):
        pairs = [
            k(s[i], s[j])
            for i, j in product(range(len(s)), range(len(s)))
            if not (unbiased and i == j)
        ]
        return sum(pairs) / len(pairs)

    oracle = 1000 * (within(u) + within(v) - 2 * np.mean([k(a, b) for a, b in product(u, v)]))
    found = cmmd(x, y, against="real", unbiased=unbiased)
    assert found.value == pytest.approx(oracle, rel=1e-9)
    assert (found.scale, found.estimator.split(",")[0]) == (
        1000,
        "unbiased" if unbiased else "biased",
    )


def test_cmmd_looks_at_directions_only():
    x, y = _sets()
    stretch = np.random.default_rng(3).uniform(0.1, 10, size=(40, 1))
    assert cmmd(x * stretch, y, against="real").value == pytest.approx(
        cmmd(x, y, against="real").value, rel=1e-9
    )
    with pytest.raises(ValueError, match="no direction"):
        cmmd(np.zeros((2, 6)), y, against="real")
    with pytest.raises(ValueError, match="sigma must be > 0"):
        cmmd(x, y, against="real", sigma=0)


def test_sets_of_more_than_one_block_are_summed_whole():
    x, y = _sets(1100, 1030, 2)
    u, v = (s / np.linalg.norm(s, axis=1, keepdims=True) for s in (x, y))
    k = lambda a, b: np.exp(-((a[:, None] - b[None]) ** 2).sum(-1) / 200)
    within = [(k(s, s).sum() - len(s)) / (len(s) * (len(s) - 1)) for s in (u, v)]
    oracle = 1000 * (sum(within) - 2 * k(u, v).mean())
    assert cmmd(x, y, against="real", unbiased=True).value == pytest.approx(oracle, rel=1e-7)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_half_precision_features_are_measured_in_float64(name):
    x, y = (s.astype(np.float16) for s in _sets())
    assert CALLS[name](x, y, against="real") == CALLS[name](
        x.astype(np.float64), y.astype(np.float64), against="real"
    )


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_two_references_have_two_names_and_the_extractor_is_part_of_the_answer(name):
    x, y = _sets()
    real, base = (CALLS[name](x, y, against=a, extractor="mini-clip:00") for a in ("real", "base"))
    assert (real.name, base.name) == (f"{name}_real", f"{name}_to_base")
    row = json.loads(json.dumps(real.to_json()))
    assert (row["value"], row["n"], row["n_reference"], row["extractor"]) == (
        real.value,
        40,
        50,
        "mini-clip:00",
    )
    with pytest.raises(ValueError, match="real or base, got 'coco'"):
        CALLS[name](x, y, against="coco")


@pytest.mark.parametrize("name", sorted(CALLS))
def test_too_little_or_too_strange_is_refused(name):
    x, y = _sets()
    for few in (x[:1], x[:0]) if name != "cmmd" else (x[:0],):
        with pytest.raises(ValueError, match="a distance needs at least"):
            CALLS[name](few, y, against="real")
    for bad in (x[:, :3], x[0], x[:, :0]):
        with pytest.raises(ValueError, match="two tables"):
            CALLS[name](bad, y, against="real")
    with pytest.raises(ValueError, match="finite"):
        CALLS[name](np.where(np.eye(40, 6), np.nan, x), y, against="real")


@pytest.mark.parametrize(("subsets", "size"), [(0, 10), (1, 1), (1, 41)])
def test_subsets_that_cannot_be_drawn_are_refused(subsets, size):
    x, y = _sets()
    with pytest.raises(
        ValueError, match=rf"subsets of 2\.\.40 pictures .* got {subsets} of {size}"
    ):
        kid(x, y, against="real", subsets=subsets, subset_size=size)


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
    assert fid(x, y, against="real").value == pytest.approx(float(_torchmetrics("fid")), rel=1e-6)


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance` will save:UserWarning")
def test_kid_is_torchmetrics():
    x, y = _sets(40, 40)
    value, _ = _torchmetrics("kid", subsets=1, subset_size=40)
    assert kid(x, y, against="real", subsets=1).value == pytest.approx(float(value), rel=1e-6)
