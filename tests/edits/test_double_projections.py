"""Double Projections: algebra against written-out equations, and the edit on a real denoiser."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.double_projections import DoubleProjections
from safegen.edits.functional.closed_form import (
    embed,
    null_space_map,
    project_rows,
    projections,
    reduce_pairs,
)
from safegen.workflows.edit import make_edit
from tests.tiny import build_model


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W, KEYS, TARGETS, HELD = randn(5, 9), randn(3, 9, seed=1), randn(3, 9, seed=2), randn(4, 9, seed=3)


# ------------------------------------------------------------ the algebra


def test_one_key_has_the_published_update():
    """Compares with W (t - k) x'U' / |x|^2 with x = U'k and U from a complete SVD."""
    k, t = KEYS[0], TARGETS[0]
    u = torch.linalg.svd(HELD.T)[0][:, len(HELD) :]
    x = u.T @ k
    want = W + torch.outer(W @ (t - k), x) @ u.T / (x @ x)
    assert_close(W @ null_space_map(KEYS[:1], TARGETS[:1], HELD), want, rtol=1e-10, atol=1e-10)


def test_keys_get_their_targets_and_preserved_outputs_stay():
    edited = W @ null_space_map(KEYS, TARGETS, HELD)
    assert_close(edited @ KEYS.T, W @ TARGETS.T, rtol=0, atol=1e-10)
    assert_close(edited @ HELD.T, W @ HELD.T, rtol=0, atol=1e-10)


def test_more_keys_than_free_directions_are_solved_by_least_squares():
    """Compares with the best Z of W' = W + Z U', by numpy's answer to another basis U."""
    keys, targets = randn(8, 9, seed=4), randn(8, 9, seed=5)
    u = torch.linalg.qr(torch.linalg.svd(HELD.T)[0][:, len(HELD) :] @ randn(5, 5, seed=6))[0]
    z = torch.linalg.lstsq(keys @ u, (targets - keys) @ W.T).solution.T
    edited = W @ null_space_map(keys, targets, HELD)
    assert_close(edited, W + z @ u.T, rtol=1e-9, atol=1e-9)


def test_what_truncation_leaves_out_moves_no_more_than_its_bound():
    """Checks |dW p| <= |Z| s with the first singular value s that is left out."""
    values = torch.linalg.svdvals(HELD)
    for rank in range(4):
        change = W @ null_space_map(KEYS, TARGETS, HELD, rank=rank) - W
        bound = torch.linalg.matrix_norm(change, ord=2) * values[rank]
        moved = (change @ HELD.T).norm(dim=0)
        assert 0 < moved.max() <= bound
    assert_close(null_space_map(KEYS, TARGETS, HELD, rank=4), null_space_map(KEYS, TARGETS, HELD))


def test_a_projection_onto_dependent_rows_is_that_onto_their_span():
    basis = torch.cat([HELD, HELD[:1] + HELD[1:2]])
    rounded = torch.cat([HELD, HELD[:1] + 1e-8 * randn(1, 9, seed=9)])  # as fp32 encodes it
    projected = project_rows(KEYS, basis)
    assert_close(project_rows(KEYS, rounded), projected, rtol=0, atol=1e-6)
    assert_close(projected, project_rows(projected, HELD), rtol=1e-9, atol=1e-9)
    assert_close((KEYS - projected) @ HELD.T, torch.zeros(3, 4).double(), rtol=0, atol=1e-9)
    assert not project_rows(KEYS, HELD[:0]).any()


def test_a_phrase_among_the_preserved_directions_raises():
    with pytest.raises(ConfigError, match="part of every phrase, got 4 of 9"):
        null_space_map(HELD[:1] + HELD[1:2], TARGETS[:1], HELD)


def test_rows_of_zeros_among_the_keys_change_nothing():
    """Reduces keys that leave columns empty, as those of SD 3 without T5 do."""
    wide = torch.cat([randn(12, 8, seed=7), torch.zeros(12, 1).double()], dim=1)
    keys, targets = reduce_pairs(wide, randn(12, 9, seed=8))
    assert not keys[-1].any()
    expected = null_space_map(wide, randn(12, 9, seed=8), HELD)
    assert_close(null_space_map(keys, targets, HELD), expected, rtol=0, atol=1e-9)


# ------------------------------------------------------------ on a model


def test_phrases_become_their_safe_part_and_preserved_phrases_stay(tiny_model):
    edit = DoubleProjections(erase=("red cube", "ball"), safe=("a tree", "grass"), preserve=("a",))
    patch = edit.apply(tiny_model)
    texts = ["red cube", "ball", "a tree", "grass", "a"]
    rows = torch.cat([r for (r,) in embed(tiny_model, texts, part="hidden", tokens="last")])
    for name, w in projections(tiny_model)["hidden"].items():
        edited = patch.tensors[name].double()
        want = project_rows(rows[:2], rows[2:4])
        assert_close(edited @ rows[:2].T, w @ want.T, rtol=0, atol=1e-4)
        assert_close(edited @ rows[4], w @ rows[4], rtol=0, atol=1e-5)
        assert (w @ (rows[:2] - want).T).abs().max() > 0.01


def test_columns_of_zeros_do_not_count_as_free_directions(tmp_path):
    """Edits SD 3 without T5, where embeddings fill the columns of CLIP alone."""
    (tmp_path / "calm.txt").write_text("a blue ball in the grass\na green cone\n")
    captions = (str(tmp_path / "calm.txt"),)
    patch = DoubleProjections(erase=("red cube",), captions=captions).apply(build_model("sd3"))
    assert patch.metadata.moved > 0


def test_a_concept_provides_phrases_safe_phrases_and_captions(cubes):
    edit = make_edit("double_projections", concept=cubes)
    assert (edit.erase, edit.safe, edit.captions) == (
        cubes.words,
        cubes.counterpart,
        cubes.captions,
    )
