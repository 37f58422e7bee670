"""Hooks of one call on the denoiser's inputs and output and on the scheduler's step.

A pipeline makes u + s (c - u) of the predictions u of the negative prompt and c of the prompt. For
u + s (c - u - Gamma), a denoiser that predicts both at once returns [u; c - Gamma]. One that is
called twice returns c, and then u' = u + s / (s - 1) Gamma, because u' + s (c - u') is the same.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import GUIDANCE_POINTS, PipelineAdapter
from safegen.guards.core.base import Call, GuardHook
from safegen.guards.core.rows import Args, Kwargs, check_embeds, check_tensor, replace_inputs
from safegen.guards.core.runner import GuardRunner
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import HIDDEN_ARGUMENT, read_text
from safegen.models.families.pipeline_specs import PipelineSpec

Point = Literal["negative_prompt_embeds", "prompt_embeds"]
EDIT_METHODS: dict[Point, str] = {
    "negative_prompt_embeds": "edit_negative_embeds",
    "prompt_embeds": "edit_prompt_embeds",
}


class ExtraCondition(NamedTuple):
    """Embeddings that a guard wants a prediction for, one row per image."""

    runner: GuardRunner
    name: str
    embeds: Conditioning


class PipelineHooks:
    """Hooks of all guards on a pipeline during one call, and counts of what passed through them."""

    def __init__(
        self,
        adapter: PipelineAdapter,
        call: Call,
        hooks: Sequence[tuple[GuardRunner, GuardHook]],
        *,
        max_rows: int | None = None,
    ) -> None:
        self.adapter, self.call, self.hooks, self.max_rows = adapter, call, hooks, max_rows
        self.calls_started = self.calls_ended = 0
        """Denoiser calls of this step before and after the network."""
        self.unguarded_steps = 0
        """Steps with another number of denoiser calls than the pipeline class makes."""
        self.unguided_steps = 0
        """Steps with guidance off or rescaled although a guard needs it: a callback can do that."""
        self.finite: list[bool] = []
        """Whether the final latents of each image are finite."""
        self.handles: list[RemovableHandle] = []
        self.removed: list[RemovableHandle] = []
        """Hooks that were gone when the call raised."""
        self.conditions: list[ExtraCondition] = []
        self.merged = False
        """Whether the extra conditions are in the pipeline's own denoiser batch."""
        self.extra_predictions: dict[tuple[int, str], Tensor] = {}
        self.cond: Tensor | None = None
        """The prompt's prediction, between the two calls of a step."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Attach the hooks, and always remove them. Unknown pipeline classes stay untouched."""
        with ExitStack() as stack:
            if self.adapter.spec:
                for network in self.adapter.denoisers if self.hooks else ():
                    self._attach(network, stack)
                stack.enter_context(self._patched_step(self.adapter.pipe.scheduler))
            try:
                yield
            except Exception:
                self.removed = [h for h in self.handles if h.id not in (h.hooks_dict_ref() or ())]
                raise

    def _attach(self, network: nn.Module, stack: ExitStack) -> None:
        before = network.register_forward_pre_hook(self._before, with_kwargs=True)
        after = network.register_forward_hook(self._after, with_kwargs=True)
        self.handles += [before, after]
        for runner, hook in self.hooks:
            if runner.acts_at("submodules"):
                for module, function in hook.submodule_hooks(network):
                    timed = runner.timed(function)
                    self.handles.append(module.register_forward_pre_hook(timed, with_kwargs=True))
        for handle in self.handles:
            stack.callback(handle.remove)

    def faults(self, n: int) -> list[str]:
        """Return for each of `n` images why it must be withheld; empty if nothing went wrong."""
        if not self.adapter.spec:
            return [""] * n
        done, steps = self.call.step, self.adapter.num_timesteps
        fault = ""
        if done != steps or done == 0:
            fault = f"{done} of {steps} steps went through the guards"
        elif self.unguarded_steps:
            fault = f"the denoiser bypassed the guards in {self.unguarded_steps} of {steps} steps"
        elif self.unguided_steps:
            fault = (
                f"guidance was off or rescaled in {self.unguided_steps} of {steps} steps, "
                "and a guard needs it"
            )
        elif len(self.finite) != n:
            fault = f"latents of {len(self.finite)} images for {n}"
        if fault:
            return [f"calls: {fault}"] * n
        return ["" if ok else "not-finite: the latents hold NaN or infinity" for ok in self.finite]

    @contextmanager
    def _patched_step(self, scheduler: Any) -> Iterator[None]:
        """Replace the scheduler's `step` by one that counts and lets guards edit the latents."""
        original, attribute = scheduler.step, scheduler.__dict__.get("step")

        @functools.wraps(original)  # pipelines read its signature
        def step(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            latents = output[0] if isinstance(output, tuple) else output.prev_sample
            edited = self._on_step_end(latents)
            if edited is latents:
                return output
            if isinstance(output, tuple):
                return (edited, *output[1:])
            return type(output)(**(dict(output) | {"prev_sample": edited}))

        scheduler.step = step
        try:
            yield
        finally:
            if scheduler.__dict__.get("step") is step:
                del scheduler.step
                if attribute is not None:
                    scheduler.step = attribute

    def _on_step_end(self, latents: Tensor) -> Tensor:
        """Count a step, let guards edit the latents, and check those of the last step."""
        guided = self.call.has_guidance
        expected = self._spec.calls_per_step if guided else 1
        if self.hooks:
            self.unguarded_steps += not self.calls_started == self.calls_ended == expected
        self.unguided_steps += not self.adapter.guidance_applies(self.call.options) and any(
            r.acts_at(*GUIDANCE_POINTS) for r, _ in self.hooks
        )
        self.calls_started = self.calls_ended = 0
        for runner, hook in self.hooks:
            if runner.acts_at("latents"):
                with runner.timed_call():
                    latents = check_tensor(hook.on_step_end(latents), latents, "on_step_end")
        self.call.step += 1
        if self.call.step == self.adapter.num_timesteps:
            self.finite = latents.flatten(1).isfinite().all(dim=1).tolist()
            if not all(self.finite):  # these images are withheld, but the decoder needs numbers
                latents = latents.nan_to_num(0.0, 0.0, 0.0)
        return latents

    @property
    def _spec(self) -> PipelineSpec:
        assert self.adapter.spec is not None
        return self.adapter.spec

    @property
    def _joint(self) -> bool:
        """Whether one denoiser call predicts [negative; prompt] together."""
        return self.call.has_guidance and self._spec.calls_per_step == 1

    def _before(self, network: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Edit the embeddings of a denoiser call, and append the rows of extra conditions."""
        self.call.num_steps, self.conditions = self.adapter.num_timesteps, []
        if HIDDEN_ARGUMENT not in kwargs:
            raise ConfigError(
                f"{HIDDEN_ARGUMENT} must be given to the denoiser by keyword with guards inside "
                "it, got it by position or not at all. Use the pipeline's own call."
            )
        original, joint = read_text(kwargs), self._joint
        rows = len(original)
        n = rows // 2 if joint else rows
        embeds = self._edited(original)
        if self.call.has_guidance and (joint or self.calls_started == 0):
            self.conditions = self._extra_conditions(embeds[rows - n :])
        total = rows + len(self.conditions) * n
        self.merged = (
            joint and bool(self.conditions) and (self.max_rows is None or total <= self.max_rows)
        )
        selection: list[int] = []
        if self.merged:
            selection = [*range(rows), *list(range(rows - n, rows)) * len(self.conditions)]
            embeds = Conditioning.concat([embeds, *(c.embeds for c in self.conditions)])
        self._set_rows(rows, n)
        self.calls_started += 1
        return replace_inputs(args, kwargs, rows, selection, None if embeds is original else embeds)

    def _set_rows(self, rows: int, n: int) -> None:
        """Give guards their rows. The prompts' `n` rows are the last of the pipeline's `rows`."""
        for runner, hook in self.hooks:
            own = {
                condition.name: slice(rows + k * n, rows + (k + 1) * n)
                for k, condition in enumerate(self.conditions if self.merged else ())
                if condition.runner is runner
            }
            hook.set_rows({"cond": slice(rows - n, rows)} | own)

    def _edited(self, embeds: Conditioning) -> Conditioning:
        """Return the embeddings of a denoiser call after the guards' edits."""
        if not self.call.has_guidance:
            return self._edit("prompt_embeds", embeds)
        if not self._joint:
            first = self.calls_started == 0
            return self._edit("prompt_embeds" if first else "negative_prompt_embeds", embeds)
        n = len(embeds) // 2
        negative, prompt = embeds[:n], embeds[n:]
        edited = (
            self._edit("negative_prompt_embeds", negative),
            self._edit("prompt_embeds", prompt),
        )
        unchanged = edited[0] is negative and edited[1] is prompt
        return embeds if unchanged else Conditioning.concat(edited)

    def _edit(self, point: Point, embeds: Conditioning) -> Conditioning:
        for runner, hook in self.hooks:
            if runner.acts_at(point):
                method = EDIT_METHODS[point]
                with runner.timed_call():
                    edited = getattr(hook, method)(embeds)
                    if edited is not embeds:
                        embeds = check_embeds(edited, embeds, method)
        return embeds

    def _extra_conditions(self, like: Conditioning) -> list[ExtraCondition]:
        """Return the conditions of all guards, with rows like those of the prompts."""
        conditions: list[ExtraCondition] = []
        for runner, hook in self.hooks:
            if runner.acts_at("guidance"):
                with runner.timed_call():
                    new = hook.extra_conditions()
                    conditions += [
                        ExtraCondition(runner, name, check_embeds(embeds, like, "extra_conditions"))
                        for name, embeds in new.items()
                    ]
                    runner.rows += len(like.hidden) * len(new)
        return conditions

    def _after(self, network: nn.Module, args: Args, kwargs: Kwargs, output: Any) -> Any:
        """Subtract the guards' guidance corrections from the denoiser's prediction."""
        prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
        first, self.calls_ended = self.calls_ended == 0, self.calls_ended + 1
        if not self.call.has_guidance:
            return None
        joint = self._joint
        if joint or first:
            prediction = self._split_extra(network, args, kwargs, prediction)
        if not joint and first:
            self.cond = prediction
            return None
        u, c = prediction.chunk(2) if joint else (prediction, self.cond)
        assert c is not None
        gamma = self._guidance_correction(u, c)
        if gamma is not None and joint:
            prediction = torch.cat([u, (c.float() - gamma).to(c.dtype)])
        elif gamma is not None:
            s = self.adapter.guidance_scale(network, self.call.options)
            prediction = (u.float() + s / (s - 1) * gamma).to(u.dtype)
        if isinstance(output, tuple):
            return (prediction, *output[1:])
        return type(output)(sample=prediction)

    def _split_extra(
        self, network: nn.Module, args: Args, kwargs: Kwargs, prediction: Tensor
    ) -> Tensor:
        """Store the predictions of the extra conditions, and return the pipeline's own rows."""
        extra: Sequence[Tensor] = []
        if self.merged:
            chunks = prediction.chunk(2 + len(self.conditions))
            prediction, extra = prediction[: 2 * len(chunks[0])], chunks[2:]
        elif self.conditions:
            extra = self._predict_extra(network, args, kwargs, len(prediction))
        self.extra_predictions = {
            (id(condition.runner), condition.name): rows.float()
            for condition, rows in zip(self.conditions, extra, strict=True)
        }
        return prediction

    def _guidance_correction(self, u: Tensor, c: Tensor) -> Tensor | None:
        """Return the sum of the guards' corrections; None if there is none."""
        total: Tensor | None = None
        for runner, hook in self.hooks:
            if runner.acts_at("guidance"):
                predictions = {
                    name: rows
                    for (owner, name), rows in self.extra_predictions.items()
                    if owner == id(runner)
                }
                with runner.timed_call():
                    gamma = hook.guidance_correction(
                        {"uncond": u.float(), "cond": c.float(), **predictions}
                    )
                    if gamma is not None:
                        gamma = check_tensor(gamma, c, "guidance_correction")
                        total = gamma if total is None else total + gamma
        return total

    def _predict_extra(
        self, network: nn.Module, args: Args, kwargs: Kwargs, rows: int
    ) -> Sequence[Tensor]:
        """Return the predictions of the extra conditions by calls of at most `max_rows` rows.

        These calls bypass the hooks.
        """
        n = rows // 2 if self._joint else rows
        embeds = Conditioning.concat([c.embeds for c in self.conditions])
        selection = list(range(rows - n, rows)) * len(self.conditions)  # the prompts' rows are last
        size = self.max_rows or n
        predictions = []
        for start in range(0, len(selection), size):
            part = slice(start, start + size)
            new_args, new_kwargs = replace_inputs(args, kwargs, rows, selection[part], embeds[part])
            output = network.forward(*new_args, **new_kwargs)
            predictions.append(output[0] if isinstance(output, tuple) else output.sample)
        return torch.cat(predictions).chunk(len(self.conditions))
