"""Closed-form algebra against least squares, and UCE on a real denoiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.edits.functional.closed_form import (
    debias_value,
    embed,
    projections,
    reduce_pairs,
    reduce_rows,
    solve_text_map,
)
from safegen.edits.uce import UCE
from safegen.workflows.edit import edit as edit_model
from safegen.workflows.edit import make_edit
from tests.edits.written_out import solve_projection

SCALES = {"erase_scale": 1.3, "preserve_scale": 0.4, "lamb": 0.2}


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def solve(w, keys, targets, preserved, **scales):
    """Return a projection after the map of an erasure."""
    return w.double() @ solve_text_map(keys, targets, preserved, **scales)


@pytest.fixture
def system():
    """Return a projection, keys, their targets and preserved rows."""
    return randn(5, 7), randn(3, 7, seed=1), randn(3, 7, seed=2), randn(4, 7, seed=3)


# ------------------------------------------------------------ the algebra


def test_the_solution_equals_least_squares(system):
    w, k, t, c = (x.numpy() for x in system)
    a, b, stay = (
        SCALES["erase_scale"] ** 0.5,
        SCALES["preserve_scale"] ** 0.5,
        SCALES["lamb"] ** 0.5,
    )
    left = np.concatenate([a * k, b * c, stay * np.eye(7)])  # rows of X in min |X W' - Y|^2
    right = np.concatenate([a * t @ w.T, b * c @ w.T, stay * w.T])
    want = np.linalg.lstsq(left, right, rcond=None)[0].T
    assert_close(solve(*system, **SCALES), torch.from_numpy(want), rtol=1e-9, atol=1e-9)


def test_the_solution_by_hand():
    """Solves for one number: (l w + a w t k) / (l + a k^2) = (0.5 * 2 + 2 * 1.5 * 2) / 4.5."""
    one = [torch.tensor([[x]], dtype=torch.float64) for x in (2.0, 2.0, 1.5)]
    found = solve(*one, torch.empty(0, 1), erase_scale=1.0, preserve_scale=1.0, lamb=0.5)
    assert found.item() == pytest.approx(7 / 4.5)


def test_zero_erase_scale_keeps_the_projection(system):
    assert_close(solve(*system, **SCALES | {"erase_scale": 0.0}), system[0], rtol=0, atol=1e-10)


def test_a_projection_that_already_agrees_does_not_change(system):
    w, k, _, c = system
    assert_close(solve(w, k, k, c, **SCALES), w, rtol=0, atol=1e-10)


def test_a_direction_orthogonal_to_the_keys_maps_as_before(system):
    w, k, t, _ = system
    other = torch.linalg.svd(k)[2][-1]  # orthogonal to every key
    found = solve(w, k, t, k[:0], **SCALES)
    assert_close(found @ other, w @ other, rtol=0, atol=1e-10)
    assert (found - w).norm() > 0.1


def test_a_large_erase_scale_gives_each_key_the_output_of_its_target(system):
    w, k, t, c = system
    found = solve(w, k, t, c[:0], **SCALES | {"erase_scale": 1e9})
    assert_close(found @ k.T, w @ t.T, rtol=0, atol=1e-6)


def test_a_large_preserve_scale_keeps_the_preserved_outputs(system):
    w, k, t, c = system
    found = solve(w, k, t, c, **SCALES | {"preserve_scale": 1e9})
    assert_close(found @ c.T, w @ c.T, rtol=0, atol=1e-6)


def test_low_precision_embeddings_are_solved_in_float64(system):
    _, k, t, c = (x.float() for x in system)
    found = solve_text_map(k, t, c, **SCALES)
    assert found.dtype == torch.float64
    assert torch.equal(found, solve_text_map(k.double(), t.double(), c.double(), **SCALES))


def test_zero_lamb_raises(system):
    with pytest.raises(ValueError, match="lamb must be > 0, got 0"):
        solve(*system, **SCALES | {"lamb": 0})


def test_one_map_solves_every_projection(system):
    """Compares with the equation of each projection, written out."""
    _, k, t, c = system
    for w in (randn(5, 7, seed=4), randn(9, 7, seed=5)):
        want = solve_projection(w, k, t @ w.T, c, **SCALES)
        assert_close(solve(w, k, t, c, **SCALES), want, rtol=1e-12, atol=1e-12)


def test_reduced_rows_and_pairs_give_an_equal_map():
    rows, keys, targets = randn(50, 7), randn(40, 7, seed=1), randn(40, 7, seed=2)
    reduced, fewer = reduce_rows(rows), reduce_pairs(keys, targets)
    assert {x.shape for x in (reduced, *fewer)} == {(7, 7)}
    want = solve_text_map(keys, targets, rows, **SCALES)
    found = solve_text_map(*fewer, reduced, **SCALES)
    assert_close(found, want, rtol=1e-12, atol=1e-12)
    moved = randn(7, 7, seed=3)  # as rounds of RECE move the keys
    want = solve_text_map(keys @ moved, targets, rows, **SCALES)
    found = solve_text_map(fewer[0] @ moved, fewer[1], reduced, **SCALES)
    assert_close(found, want, rtol=1e-12, atol=1e-12)
    assert torch.equal(reduce_rows(rows[:7]), rows[:7])
    assert reduce_pairs(keys[:7], targets[:7])[1].equal(targets[:7])


# ------------------------------------------------------------ on a model


def rows_of(model, text, tokens="last"):
    """Return the token embeddings of a text, which has one span."""
    ((rows,),) = embed(model, [text], part="hidden", tokens=tokens)
    return rows


def test_only_keys_and_values_of_cross_attention_change(tiny_model):
    patch = UCE(erase=("red cube",)).apply(tiny_model)
    names = {
        n
        for n, _ in tiny_model.denoiser.named_parameters()
        if "attn2.to_k" in n or "attn2.to_v" in n
    }
    assert set(patch.tensors) == names == set(projections(tiny_model)["hidden"])
    assert {v.dtype for v in patch.tensors.values()} == {torch.float32}
    assert 0 < patch.metadata.moved < 1


def test_the_erased_phrase_gets_the_keys_and_values_of_the_guide(tiny_model):
    """With all weight on it, at the word's last token, in every layer."""
    patch = UCE(erase=("red cube",), guide="a tree", lamb=1e-7).apply(tiny_model)
    word, guide = (rows_of(tiny_model, text) for text in ("red cube", "a tree"))
    for name, w in projections(tiny_model)["hidden"].items():
        assert_close(patch.tensors[name].double() @ word.T, w @ guide.T, rtol=0, atol=2e-4)
        assert not torch.allclose(w @ word.T, w @ guide.T, rtol=0, atol=0.01)


