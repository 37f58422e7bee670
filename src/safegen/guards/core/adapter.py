"""Adapter of diffusers pipelines: what guards ask one, and where they can hook it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import (
    default_side,
    pack_latents,
    packs_latents,
    unpack_latents,
)
from safegen.models.families.pipeline_specs import (
    NOISE_PIPELINES,
    PIPELINE_SPECS,
    encode_texts,
    spec_class,
)
from safegen.models.text_encoder import TextEncoderView, count_tokens, text_encoders

HookPoint = Literal[
    "prompt",
    "probe",
    "negative_prompt_embeds",
    "prompt_embeds",
    "guidance",
    "submodules",
    "latents",
    "image",
]
"""Where a guard acts: prompt, probe images, embeddings, guidance, layers, latents, image."""
UNIVERSAL_POINTS: frozenset[HookPoint] = frozenset({"prompt", "image"})
"""Hook points of every pipeline, without `image` where it makes videos."""
ALL_POINTS: frozenset[HookPoint] = frozenset(get_args(HookPoint))
GUIDANCE_POINTS: frozenset[HookPoint] = frozenset({"negative_prompt_embeds", "guidance"})
"""Hook points that have no effect without guidance."""
EXTERNAL_POINTS: frozenset[HookPoint] = frozenset({"prompt", "probe", "image"})
"""Hook points outside the pipeline's call."""
IMAGE_OPTIONS = ("image", "mask_image", "control_image")
"""Options with an image per prompt: a list, or a batch (n, c, h, w)."""
NUM_IMAGES_OPTIONS = ("num_images_per_prompt", "num_videos_per_prompt")
OWN_METHODS = ("__call__", "encode_prompt")
"""Methods on which the hooks depend: order of the denoiser's rows, and tokens of a prompt."""


def clone_generator(generator: torch.Generator) -> torch.Generator:
    """Return a generator that yields the same numbers as `generator` will."""
    return torch.Generator(generator.device).set_state(generator.get_state())


