"""Closed forms on every family: what each projection of text reads, and what it makes of it."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.edits.functional.closed_form import embed, projections
from safegen.edits.rece import RECE
from safegen.edits.uce import UCE
from safegen.models.families.denoisers import predict
from tests.edits.written_out import erase_rounds, relative_distance
from tests.tiny import FAMILIES, build_model

TRANSFORMERS = [name for name in FAMILIES if name[:3] in ("sd3", "flu")]
CONTEXT = ["time_text_embed.text_embedder.linear_1.weight", "context_embedder.weight"]
each = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def models():
    """Return the tiny model of each family; no test changes one."""
    return {family: build_model(family) for family in FAMILIES}


def rows_of(model, text, part, tokens="last"):
    """Return the embeddings of a text that projections read, of all its spans."""
    return torch.cat(embed(model, [text], part=part, tokens=tokens)[0])


# ------------------------------------------------------------ spans


def test_spans_are_those_of_the_encoders_of_each_family(models):
    spans = {name: model.token_spans(["red cube", ""]) for name, model in models.items()}
    clip, t5, empty = [(0, 2, 32)], [(0, 1, 32)], [(0, 0, 32)]
    assert spans == {
        **{name: [clip, empty] for name in ("sd1", "sd2-v", "sdxl", "sdxl-v", "sd3")},
        "sd35": [[*clip, (32, 33, 64)], [*empty, (32, 32, 64)]],
        **{name: [t5, empty] for name in ("flux", "flux-schnell")},
    }


@each
def test_the_last_token_of_a_span_is_that_of_its_tokenizer(models, family):
    model, pipe = models[family], models[family].pipeline
    names = {"sd35": ("tokenizer", "tokenizer_3")}.get(family, ("tokenizer",))
    if family.startswith("flux"):
        names = ("tokenizer_2",)
    for text in ("red cube", "a red cube on a white table", "grass", "a " * 100):
        (spans,) = model.token_spans([text])
        for (start, last, stop), name in zip(spans, names, strict=True):
            tokenizer = getattr(pipe, name)
            plain = tokenizer(text, add_special_tokens=False).input_ids
            ids = tokenizer(text, truncation=True, max_length=stop - start).input_ids
            own = [i for i, token in enumerate(ids) if token not in tokenizer.all_special_ids]
            assert last - start == own[-1]
            assert ids[last - start] == plain[len(own) - 1]


@each
def test_rows_from_the_last_token_on_depend_on_it_and_earlier_ones_of_clip_do_not(models, family):
    model = models[family]
    one, other = (model.encode_text([text]).hidden[0] for text in ("a red cube", "a red ball"))
    moved = (one - other).abs().sum(1) > 1e-6
    for i, (start, last, stop) in enumerate(model.token_spans(["a red cube"])[0]):
        assert moved[last:stop].all()
        if i == 0 and not family.startswith("flux"):  # T5 reads in both directions
            assert not moved[start:last].any()
    assert not moved[stop:].any()  # SD 3 without T5 has zeros there, of no span
    assert (one[stop:] == 0).all()


def test_rows_of_clip_are_padded_to_the_width_of_t5(models):
    clip, t5 = embed(models["sd35"], ["red cube"], part="hidden", tokens="last")[0]
    assert clip.shape == t5.shape == (1, 64)
    assert (clip[:, 32 + 24 :] == 0).all()
    assert (t5[:, 32 + 24 :] != 0).any()


@pytest.mark.parametrize("family", ["sdxl", "sdxl-v"])
def test_an_empty_guide_of_sdxl_is_the_mark_that_the_released_code_takes(models, family):
    """Zeros, which the pipeline guides away from, would erase keys and values."""
    model = models[family]
    pipe = model.pipeline
    want = pipe.encode_prompt("", device="cpu", do_classifier_free_guidance=False)[0][0, :1]
    assert_close(rows_of(model, "", "hidden"), want.double())
    assert not model.encode_text([""]).hidden.any()


# ------------------------------------------------------------ UCE


@each
def test_the_projections_are_those_that_read_text_itself(models, family):
    model = models[family]
    found = projections(model)
    if family in TRANSFORMERS:
        assert [list(found[part]) for part in ("pooled", "hidden")] == [[n] for n in CONTEXT]
    else:
        assert set(found) == {"hidden"}
        assert all(".attn2.to_k." in name or ".attn2.to_v." in name for name in found["hidden"])
    text = model.encode_text(["red cube"])
    for part, weights in found.items():
        width = getattr(text, part).shape[-1]
        assert {w.shape[1] for w in weights.values()} == {width}


@each
def test_the_phrase_gets_the_outputs_of_the_guide_and_preserved_phrases_keep_theirs(models, family):
    model, held = models[family], "grass"
    edit = UCE(erase=("red cube",), guide="a blue ball", preserve=(held,), lamb=1e-8)
    patch = edit.apply(model)
    for part, weights in projections(model).items():
        word, guide, still = (rows_of(model, t, part) for t in ("red cube", "a blue ball", held))
        for name, w in weights.items():
            new = patch.tensors[name].double()
            assert_close(new @ word.T, w @ guide.T, rtol=0, atol=1e-4)
            assert_close(new @ still.T, w @ still.T, rtol=0, atol=1e-4)
            assert (w @ word.T - w @ guide.T).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_transformer_reads_the_guide_in_place_of_the_phrase(models, family):
    """Checks that all text enters by the two layers that are solved."""
    model = models[family]
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    t, (word, guide) = torch.tensor([600.0]), ["red cube", "a blue ball"]

    def read(text, tensors=None):
        with torch.no_grad():
            return predict(model.denoiser, x, t, model.encode_text([text]), tensors)

    edit = UCE(erase=(word,), guide=guide, tokens="all", lamb=1e-9)
    tensors = edit.apply(model).tensors
    assert (read(word) - read(guide)).abs().max() > 1e-2
    assert_close(read(word, tensors), read(guide), rtol=0, atol=2e-4)


def test_flux_equals_the_released_algebra_without_its_bias(models):
    """Restates `uce_flux_edit.py` in float64, with outputs of the weight alone."""
    model = models["flux"]
    pipe = model.pipeline

    def encode(text):
        hidden, pooled, _ = pipe.encode_prompt(text, None, device="cpu", max_sequence_length=32)
        mask = pipe.tokenizer_2(text, padding="max_length", max_length=32, truncation=True)
        return pooled.double(), hidden[:, sum(mask["attention_mask"]) - 2].double()

    edit = UCE(erase=("red cube", "a ball"), guide="grass", preserve=("a tree",))
    patch = edit.apply(model)
    for i, name in enumerate(CONTEXT):
        old = model.denoiser.get_parameter(name).detach().double()
        mat1, mat2 = 0.5 * old, 0.5 * torch.eye(old.shape[1], dtype=torch.float64)
        for key, value in (("red cube", "grass"), ("a ball", "grass"), ("a tree", "a tree")):
            c, v = encode(key)[i].T, old @ encode(value)[i].T
            mat1, mat2 = mat1 + v @ c.T, mat2 + c @ c.T
        assert_close(patch.tensors[name].double(), mat1 @ mat2.inverse(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_captions_are_preserved(models, family, tmp_path):
    (tmp_path / "calm.txt").write_text("a blue ball in the grass\na green cone\n")
    captions, model = (str(tmp_path / "calm.txt"),), models[family]
    free = UCE(erase=("red cube",)).apply(model)
    held = UCE(erase=("red cube",), captions=captions, preserve_scale=100.0).apply(model)
    for part, weights in projections(model).items():
        texts = ("a blue ball in the grass", "a green cone")
        calm = torch.cat([rows_of(model, text, part, "all") for text in texts])
        moved = [
            sum(float(((p.tensors[n].double() - w) @ calm.T).norm()) for n, w in weights.items())
            for p in (free, held)
        ]
        assert moved[1] < 0.2 * moved[0]


# ------------------------------------------------------------ RECE


@pytest.mark.parametrize("family", ["sdxl", "sd3", "sd35", "flux"])
def test_rounds_of_rece_equal_the_written_out_steps_on_each_part(models, family):
    model = models[family]
    found, want = RECE(erase=("red cube",), rounds=2).solve(model), {}
    scales = {"erase_scale": 1.0, "preserve_scale": 0.1, "lamb": 0.1}
    for part, original in projections(model).items():
        c, blank = (rows_of(model, text, part, "all") for text in ("red cube", " "))
        want |= erase_rounds(original, c, blank, blank, rounds=2, **scales)
        assert all((want[n] - w).norm() > 0.05 * w.norm() for n, w in original.items())
    assert relative_distance(found, want) < 1e-9


@each
def test_the_released_start_is_solved_on_every_family(models, family):
    patch = RECE(erase=("red cube",), start="uce", rounds=1, captions=()).apply(models[family])
    assert set(patch.tensors) == {n for w in projections(models[family]).values() for n in w}
    assert patch.metadata.moved > 0


# ------------------------------------------------------------ what the report says


def test_descriptions_hold_for_transformers_too():
    for edit in (UCE(erase=("red cube",)), RECE(erase=("red cube",))):
        assert "cross-attention" not in edit.describe()