def test_the_edit_is_the_published_formula(tiny_model):
    """The released step, in fp32 with an inverse, on one layer."""
    settings = make_edit("uce", "paper", erase=("red cube", "ball"), preserve=("a tree",))
    patch = settings.apply(tiny_model)

    def last(text):
        pipe = tiny_model.pipeline
        rows = pipe.encode_prompt(
            prompt=text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        mask = pipe.tokenizer(
            text,
            padding="max_length",
            max_length=pipe.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        return rows[:, mask["attention_mask"].sum() - 2, :]

    for name, old in tiny_model.denoiser.named_parameters():
        if name not in patch.tensors:
            continue
        mat1, mat2 = 0.5 * old, 0.5 * torch.eye(old.shape[1])
        for erased, guide in (("red cube", ""), ("ball", ""), ("a tree", "a tree")):
            c_i, v_i = last(erased).T, (last(guide) @ old.T).T
            mat1 = mat1 + v_i @ c_i.T
            mat2 = mat2 + c_i @ c_i.T
        assert_close(patch.tensors[name], mat1 @ torch.inverse(mat2), rtol=0, atol=1e-4)


def test_embeddings_of_each_choice_of_positions(tiny_model):
    rows = tiny_model.encode_text(["a red cube"]).hidden[0].double()
    last, tail, every = (rows_of(tiny_model, "a red cube", t) for t in ("last", "tail", "all"))
    assert torch.equal(last, rows[3:4])  # start, a, red, cube
    assert torch.equal(tail, rows[3:])
    assert torch.equal(every, rows)
    blank = rows_of(tiny_model, "")
    assert_close(blank, rows[:1], rtol=0, atol=1e-6)  # the start mark, which no text changes


def test_captions_are_preserved(tiny_model, tmp_path):
    (tmp_path / "calm.txt").write_text("a blue ball in the grass\na green cone\n")
    captions = (str(tmp_path / "calm.txt"),)
    free = UCE(erase=("red cube",)).apply(tiny_model)
    held = UCE(erase=("red cube",), captions=captions, preserve_scale=100.0).apply(tiny_model)
    texts = ("a blue ball in the grass", "a green cone")
    calm = torch.cat([rows_of(tiny_model, text, "all") for text in texts])

    def moved(patch):
        return sum(
            float(((patch.tensors[n].double() - w) @ calm.T).norm())
            for n, w in projections(tiny_model)["hidden"].items()
        )

    assert moved(held) < 0.2 * moved(free)


def test_prediction_type_and_precision_of_the_model_do_not_matter(make_model):
    plain = UCE(erase=("cube",)).apply(make_model())
    assert UCE(erase=("cube",)).apply(make_model(prediction_type="v_prediction")).hash == plain.hash
    half = make_model()
    half.pipeline.to(torch.bfloat16)
    assert {v.dtype for v in UCE(erase=("cube",)).apply(half).tensors.values()} == {torch.float32}


# ------------------------------------------------------------ settings


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_a_concept_provides_phrases_and_captions_but_none_for_paper(method):
    skulls = load_concept("skulls")
    lent, paper = make_edit(method, concept="skulls"), make_edit(method, "paper", concept="skulls")
    assert lent.erase == skulls.words
    assert set(skulls.captions) <= set(lent.captions)
    assert {"mini:ghosts-train", "mini:leaves-train"} <= set(
        lent.captions
    )  # similar phrases are preserved too
    assert (paper.erase, paper.captions) == (skulls.words, ())


def test_one_call_edits_by_the_name_of_a_concept(tiny_model, triplets):
    assert edit_model(tiny_model, "uce", concept="skulls").metadata.settings["erase"] == [
        "skulls",
        "a skull",
    ]
    with pytest.raises(ConfigError, match="uce learns from phrases, and triplets have no effect"):
        edit_model(tiny_model, "uce", concept="skulls", triplets=triplets.folder)
    with pytest.warns(UnusedSettingWarning, match="concept 'skulls' has no effect on uce"):
        edit_model(tiny_model, "uce", preset="paper", concept="skulls", erase=("cube",))


REFUSED = {
    "phrases must not be blank": {"erase": (" ", "cube")},
    "lamb must be greater than 0, got 0": {"lamb": 0},
    "erase_scale": {"erase_scale": -1},
    "tokens": {"tokens": "some"},
    "Did you mean 'guide'": {"guid": "x"},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
@pytest.mark.parametrize("method", ["uce", "rece"])
def test_an_invalid_setting_raises_one_line(method, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit(method, **REFUSED[words])
    assert "\n" not in str(caught.value)


def test_a_guide_among_the_phrases_raises(tiny_model):
    with pytest.raises(
        ConfigError, match="guide must not be among the phrases to erase, got 'cube'"
    ):
        UCE(erase=("cube",), guide="cube").apply(tiny_model)


def test_the_paper_preset_has_the_published_values():
    uce, rece = make_edit("uce", "paper"), make_edit("rece", "paper")
    assert (uce.guide, uce.tokens, uce.expand, uce.erase_scale, uce.preserve_scale, uce.lamb) == (
        "",
        "last",
        False,
        1.0,
        1.0,
        0.5,
    )
    assert rece.start == "uce"
    assert (rece.guide, rece.preserve, rece.tokens, rece.rounds, rece.ridge) == (
        " ",
        (" ",),
        "all",
        3,
        0.1,
    )
    assert (rece.erase_scale, rece.preserve_scale, rece.lamb) == (1.0, 0.1, 0.1)
    assert make_edit("rece", "paper", concept="skulls").preserve_scale == 0.1
    assert make_edit("rece", concept="skulls").preserve_scale == 10.0
    assert (
        make_edit("rece", concept="skulls", captions=()).preserve_scale == 0.1
    )  # a weight of captions
    assert (
        make_edit(
            "rece", concept=load_concept("skulls").model_copy(update={"captions": ()})
        ).preserve_scale
        == 0.1
    )


# ------------------------------------------------------------ debiasing


def test_debias_value_by_hand():
    """(1, 2) + 0.5 (4, 0) - 0.25 (0, 8) = (3, 0).

    With W = [[1, 1]] it is sent from 3 to 3, and W (1, 0) from 1 to W (2, 0).
    """
    key, man, woman = (
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[4.0, 0.0]]),
        torch.tensor([[0.0, 8.0]]),
    )
    assert debias_value(key, [man, woman], [0.5, -0.25]).tolist() == [[3.0, 0.0]]
    one, w = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    aim = debias_value(one, [man], [0.25])
    found = solve(w, one, aim, one[:0], erase_scale=1.0, preserve_scale=1.0, lamb=0.5)
    assert_close(
        found, torch.tensor([[2.5 / 1.5, 1.0]], dtype=torch.float64)
    )  # (0.5 * 1 + 1 * 2) / (0.5 + 1); nothing else moves


@pytest.mark.parametrize("tokens", ["last", "tail"])
def test_a_debiased_phrase_gets_shares_of_the_attributes(tiny_model, tokens):
    patch = UCE(
        erase=("red cube", "ball"), debias={"a tree": 0.3, "grass": -0.2}, tokens=tokens, lamb=1e-7
    ).apply(tiny_model)
    tree, grass, *words = (
        rows_of(tiny_model, text, tokens) for text in ("a tree", "grass", "red cube", "ball")
    )
    n = min(len(rows) for rows in (tree, grass, *words))
    for name, w in projections(tiny_model)["hidden"].items():
        for word in words:
            want = w @ (word[:1] + 0.3 * tree[:1] - 0.2 * grass[:1]).T
            assert_close(
                patch.tensors[name].double() @ word[:1].T,
                want,
                rtol=0,
                atol=3e-2 if n > 1 else 3e-4,
            )
            assert not torch.allclose(w @ word[:1].T, want, rtol=0, atol=5e-2)


def test_debias_survives_json_and_changes_the_patch(tiny_model):
    edit = make_edit("uce", erase=("ball",), debias={"a tree": 0.3})
    assert UCE.model_validate_json(edit.model_dump_json()) == edit
    assert edit.apply(tiny_model).hash != make_edit("uce", erase=("ball",)).apply(tiny_model).hash
    assert "debias" in edit.apply(tiny_model).metadata.settings
    with pytest.raises(ConfigError, match=r"debias.grass must be a finite number"):
        make_edit("uce", debias={"grass": float("inf")})


def test_provenance_reduces_caption_files_to_their_names(tiny_model, tmp_path):
    (tmp_path / "calm.txt").write_text("a blue ball in the grass")
    edit = UCE(erase=("red cube",), captions=(str(tmp_path / "calm.txt"), "mini:benign"))
    assert edit.apply(tiny_model).metadata.settings["captions"] == ["calm.txt", "mini:benign"]


def test_an_attribute_of_debias_must_not_be_blank():
    with pytest.raises(ValidationError, match="phrases must not be blank"):
        UCE(erase=("a castle",), debias={" ": 0.3})
