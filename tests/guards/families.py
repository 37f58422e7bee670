"""Which guard runs on which family; a cell is empty, or has the reason of the refusal."""

from __future__ import annotations

FAMILIES = ("sd1", "sd2-v", "sdxl", "sdxl-v", "sd3", "sd35", "flux", "flux-schnell")
GUARDS = (
    "crops",
    "dual-latent",
    "judge-filter",
    "latent-guard",
    "negative-prompt",
    "pno",
    "prompt-filter",
    "safety-checker",
    "safree",
    "sld",
)
NO_TRUE_CFG = {family: f"{family}, true_cfg_scale 1" for family in ("flux", "flux-schnell")}
"""Families that guide only with `true_cfg_scale` > 1, with their row without it."""
IMAGE_CLASSES = {
    "sd3 from an image": "StableDiffusion3Img2ImgPipeline",
    "sd3 inpainting": "StableDiffusion3InpaintPipeline",
    "flux from an image": "FluxImg2ImgPipeline",
    "flux inpainting": "FluxInpaintPipeline",
}
"""Rows of pipelines that start from an image, with their classes."""
TRUE_CFG_REASON = "true_cfg_scale must be > 1"
NOISE_REASON = "moves the initial noise, and a {} starts from an image"
STREAMS_REASON = "needs two streams of equal noise, and inpainting does not start them alike"

GUARDS_ON_FAMILIES: dict[str, dict[str, str]] = (
    {family: dict.fromkeys(GUARDS, "") for family in FAMILIES}
    | {
        row: dict.fromkeys(GUARDS, "") | dict.fromkeys(("negative-prompt", "sld"), TRUE_CFG_REASON)
        for row in NO_TRUE_CFG.values()
    }
    | {
        row: dict.fromkeys(GUARDS, "")
        | dict.fromkeys(("crops", "pno"), NOISE_REASON.format(kind))
        | ({"dual-latent": STREAMS_REASON} if "inpainting" in row else {})
        for row, kind in IMAGE_CLASSES.items()
    }
)
"""Row: guard: reason why it refuses, part of its message; empty where it acts.

Rows of FLUX have `true_cfg_scale` 4 and an empty negative prompt, unless they say otherwise.
"""
