"""Latent Guard: the published head and loss by hand, files, training and calibration."""

from __future__ import annotations

import math

import pytest
import torch

from safegen.core.errors import ConfigError, FileError
from safegen.guards import make_guard
from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.latent_guard.head import (
    ClipTextFeatures,
    LatentGuardHead,
    contrastive_loss,
    load_head,
    max_scores,
    save_head,
    train_head,
)
from safegen.guards.latent_guard.latent_guard import calibrate

THINGS = ("cube", "ball", "cone", "table", "grass", "tree")
TABLE = {
    thing: [
        (f"{start} {thing}", f"{start} {other}")
        for start in ("a red", "a blue", "a green", "under a")
        for other in ("white", "in the")
    ]
    for thing in THINGS[:4]
}


@pytest.fixture(scope="module")
def adapter(tiny_model):
    return PipelineAdapter(tiny_model.pipeline)


@pytest.fixture(scope="module")
def head(adapter):
    return train_head(adapter, TABLE, updates=60, batch=4)


def published(state, x1, x2, heads=16):
    """Return the score of a prompt (tokens, width) with a concept (width,), head by head."""

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    key, value = linear("x1_to_key", x1), linear("x1_to_value", x1)
    query = linear("x2_to_query", x2)
    d, parts = len(query) // heads, []
    for h in range(heads):
        columns = slice(h * d, (h + 1) * d)
        weight = torch.softmax(key[:, columns] @ query[columns] / d**0.5, dim=0)
        parts.append(weight @ value[:, columns])
    v, q = linear("final_mlp", torch.cat(parts)), linear("mlp_query1", query)
    return state["tempr"] * (v @ q) / (v.norm() * q.norm())


def test_the_head_equals_the_published_formula_for_every_pair():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = LatentGuardHead(24).double()
        x, g = torch.randn(3, 5, 24).double(), torch.randn(4, 24).double()
    outputs = head(x, g)
    assert outputs.shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert torch.allclose(outputs[i, j], published(head.state_dict(), x[i], g[j]))


def test_the_head_has_the_published_parameters():
    assert (
        sum(p.numel() for p in LatentGuardHead(768).parameters())
        == 3 * (768 * 512 + 512) + 2 * (512 * 128 + 128) + 1
    )
    layers = ("x1_to_key", "x1_to_value", "x2_to_query", "final_mlp", "mlp_query1")
    assert set(LatentGuardHead(768).state_dict()) == {
        "tempr",
        *(f"{name}.{part}" for name in layers for part in ("weight", "bias")),
    }


def test_the_loss_equals_two_cross_entropies_by_hand():
    s, r = torch.randn(2, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs = contrastive_loss(s, r)
    for i in range(5):
        row = s[i, i] - torch.logsumexp(torch.cat([s[i], r.max(dim=1).values]), 0)
        column = s[i, i] - torch.logsumexp(torch.cat([s[:, i], r[:, i]]), 0)
        assert torch.allclose(outputs[i], -(row + column))
    assert contrastive_loss(100 * torch.eye(5), torch.zeros(5, 5)).max() < 1e-6


def test_training_separates_prompts_with_and_without_a_concept(adapter, head):
    tower = ClipTextFeatures(adapter)
    for thing, pairs in TABLE.items():
        ends = tower.pooled([thing])
        with_it, without = (
            max_scores(head, tower, [pair[side] for pair in pairs], ends) for side in (0, 1)
        )
        assert min(with_it) > max(without), thing
    again = train_head(adapter, TABLE, updates=60, batch=4)
    assert all(
        torch.equal(a, b)
        for a, b in zip(head.state_dict().values(), again.state_dict().values(), strict=True)
    )


def test_a_head_round_trips_and_the_published_layout_loads(head, tmp_path):
    save_head(head, tmp_path / "head.safetensors")
    torch.save(head.state_dict(), tmp_path / "model_parameters.pth")
    for loaded in (
        load_head(tmp_path / "head.safetensors"),
        load_head(tmp_path / "model_parameters.pth", allow_pickle=True),
    ):
        assert all(
            torch.equal(a, b)
            for a, b in zip(head.state_dict().values(), loaded.state_dict().values(), strict=True)
        )
    with pytest.raises(FileError, match="must not be a pickle"):
        load_head(tmp_path / "model_parameters.pth")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gone.safetensors", "does not exist"),
        ("bad.safetensors", "is not a head"),
        ("other.safetensors", "is not a head"),
    ],
)
def test_invalid_head_files_are_refused(tmp_path, name, says):
    from safetensors.torch import save_file

    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    save_file({"x1_to_key.weight": torch.zeros(512, 8)}, tmp_path / "other.safetensors")
    with pytest.raises(FileError, match=says):
        load_head(tmp_path / name)


def test_a_head_that_is_not_finite_is_refused(tmp_path):
    head = LatentGuardHead(8)
    head.tempr.data.fill_(float("nan"))
    save_head(head, tmp_path / "nan.safetensors")
    with pytest.raises(FileError, match="NaN or infinite"):
        load_head(tmp_path / "nan.safetensors")


