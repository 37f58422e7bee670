"""UCE and RECE against the released algebra, restated with sums of outer products and an inverse.

Released code: unified-concept-editing 28c81ed and its first version, RECE 403a67f.
"""

from __future__ import annotations

import pytest
import torch

from safegen.edits.functional.closed_form import projections
from safegen.workflows.edit import make_edit

NAMES = {
    "object": ("image of", "photo of", "portrait of", "picture of", "painting of"),
    "art": ("painting by", "art by", "artwork by", "picture by", "style of"),
}
WORDS = (("red cube",), ("red cube", "a ball"))


def encode(model, text):
    """Return all rows of a text, float64, and the index of its last token."""
    pipe = model.pipeline
    given = pipe.tokenizer(
        [text],
        padding="max_length",
        max_length=pipe.tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    rows = pipe.text_encoder(given.input_ids)[0][0].double()
    return rows, int(given.attention_mask.sum()) - 2


def solve(w, pairs, kept, *, lamb, erase_scale, preserve_scale):
    """Return lamb W + sum v k' times the inverse of lamb I + sum k k', one position at a time."""
    left, right = lamb * w, lamb * torch.eye(w.shape[1], dtype=torch.float64)
    weighted = [(erase_scale, *pair) for pair in pairs] + [
        (preserve_scale, rows, rows) for rows in kept
    ]
    for scale, old, new in weighted:
        for k, c in zip(old, new, strict=True):
            left = left + scale * torch.outer(w @ c, k)
            right = right + scale * torch.outer(k, k)
    return left @ torch.inverse(right)


def uce_2025(model, erase, guides, preserve, **scales):
    """Return the weights of the released `UCE()`: the last token of each text."""

    def last(text):
        rows, index = encode(model, text)
        return rows[index : index + 1]

    pairs = [(last(old), last(new)) for old, new in zip(erase, guides, strict=True)]
    kept = [last(text) for text in preserve]
    return {n: solve(w, pairs, kept, **scales) for n, w in projections(model)["hidden"].items()}


def uce_first_code(model, erase, guides, preserve, **scales):
    """Return the weights of the first code's `edit_model`.

    It takes the positions from the last token on, and every position of a preserved text.
    """
    pairs = []
    for old, new in zip(erase, guides, strict=True):
        (a, i), (b, j) = encode(model, old), encode(model, new)
        n = len(a) - max(i, j)
        pairs.append((a[i : i + n], b[j : j + n]))
    kept = [encode(model, text)[0] for text in preserve]
    return {n: solve(w, pairs, kept, **scales) for n, w in projections(model)["hidden"].items()}


def rece_rounds(model, weights, erase, guide, preserve, *, rounds, ridge, **scales):
    """Return the weights after `close_form_emb_regzero` and `edit_model_adversarial` in turn."""
    original = projections(model)["hidden"]
    texts, blank = [encode(model, text)[0] for text in erase], encode(model, guide)[0]
    kept = [encode(model, text)[0] for text in preserve]
    for _ in range(rounds):
        width = blank.shape[1]
        left, right = ridge * torch.eye(width, dtype=torch.float64), torch.zeros(width, width)
        for name, w in weights.items():
            left, right = left + w.T @ w, right + w.T @ original[name]
        pairs = [(rows @ (torch.inverse(left) @ right).T, blank) for rows in texts]
        weights = {n: solve(w, pairs, kept, **scales) for n, w in weights.items()}
    return weights


def distance(model, patch, weights):
    """Return the distance of two edits relative to the change that the second one makes."""
    original = projections(model)["hidden"]
    assert patch.tensors.keys() == weights.keys()
    apart = sum(float((patch.tensors[n].double() - w).norm() ** 2) for n, w in weights.items())
    change = sum(float((w - original[n]).norm() ** 2) for n, w in weights.items())
    return (apart / change) ** 0.5


# ------------------------------------------------------------ UCE


@pytest.mark.parametrize("guide", ["", "a tree"])
@pytest.mark.parametrize("kind", ["object", "art"])
def test_expand_equals_the_released_flag(tiny_model, kind, guide):
    """Templates on the phrase and on its guide; nothing of it is preserved."""
    erase, guides = ["red cube", "a ball"], [guide, guide]
    for old, new in [*zip(erase, guides, strict=True)]:
        erase += [f"{name} {old}" for name in NAMES[kind]]
        guides += [f"{name} {new}" for name in NAMES[kind]]
    want = uce_2025(
        tiny_model, erase, guides, ["grass"], lamb=0.5, erase_scale=1.0, preserve_scale=1.0
    )
    settings = {"erase": ("red cube", "a ball"), "guide": guide, "preserve": ("grass",)}
    edit = make_edit("uce", "paper", expand=True, concept_type=kind, **settings)
    assert distance(tiny_model, edit.apply(tiny_model), want) < 1e-4
    plain = make_edit("uce", "paper", **settings)
    assert distance(tiny_model, plain.apply(tiny_model), want) > 0.1


def test_the_released_guide_of_a_style_is_art(tiny_model):
    want = uce_2025(tiny_model, ["a ball"], ["art"], [], lamb=0.5, erase_scale=1, preserve_scale=1)
    edit = make_edit("uce", "paper", erase=("a ball",), concept_type="art")
    assert edit.guide == "art"
    assert distance(tiny_model, edit.apply(tiny_model), want) < 1e-4
    assert make_edit("uce", erase=("a ball",), concept_type="art", guide="").guide == ""


def test_tail_preserves_every_position_as_the_first_code_does(tiny_model):
    scales = {"lamb": 0.1, "erase_scale": 1.0, "preserve_scale": 0.1}
    want = uce_first_code(
        tiny_model, ["red cube", "a ball"], [" ", " "], ["", "a green cone"], **scales
    )
    edit = make_edit(
        "uce",
        erase=("red cube", "a ball"),
        guide=" ",
        preserve=("", "a green cone"),
        tokens="tail",
        **scales,
    )
    assert distance(tiny_model, edit.apply(tiny_model), want) < 1e-4


# ------------------------------------------------------------ RECE

RECE = {"lamb": 0.1, "erase_scale": 1.0, "preserve_scale": 0.1}
FIRST = {"lamb": 0.5, "erase_scale": 1.0}


@pytest.mark.parametrize("erase", WORDS, ids=str)
@pytest.mark.parametrize(("preset", "rounds"), [("paper", 3), ("paper-unsafe", 2)])
def test_paper_equals_the_released_run_for_nudity_and_unsafe_concepts(
    tiny_model, erase, preset, rounds
):
    """The run starts from the first code's checkpoint and preserves a blank for each phrase."""
    blanks = [" "] * len(erase)
    start = uce_first_code(tiny_model, erase, blanks, [""], preserve_scale=1.0, **FIRST)
    want = rece_rounds(tiny_model, start, erase, " ", blanks, rounds=rounds, ridge=0.1, **RECE)
    patch = make_edit("rece", preset, erase=erase).apply(tiny_model)
    assert distance(tiny_model, patch, want) < 1e-4
    own = make_edit("rece", preset, erase=erase, start="rece").apply(tiny_model)
    assert distance(tiny_model, own, want) > 0.1


def test_the_start_alone_is_the_checkpoint_of_the_first_code(tiny_model):
    blanks = [" ", " "]
    want = uce_first_code(tiny_model, WORDS[1], blanks, [""], preserve_scale=1.0, **FIRST)
    patch = make_edit("rece", "paper", erase=WORDS[1], rounds=0, preserve_per_phrase=False)
    assert distance(tiny_model, patch.apply(tiny_model), want) < 1e-4


@pytest.mark.parametrize("erase", WORDS, ids=str)
def test_paper_object_equals_the_released_run(tiny_model, erase):
    """The blank is preserved once, and one round has a small ridge."""
    blanks = [" "] * len(erase)
    start = uce_first_code(tiny_model, erase, blanks, [""], preserve_scale=1.0, **FIRST)
    want = rece_rounds(tiny_model, start, erase, " ", [""], rounds=1, ridge=0.001, **RECE)
    patch = make_edit("rece", "paper-object", erase=erase).apply(tiny_model)
    assert distance(tiny_model, patch, want) < 1e-4


def test_paper_art_equals_the_released_run(tiny_model):
    """Names of other artists are preserved, and the start weighs them by their number."""
    erase, others = ["a ball"], ["a tree", "grass", "a green cone"]
    kept = ["", *others]
    start = uce_first_code(tiny_model, erase, ["art"], kept, preserve_scale=0.25, **FIRST)
    want = rece_rounds(tiny_model, start, erase, "art", kept, rounds=1, ridge=0.001, **RECE)
    patch = make_edit("rece", "paper-art", erase=("a ball",), preserve=("", *others))
    assert distance(tiny_model, patch.apply(tiny_model), want) < 1e-4
