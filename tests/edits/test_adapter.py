"""LoRA training: initial output, rank, merged weights and removal."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.functional.rollout import frozen_predictor
from safegen.edits.training.lora import trainable_parameters
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

HOW = {"rank": 3, "alpha": None, "seed": 0}


@pytest.fixture
def inputs(tiny_model):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([10, 700]),
        tiny_model.encode_text(["a red cube", ""]),
    )


@torch.no_grad()
def perturb(net, names):
    for name in names:
        p = net.get_parameter(name)
        p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))


@pytest.mark.parametrize("selector", ["attn1", "attn2", "all"])
def test_a_lora_starts_at_zero_and_its_merged_weights_give_its_output(make_model, inputs, selector):
    """`all` has convolutions with strides, and projections of 1x1."""
    model = make_model()
    net = model.denoiser
    plain = frozen_predictor(net)(*inputs)
    with trainable_parameters(model, selector, **HOW | {"alpha": 6.0}) as trainable:
        assert torch.equal(frozen_predictor(net)(*inputs), plain)
        perturb(net, trainable.names)
        adapted = frozen_predictor(net)(*inputs)
        new = trainable.merge({n: net.get_parameter(n).detach() for n in trainable.names})
    assert (adapted - plain).abs().max() > 1e-2
    assert torch.equal(frozen_predictor(net)(*inputs), plain)
    assert set(new) <= set(select_parameters(net, selector))
    assert_close(
        frozen_predictor(net, new)(*inputs),
        adapted,
        rtol=1e-3,
        atol=1e-3 * float(adapted.abs().max()),
    )


def test_the_change_of_a_weight_has_the_inputs_rank(make_model):
    model = make_model()
    with trainable_parameters(model, "attn2", **HOW) as trainable:
        perturb(model.denoiser, trainable.names)
        new = trainable.merge(
            {n: model.denoiser.get_parameter(n).detach() for n in trainable.names}
        )
    own = dict(model.denoiser.named_parameters())
    assert {
        int(torch.linalg.matrix_rank(v.double() - own[n].double(), rtol=1e-4))
        for n, v in new.items()
    } == {3}


def test_initial_factors_stand_for_the_original_model(make_model, inputs):
    """Objectives predict with the original model by setting the initial factors."""
    model = make_model()
    net = model.denoiser
    plain = frozen_predictor(net)(*inputs)
    with trainable_parameters(model, "attn2", **HOW) as trainable:
        start = {n: net.get_parameter(n).detach().clone() for n in trainable.names}
        perturb(net, trainable.names)
        assert torch.equal(frozen_predictor(net, start)(*inputs), plain)


def test_only_the_factors_get_gradients(make_model, inputs):
    model = make_model()
    with trainable_parameters(model, "kv2", **HOW) as trainable:
        assert all(
            ".attn2.to_" in n and n.rpartition(".")[2] in ("down", "up") for n in trainable.names
        )
        for n in trainable.names:
            model.denoiser.get_parameter(n).requires_grad_()
        predict(model.denoiser, *inputs).pow(2).mean().backward()
        grads = {n for n, p in model.denoiser.named_parameters() if p.grad is not None}
    assert grads == set(trainable.names)


def test_loras_are_removed_after_an_error(make_model):
    model = make_model()
    names, modules = (
        [n for n, _ in model.denoiser.named_parameters()],
        [n for n, _ in model.denoiser.named_modules()],
    )

    def fail():
        with trainable_parameters(model, "attn2", **HOW):
            raise ConnectionError("pulled the plug")

    with pytest.raises(ConnectionError):
        fail()
    assert [n for n, _ in model.denoiser.named_parameters()] == names
    assert [n for n, _ in model.denoiser.named_modules()] == modules
    assert not any(m._forward_hooks for m in model.denoiser.modules())


def test_equal_seeds_give_equal_initial_factors(make_model):
    starts = []
    for seed in (0, 0, 1):
        model = make_model()
        with trainable_parameters(model, "attn2", **HOW | {"seed": seed}) as trainable:
            starts.append(
                torch.cat([model.denoiser.get_parameter(n).flatten() for n in trainable.names])
            )
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_without_a_rank_the_selected_weights_are_trained(make_model):
    model = make_model()
    with trainable_parameters(model, "attn2", rank=None, alpha=None, seed=0) as trainable:
        assert list(trainable.names) == select_parameters(model.denoiser, "attn2")
        found = {n: torch.ones(1) for n in trainable.names}
        assert trainable.merge(found) == found


def test_a_selector_without_matrices_raises(make_model, monkeypatch):
    from safegen.models import selectors

    monkeypatch.setitem(selectors.SELECTORS[selectors.UNET], "norms", r"\.norm1\.")
    with pytest.raises(
        ConfigError, match="selector 'norms' must match a linear or convolutional weight"
    ):
        with trainable_parameters(make_model(), "norms", **HOW):
            pass


@pytest.mark.parametrize("method", ["safegen", "esd", "sdd", "concept_ablation"])
def test_a_rank_of_zero_raises(method):
    with pytest.raises(ConfigError, match="rank must be greater than or equal to 1, got 0"):
        make_edit(method, rank=0)