class PipelineAdapter:
    """One diffusers pipeline, as guards see it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.pipeline_class = type(pipe).__name__
        base = spec_class(type(pipe))
        self.family = base.__name__ if base else ""
        """Name in `PIPELINE_SPECS` of the class or of the class that it extends; may be empty."""
        self.replaced = [m for m in OWN_METHODS if base and _is_replaced(pipe, base, m)]
        """Methods that a subclass or an attribute replaces, which hides what hooks depend on."""
        known = PIPELINE_SPECS.get(self.family)
        self.spec = None if self.replaced else known
        points = ALL_POINTS if self.spec else UNIVERSAL_POINTS
        if known and known.starts_from_image:
            points -= {"probe"}
        if known and known.makes_videos:
            points -= {"image"}
        self.hook_points = points
        self.supported = sorted(PIPELINE_SPECS)

    def missing_reason(self, points: frozenset[HookPoint]) -> str:
        """Return why the pipeline lacks hook points, a phrase after "it"; empty if it has them."""
        missing = points - self.hook_points
        if not missing:
            return ""
        if "image" in missing:
            return "checks images, and this pipeline makes videos"
        if self.replaced:
            return (
                f"acts inside the denoiser, and {self.pipeline_class} replaces "
                f"{' and '.join(self.replaced)} of {self.family}"
            )
        if self.spec:
            return f"moves the initial noise, and a {self.pipeline_class} starts from an image"
        return f"acts inside the denoiser, which is supported for {', '.join(self.supported)}"

    @property
    def device(self) -> torch.device:
        """Device that the pipeline computes on, also while its weights are offloaded."""
        device: torch.device = self.pipe._execution_device
        return device

    @property
    def denoisers(self) -> list[nn.Module]:
        """Networks that predict the noise, in the order of their guidance scales."""
        names = self.spec.denoisers if self.spec else ()
        networks = [getattr(self.pipe, name, None) for name in names]
        return [network for network in networks if network is not None]

    @property
    def num_timesteps(self) -> int:
        """Scheduler steps of the running call."""
        return int(self.pipe.num_timesteps)

    def has_guidance(self, options: Mapping[str, Any]) -> bool:
        """Return whether the running call uses classifier-free guidance.

        Args:
            options: options of the call. FLUX guides only beside a negative prompt.
        """
        if hasattr(self.pipe, "do_classifier_free_guidance"):
            return bool(self.pipe.do_classifier_free_guidance)
        return self._option_scale(options) > 1 and options.get("negative_prompt") is not None

    def guidance_applies(self, options: Mapping[str, Any]) -> bool:
        """Return whether the running call uses guidance and does not rescale it afterwards."""
        rescale = getattr(self.pipe, "guidance_rescale", None) or 0.0
        return self.has_guidance(options) and not rescale > 0

    def guidance_scale(self, network: nn.Module, options: Mapping[str, Any]) -> float:
        """Return the guidance scale of the running call for one denoiser."""
        assert self.spec is not None
        if not self.spec.guidance_attributes:
            return self._option_scale(options)
        index = next(i for i, denoiser in enumerate(self.denoisers) if denoiser is network)
        scale = getattr(self.pipe, self.spec.guidance_attributes[index], None)
        return float(self.pipe.guidance_scale if scale is None else scale)

    def _option_scale(self, options: Mapping[str, Any]) -> float:
        """Return the guidance scale that a call asks for; 1 on a pipeline without guidance."""
        option = self.spec.guidance_option if self.spec else "guidance_scale"
        scale = options.get(option, self.call_defaults.get(option))
        return 1.0 if scale is None else float(scale)

    @property
    def has_clip_skip(self) -> bool:
        """Whether the pipeline's `clip_skip` works: it needs a part that transformers 5 dropped."""
        needs_part = self.spec is not None and self.spec.encode_options == ("clip_skip",)
        needs_part = needs_part and not hasattr(self.pipe, "text_encoder_2")
        return not needs_part or hasattr(self.pipe.text_encoder, "text_model")

    @property
    def call_defaults(self) -> dict[str, Any]:
        """Options of the pipeline's call with their default values."""
        return {k: p.default for k, p in signature(type(self.pipe).__call__).parameters.items()}

    @property
    def num_images_option(self) -> str | None:
        """Name of the option for the number of images per prompt; None if there is none."""
        return next((key for key in NUM_IMAGES_OPTIONS if key in self.call_defaults), None)

    @property
    def takes_image_per_row(self) -> bool:
        """Whether the pipeline reads one image per generator, and repeats none."""
        return self.family == "StableDiffusion3Img2ImgPipeline"

    def image_options(self, n: int) -> tuple[str, ...]:
        """Return the options that may hold one image for each of `n` prompts.

        None for a single prompt or several ControlNets, which may take several images each.
        """
        several_nets = hasattr(getattr(self.pipe, "controlnet", None), "nets")
        return () if n == 1 or several_nets else IMAGE_OPTIONS

    def encode(
        self, texts: Sequence[str], options: Mapping[str, Any] | None = None
    ) -> Conditioning:
        """Return texts as the pipeline encodes them in a call with these options, one row each."""
        return encode_texts(self.pipe, texts, self._encode_options(options))

    def _encode_options(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the options that change the encoding, with the defaults of a call."""
        if not self.spec:
            return {}
        defaults = self.call_defaults
        return {k: (options or {}).get(k, defaults[k]) for k in self.spec.encode_options}

    def text_encoders(self, options: Mapping[str, Any] | None = None) -> list[TextEncoderView]:
        """Return the text encoders that give a call with these options its tokens."""
        return text_encoders(self.pipe, self._encode_options(options))

    def count_tokens(self, text: str, options: Mapping[str, Any] | None = None) -> tuple[int, int]:
        """Return the tokens of a text with its marks, and how many are read."""
        return count_tokens(self.text_encoders(options), text)

    def token_rows(self, text: str, options: Mapping[str, Any] | None = None) -> list[int]:
        """Return the rows of the embedding that hold a text's own tokens."""
        rows = (view.token_rows(text) for view in self.text_encoders(options))
        return sorted({row for each in rows for row in each})

    def check_length(
        self,
        text: str,
        name: str,
        options: Mapping[str, Any] | None = None,
        *,
        encoder: TextEncoderView | None = None,
    ) -> None:
        """Refuse a text that is truncated: words that are not read guard nothing.

        Args:
            text: the text.
            name: what it is, for the message.
            options: options of the call.
            encoder: the text encoder that reads it. Default: those of the denoiser.

        Raises:
            ConfigError: the text is too long.
        """
        views = self.text_encoders(options) if encoder is None else [encoder]
        n, limit = count_tokens(views, text)
        if n > limit:
            raise ConfigError(
                f"{name} must have at most {limit} tokens, got {n}: {text[:60]!r}. Shorten it."
            )

    def initial_latents(
        self, options: Mapping[str, Any], guard: str
    ) -> tuple[Tensor, list[torch.Generator]]:
        """Return a call's initial noise (b, ...) and copies of its generators after drawing it.

        The noise is `latents` if the call has them. FLUX's is packed, as its call takes it. The
        call's own generators stay unused.

        Args:
            options: options of the call.
            guard: name of the guard, for the message.

        Raises:
            ConfigError: the call has no list of generators.
        """
        assert self.family in NOISE_PIPELINES
        generators, latents = options.get("generator"), options.get("latents")
        if not isinstance(generators, list):
            raise ConfigError(
                f"generator must be a list with one per prompt for the guard {guard!r}, got "
                f"{type(generators).__name__}. The guard needs the initial latents of each image."
            )
        clones = [clone_generator(g) for g in generators]
        if latents is not None:
            return latents, clones
        denoiser: Any = self.denoisers[0]
        shape, dtype = self.latent_shape(options), denoiser.dtype
        noise = [torch.randn(shape, generator=g, device=g.device, dtype=dtype) for g in clones]
        latents = torch.stack(noise)
        return pack_latents(latents) if packs_latents(self.pipe) else latents, clones

    def latent_shape(self, options: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return the shape (c, h, w) of a call's latents before FLUX packs them."""
        scale, patch = int(self.pipe.vae_scale_factor), 2 if packs_latents(self.pipe) else 1
        side = default_side(self.pipe) * scale
        height, width = (
            (options.get(name) or side) // (scale * patch) * patch for name in ("height", "width")
        )
        return int(self.pipe.vae.config.latent_channels), height, width

    def unpack(self, latents: Tensor, options: Mapping[str, Any]) -> Tensor:
        """Return a call's latents in their shape (b, c, h, w), unpacked if they are FLUX's."""
        shape = torch.Size((len(latents), *self.latent_shape(options)))
        return unpack_latents(latents, shape) if packs_latents(self.pipe) else latents


def _is_replaced(pipe: Any, base: type, method: str) -> bool:
    """Return whether a pipeline has another method than a class of diffusers defines.

    The class may be patched, and a wrapper may bear the names of what it wraps. So the module of
    each function counts, from the method to what it wraps; torch's `no_grad` is such a wrapper.
    """
    function = getattr(getattr(pipe, method), "__func__", None)
    if function is not getattr(base, method):
        return True
    while function is not None:
        module = getattr(function, "__globals__", {}).get("__name__", "")
        if not module.startswith(("diffusers.", "torch.")):
            return True
        function = getattr(function, "__wrapped__", None)
    return False
