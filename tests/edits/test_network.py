"""The network of a training: attention kernels, merged passes, half weights."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.edits.safegen import SafeGen, SafeGenObjective
from safegen.edits.training import micro_steps, network
from safegen.edits.training.config import Training
from safegen.edits.training.lora import merged_weight, trainable_parameters
from safegen.edits.training.micro_steps import forward_passes
from safegen.edits.training.network import SizedAttention, prepared_network
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters


def inputs(model, n=2):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, 8, 8, generator=g)
    return x, torch.tensor([5, 700])[:n], model.encode_text(["a red cube", ""][:n]).float()


def test_layers_are_as_before_after_the_training(make_model):
    model = make_model()
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    names = select_parameters(model.denoiser, "attn1")
    with prepared_network(model.denoiser, names, Training(precision="bf16")) as trained:
        assert {p.dtype for p in trained.values()} == {torch.float32}
        assert model.denoiser.conv_out.weight.dtype == torch.bfloat16
    after = model.denoiser.state_dict()
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())
    assert not any(isinstance(p, SizedAttention) for p in model.denoiser.attn_processors.values())


def test_rounded_weights_predict_what_autocast_does(make_model):
    model = make_model()
    names = select_parameters(model.denoiser, "attn1")
    model.denoiser.set_attn_processor(SizedAttention())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = predict(model.denoiser, *inputs(model))
        with prepared_network(model.denoiser, names, Training(precision="bf16")):
            rounded = predict(model.denoiser, *inputs(model))
    assert torch.equal(plain, rounded)


def test_the_base_of_a_lora_is_not_rounded(make_model):
    """An adversary compares its weight, with the LoRA, to the original one."""
    model = make_model()
    name = next(n for n in select_parameters(model.denoiser, "kv2") if n.endswith(".weight"))
    module = model.denoiser.get_submodule(name.removesuffix(".weight"))
    before = module.weight.detach().clone()
    with (
        trainable_parameters(model, "kv2", rank=2, alpha=None, seed=0) as trainable,
        prepared_network(model.denoiser, trainable.names, Training(precision="bf16")),
    ):
        assert torch.equal(merged_weight(module), before)
        assert model.denoiser.conv_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("tokens", "half", "text", "kind"),
    [
        (16, False, None, "fused"),
        (16, True, None, "plain"),
        (1024, True, None, "fused"),
        (1024, False, 77, "plain"),
        (128 * 128, True, 77, "fused"),
    ],
)
def test_the_kernel_follows_tokens_text_and_precision(monkeypatch, tokens, half, text, kind):
    attention = SizedAttention()
    for name in ("plain", "fused"):
        monkeypatch.setattr(attention, name, lambda *args, name=name: name)
    x = torch.zeros(1, tokens, 1)
    texts = None if text is None else torch.zeros(1, text, 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        assert attention(None, x, texts) == kind


def test_other_attention_processors_stay(make_model):
    class OtherProcessor:
        pass

    own = OtherProcessor()
    processors = {**make_model().denoiser.attn_processors, "own": own}
    faster = network.faster_processors(processors)
    assert faster.pop("own") is own
    assert {type(p) for p in faster.values()} == {SizedAttention}


@pytest.mark.parametrize(
    ("merged", "sizes"), [(1, [1] * 5), (2, [1, 2, 2]), (4, [2, 3]), (5, [5]), (9, [5])]
)
def test_micro_steps_are_spread_evenly_over_forward_passes(merged, sizes):
    class Objective:
        micro_steps_per_pass = merged

        def training_steps(self):
            raise NotImplementedError

    passes = list(forward_passes(Objective(), Training(accumulation=5), 2))
    assert [step for steps in passes for step in steps] == [10, 11, 12, 13, 14]
    assert [len(steps) for steps in passes] == sizes


def test_merged_micro_steps_are_the_separate_ones(make_model, triplets, monkeypatch):
    settings = {"captions": (), "adversary": 0.25, "training": {"updates": 2, "accumulation": 3}}
    settings["training"] |= {"batch": 2, "lr": 1e-4, "warmup": 0, "precision": "fp32"}
    log, patches = [], []
    for limit in (1, micro_steps.MERGED_POSITIONS):
        monkeypatch.setattr(micro_steps, "MERGED_POSITIONS", limit)
        edit = SafeGen(**{**settings, "training": Training(**settings["training"])})
        done = lambda *row: log.append(row[2])  # noqa: E731
        patches.append(edit.apply(make_model(), triplets, callback=done).tensors)
    for name, value in patches[0].items():
        assert_close(patches[1][name], value, rtol=0, atol=1e-6)
    for separate, merged in zip(log[:2], log[2:], strict=True):
        assert merged["L_m"] == pytest.approx(separate["L_m"], rel=1e-3)
        assert merged["norm"] == pytest.approx(separate["norm"], rel=1e-3)


def test_an_adversary_that_learns_from_each_micro_step_is_not_merged(make_model, triplets):
    counts = []
    for adversary in (0.25, "inversion"):
        model = make_model()
        names = select_parameters(model.denoiser, "attn1")
        edit = SafeGen(captions=(), adversary=adversary, training=Training(batch=2))
        counts.append(SafeGenObjective(edit, model, triplets, names).micro_steps_per_pass)
    assert counts[0] > counts[1] == 1
