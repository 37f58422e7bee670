"""Where a guard can take hold of a diffusers pipeline: the one place that knows how its families guide, encode and count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import Any, Literal

import torch
from torch import Tensor, nn

from safegen.core.errors import ConfigError

HookPoint = Literal["prompt", "start", "uncond", "text", "branch", "latents", "image"]
"""Where a guard acts: before drawing, on pictures drawn as probes, on the blank or on the prompt's embedding, on guidance, between steps,
on the picture."""
UNIVERSAL_POINTS: frozenset[HookPoint] = frozenset({"prompt", "image"})
"""Seams that need nothing of a pipeline but that it draws."""
ALL_POINTS: frozenset[HookPoint] = frozenset(
    {"prompt", "start", "uncond", "text", "branch", "latents", "image"}
)
GUIDANCE_POINTS: frozenset[HookPoint] = frozenset({"uncond", "branch"})
"""Seams that are nothing without guidance."""


@dataclass(frozen=True, eq=False)
class Text:
    """What rows of the denoiser are conditioned on."""

    hidden: Tensor
    """Text embeddings, (b, tokens, width)."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Further tensors (b, ...) by their name in `added_cond_kwargs`: SDXL's pooled text."""

    def rows(self, n: int) -> Text:
        """Return the text for `n` pictures, a multiple of b: each row as often as the next, repeats side by side."""
        return Text(
            self.hidden.repeat_interleave(n // len(self.hidden), 0),
            {k: v.repeat_interleave(n // len(v), 0) for k, v in self.extra.items()},
        )

    def like(self, hidden: Tensor) -> Text:
        """Return the text in another tensor's type and place."""
        return Text(self.hidden.to(hidden), {k: v.to(hidden) for k, v in self.extra.items()})


Encode = Callable[[Any, Sequence[str], Mapping[str, Any]], Text]


def _sd(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Text:
    return Text(pipe.encode_prompt(list(texts), pipe._execution_device, 1, False, **options)[0])


def _sdxl(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Text:
    found = pipe.encode_prompt(
        list(texts), device=pipe._execution_device, do_classifier_free_guidance=False, **options
    )
    return Text(found[0], {"text_embeds": found[2]})


def _wan(pipe: Any, texts: Sequence[str], options: Mapping[str, Any]) -> Text:
    return Text(
        pipe.encode_prompt(
            list(texts), do_classifier_free_guidance=False, device=pipe._execution_device, **options
        )[0]
    )


@dataclass(frozen=True)
class PipelineSpec:
    """How pipelines of one class guide and encode."""

    calls: Literal[1, 2]
    """Denoiser calls a step under guidance: one for [blank.

    Prompt] together, or one for the prompt and then one for the blank.
    """
    denoisers: tuple[str, ...]
    """Names of the networks that predict the noise; each has a guidance scale of its own."""
    scales: tuple[str, ...]
    encode: Encode
    options: tuple[str, ...] = ()
    """Arguments of a call that change how text is encoded."""
    extra: tuple[str, ...] = ()
    """Keys of `Text.extra`."""


PIPELINE_SPECS = {
    "StableDiffusionPipeline": PipelineSpec(1, ("unet",), ("guidance_scale",), _sd, ("clip_skip",)),
    "StableDiffusionXLPipeline": PipelineSpec(
        1, ("unet",), ("guidance_scale",), _sdxl, ("clip_skip",), ("text_embeds",)
    ),
    "WanPipeline": PipelineSpec(
        2,
        ("transformer", "transformer_2"),
        ("guidance_scale", "_guidance_scale_2"),
        _wan,
        ("max_sequence_length",),
    ),
}
"""Class of a pipeline: its family. Of any other, guards reach the prompt and the picture only."""


LENGTH = "max_sequence_length"
"""Argument of a call by which it says how many tokens are read, where a family has that."""
ONE_FRAME = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
"""Families whose latents are (b, c, h, w)."""


def copied(generator: torch.Generator) -> torch.Generator:
    """Return a generator that gives what another one will give."""
    return torch.Generator(generator.device).set_state(generator.get_state())


class PipelineAdapter:
    """A pipeline as guards see it."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.pipeline_class = type(pipe).__name__
        self.family = PIPELINE_SPECS.get(self.pipeline_class)
        self.hook_points = ALL_POINTS if self.family else UNIVERSAL_POINTS
        self.known = sorted(PIPELINE_SPECS)
        self.videos = self.family is not None and self.pipeline_class not in ONE_FRAME

    @property
    def denoisers(self) -> list[nn.Module]:
        """The networks that predict the noise, in the order of their guidance scales."""
        found = [
            getattr(self.pipe, name, None)
            for name in (self.family.denoisers if self.family else ())
        ]
        return [network for network in found if network is not None]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], call: Mapping[str, Any] | None = None) -> Text:
        """Return texts as the pipeline itself would encode them in a call with these arguments, one row a text."""
        assert self.family is not None
        return self.family.encode(self.pipe, texts, self._reading(call))

    def _reading(self, call: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what changes how a call encodes: its own arguments, and where it has none the call's defaults, not those of encoding."""
        usual = signature(type(self.pipe).__call__).parameters if self.family else {}
        return {
            k: (call or {}).get(k, usual[k].default)
            for k in (self.family.options if self.family else ())
        }

    def tokens(self, text: str, call: Mapping[str, Any] | None = None) -> tuple[int, int]:
        """Return how many tokens a text has, its ends included, and how many the text encoder reads in a call with these arguments."""
        tokenizer = self.pipe.tokenizer
        return len(tokenizer(text).input_ids), int(
            self._reading(call).get(LENGTH, tokenizer.model_max_length)
        )

    def fits(self, text: str, what: str, call: Mapping[str, Any] | None = None) -> None:
        """Refuse a text that the encoder would cut in a call with these arguments: words that are not read guard nothing.

        Raises:
            ConfigError: it is too long.
        """
        n, most = self.tokens(text, call)
        if n > most:
            raise ConfigError(
                f"{what} has {n} tokens, this model's text encoder reads {most}: {text[:60]!r}; shorten it"
            )

    def starts(self, call: Mapping[str, Any], names: str) -> tuple[Tensor, list[torch.Generator]]:
        """Return the noise (b, c, h, w), of unit variance, that a call's pictures start from, and generators as they are once it is drawn.

        It is `latents` where the call has them. The call's generators are not used up.

        Args:
            call: the arguments of the call.
            names: who asks, for the message.

        Raises:
            ConfigError: a call without a generator a prompt.
        """
        assert self.pipeline_class in ONE_FRAME
        own, given = call.get("generator"), call.get("latents")
        if not isinstance(own, list):
            raise ConfigError(
                f"{names} needs a list of generators, one a prompt, to find each picture's start"
            )
        if given is not None:
            return given, [copied(g) for g in own]
        scale, net = self.pipe.vae_scale_factor, self.pipe.unet
        sides = [
            (call.get(side) or net.config.sample_size * scale) // scale
            for side in ("height", "width")
        ]
        after, shape = [copied(g) for g in own], (net.config.in_channels, *sides)
        return torch.stack(
            [torch.randn(shape, generator=g, device=g.device, dtype=net.dtype) for g in after]
        ), after

    def guidance(self, network: nn.Module) -> float:
        """Return the guidance scale of the running call, that of `network` where each has its own."""
        assert self.family is not None
        at = next(i for i, own in enumerate(self.denoisers) if own is network)
        own = getattr(self.pipe, self.family.scales[at], None)
        return float(self.pipe.guidance_scale if own is None else own)

    def refuse(
        self, call: Mapping[str, Any], *, guided: Sequence[str], inside: Sequence[str]
    ) -> None:
        """Refuse a call in which guards would be without effect, or with another than they have.

        Args:
            call: the arguments for the pipeline.
            guided: names of the guards that act through guidance.
            inside: names of the guards that act on the denoiser at all.

        Raises:
            ConfigError: guidance is off or rescaled, the model is guidance-distilled, or a cache
                skips denoiser calls.
        """
        names = ", ".join(guided)
        default = {k: p.default for k, p in signature(type(self.pipe).__call__).parameters.items()}
        for key in ("guidance_scale", "guidance_scale_2"):
            scale = call.get(key, default.get(key))
            if guided and scale is not None and not scale > 1:  # NaN is no guidance either
                raise ConfigError(
                    f"{names} has no effect without guidance; {key.replace('_', ' ')} must be > 1, got {scale}"
                )
        if guided and any(
            getattr(d.config, "time_cond_proj_dim", None) is not None for d in self.denoisers
        ):
            raise ConfigError(
                f"{names} has no effect on a guidance-distilled model, which makes no blank prediction; use a text or output guard"
            )
        if guided and (call.get("guidance_rescale") or 0.0) > 0:
            raise ConfigError(
                f"{names} would be undone in part by guidance_rescale, which must be 0, got {call['guidance_rescale']}; leave it out"
            )
        if inside and any(getattr(d, "is_cache_enabled", False) for d in self.denoisers):
            raise ConfigError(
                f"{', '.join(inside)} would miss the denoiser calls that a cache skips; call disable_cache() on the denoiser first"
            )
