"""Adapter of diffusers pipelines: the only module that knows how each class guides and encodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from inspect import signature
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError
from safegen.models.text_encoder import text_encoders

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
LENGTH_OPTION = "max_sequence_length"
"""Option that sets how many tokens are read, where a pipeline has it."""


@dataclass(frozen=True, eq=False)
class TextEmbeds:
    """Text embeddings that rows of the denoiser are conditioned on."""

    hidden: Tensor
    """Token embeddings, (b, tokens, width)."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Further tensors (b, ...) by their name in `added_cond_kwargs`, such as SDXL's pooled text."""

    @staticmethod
    def concat(embeds: Sequence[TextEmbeds]) -> TextEmbeds:
        """Return the rows of several embeddings in one batch."""
        return TextEmbeds(
            torch.cat([e.hidden for e in embeds]),
            {k: torch.cat([e.extra[k] for e in embeds]) for k in embeds[0].extra},
        )

    def select(self, rows: slice | list[int]) -> TextEmbeds:
        """Return some of the rows."""
        return TextEmbeds(self.hidden[rows], {k: v[rows] for k, v in self.extra.items()})

    def expand(self, n: int) -> TextEmbeds:
        """Return `n` rows, a multiple of b: every row repeated equally often, repeats adjacent."""
        return TextEmbeds(
            self.hidden.repeat_interleave(n // len(self.hidden), 0),
            {k: v.repeat_interleave(n // len(v), 0) for k, v in self.extra.items()},
        )

    def to(self, like: Tensor) -> TextEmbeds:
        """Return the embeddings with the dtype and device of another tensor."""
        return TextEmbeds(self.hidden.to(like), {k: v.to(like) for k, v in self.extra.items()})


EncodeFunction = Callable[[Any, Sequence[str], Mapping[str, Any]], TextEmbeds]


def _encode_sd(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> TextEmbeds:
    return TextEmbeds(
        pipe.encode_prompt(list(texts), pipe._execution_device, 1, False, **options)[0]
    )


def _encode_sdxl(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> TextEmbeds:
    outputs = pipe.encode_prompt(
        list(texts), device=pipe._execution_device, do_classifier_free_guidance=False, **options
    )
    return TextEmbeds(outputs[0], {"text_embeds": outputs[2]})


def _encode_wan(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> TextEmbeds:
    return TextEmbeds(
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
    extra_keys: tuple[str, ...] = ()
    """Keys of `TextEmbeds.extra`."""
    starts_from_image: bool = False
    """Whether the initial latents are those of an image, which guards must not replace."""
    makes_videos: bool = False


_SD = PipelineSpec(1, ("unet",), ("guidance_scale",), _encode_sd, ("clip_skip",))
_SDXL = PipelineSpec(
    1, ("unet",), ("guidance_scale",), _encode_sdxl, ("clip_skip",), ("text_embeds",)
)
PIPELINE_SPECS = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": replace(_SD, starts_from_image=True),
    "StableDiffusionInpaintPipeline": replace(_SD, starts_from_image=True),
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": replace(_SDXL, starts_from_image=True),
    "StableDiffusionXLInpaintPipeline": replace(_SDXL, starts_from_image=True),
    "WanPipeline": PipelineSpec(
        2,
        ("transformer", "transformer_2"),
        ("guidance_scale", "_guidance_scale_2"),
        _encode_wan,
        (LENGTH_OPTION,),
        makes_videos=True,
    ),
}
"""Pipeline classes with a denoiser that guards can hook, and so their subclasses.

Others have universal points only, and so have subclasses that replace one of `OWN_METHODS`.
"""
OWN_METHODS = ("__call__", "encode_prompt")
"""Methods on which the hooks depend: order of the denoiser's rows, and tokens of a prompt."""
IMAGE_PIPELINES = tuple(name for name, spec in PIPELINE_SPECS.items() if not spec.makes_videos)
"""Pipeline classes with latents of shape (b, c, h, w)."""
NOISE_PIPELINES = tuple(n for n in IMAGE_PIPELINES if not PIPELINE_SPECS[n].starts_from_image)
"""Those of them that start from noise, which guards may replace."""


def clone_generator(generator: torch.Generator) -> torch.Generator:
    """Return a generator that yields the same numbers as `generator` will."""
    return torch.Generator(generator.device).set_state(generator.get_state())


class PipelineAdapter:
    """One diffusers pipeline, as guards see it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.pipeline_class = type(pipe).__name__
        base = _supported_class(type(pipe))
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

    @property
    def has_guidance(self) -> bool:
        """Whether the running call uses classifier-free guidance."""
        return bool(self.pipe.do_classifier_free_guidance)

    @property
    def guidance_applies(self) -> bool:
        """Whether the running call uses guidance and does not rescale it afterwards."""
        return self.has_guidance and not (getattr(self.pipe, "guidance_rescale", None) or 0.0) > 0

    def guidance_scale(self, network: nn.Module) -> float:
        """Return the guidance scale of the running call for one denoiser."""
        assert self.spec is not None
        index = next(i for i, denoiser in enumerate(self.denoisers) if denoiser is network)
        scale = getattr(self.pipe, self.spec.guidance_attributes[index], None)
        return float(self.pipe.guidance_scale if scale is None else scale)

    @property
    def has_clip_skip(self) -> bool:
        """Whether the pipeline's `clip_skip` works: it needs a part that transformers 5 dropped."""
        needs_part = self.spec is not None and self.spec.encode is _encode_sd
        return not needs_part or hasattr(self.pipe.text_encoder, "text_model")

    @property
    def call_defaults(self) -> dict[str, Any]:
        """Options of the pipeline's call with their default values."""
        return {k: p.default for k, p in signature(type(self.pipe).__call__).parameters.items()}

    @property
    def num_images_option(self) -> str | None:
        """Name of the option for the number of images per prompt; None if there is none."""
        return next((key for key in NUM_IMAGES_OPTIONS if key in self.call_defaults), None)

    def image_options(self, n: int) -> tuple[str, ...]:
        """Return the options that may hold one image for each of `n` prompts.

        None for a single prompt or several ControlNets, which may take several images each.
        """
        several_nets = hasattr(getattr(self.pipe, "controlnet", None), "nets")
        return () if n == 1 or several_nets else IMAGE_OPTIONS

    @torch.no_grad()
    def encode(self, texts: Sequence[str], options: Mapping[str, Any] | None = None) -> TextEmbeds:
        """Return texts as the pipeline encodes them in a call with these options, one row each."""
        assert self.spec is not None
        return self.spec.encode(self.pipe, texts, self._encode_options(options))

    def _encode_options(self, options: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the options that change the encoding, with the defaults of a call."""
        if not self.spec:
            return {}
        defaults = self.call_defaults
        return {k: (options or {}).get(k, defaults[k]) for k in self.spec.encode_options}

    def count_tokens(self, text: str, options: Mapping[str, Any] | None = None) -> tuple[int, int]:
        """Return the tokens of a text with both ends, and how many are read.

        Of several text encoders, the one that leaves out most counts.
        """
        limit = self._encode_options(options).get(LENGTH_OPTION)
        counts = [
            (len(view.token_ids(text)), view.limit if limit is None else int(limit))
            for view in text_encoders(self.pipe)
        ]
        return max(counts, key=lambda count: count[0] - count[1])

    def last_token(self, text: str) -> int:
        """Return the position of a text's last token that an encoder reads; 0 for an empty text."""
        return max(view.tokenize(text)[1] for view in text_encoders(self.pipe))

    def check_length(self, text: str, name: str, options: Mapping[str, Any] | None = None) -> None:
        """Refuse a text that the encoder would truncate: words that are not read guard nothing.

        Raises:
            ConfigError: the text is too long.
        """
        n, limit = self.count_tokens(text, options)
        if n > limit:
            raise ConfigError(
                f"{name} must have at most {limit} tokens, got {n}: {text[:60]!r}. Shorten it."
            )

    def initial_latents(
        self, options: Mapping[str, Any], guard: str
    ) -> tuple[Tensor, list[torch.Generator]]:
        """Return a call's initial noise (b, c, h, w) and copies of its generators after drawing it.

        The noise is `latents` if the call has them. The call's own generators stay unused.

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
        scale, net = self.pipe.vae_scale_factor, self.pipe.unet
        size = [
            (options.get(side) or net.config.sample_size * scale) // scale
            for side in ("height", "width")
        ]
        shape = (net.config.in_channels, *size)
        noise = [torch.randn(shape, generator=g, device=g.device, dtype=net.dtype) for g in clones]
        return torch.stack(noise), clones


def _supported_class(kind: type) -> type | None:
    """Return the class of diffusers with a spec that a pipeline's class is or extends."""
    bases = (c for c in kind.__mro__ if c.__module__.startswith("diffusers."))
    return next((c for c in bases if c.__name__ in PIPELINE_SPECS), None)


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
