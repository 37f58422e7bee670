"""Schedulers by name, in place of a pipeline's own for the length of a call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

from safegen.core.errors import ConfigError, UnknownNameError, first_line

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

    aliases = {alias.lower(): alias for alias in SAMPLERS}
    known = {kind.__name__ for kind in scheduler.compatibles} | {type(scheduler).__name__}
    class_name, settings = SAMPLERS.get(aliases.get(name.lower(), ""), (name, {}))
    if class_name not in known:
        samplers = {alias for alias, (kind, _) in SAMPLERS.items() if kind in known}
        noun = f"scheduler that fits the model's {type(scheduler).__name__}"
        raise UnknownNameError(noun, name, known | samplers)
    kind = getattr(diffusers, class_name)
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
    known = {kind.__name__ for kind in scheduler.compatibles} | {type(scheduler).__name__}
    return sorted(name for name, (kind, _) in SAMPLERS.items() if kind in known)


def sampler_name(scheduler: Any) -> str:
    """Return the name of a scheduler in A1111; that of its class if A1111 has none."""

    def kind(class_name: str, config: Mapping[str, Any]) -> tuple[object, ...]:
        is_sde = config.get("algorithm_type") == "sde-dpmsolver++"
        return class_name, is_sde, bool(config.get("use_karras_sigmas"))

    own = type(scheduler).__name__
    names = {kind(*entry): name for name, entry in SAMPLERS.items()}
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