@pytest.mark.parametrize("rate", [0.0, 0.25, 0.5])
def test_calibrate_returns_the_least_threshold_for_the_rate(adapter, head, rate):
    tower = ClipTextFeatures(adapter)
    benign = [
        f"a {color} {place}"
        for color in ("red", "blue", "green", "white")
        for place in ("grass", "tree")
    ]
    threshold = calibrate(adapter, head, ["cube", "cone"], benign, rate=rate)
    scores = max_scores(head, tower, benign, tower.pooled(["cube", "cone"]))
    assert sum(v >= threshold for v in scores) <= rate * len(benign)
    below = torch.nextafter(
        torch.tensor(threshold, dtype=torch.float64), torch.tensor(-1e9, dtype=torch.float64)
    ).item()
    assert sum(v >= below for v in scores) > rate * len(benign)  # it is the least threshold


def test_calibrate_refuses_too_few_prompts_for_the_rate(adapter, head):
    with pytest.raises(
        ConfigError, match=r"rate must be 0 or at least 1 / prompts, got 0.01 with 3 prompts"
    ):
        calibrate(adapter, head, ["cube"], ["a", "b", "c"], rate=0.01)


def test_calibrate_refuses_scores_of_nan(make_model, head):
    pipe = make_model().pipeline
    next(pipe.text_encoder.parameters()).data.fill_(math.nan)
    with pytest.raises(ConfigError, match="scores of benign prompts must be finite, got nan"):
        calibrate(PipelineAdapter(pipe), head, ["cube"], ["a ball"], rate=0.0)


def test_blocks_the_concept_and_generates_the_rest(tiny_model, adapter, head, generate, tmp_path):
    save_head(head, tmp_path / "head.safetensors")
    threshold = calibrate(adapter, head, ["cube"], [b for _, b in TABLE["cube"]], rate=0.0)
    guard = make_guard(
        "latent-guard",
        weights=tmp_path / "head.safetensors",
        concepts=["cube"],
        threshold=threshold,
    )
    gone, shown = generate(tiny_model.pipeline, [guard], ["a red cube", "a red white"])
    assert (gone.image, gone.trace.reason) == (None, "latent-guard: concept")
    assert shown.image is not None
    assert shown.trace.guards[0].scores["score"] < threshold <= gone.trace.guards[0].scores["score"]
    (tmp_path / "moved").mkdir()
    save_head(head, tmp_path / "moved" / "same.safetensors")
    assert (
        guard.fingerprint()
        == guard.model_copy(
            update={"weights": tmp_path / "moved" / "same.safetensors"}
        ).fingerprint()
    )
    assert guard.fingerprint() != guard.model_copy(update={"threshold": 0.0}).fingerprint()


def test_a_concept_at_the_end_of_a_long_prompt_counts(adapter, head):
    tower = ClipTextFeatures(adapter)
    tokenizer = adapter.pipe.tokenizer
    long = " ".join(["the"] * 60) + " a red cube"
    parts = tower.windows(long)
    assert len(parts) > 1
    assert all(len(part) == tokenizer.model_max_length for part in parts)
    texts = [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
    assert texts[-1].endswith("a red cube")
    ends = tower.pooled(["cube"])
    assert max_scores(head, tower, [long, "x"], ends)[0] == pytest.approx(
        max(max_scores(head, tower, texts, ends)), abs=1e-4
    )
    assert tower.windows("a cube") == [tokenizer("a cube").input_ids]


def test_a_concept_longer_than_the_encoder_reads_is_refused(adapter, head, tmp_path):
    save_head(head, tmp_path / "h.safetensors")
    with pytest.raises(ConfigError, match="a concept of the guard 'latent-guard' must have"):
        make_guard(
            "latent-guard",
            weights=tmp_path / "h.safetensors",
            concepts=["cube", " ".join(["the"] * 60)],
        ).build(adapter)


def test_a_head_for_another_text_encoder_is_refused(adapter, tiny_wan, tmp_path):
    save_head(LatentGuardHead(24), tmp_path / "h.safetensors")
    guard = make_guard("latent-guard", weights=tmp_path / "h.safetensors", concepts=["cube"])
    with pytest.raises(ConfigError, match="must fit a text encoder of width 32, got 24"):
        guard.build(adapter)
    with pytest.raises(
        ConfigError, match=r"on a WanPipeline: it needs a CLIP text encoder\. Guards that can: neg"
    ):
        GuardedPipeline(tiny_wan, [guard])


def test_training_refuses_a_table_without_two_concepts(adapter):
    with pytest.raises(ConfigError, match="at least two concepts"):
        train_head(adapter, {"cube": TABLE["cube"]})
    with pytest.raises(ConfigError, match="at least two concepts"):
        train_head(adapter, {"cube": TABLE["cube"], "ball": []})
