"""Our LoRA files in the hands of others: diffusers' own `load_lora_weights`, with peft behind it, draws the patched model's picture."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.models.selectors import select_parameters
from safegen.patches.lora import extract_lora, load_lora, save_lora
from safegen.patches.patch import Patch


def picture(pipeline):
    ask = {
        "prompt": "a red cube",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "np",
    }
    return torch.from_numpy(pipeline(**ask, generator=torch.Generator().manual_seed(0)).images)


@pytest.fixture
def drawn(make_model, make_tiny):
    """Return a builder: a fresh model of a build, a patch of all its attention matrices, and what it draws before and with the patch."""

    def build(kind):
        model = make_model() if kind == "sd1" else make_tiny(kind)
        own, g = dict(model.denoiser.named_parameters()), torch.Generator().manual_seed(1)
        names = [n for n in select_parameters(model.denoiser, "attention") if own[n].ndim == 2]
        patch = Patch({n: own[n] + 0.1 * torch.randn(own[n].shape, generator=g) for n in names})
        before = picture(model.pipeline)
        with patch.apply(model):
            after = picture(model.pipeline)
        assert (after - before).abs().max() > 1e-2  # or nothing would be shown
        return model, patch, before, after

    return build


@pytest.mark.parametrize("keys", ["kohya", "diffusers"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_the_library_draws_the_patched_picture_with_our_lora(drawn, tmp_path, kind, keys):
    model, patch, before, after = drawn(kind)
    save_lora(
        extract_lora(patch, model, 56),
        model,
        tmp_path / "lora.safetensors",
        keys=keys,
        dtype=torch.float32,
    )
    pipe = model.pipeline
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="safety")
    assert_close(picture(pipe), after, rtol=0, atol=1e-3)
    pipe.disable_lora()
    assert_close(picture(pipe), before, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # peft says so of every second adapter
def test_beside_another_lora_both_act(drawn, tmp_path):
    """As docs/how-to/other-loras.md says, the safety LoRA stays active beside another and is not fused into it."""
    model, patch, _, _ = drawn("sd1")
    own, g = dict(model.denoiser.named_parameters()), torch.Generator().manual_seed(2)
    theirs = Patch(
        {n: own[n] + 0.1 * torch.randn(own[n].shape, generator=g) for n in patch.tensors}
    )
    for name, part in {"safety": patch, "theirs": theirs}.items():
        save_lora(
            extract_lora(part, model, 56),
            model,
            tmp_path / f"{name}.safetensors",
            dtype=torch.float32,
        )
    both = Patch({n: patch.tensors[n] + theirs.tensors[n] - own[n] for n in patch.tensors})
    with both.apply(model):
        want = picture(model.pipeline)
    pipe = model.pipeline
    for name in ("safety", "theirs"):
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["theirs", "safety"])
    assert_close(picture(pipe), want, rtol=0, atol=1e-3)


def test_what_the_library_saves_we_read(drawn, tmp_path):
    model, patch, _, after = drawn("sd1")
    save_lora(
        extract_lora(patch, model, 56),
        model,
        tmp_path / "ours.safetensors",
        keys="diffusers",
        dtype=torch.float32,
    )
    pipe = model.pipeline
    pipe.load_lora_weights(tmp_path, weight_name="ours.safetensors", adapter_name="safety")
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    layers = convert_state_dict_to_diffusers(
        get_peft_model_state_dict(pipe.unet, adapter_name="safety")
    )
    pipe.save_lora_weights(tmp_path / "theirs", unet_lora_layers=layers)
    pipe.unload_lora_weights()
    with load_lora(tmp_path / "theirs" / "pytorch_lora_weights.safetensors", model).apply(model):
        assert_close(picture(pipe), after, rtol=0, atol=1e-3)
