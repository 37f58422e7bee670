"""Our LoRA files in diffusers' `load_lora_weights`, and diffusers' files in ours."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from safegen.models.selectors import select_parameters
from safegen.patches.active_lora import active_loras
from safegen.patches.lora import extract_lora, save_lora
from safegen.patches.lora_reader import load_lora, read_lora
from safegen.patches.patch import Patch


def image(pipeline):
    call = {
        "prompt": "a red cube",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "output_type": "np",
    }
    return torch.from_numpy(pipeline(**call, generator=torch.Generator().manual_seed(0)).images)


@pytest.fixture
def generated(make_model, make_tiny):
    """Return a builder of a model, a patch of its attention, and images without and with it."""

    def build(kind):
        model = make_model() if kind == "sd1" else make_tiny(kind)
        own, g = dict(model.denoiser.named_parameters()), torch.Generator().manual_seed(1)
        names = [n for n in select_parameters(model.denoiser, "attention") if own[n].ndim == 2]
        patch = Patch({n: own[n] + 0.1 * torch.randn(own[n].shape, generator=g) for n in names})
        before = image(model.pipeline)
        with patch.apply(model):
            after = image(model.pipeline)
        assert (after - before).abs().max() > 1e-2  # the patch has an effect
        return model, patch, before, after

    return build


@pytest.mark.parametrize(("kind", "keys"), [("sd1", "diffusers"), ("sdxl", "kohya")])
def test_diffusers_generates_the_patched_image_with_our_lora(generated, tmp_path, kind, keys):
    model, patch, before, after = generated(kind)
    save_lora(
        extract_lora(patch, model, 56),
        model,
        tmp_path / "lora.safetensors",
        keys=keys,
        dtype=torch.float32,
    )
    pipe = model.pipeline
    pipe.load_lora_weights(tmp_path, weight_name="lora.safetensors", adapter_name="safety")
    assert_close(image(pipe), after, rtol=0, atol=1e-3)
    pipe.disable_lora()
    assert_close(image(pipe), before, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings(
    "ignore:Already found a `peft_config`:UserWarning"
)  # peft warns at every second adapter
def test_diffusers_combines_our_lora_with_another(generated, tmp_path):
    """The safety LoRA stays active beside another and is not fused."""
    model, patch, _, _ = generated("sd1")
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
        want = image(model.pipeline)
    pipe = model.pipeline
    for name in ("safety", "theirs"):
        pipe.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    pipe.set_adapters(["theirs", "safety"])
    assert_close(image(pipe), want, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.filterwarnings("ignore::safegen.patches.active_lora.AdapterWarning")
@pytest.mark.parametrize("scales", [(1.0, 0.8), (-0.5, 2.0)])
def test_active_loras_equal_those_of_diffusers(generated, tmp_path, scales):
    model, patch, before, _ = generated("sd1")
    files = [tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"]
    for file in files:
        lora = extract_lora(patch, model, 4 if file.stem == "kohya" else 8)
        save_lora(lora, model, file, keys=file.stem)
    loras = [(read_lora(file, model), s) for file, s in zip(files, scales, strict=True)]
    with active_loras(model, loras):
        ours = image(model.pipeline)
    pipe = model.pipeline
    for file in files:
        pipe.load_lora_weights(tmp_path, weight_name=file.name, adapter_name=file.stem)
    pipe.set_adapters([file.stem for file in files], adapter_weights=list(scales))
    theirs = image(pipe)
    pipe.unload_lora_weights()
    assert_close(ours, theirs, rtol=0, atol=1 / 255)
    assert (ours - before).abs().max() > 1e-2
    assert torch.equal(image(pipe), before)


def test_loras_saved_by_diffusers_are_read(generated, tmp_path):
    model, patch, _, after = generated("sd1")
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
        assert_close(image(pipe), after, rtol=0, atol=1e-3)
