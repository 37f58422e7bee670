"""LoRA files by family and form of the keys: what works, and where diffusers ignores layers."""

from __future__ import annotations

_SD3 = (
    "diffusers has no reader for kohya's keys of SD 3 and generates without the LoRA; the "
    "key lists of ComfyUI and kohya's scripts have them"
)
_FLUX = (
    "diffusers leaves out layers outside the blocks, such as context_embedder; the key list of "
    "ComfyUI has them"
)
LORAS_OF_FAMILIES: dict[str, dict[str, str]] = {
    "sd1": {"kohya": "", "diffusers": ""},
    "sd2-v": {"kohya": "", "diffusers": ""},
    "sdxl": {"kohya": "", "diffusers": ""},
    "sdxl-v": {"kohya": "", "diffusers": ""},
    "sd3": {"kohya": _SD3, "diffusers": ""},
    "sd35": {"kohya": _SD3, "diffusers": ""},
    "flux": {"kohya": _FLUX, "diffusers": ""},
    "flux-schnell": {"kohya": _FLUX, "diffusers": ""},
}
"""Family, form of the keys: empty if every matrix and convolution of the denoiser is written, read
back, and changed in the same way by diffusers' `load_lora_weights`; else what diffusers ignores.

Files of every form are written and read back without loss.
"""
