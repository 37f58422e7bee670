"""Classes of diffusers pipelines: how each one encodes text, guides and starts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any, Literal

import torch

from safegen.core.errors import ConfigError
from safegen.models.families.conditioning import Conditioning

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
    """Attributes with the guidance scale of each denoiser; none if only the call has it."""
    encode: EncodeFunction
    token_encoders: tuple[str, ...]
    """Text encoders of the token embeddings; others give the pooled embedding alone."""
    encode_options: tuple[str, ...] = ()
    """Options of a call that change how text is encoded."""
    guidance_option: str = "guidance_scale"
    """Option of a call with the scale of classifier-free guidance."""
    spaces_steps: bool = False
    """Whether it spaces the noise levels of the steps itself: 1, ..., 2 / n, 1 / n."""
    starts_from_image: bool = False
    """Whether the initial latents are those of an image, which guards must not replace."""
    makes_videos: bool = False


TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
"""Text encoders of a pipeline; SD 1.x and 2.x have one, SDXL and FLUX two, SD 3 up to three."""
_SD = PipelineSpec(1, ("unet",), ("guidance_scale",), _encode_sd, TEXT_ENCODERS[:1], ("clip_skip",))
_SDXL = PipelineSpec(
    1, ("unet",), ("guidance_scale",), _encode_sdxl, TEXT_ENCODERS[:2], ("clip_skip",)
)
_SD3 = PipelineSpec(
    1,
    ("transformer",),
    ("guidance_scale",),
    _encode_sd3,
    TEXT_ENCODERS,
    ("clip_skip", LENGTH_OPTION),
)
_FLUX = PipelineSpec(
    2,
    ("transformer",),
    (),
    _encode_flux,
    ("text_encoder_2",),
    (LENGTH_OPTION,),
    guidance_option="true_cfg_scale",
    spaces_steps=True,
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
        ("text_encoder",),
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


def spec_class(kind: type) -> type | None:
    """Return the class of diffusers in `PIPELINE_SPECS` that a pipeline's class is or extends."""
    bases = (c for c in kind.__mro__ if c.__module__.startswith("diffusers."))
    return next((c for c in bases if c.__name__ in PIPELINE_SPECS), None)


def spec_of(pipe: Any) -> PipelineSpec | None:
    """Return how a pipeline guides and encodes; None if that is unknown."""
    kind = spec_class(type(pipe))
    return PIPELINE_SPECS[kind.__name__] if kind else None


def guidance_option(pipe: Any) -> str:
    """Return the option of a pipeline's call with the scale of classifier-free guidance."""
    spec = spec_of(pipe)
    return spec.guidance_option if spec else "guidance_scale"


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


def step_options(pipe: Any, latent_shape: tuple[int, int, int], steps: int) -> dict[str, Any]:
    """Return what a pipeline gives a scheduler of flow matching with the number of steps.

    Args:
        pipe: the pipeline.
        latent_shape: shape (c, h, w) of the latents; some schedules depend on their size.
        steps: number of steps.
    """
    spec, config = spec_of(pipe), pipe.scheduler.config
    options: dict[str, Any] = {}
    if spec is not None and spec.spaces_steps:
        options["sigmas"] = [(steps - i) / steps for i in range(steps)]
    if config.get("use_dynamic_shifting"):
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        patches = (latent_shape[1] // 2) * (latent_shape[2] // 2)
        options["mu"] = calculate_shift(patches, *(config[name] for name in names))
    return options


def is_t5(tokenizer: Any) -> bool:
    """Return whether a tokenizer is that of a T5 encoder."""
    return type(tokenizer).__name__.startswith("T5")


def encode_texts(
    pipe: Any,
    texts: Sequence[str],
    options: Mapping[str, Any] | None = None,
    *,
    with_gradient: bool = False,
) -> Conditioning:
    """Return texts as a pipeline encodes them in a call with these options, one row each.

    Args:
        pipe: pipeline of a class in `PIPELINE_SPECS`, or one that extends it.
        texts: the texts.
        options: options of the call.
        with_gradient: whether gradients flow to what the text encoders read.

    Raises:
        ConfigError: the class is unknown.
    """
    spec = spec_of(pipe)
    if spec is None:
        raise ConfigError(
            f"pipeline must be one of {', '.join(PIPELINE_SPECS)}, got {type(pipe).__name__}. "
            "Load one of these."
        )
    defaults = call_defaults(pipe)
    own = {k: (options or {}).get(k, defaults[k]) for k in spec.encode_options}
    with torch.set_grad_enabled(with_gradient):
        return spec.encode(pipe, texts, own)


def add_inputs(pipe: Any, text: Conditioning, texts: Sequence[str], size: int) -> Conditioning:
    """Return embeddings of texts with what else the denoiser reads of a request.

    SDXL reads sizes and crops, and a guidance-distilled FLUX the guidance. SDXL's embeddings of an
    empty text are 0 where the pipeline's are.

    Args:
        pipe: the pipeline.
        text: embeddings of `texts`.
        texts: the texts.
        size: side of the images in pixels.
    """
    hidden, pooled = text.hidden, text.pooled
    if denoiser_name(pipe) == "unet" and pooled is not None:
        if pipe.config.get("force_zeros_for_empty_prompt"):
            is_text = torch.tensor([bool(t) for t in texts], device=hidden.device)
            hidden, pooled = hidden * is_text[:, None, None], pooled * is_text[:, None]
        sizes = [size, size, 0, 0, size, size]
        return Conditioning(hidden, pooled, {"time_ids": pooled.new_tensor([sizes] * len(texts))})
    if getattr(pipe, denoiser_name(pipe)).config.get("guidance_embeds"):
        guidance = hidden.new_full((len(texts),), EMBEDDED_GUIDANCE)
        return Conditioning(hidden, pooled, {"guidance": guidance.float()})
    return text
