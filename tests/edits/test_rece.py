"""RECE: adversarial embeddings and rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from safegen.edits.functional.closed_form import adversarial_embeddings, embed, projections
from safegen.edits.rece import RECE
from safegen.edits.uce import UCE
from safegen.workflows.edit import make_edit
from tests.edits.written_out import erase_rounds, relative_distance


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


SCALES = {"erase_scale": 1.0, "preserve_scale": 0.1, "lamb": 0.1}


def test_two_rounds_equal_the_written_out_steps(tiny_model):
    """Starts each round from the weights of the previous round, one projection at a time."""
    ((c,), (blank,)) = embed(tiny_model, ["red cube", " "], part="hidden", tokens="all")
    original = projections(tiny_model)["hidden"]
    want = erase_rounds(original, c, blank, blank, rounds=2, **SCALES)
    assert relative_distance(RECE(erase=("red cube",), rounds=2).solve(tiny_model), want) < 1e-9


def test_many_phrases_and_captions_equal_the_written_out_steps(tiny_model, tmp_path):
    """More rows than columns, and more texts than a batch, in one system each."""
    phrases = tuple(f"a {a} {b}" for a in ("red", "blue", "green") for b in "abcdefghij" * 3)
    captions = [f"a cube in the grass {letter}" for letter in "klmnopqrst"]
    (tmp_path / "captions.txt").write_text("\n".join(captions))
    edit = RECE(
        erase=phrases, captions=(str(tmp_path / "captions.txt"),), preserve_scale=10.0, rounds=1
    )
    rows = [
        torch.cat(
            [
                row
                for spans in embed(tiny_model, texts, part="hidden", tokens="all")
                for row in spans
            ]
        )
        for texts in (phrases, [" "], captions)
    ]
    keys, blank, held = rows
    want = erase_rounds(
        projections(tiny_model)["hidden"],
        keys,
        blank.repeat(len(phrases), 1),
        torch.cat([blank, held / len(captions) ** 0.5]),
        rounds=1,
        **SCALES | {"preserve_scale": 10.0},
    )
    assert len(keys) > 64 * len(blank) > keys.shape[1]
    assert relative_distance(edit.solve(tiny_model), want) < 1e-9


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


def test_kept_outputs_of_the_text_encoder_change_no_bit(tiny_model):
    edit = make_edit("rece", "paper", erase=("red cube", "ball"))
    plain, patch = edit.solve(tiny_model), edit.apply(tiny_model)
    assert all(torch.equal(patch.tensors[name], value.float()) for name, value in plain.items())
