"""Watch on a user's callbacks: the latents of the last step must be those that are decoded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from safegen.guards.core.base import Call

CALLBACK, LEGACY_CALLBACK = "callback_on_step_end", "callback"
CALLBACK_OPTIONS = (CALLBACK, LEGACY_CALLBACK)
"""Options with a callback."""


class CallbackWatch:
    """Wraps the callbacks of one call, and notes whether one changed the last step's latents.

    No guard sees latents that replace those of the last step. Latents that replace those of an
    earlier step go through the rest of the steps, and so through the guards.
    """

    def __init__(self, call: Call) -> None:
        self.call, self.replaced = call, False

    @property
    def _is_last_step(self) -> bool:
        adapter = self.call.adapter
        return adapter.spec is not None and self.call.step == adapter.num_timesteps

    def wrap(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of a pipeline with its callbacks wrapped."""
        wrapped = dict(arguments)
        if (callback := wrapped.get(CALLBACK)) is not None:
            wrapped[CALLBACK] = self._wrapped(callback)
            if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
                wrapped[f"{CALLBACK}_tensor_inputs"] = list(callback.tensor_inputs)
        if (legacy := wrapped.get(LEGACY_CALLBACK)) is not None:
            wrapped[LEGACY_CALLBACK] = self._wrapped_legacy(legacy)
        return wrapped

    def faults(self, faults: Sequence[str]) -> list[str]:
        """Return the faults of all images, with this one where there was none."""
        own = "calls: a callback replaced the latents after the last step" if self.replaced else ""
        return [fault or own for fault in faults]

    def _wrapped(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(callback, updated=())
        def wrapped(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> Any:
            before = tensors.get("latents") if self._is_last_step else None
            copy = None if before is None else before.clone()
            outputs = callback(pipe, step, timestep, tensors)
            if self._is_last_step:
                self._compare(copy, outputs.get("latents", before))
            return outputs

        return wrapped

    def _wrapped_legacy(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(callback, updated=())
        def wrapped(step: int, timestep: Any, latents: Tensor) -> None:
            copy = latents.clone() if self._is_last_step else None
            callback(step, timestep, latents)
            if self._is_last_step:
                self._compare(copy, latents)

        return wrapped

    def _compare(self, before: Tensor | None, after: Tensor | None) -> None:
        """Note whether latents differ. Those that the callback did not receive count as others."""
        if before is not None and after is not None:
            self.replaced |= not torch.equal(before, after)
        else:
            self.replaced |= after is not None
