"""Identification of our files by InvokeAI, and its LoRA patcher on our UNet."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from safegen.models.checkpoint import configs
from safegen.models.selectors import select_parameters
from safegen.patches.lora_keys import lora_tensors
from tools.interop.files import Files
from tools.interop.read_diffusers import load
from tools.interop.scene import Report, stub_torchvision

EXPECTED = {
    "base": "Main_Checkpoint_SD1_Config",
    "patched": "Main_Checkpoint_SD1_Config",
    "kohya": "LoRA_LyCORIS_SD1_Config",
}
"""File, class by which InvokeAI knows it."""
FAMILIES = {"sdxl": "LoRA_LyCORIS_SDXL_Config", "flux": "LoRA_LyCORIS_FLUX_Config"}
"""Family, class by which InvokeAI knows its LoRAs. It has none for SD 3."""
TOLERANCE = 1e-2
"""Largest difference of a weight from the patched one, by the largest change; factors are fp16."""


def read(files: Files, report: Report) -> None:
    """Identify the files, and apply the LoRA."""
    stub_torchvision()
    factory: Any = import_module("invokeai.backend.model_manager.configs.factory")
    for name, expected in EXPECTED.items():
        match = factory.ModelConfigFactory.from_model_on_disk(getattr(files, name))
        result = type(match.config).__name__
        report.check(f"{name}: identified", result, passed=result == expected)
    _apply_lora(files, report)
    for family, expected in FAMILIES.items():
        path = report.out / f"{family}-kohya.safetensors"
        save_file(_random_lora(family), path)
        match = factory.ModelConfigFactory.from_model_on_disk(path)
        result = type(match.config).__name__
        report.check(f"{family}: LoRA of attn1 identified", result, passed=result == expected)


def _random_lora(family: str) -> dict[str, torch.Tensor]:
    """Return a LoRA of rank 1 for a network of real size, in kohya's keys."""
    from diffusers import FluxTransformer2DModel, UNet2DConditionModel

    with torch.device("meta"):
        network = (
            FluxTransformer2DModel()
            if family == "flux"
            else UNet2DConditionModel.from_config(configs.UNET[family])
        )
    own = dict(network.named_parameters())
    factors = {
        name: (torch.ones(1, own[name].shape[1]), torch.ones(own[name].shape[0], 1))
        for name in select_parameters(network, "attn1")
        if name.endswith(".weight")
    }
    return lora_tensors(factors, network, 1, "kohya")


@torch.inference_mode()
def _apply_lora(files: Files, report: Report) -> None:
    """Apply the LoRA with InvokeAI's patcher and compare with the patched file."""
    patcher: Any = import_module("invokeai.backend.patches.layer_patcher")
    conversion: Any = import_module(
        "invokeai.backend.patches.lora_conversions.sd_lora_conversion_utils"
    )
    unet, patched = load(files.base).unet, load(files.patched).unet.state_dict()
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    lora = conversion.lora_model_from_sd_state_dict(load_file(files.kohya))
    with patcher.LayerPatcher.apply_smart_model_patches(
        model=unet,
        patches=[(lora, 1.0)],
        prefix="lora_unet_",
        dtype=torch.float32,
        force_direct_patching=True,
    ):
        now = unet.state_dict()
        changed = {n for n, value in now.items() if not torch.equal(value, before[n])}
        gap = max(float((now[n] - patched[n]).abs().max()) for n in patched)
    wanted = {n for n, value in patched.items() if not torch.equal(value, before[n])}
    size = max(float((patched[n] - before[n]).abs().max()) for n in wanted)
    count = f"{len(changed)} of {len(wanted)} weights changed"
    report.check("kohya: the patch's weights change", count, passed=changed == wanted)
    share = f"largest difference from the patch {gap / size:.1e} of the largest change"
    report.check("kohya: weights as patched", share, passed=gap / size < TOLERANCE)
