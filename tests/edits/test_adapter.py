"""A LoRA beside the weights: it starts silent, stays thin, becomes the weights that it stands for, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.functional.rollout import frozen_predictor
from safegen.edits.training.lora import trainable_parameters
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

HOW = {"rank": 3, "alpha": None, "seed": 0}


@pytest.fixture
def given(tiny_model):
    g = torch.Generator().manual_seed(1)
    return (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([10, 700]),
        tiny_model.encode_text(["a red cube", ""]),
    )


@torch.no_grad()
def shake(net, names):
    for name in names:
        p = net.get_parameter(name)
        p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))


@pytest.mark.parametrize("selector", ["attn1", "attn2", "all"])
def test_the_factors_start_silent_and_then_are_the_weights_they_stand_for(
    make_model, given, selector
):
    """`all` has convolutions with strides, and projections of 1x1."""
    model = make_model()
    net = model.denoiser
    plain = frozen_predictor(net)(*given)
    with trainable_parameters(model, selector, **HOW | {"alpha": 6.0}) as part:
        assert torch.equal(frozen_predictor(net)(*given), plain)
        shake(net, part.names)
        beside = frozen_predictor(net)(*given)
        new = part.weights({n: net.get_parameter(n).detach() for n in part.names})
    assert (beside - plain).abs().max() > 1e-2
    assert torch.equal(frozen_predictor(net)(*given), plain)
    assert set(new) <= set(select_parameters(net, selector))
    assert_close(
        frozen_predictor(net, new)(*given), beside, rtol=1e-3, atol=1e-3 * float(beside.abs().max())
    )


def test_a_change_has_the_rank_that_was_asked_for(make_model):
    model = make_model()
    with trainable_parameters(model, "attn2", **HOW) as part:
        shake(model.denoiser, part.names)
        new = part.weights({n: model.denoiser.get_parameter(n).detach() for n in part.names})
    own = dict(model.denoiser.named_parameters())
    assert {
        int(torch.linalg.matrix_rank(v.double() - own[n].double(), rtol=1e-4))
        for n, v in new.items()
    } == {3}


def test_the_reference_is_the_factors_as_they_began(make_model, given):
    """What the edits call the untouched model: the first values of what is trained, put in for a call."""
    model = make_model()
    net = model.denoiser
    plain = frozen_predictor(net)(*given)
    with trainable_parameters(model, "attn2", **HOW) as part:
        start = {n: net.get_parameter(n).detach().clone() for n in part.names}
        shake(net, part.names)
        assert torch.equal(frozen_predictor(net, start)(*given), plain)


def test_only_the_factors_are_trained(make_model, given):
    model = make_model()
    with trainable_parameters(model, "kv2", **HOW) as part:
        assert all(".attn2.to_" in n and n.rpartition(".")[2] in ("down", "up") for n in part.names)
        for n in part.names:
            model.denoiser.get_parameter(n).requires_grad_()
        model.denoiser(*given).sample.pow(2).mean().backward()
        grads = {n for n, p in model.denoiser.named_parameters() if p.grad is not None}
    assert grads == set(part.names)


def test_everything_is_gone_after_a_failure_too(make_model):
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


def test_the_same_seed_starts_the_same_factors(make_model):
    starts = []
    for seed in (0, 0, 1):
        model = make_model()
        with trainable_parameters(model, "attn2", **HOW | {"seed": seed}) as part:
            starts.append(
                torch.cat([model.denoiser.get_parameter(n).flatten() for n in part.names])
            )
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_without_a_rank_the_weights_themselves_are_trained(make_model):
    model = make_model()
    with trainable_parameters(model, "attn2", rank=None, alpha=None, seed=0) as part:
        assert list(part.names) == select_parameters(model.denoiser, "attn2")
        found = {n: torch.ones(1) for n in part.names}
        assert part.weights(found) == found


def test_a_selector_without_matrices_is_refused(make_model, monkeypatch):
    from safegen.models import selectors as room

    monkeypatch.setitem(room.__globals__["SELECTORS"], "norms", r"\.norm1\.")
    with pytest.raises(
        ConfigError, match="the selector 'norms' picks no matrix and no convolution"
    ):
        with trainable_parameters(make_model(), "norms", **HOW):
            pass


@pytest.mark.parametrize("method", ["safegen", "esd", "sdd", "concept_ablation"])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, "rank must be greater than or equal to 1, got 0"),
        ({"alpha": 2.0}, "alpha has no"),
    ],
)
def test_a_rank_of_nothing_and_an_idle_strength_are_refused_in_one_line(method, settings, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit(method, **settings)
    assert "\n" not in str(caught.value)
