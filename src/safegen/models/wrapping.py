"""Models of pipelines and denoisers that are loaded already."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast
from weakref import ref

from diffusers import DiffusionPipeline

from safegen.core.errors import ConfigError, PatchError
from safegen.core.quiet import silence_libraries
from safegen.models.families.denoisers import DENOISERS
from safegen.models.families.pipeline_specs import NOISE_PIPELINES, denoiser_name
from safegen.models.model import Model
from safegen.models.patched_weights import component_of

ATTRIBUTE = "_safegen_model"
"""Attribute of a denoiser that holds its model, which knows the patches on it."""


def model_of(target: Any) -> Model:
    """Return the model of a pipeline or a denoiser: the same one at every call.

    Args:
        target: a `Model`, a diffusers pipeline with a UNet, or the UNet. The model of a UNet alone
            can be patched, and not generated with.

    Raises:
        ConfigError: it is none of them, or its weights are offloaded.
    """
    if isinstance(target, Model):
        if _known_model(target.denoiser) is None:
            register_model(target)
        return target
    is_denoiser = _is_denoiser(target)
    denoiser: Any = target if is_denoiser else getattr(target, denoiser_name(target), None)
    if not _is_denoiser(denoiser):
        raise ConfigError(
            "model must be a safegen.Model, a diffusers pipeline with a UNet or an SD 3 or FLUX "
            f"transformer, or that network, got {type(target).__name__}. Use one of them."
        )
    if any(parameter.is_meta for parameter in denoiser.parameters()):
        raise ConfigError(
            "weights of the denoiser must be loaded, got offloaded ones. Call this before "
            "enable_sequential_cpu_offload()."
        )
    if (known := _known_model(denoiser)) is not None:
        if not is_denoiser and isinstance(known.pipeline, SimpleNamespace):
            known.name, known.pipeline = _name_of(target), target
        return known
    name = "unet" if type(denoiser).__name__.startswith("UNet") else "transformer"
    pipeline = SimpleNamespace(**{name: denoiser}) if is_denoiser else target
    model = Model(_name_of(target), cast(Any, pipeline))
    setattr(denoiser, ATTRIBUTE, model)  # nobody else need hold it
    return model


def check_shared(target: Any, model: Model, components: Iterable[str | None]) -> None:
    """Check that a pipeline has the text encoders of its model, which has the same denoiser.

    Args:
        target: what `model_of` returned the model for.
        model: the model.
        components: names of the text encoders.

    Raises:
        PatchError: it has another one.
    """
    pipeline = getattr(target, "pipeline", target)
    for component in sorted(filter(None, components)):
        own = getattr(model.pipeline, component, None)
        if pipeline is not model.denoiser and getattr(pipeline, component, None) is not own:
            raise PatchError(
                f"{component} of the pipeline must be that of {model.name!r}, which has the same "
                "denoiser, got another one. Load a pipeline with a denoiser of its own"
            )


def patched_encoders(pipe: Any) -> list[str]:
    """Return the names of a pipeline's text encoders that patches of safegen change."""
    denoiser = getattr(pipe, denoiser_name(pipe), None)
    model = _known_model(denoiser) if _is_denoiser(denoiser) else None
    patches = [] if model is None else model.applied_patches
    return sorted({c for patch in patches for name in patch.names if (c := component_of(name))})


def _is_denoiser(target: Any) -> bool:
    """Return whether a value is a network of a class that can be called."""
    return any(kind.__name__ in DENOISERS for kind in type(target).__mro__)


def pipeline_model(pipe: Any) -> Model:
    """Return a model that generates as a pipeline does; its patches are those of `model_of`.

    Pipelines may share a denoiser and have other schedulers, text encoders or calls.
    """
    model = model_of(pipe)
    if type(model.pipeline) is type(pipe):
        parts = pipe.components
        if all(getattr(model.pipeline, name) is parts[name] for name in parts):
            return model
    own = Model(
        _name_of(pipe), pipe, applied_patches=model.applied_patches, hash_memory=model.hash_memory
    )
    own.hash = model.hash  # that of the weights without patches
    return own


def _known_model(denoiser: Any) -> Model | None:
    """Return the model that a denoiser has, unless it is a copy of another denoiser's."""
    known = vars(denoiser).get(ATTRIBUTE)
    known = known() if isinstance(known, ref) else known
    return known if isinstance(known, Model) and known.denoiser is denoiser else None


def register_model(model: Model) -> None:
    """Make `model_of` return a model for its denoiser, as long as the model is in use."""
    setattr(model.denoiser, ATTRIBUTE, ref(model))  # a cycle would keep its memory


def text_to_image(pipe: Any) -> Any:
    """Return a pipeline that makes images from text, with the components of another one.

    Raises:
        ConfigError: it is none that safegen knows.
    """
    parts = ("vae", "text_encoder", "tokenizer", "scheduler")
    is_known = isinstance(pipe, DiffusionPipeline) and all(hasattr(pipe, part) for part in parts)
    denoiser = getattr(pipe, denoiser_name(pipe), None) if is_known else None
    if not _is_denoiser(denoiser):
        raise ConfigError(
            "pipeline must be a Stable Diffusion 1.x to 3.x, an SDXL or a FLUX of diffusers, got "
            f"{type(pipe).__name__}. Load one of these."
        )
    if type(pipe).__name__ in NOISE_PIPELINES:
        return pipe
    if hasattr(pipe, "unet") and pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise ConfigError(
            f"pipeline must have a UNet that starts from noise alone, got a {type(pipe).__name__} "
            f"with {pipe.unet.config.in_channels} input channels. Use safegen.protect or "
            "Patch.apply on it."
        )
    with silence_libraries():  # its import loads every pipeline, and logs about torchvision
        from diffusers import AutoPipelineForText2Image

    return AutoPipelineForText2Image.from_pipe(pipe)


def _name_of(target: Any) -> str:
    """Return the name that a pipeline or a denoiser was loaded by, or the name of its class."""
    name = getattr(target, "config", {}).get("_name_or_path")
    return str(name) if name else type(target).__name__
