"""RECE: adversarial embeddings and rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from safegen.edits.functional.closed_form import (
    adversarial_embeddings,
    embed,
    projections,
    solve_projection,
)
from safegen.edits.rece import RECE
from safegen.edits.uce import UCE


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_adversarial_embeddings_equal_least_squares():
    edited, original, c = (
        [randn(4, 6, seed=s) for s in (1, 2, 3)],
        [randn(4, 6, seed=s) for s in (4, 5, 6)],
        randn(2, 6),
    )
    left = np.concatenate([*(w.numpy() for w in edited), 0.3**0.5 * np.eye(6)])
    right = np.concatenate([*((w @ c.T).numpy() for w in original), np.zeros((6, 2))])
    want = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert_close(
        adversarial_embeddings(edited, original, c, ridge=0.3),
        torch.from_numpy(want),
        rtol=1e-9,
        atol=1e-9,
    )


def test_adversarial_embeddings_of_an_unedited_model_are_the_embeddings():
    weights, c = [randn(8, 6, seed=s) for s in (1, 2)], randn(3, 6)
    assert_close(adversarial_embeddings(weights, weights, c, ridge=1e-9), c, rtol=0, atol=1e-7)


def test_a_large_ridge_gives_a_short_embedding():
    weights, c = [randn(8, 6)], randn(3, 6)
    assert adversarial_embeddings(weights, weights, c, ridge=1e6).norm() < 1e-3 * c.norm()
    with pytest.raises(ValueError, match="ridge must be > 0, got 0"):
        adversarial_embeddings(weights, weights, c, ridge=0)


def test_no_rounds_equal_uce_at_every_position(tiny_model):
    rece = RECE(erase=("red cube",), rounds=0).apply(tiny_model)
    uce = UCE(
        erase=("red cube",), guide=" ", preserve=(" ",), tokens="all", preserve_scale=0.1, lamb=0.1
    ).apply(tiny_model)
    assert rece.hash == uce.hash


def test_two_rounds_equal_the_written_out_steps(tiny_model):
    """Each round starts from the weights of the previous round."""
    ((c,), (blank,)) = embed(tiny_model, ["red cube", " "], part="hidden", tokens="all")
    original = projections(tiny_model)["hidden"]
    weights, keys = dict(original), c
    for i in range(3):
        if i:
            keys = adversarial_embeddings(
                list(weights.values()), list(original.values()), c, ridge=0.1
            )
        weights = {
            n: solve_projection(
                w, keys, blank @ w.T, blank, erase_scale=1.0, preserve_scale=0.1, lamb=0.1
            )
            for n, w in weights.items()
        }
    found = RECE(erase=("red cube",), rounds=2).apply(tiny_model)
    assert found.tensors.keys() == weights.keys()
    for name, value in weights.items():
        assert_close(found.tensors[name], value.float(), rtol=0, atol=0)


def test_every_round_increases_the_distance_of_adversarial_embeddings(tiny_model):
    """Distance to the original outputs for the weights after 0, 1 and 2 rounds."""
    ((c,),) = embed(tiny_model, ["red cube"], part="hidden", tokens="all")
    original = projections(tiny_model)["hidden"]
    near = []
    for rounds in range(3):
        edited = {
            n: v.double()
            for n, v in RECE(erase=("red cube",), rounds=rounds).apply(tiny_model).tensors.items()
        }
        back = adversarial_embeddings(list(edited.values()), list(original.values()), c, ridge=0.1)
        near.append(
            sum(float((back @ edited[n].T - c @ w.T).pow(2).sum()) for n, w in original.items())
        )
    assert near[0] < near[1] < near[2]
