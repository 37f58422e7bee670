"""Classes of diffusers pipelines: how each one encodes text, guides and starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal

import torch

from safegen.models.conditioning import Conditioning
from safegen.models.text_encoder import expand_prompt

LENGTH_OPTION = "max_sequence_length"
"""Option of a call that sets how many tokens T5 reads, where a pipeline has it."""
EMBEDDED_GUIDANCE = 3.5
"""Guidance that edits train a guidance-distilled FLUX at: the default of its pipeline."""

EncodeFunction = Callable[[Any, Sequence[str], Mapping[str, Any]], Conditioning]


def _encode_sd(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Conditioning:
    return Conditioning(
        pipe.encode_prompt(list(texts), pipe._execution_device, 1, False, **options)[0]
    )


def _encode_sdxl(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Conditioning:
    hidden, _, pooled, _ = pipe.encode_prompt(
        list(texts), device=pipe._execution_device, do_classifier_free_guidance=False, **options
    )
    return Conditioning(hidden, pooled)


def _encode_sd3(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Conditioning:
    hidden, _, pooled, _ = pipe.encode_prompt(
        list(texts),
        None,
        None,
        device=pipe._execution_device,
        do_classifier_free_guidance=False,
        **options,
    )
    return Conditioning(hidden, pooled)


def _encode_flux(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Conditioning:
    hidden, pooled, _ = pipe.encode_prompt(
        list(texts), None, device=pipe._execution_device, **options
    )
    return Conditioning(hidden, pooled)


def _encode_wan(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Conditioning:
    return Conditioning(
        pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, device=pipe._execution_device, **options
        )[0]
    )


@dataclass(frozen=True)
class PipelineSpec:
    """How pipelines of one class guide and encode."""

    calls_per_step: Literal[1, 2]
    """Denoiser calls per guided step: 1 for [negative; prompt], 2 for prompt, then negative."""
    denoisers: tuple[str, ...]
    """Attributes with the networks that predict the noise."""
    guidance_attributes: tuple[str, ...]
    """Attributes with the guidance scale of each denoiser."""
    encode: EncodeFunction
    encode_options: tuple[str, ...] = ()
    """Options of a call that change how text is encoded."""
    guidance_option: str = "guidance_scale"
    """Option of a call with the scale of classifier-free guidance."""
    starts_from_image: bool = False
    """Whether the initial latents are those of an image, which guards must not replace."""
    makes_videos: bool = False


_SD = PipelineSpec(1, ("unet",), ("guidance_scale",), _encode_sd, ("clip_skip",))
_SDXL = PipelineSpec(1, ("unet",), ("guidance_scale",), _encode_sdxl, ("clip_skip",))
_SD3 = PipelineSpec(
    1, ("transformer",), ("guidance_scale",), _encode_sd3, ("clip_skip", LENGTH_OPTION)
)
_FLUX = PipelineSpec(
    2,
    ("transformer",),
    ("true_cfg_scale",),
    _encode_flux,
    (LENGTH_OPTION,),
    guidance_option="true_cfg_scale",
)
PIPELINE_SPECS: Mapping[str, PipelineSpec] = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": replace(_SD, starts_from_image=True),
    "StableDiffusionInpaintPipeline": replace(_SD, starts_from_image=True),
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": replace(_SDXL, starts_from_image=True),
    "StableDiffusionXLInpaintPipeline": replace(_SDXL, starts_from_image=True),
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusion3Img2ImgPipeline": replace(_SD3, starts_from_image=True),
    "StableDiffusion3InpaintPipeline": replace(_SD3, starts_from_image=True),
    "FluxPipeline": _FLUX,
    "FluxImg2ImgPipeline": replace(_FLUX, starts_from_image=True),
    "FluxInpaintPipeline": replace(_FLUX, starts_from_image=True),
    "WanPipeline": PipelineSpec(
        2,
        ("transformer", "transformer_2"),
        ("guidance_scale", "_guidance_scale_2"),
        _encode_wan,
        (LENGTH_OPTION,),
        makes_videos=True,
    ),
}
"""Pipeline classes of diffusers with a denoiser that is known.

Guards know no more of others than prompts and images, and so of subclasses with methods of their
own.
"""
IMAGE_PIPELINES = tuple(name for name, spec in PIPELINE_SPECS.items() if not spec.makes_videos)
"""Pipeline classes that make images."""
NOISE_PIPELINES = tuple(n for n in IMAGE_PIPELINES if not PIPELINE_SPECS[n].starts_from_image)
"""Those of them that start from noise: the classes of models."""


def spec_name(kind: type) -> str | None:
    """Return the name in `PIPELINE_SPECS` that a pipeline's class has or extends, if any."""
    bases = (c for c in kind.__mro__ if c.__module__.startswith("diffusers."))
    return next((c.__name__ for c in bases if c.__name__ in PIPELINE_SPECS), None)


def denoiser_name(pipe: Any) -> str:
    """Return the name of a pipeline's component that predicts: `unet` or `transformer`."""
    return "unet" if getattr(pipe, "unet", None) is not None else "transformer"


def call_defaults(pipe: Any) -> dict[str, Any]:
    """Return the options of a pipeline's call with the values that safegen calls it with.

    T5 reads no more tokens than its tokenizer states.
    """
    defaults = {k: p.default for k, p in signature(type(pipe).__call__).parameters.items()}
    tokenizer = next(
        (t for name in ("tokenizer_3", "tokenizer_2") if is_t5(t := getattr(pipe, name, None))),
        None,
    )
    if LENGTH_OPTION in defaults and tokenizer is not None:
        limit = int(tokenizer.model_max_length)
        defaults[LENGTH_OPTION] = min(defaults[LENGTH_OPTION], limit)
    return defaults


def text_masks(pipe: Any, texts: Sequence[str]) -> list[list[list[int]]]:
    """Return the attention mask of each text, by span of its token embeddings.

    A mask is 1 at the marks and tokens of a text. Encoders that share columns share a span.
    """
    names = [name for name in ("tokenizer", "tokenizer_2", "tokenizer_3") if hasattr(pipe, name)]
    known = [t for name in names if (t := getattr(pipe, name)) is not None]
    t5 = [tokenizer for tokenizer in known if is_t5(tokenizer)]
    clip = [tokenizer for tokenizer in known if not is_t5(tokenizer)][:1]
    spans = t5 if spec_name(type(pipe)) == "FluxPipeline" else [*clip, *t5]
    length = call_defaults(pipe).get(LENGTH_OPTION)
    masks = []
    for tokenizer in spans:
        limit = length if is_t5(tokenizer) else tokenizer.model_max_length
        expanded = [expand_prompt(pipe, text, tokenizer) for text in texts]
        options = {"padding": "max_length", "max_length": limit, "truncation": True}
        masks.append([list(row) for row in tokenizer(expanded, **options).attention_mask])
    return masks


def is_t5(tokenizer: Any) -> bool:
    """Return whether a tokenizer is that of a T5 encoder."""
    return type(tokenizer).__name__.startswith("T5")


@torch.no_grad()
def encode_texts(
    pipe: Any, texts: Sequence[str], options: Mapping[str, Any] | None = None
) -> Conditioning:
    """Return texts as a pipeline encodes them in a call with these options, one row each.

    Args:
        pipe: pipeline of a class in `PIPELINE_SPECS`, or one that extends it.
        texts: the texts.
        options: options of the call.
    """
    spec = PIPELINE_SPECS[spec_name(type(pipe)) or ""]
    defaults = call_defaults(pipe)
    own = {k: (options or {}).get(k, defaults[k]) for k in spec.encode_options}
    return spec.encode(pipe, texts, own)
