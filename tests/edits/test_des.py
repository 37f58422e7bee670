"""DES: its losses and targets, and the text encoders of every family that it trains."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.des import DES, DESObjective, concept_vector, cosine_distance, least_similar
from safegen.edits.training.config import Training
from safegen.models.families.text_outputs import TextEncoders, text_outputs
from safegen.models.patched_weights import pipeline_weights
from tiny import FAMILIES, build_model

SHORT = Training(updates=3, batch=2, accumulation=1, lr=1e-3, weight_decay=0.0, ema=0.0)
TEXTS = ["a red cube on a white table", "a blue ball", ""]
UNREAD = {
    "sd1": set(),
    "sdxl": {"text_encoder.text_model.final_layer_norm.weight"},
    "sd35": set(),
    "flux": set(),
}


@pytest.fixture
def safe_file(tmp_path):
    path = tmp_path / "safe.txt"
    path.write_text("a blue ball in the grass\na green cone\na tree\n", encoding="utf-8")
    return str(path)


@pytest.fixture
def edit(safe_file):
    return DES(erase=("red cube", "a cube"), captions=(safe_file,), training=SHORT)


def test_the_distance_of_rows_is_that_of_their_directions():
    x = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    assert_close(cosine_distance(x, torch.tensor([[5.0, 0.0]] * 3)), torch.tensor([0.0, 1.0, 2.0]))


def test_the_least_similar_row_has_the_least_cosine_whatever_its_length():
    x = torch.tensor([[1.0, 0.0]])
    others = torch.tensor([[100.0, 0.0], [-0.1, 0.1], [0.0, 5.0]])
    assert least_similar(x, others).tolist() == [1]


def test_the_vector_has_the_direction_of_the_phrases_and_a_relative_length():
    phrases, safe = torch.tensor([[2.0, 0.0], [0.0, 9.0]]), torch.tensor([[3.0, 4.0], [0.0, 15.0]])
    found = concept_vector(phrases, safe, scale=0.5)
    assert_close(found, torch.full((2,), 5.0 / 2**0.5))


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_what_the_denoiser_reads(family):
    """Compare with the pipeline's own `encode_prompt`."""
    model = build_model(family)
    network = TextEncoders(model.pipeline, list(text_outputs(model.pipeline)))
    outputs, text = network(network.tokenize(TEXTS)), model.encode_text(TEXTS)
    tokens = {n: value for n, value in outputs.items() if not n.endswith("pooled")}
    pooled = [value for name, value in outputs.items() if name.endswith("pooled")]
    hidden = text.hidden[:2]  # SDXL has zeros for an empty text
    for name, value in tokens.items():
        width = getattr(model.pipeline, name.partition(".")[0]).config.hidden_size
        own = value[:2].unflatten(1, (-1, width))
        rows, columns = hidden.shape[1] - own.shape[1], hidden.shape[2] - width
        parts = [
            hidden[:, i : i + own.shape[1], j : j + width] for i in (0, rows) for j in (0, columns)
        ] + [hidden[:, : own.shape[1], 32 : 32 + width]]
        assert any(p.shape == own.shape and torch.allclose(p, own, atol=1e-5) for p in parts), name
    if pooled:
        assert_close(torch.cat(pooled, dim=1)[:2], text.pooled[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_names_of_the_network_are_those_of_patches(family):
    model = build_model(family)
    network = TextEncoders(model.pipeline, list(text_outputs(model.pipeline)))
    weights = pipeline_weights(model.pipeline)
    for name, parameter in network.named_parameters():
        assert weights[name] is parameter


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd35", "flux"])
def test_the_patch_changes_what_the_denoiser_reads_of_each_encoder(family, edit):
    model = build_model(family)
    before = {n: p.detach().clone() for n, p in pipeline_weights(model.pipeline).items()}
    patch = edit.apply(model)
    assert all(torch.equal(p, before[n]) for n, p in pipeline_weights(model.pipeline).items())
    encoders = set(text_outputs(model.pipeline))
    assert {name.partition(".")[0] for name in patch.tensors} == encoders
    assert set(patch.metadata.components) == encoders
    assert not UNREAD[family] & patch.names
    assert patch.metadata.training_prompts["unsafe"] == 2
    text = model.encode_text(TEXTS)
    with patch.apply(model):
        changed = model.encode_text(TEXTS)
    assert not torch.equal(text.hidden, changed.hidden)
    assert text.pooled is None or not torch.equal(text.pooled, changed.pooled)


def test_training_lowers_the_weighted_sum(make_model, edit):
    losses = []
    training = SHORT.model_copy(update={"updates": 40, "batch": 8, "lr": 3e-3})
    edit.model_copy(update={"training": training}).apply(
        make_model(), callback=lambda done, total, row: losses.append(row) and None
    )
    first, last = (
        sum(weight * row[term] for term, weight in {"L_unsafe": 0.7, "L_concept": 0.7}.items())
        + 0.3 * row["L_safe"]
        for row in (losses[0], losses[-1])
    )
    assert last < 0.8 * first


def test_original_encoders_lose_nothing_on_safe_prompts_without_the_vector(make_model, safe_file):
    model = make_model()
    edit = DES(erase=("red cube",), captions=(safe_file,), concept_scale=0.0, training=SHORT)
    network = edit.network(model)
    objective = DESObjective(edit, network)
    terms = objective.training_step(network, 0, torch.Generator().manual_seed(0), (0, 1))
    assert_close(terms["L_safe"], torch.zeros(2), atol=1e-6, rtol=0)
    assert terms["L_unsafe"].min() > 1e-4
    assert objective.weights == {"L_unsafe": 0.7, "L_safe": 0.3, "L_concept": 0.7}


def test_processes_share_a_batch(make_model, edit):
    network = edit.network(make_model())
    objective = DESObjective(edit, network)
    terms = [
        objective.training_step(network, 0, torch.Generator().manual_seed(3), share)
        for share in ((0, 1), (0, 2), (1, 2))
    ]
    whole, first, second = (each["L_unsafe"] for each in terms)
    assert_close(whole, torch.cat([first, second]))


def test_encoders_can_be_chosen_and_must_exist(edit):
    model = build_model("sd3")
    chosen = edit.model_copy(update={"encoders": ("text_encoder_2",)})
    assert set(chosen.apply(model).metadata.components) == {"text_encoder_2"}
    missing = edit.model_copy(update={"encoders": ("text_encoder_3",)})
    with pytest.raises(ConfigError, match="encoders must be among text_encoder, text_encoder_2 of"):
        missing.apply(model)


def test_an_edit_on_top_of_another_names_its_parent(make_model, edit):
    from safegen.edits.uce import UCE

    model = make_model()
    first = UCE(erase=("red cube",)).apply(model)
    with first.apply(model):
        second = edit.apply(model)
    assert [parent.hash for parent in second.metadata.parents] == [first.hash]
    assert not first.names & second.names
    assert second.hash == edit.apply(model).hash  # it does not read the denoiser


def test_safe_prompts_are_needed(make_model):
    with pytest.raises(ConfigError, match="des needs safe prompts, got none"):
        DES(erase=("red cube",), training=SHORT).apply(make_model())


def test_gradient_checkpointing_is_refused():
    with pytest.raises(ValueError, match="must be off for text encoders"):
        DES(training=SHORT.model_copy(update={"gradient_checkpointing": True}))
