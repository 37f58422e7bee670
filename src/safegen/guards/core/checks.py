"""Checks before guards act: pipeline, options of the call, and methods of each hook point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from torch import nn

from safegen.core.errors import ConfigError
from safegen.core.registry import GUARDS, resolve
from safegen.guards.core.adapter import EXTERNAL_POINTS, HookPoint, PipelineAdapter
from safegen.guards.core.base import Guard, GuardConfig, GuardHook
from safegen.models.families.pipeline_specs import TEXT_ENCODERS

GUARD_METHODS: dict[str, HookPoint] = {
    "check_prompts": "prompt",
    "probe": "probe",
    "check_images": "image",
}
"""Methods of a guard by which it hooks a point."""
HOOK_METHODS: dict[str, HookPoint] = {
    "edit_negative_embeds": "negative_prompt_embeds",
    "edit_prompt_embeds": "prompt_embeds",
    "guidance_correction": "guidance",
    "extra_conditions": "guidance",  # its predictions are for `guidance_correction`
    "submodule_hooks": "submodules",
    "on_step_end": "latents",
}
"""Methods of a hook by which it hooks a point. The first one of a point is required."""


def check_config(
    config: GuardConfig,
    configs: Sequence[GuardConfig],
    adapter: PipelineAdapter,
    negative_prompts: Sequence[str],
) -> None:
    """Refuse a guard that could never act on the pipeline, or beside the others.

    Args:
        config: settings of the guard.
        configs: settings of all guards.
        adapter: the pipeline.
        negative_prompts: negative prompts, beside each of which the guard must act.
    """
    name = config.name
    if not config.hook_points:
        raise ConfigError(
            f"the guard {name!r} must have a hook point, got none. It would never act."
        )
    _check_supported(name, config.unsupported_reason(adapter), adapter)
    if config.exclusive and sum(c.name == name for c in configs) > 1:
        raise ConfigError(
            f"the guard {name!r} must be given once. A second one would undo the first."
        )
    others = [c for c in configs if c is not config]
    for negative in dict.fromkeys(negative_prompts):
        if reason := config.conflict(others, negative):
            raise ConfigError(
                f"the guard {name!r} would have no effect: {reason}. Change it, or leave one out."
            )


def _check_supported(name: str, reason: str, adapter: PipelineAdapter) -> None:
    """Refuse a guard that has a reason why it cannot run, and name those that can."""
    if reason:
        supported = [
            other
            for other in sorted(GUARDS)
            if not resolve(GUARDS, other, "guard").unsupported_reason(adapter)
        ]
        raise ConfigError(
            f"the guard {name!r} cannot run on a {adapter.pipeline_class}: it {reason}. "
            f"Guards that can: {', '.join(supported) or 'none'}."
        )


def check_guard(guard: Guard, adapter: PipelineAdapter) -> None:
    """Refuse a guard with other hook points than its settings, its methods or the pipeline have.

    Raises:
        ConfigError: a hook point of the settings or of the pipeline is missing, or a method is
            missing, misspelt, or of no hook point of the guard.
    """
    if lost := guard.config.hook_points - guard.hook_points:
        raise ConfigError(
            f"hook_points of the guard {guard.config.name!r} must have {_quoted(lost)} of its "
            f"settings, got {_quoted(guard.hook_points)}. Add it."
        )
    _check_supported(guard.config.name, adapter.missing_reason(guard.hook_points), adapter)
    methods = _overridden(guard, Guard)
    _check_methods(guard, methods, GUARD_METHODS, guard.hook_points & EXTERNAL_POINTS, guard)
    inside = guard.hook_points - EXTERNAL_POINTS
    if bool(inside) != ("start" in methods):
        name = guard.config.name
        if inside:
            raise ConfigError(
                f"the guard {name!r} must implement start for {_quoted(inside)}, got none. "
                "Return its GuardHook there."
            )
        raise ConfigError(
            f"hook_points of the guard {name!r} must name those of its hook, got "
            f"{_quoted(guard.hook_points)}. Add them, or remove start."
        )
    if "wants_reference_stream" in methods and "latents" not in guard.hook_points:
        raise ConfigError(
            f"hook_points of the guard {guard.config.name!r} must have 'latents' for "
            f"wants_reference_stream, got {_quoted(guard.hook_points)}. Add it."
        )


def check_hook(guard: Guard, hook: GuardHook) -> None:
    """Refuse a hook with other methods than the guard's hook points need.

    Raises:
        ConfigError: a method is missing, misspelt, or of no hook point of the guard.
    """
    if not isinstance(hook, GuardHook):
        raise ConfigError(
            f"start of the guard {guard.config.name!r} must return a GuardHook, got "
            f"{type(hook).__name__}. Derive its class from GuardHook."
        )
    methods = _overridden(hook, GuardHook)
    _check_methods(guard, methods, HOOK_METHODS, guard.hook_points - EXTERNAL_POINTS, hook)


def _check_methods(
    guard: Guard,
    methods: set[str],
    points: dict[str, HookPoint],
    declared: frozenset[HookPoint],
    instance: Guard | GuardHook,
) -> None:
    """Refuse methods that disagree with the declared hook points, or look misspelt."""
    name, base = guard.config.name, Guard if isinstance(instance, Guard) else GuardHook
    for method in sorted(_added(instance, base)):
        if near := get_close_matches(method, _public(base), 1, 0.8):
            raise ConfigError(
                f"the guard {name!r} must have methods of {base.__name__}, got {method!r}. "
                f"Did you mean {near[0]!r}? Start a helper's name with an underscore."
            )
    found = {points[m] for m in methods if m in points}
    main = {point: method for method, point in reversed(points.items())}
    if absent := {point for point in declared if main[point] not in methods}:
        needed = sorted(main[point] for point in absent)
        raise ConfigError(
            f"the guard {name!r} must implement {', '.join(needed)} of {base.__name__} for its "
            f"hook point {_quoted(absent)}, got none. Implement it, or correct hook_points."
        )
    if extra := found - declared:
        unused = sorted(m for m in methods if points.get(m) in extra)
        raise ConfigError(
            f"hook_points of the guard {name!r} must have {_quoted(extra)} for "
            f"{', '.join(unused)}, got {_quoted(guard.hook_points)}. Add it."
        )


def _overridden(instance: object, base: type) -> set[str]:
    """Return the public methods of a base class that an instance replaces."""
    return {
        name
        for name in _public(base)
        if getattr(getattr(instance, name), "__func__", None) is not getattr(base, name)
    }


def _added(instance: object, base: type) -> set[str]:
    """Return the public methods of an instance that its base class lacks."""
    members = dict(vars(instance))
    for kind in type(instance).__mro__:
        members |= {} if kind in base.__mro__ else vars(kind)
    names = {name for name, value in members.items() if name[0] != "_" and callable(value)}
    return names - _public(base)


def _public(base: type) -> set[str]:
    return {name for name, value in vars(base).items() if name[0] != "_" and callable(value)}


def _quoted(points: frozenset[HookPoint] | set[HookPoint]) -> str:
    return ", ".join(repr(point) for point in sorted(points)) or "none"


def check_options(
    adapter: PipelineAdapter,
    options: Mapping[str, Any],
    *,
    guided: Sequence[str],
    inside: Sequence[str],
    reading: Sequence[str],
) -> None:
    """Refuse a call in which guards would have no effect, or another effect than usual.

    Args:
        adapter: the pipeline.
        options: options of the call.
        guided: names of the guards that act through guidance.
        inside: names of the guards that act on the denoiser.
        reading: names of the guards that encode texts for the denoiser.

    Raises:
        ConfigError: guidance is off or rescaled, the model is guidance-distilled, a cache skips
            denoiser calls, some bypass the guards, or the call scales a LoRA of a text encoder.
    """
    if options.get("clip_skip") is not None and not adapter.has_clip_skip:
        raise ConfigError(
            f"clip_skip must be None with transformers 5, got {options['clip_skip']}. diffusers "
            "reads it from text_encoder.text_model, which transformers 5 dropped. Leave it out."
        )
    names = ", ".join(guided)
    if guided:
        _check_guidance(adapter, options, names)
    if guided and any(
        getattr(d.config, "time_cond_proj_dim", None) is not None for d in adapter.denoisers
    ):
        raise ConfigError(
            f"{names} has no effect on a guidance-distilled model. "
            "Use a guard of prompts or images."
        )
    if guided and (options.get("guidance_rescale") or 0.0) > 0:
        raise ConfigError(
            f"guidance_rescale must be 0 with {names}, got {options['guidance_rescale']}. "
            "It would undo a part of the guard."
        )
    if inside and any(getattr(d, "is_cache_enabled", False) for d in adapter.denoisers):
        raise ConfigError(
            f"{', '.join(inside)} must see every denoiser call, and a cache skips some. "
            "Call disable_cache() on the denoiser."
        )
    if inside and options.get("skip_guidance_layers") is not None:
        raise ConfigError(
            f"skip_guidance_layers must be None with {', '.join(inside)}, got "
            f"{options['skip_guidance_layers']}. Its predictions bypass the guards."
        )
    key = "cross_attention_kwargs" if hasattr(adapter.pipe, "unet") else "joint_attention_kwargs"
    scale = (options.get(key) or {}).get("scale")
    if reading and scale not in (None, 1) and _has_text_lora(adapter.pipe):
        raise ConfigError(
            f"scale of {key} must be 1 with {', '.join(reading)}, got {scale}. "
            "The guard encodes texts without it. Scale the text encoder's LoRA by set_adapters."
        )


def _check_guidance(adapter: PipelineAdapter, options: Mapping[str, Any], names: str) -> None:
    """Refuse a call without classifier-free guidance for guards that act through it."""
    option = adapter.spec.guidance_option if adapter.spec else "guidance_scale"
    is_embedded = option != "guidance_scale"
    why = (
        f"It acts through classifier-free guidance; the guidance_scale of a "
        f"{adapter.pipeline_class} is an input of its network."
        if is_embedded
        else "It acts through guidance."
    )
    for key in (option, "guidance_scale_2"):
        scale = options.get(key, adapter.call_defaults.get(key))
        if scale is not None and not scale > 1:  # NaN is no guidance either
            raise ConfigError(f"{key} must be > 1 with {names}, got {scale}. {why}")
    if is_embedded and options.get("negative_prompt") is None:
        raise ConfigError(
            f"negative_prompt must be given with {names} on a {adapter.pipeline_class}, got none. "
            f"Without one there is no classifier-free guidance; '' will do."
        )


def _has_text_lora(pipe: Any) -> bool:
    """Return whether a text encoder has layers that the LoRA scale of a call changes."""
    encoders = (getattr(pipe, name, None) for name in TEXT_ENCODERS)
    modules = (m for e in encoders if isinstance(e, nn.Module) for m in e.modules())
    return any(hasattr(module, "scale_layer") for module in modules)
