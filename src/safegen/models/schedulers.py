"""Schedulers by name, in place of a pipeline's own for the length of a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from safegen.core.errors import ConfigError, UnknownNameError, first_line
from safegen.models.families.noise_schedule import FLOW_PREDICTION, flow_shift, prediction_type
from safegen.models.families.pipeline_specs import guidance_option

SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DDIM": ("DDIMScheduler", {}),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", {}),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "DPM++ 2M SDE Karras": (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": True},
    ),
    "DPM++ SDE": ("DPMSolverSinglestepScheduler", {}),
    "DPM++ SDE Karras": ("DPMSolverSinglestepScheduler", {"use_karras_sigmas": True}),
    "DPM2": ("KDPM2DiscreteScheduler", {}),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", {"use_karras_sigmas": True}),
    "DPM2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", {"use_karras_sigmas": True}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler a": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LMS Karras": ("LMSDiscreteScheduler", {"use_karras_sigmas": True}),
    "PLMS": ("PNDMScheduler", {"skip_prk_steps": True}),
    "UniPC": ("UniPCMultistepScheduler", {}),
}
"""Name in A1111: class in diffusers and the settings that differ from the model's.

From the table in diffusers' documentation (api/schedulers/overview), with DDIM, PLMS and UniPC.
"""
_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
FLOW_SAMPLERS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "DPM++ 2M": ("DPMSolverMultistepScheduler", _FLOW),
    "Euler": ("FlowMatchEulerDiscreteScheduler", {}),
    "UniPC": ("UniPCMultistepScheduler", _FLOW),
}
"""The same for models with flow matching, SD 3 and FLUX: solvers of diffusers that take flow's
noise levels, with the model's shift."""
_LOCKS: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()


def pipeline_lock(pipe: Any) -> RLock:
    """Return the lock of a pipeline: its scheduler, which counts steps, serves one call at a time.

    Args:
        pipe: diffusers pipeline.
    """
    return _LOCKS.setdefault(pipe, RLock())


def build_scheduler(scheduler: Any, name: str) -> Any:
    """Return the scheduler of a name with the configuration of another one.

    Args:
        scheduler: scheduler of the pipeline.
        name: class in diffusers (`DDIMScheduler`), or name in A1111 (`Euler a`) in any case.

    Raises:
        UnknownNameError: no such scheduler, or none that fits the pipeline's.
        ConfigError: it needs a library that is not installed, or other settings.
    """
    import diffusers

    samplers = _samplers(scheduler)
    classes = {kind: settings for kind, settings in samplers.values() if is_flow(scheduler)}
    known = {kind.__name__ for kind in scheduler.compatibles} | {type(scheduler).__name__, *classes}
    aliases = {alias.lower(): alias for alias in samplers}
    own = (name, classes.get(name, {}))
    class_name, settings = samplers.get(aliases.get(name.lower(), ""), own)
    if class_name not in known:
        fitting = {alias for alias, (kind, _) in samplers.items() if kind in known}
        noun = f"scheduler that fits the model's {type(scheduler).__name__}"
        raise UnknownNameError(noun, name, known | fitting)
    kind = getattr(diffusers, class_name)
    if is_flow(scheduler):
        option = "flow_shift" if settings else "shift"
        settings = {**settings, option: flow_shift(scheduler)}
    try:
        return kind.from_config(scheduler.config, **settings)
    except (ImportError, ValueError, NotImplementedError) as error:
        raise ConfigError(
            f"scheduler must be one that can run here, got {name!r}: {first_line(error)}"
        ) from error


def list_schedulers(scheduler: Any) -> list[str]:
    """Return the names in A1111 of the schedulers that fit a pipeline's.

    Args:
        scheduler: scheduler of the pipeline.
    """
    if is_flow(scheduler):
        return sorted(FLOW_SAMPLERS)
    known = {kind.__name__ for kind in scheduler.compatibles} | {type(scheduler).__name__}
    return sorted(name for name, (kind, _) in SAMPLERS.items() if kind in known)


def is_flow(scheduler: Any) -> bool:
    """Return whether a scheduler is one of flow matching."""
    return prediction_type(scheduler) == FLOW_PREDICTION


def _samplers(scheduler: Any) -> Mapping[str, tuple[str, Mapping[str, Any]]]:
    """Return the table of names for a pipeline's scheduler."""
    return FLOW_SAMPLERS if is_flow(scheduler) else SAMPLERS


def sampler_name(scheduler: Any) -> str:
    """Return the name of a scheduler in A1111; that of its class if A1111 has none."""

    def kind(class_name: str, config: Mapping[str, Any]) -> tuple[object, ...]:
        is_sde = config.get("algorithm_type") == "sde-dpmsolver++"
        return class_name, is_sde, bool(config.get("use_karras_sigmas"))

    own = type(scheduler).__name__
    names = {kind(*entry): name for name, entry in _samplers(scheduler).items()}
    return names.get(kind(own, scheduler.config), own)


@contextmanager
def replaced_scheduler(pipe: Any, name: str | None) -> Iterator[None]:
    """Use another scheduler inside the block, and the pipeline's own afterwards.

    Args:
        pipe: diffusers pipeline. Its lock is held inside the block.
        name: see `build_scheduler`; None keeps the pipeline's own.

    Raises:
        UserError: see `build_scheduler`.
    """
    with pipeline_lock(pipe):
        own = pipe.scheduler
        if name is None:
            yield
            return
        pipe.scheduler = build_scheduler(own, name)
        try:
            yield
        finally:
            pipe.scheduler = own


def check_num_steps(pipe: Any, steps: int) -> None:
    """Check that a pipeline's schedule has as many steps.

    With leading spacing and an offset, as in Stable Diffusion, it has fewer than timesteps.

    Raises:
        ConfigError: it has fewer, or the scheduler cannot make so few, or cannot take the shift
            that the pipeline gives it.
    """
    scheduler = pipe.scheduler
    config = scheduler.config
    limit = int(config.get("num_train_timesteps", 1000))
    if config.get("timestep_spacing") == "leading":
        limit -= int(config.get("steps_offset", 0))
    if steps > limit:
        raise ConfigError(f"steps must be <= {limit} on this model's schedule, got {steps}")
    try:
        type(scheduler).from_config(config).set_timesteps(steps, **_shift(pipe))
    except (AssertionError, TypeError) as error:
        raise ConfigError(
            f"scheduler must be one that takes the shift of a {type(pipe).__name__}, got "
            f"{type(scheduler).__name__}. Use the model's own."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"num_inference_steps must be a number that a {type(scheduler).__name__} can make, got "
            f"{steps}. Use more steps."
        ) from error


def _shift(pipe: Any) -> dict[str, float]:
    """Return an example of the shift that a pipeline gives its scheduler at each call.

    FLUX gives one to every scheduler, SD 3 to one that shifts by the image's size.
    """
    is_flux = guidance_option(pipe) == "true_cfg_scale"
    needs_shift = bool(pipe.scheduler.config.get("use_dynamic_shifting"))
    return {"mu": 1.0} if is_flux or needs_shift else {}
