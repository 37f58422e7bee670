"""Formats of a pipeline's images: guards see PIL images in every format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from torch import Tensor

from safegen.guards.core.adapter import PipelineAdapter
from safegen.guards.core.result import GeneratedImage
from safegen.models.families.denoisers import default_side, pack_latents, packs_latents

IMAGE_OUTPUT_TYPES = ("pil", "np", "pt")
"""Values of `output_type` with images that a guard can see."""


def to_pil(image: Any) -> Any:
    """Return an image of a pipeline as a PIL image: an array (h, w, c) or a tensor (c, h, w)."""
    if isinstance(image, Tensor):
        image = VaeImageProcessor.pt_to_numpy(image[None])[0]
    return VaeImageProcessor.numpy_to_pil(image)[0] if isinstance(image, np.ndarray) else image


def restore_format(generated: GeneratedImage, output: Any) -> GeneratedImage:
    """Return an image in the format of the pipeline's output, and the output if nothing changed it.

    Args:
        generated: image after the guards, or None.
        output: the pipeline's own image; a PIL image needs no restoring.
    """
    image = generated.image
    if image is None or isinstance(output, Image.Image) or image is output:
        return generated
    own = to_pil(output)
    same = image.size == own.size and image.convert(own.mode).tobytes() == own.tobytes()
    return replace(generated, image=output if same else _from_pil(image.resize(own.size), output))


def _from_pil(image: Image.Image, like: Any) -> Any:
    """Return a PIL image as an array or a tensor like another, in [0, 1]."""
    array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    if isinstance(like, Tensor):
        return torch.from_numpy(array).permute(2, 0, 1).to(like)
    return array.astype(like.dtype)


def stack_images(
    images: Sequence[Any], adapter: PipelineAdapter, options: Mapping[str, Any]
) -> Any:
    """Return the images of a call in its output type, with a black one for each that is None.

    Args:
        images: images of one output type.
        adapter: the pipeline.
        options: options of the call.
    """
    output_type = options.get("output_type", "pil")
    shown = next((image for image in images if image is not None), None)
    if shown is None:
        shown = _black_image(adapter, options, output_type)
    if isinstance(shown, Image.Image):
        return [Image.new("RGB", shown.size) if image is None else image for image in images]
    if isinstance(shown, Tensor):
        return torch.stack([torch.zeros_like(shown) if i is None else i for i in images])
    return np.stack([np.zeros_like(shown) if image is None else image for image in images])


def _black_image(adapter: PipelineAdapter, options: Mapping[str, Any], output_type: str) -> Any:
    """Return a black image of the size that a call asks for."""
    width, height = image_size(adapter, options)
    if output_type == "pil":
        return Image.new("RGB", (width, height))
    if output_type == "pt":
        return torch.zeros(3, height, width, device=adapter.device)
    if output_type == "latent":
        shape = adapter.latent_shape({"height": height, "width": width})
        black = torch.zeros(1, *shape, device=adapter.device)
        return (pack_latents(black) if packs_latents(adapter.pipe) else black)[0]
    return np.zeros((height, width, 3), dtype=np.float32)


def image_size(adapter: PipelineAdapter, options: Mapping[str, Any]) -> tuple[int, int]:
    """Return the width and the height of the images of a call, in pixels."""
    pipe, image = adapter.pipe, options.get("image")
    scale = int(getattr(pipe, "vae_scale_factor", 1))
    if isinstance(image, list | tuple):
        image = image[0] if image else None
    if isinstance(image, Image.Image) and options.get("padding_mask_crop") is not None:
        return image.size
    is_resized = adapter.spec is not None and "height" in adapter.call_defaults
    if image is not None and options.get("mask_image") is None and not is_resized:
        if not isinstance(image, Image.Image) and image.ndim == 3:
            image = image[None]
        height, width = pipe.image_processor.get_default_height_width(image)
        return int(width), int(height)
    side = default_side(pipe) * scale
    return int(options.get("width") or side), int(options.get("height") or side)
