"""Guarded pipeline: a pipeline's own call with hooks. Images that bypassed a guard are withheld."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.core.text import short_repr
from safegen.guards.core.adapter import (
    ALL_POINTS,
    EXTERNAL_POINTS,
    GUIDANCE_POINTS,
    UNIVERSAL_POINTS,
    HookPoint,
    PipelineAdapter,
)
from safegen.guards.core.base import Guard, GuardConfig
from safegen.guards.core.callbacks import CALLBACK_OPTIONS, CallbackWatch
from safegen.guards.core.checks import check_config, check_guard, check_options
from safegen.guards.core.hooks import PipelineHooks
from safegen.guards.core.output import IMAGE_OUTPUT_TYPES, restore_format, to_pil
from safegen.guards.core.request import Request, check_request
from safegen.guards.core.result import GeneratedImage, GuardResult, InvalidResultError
from safegen.guards.core.rows import check_tensor
from safegen.guards.core.runner import (
    EmbeddingOffset,
    GuardError,
    GuardRunner,
    allowed_images,
    build_image,
    reference_streams,
    start_hooks,
)
from safegen.models.schedulers import pipeline_lock

PER_IMAGE_POINTS: frozenset[HookPoint] = frozenset({"probe", "latents"})
"""Hook points that need the initial latents of each image."""


class GuardedPipeline:
    """A diffusers pipeline with guards. Images are unchanged bit for bit where no guard acts."""

    def __init__(
        self,
        pipe: Any,
        configs: Sequence[GuardConfig],
        *,
        max_rows: int | None = None,
        negative_prompt: str = "",
    ) -> None:
        """Check the guards against the pipeline and load their files.

        Args:
            pipe: diffusers pipeline. Guards inside the denoiser need one of `PIPELINE_SPECS`, or a
                subclass that keeps its `__call__` and `encode_prompt`.
            configs: settings of the guards, in the order in which they act.
            max_rows: most rows of one denoiser call. Rows of guards beyond it are predicted in
                calls of their own. None: no limit.
            negative_prompt: negative prompt of the calls, to refuse guards without effect now.
                Each call is checked too.

        Raises:
            ConfigError: a guard cannot run on this pipeline, does not implement its hook points,
                has no effect beside the others, or is given twice and must not be.
            UserError: a file of a guard cannot be used.
        """
        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"max_rows must be >= 1, got {max_rows}")
        self.pipe, self.max_rows, self.adapter = pipe, max_rows, PipelineAdapter(pipe)
        self.guards: list[Guard] = []
        self._check_guards(configs, [negative_prompt])
        self.guards = [config.build(self.adapter) for config in configs]
        self._check_guards(configs, [negative_prompt])
        self._lock = pipeline_lock(pipe)

    def __repr__(self) -> str:
        """Return the pipeline's class and the guards in one line."""
        names = [guard.config.name for guard in self.guards]
        return short_repr(GuardedPipeline, type(self.pipe).__name__, guards=names)

    def generate(
        self, prompts: Sequence[str], *, num_images_per_prompt: int = 1, **options: Any
    ) -> list[GeneratedImage]:
        """Return the images with their traces, those of one prompt adjacent.

        Calls on one pipeline wait for each other.

        Args:
            prompts: prompts to generate for.
            num_images_per_prompt: number of images per prompt.
            options: other options of the pipeline's call, but no embeddings or image prompts.
                Lists have one entry per prompt; generators may have one per image.

        Raises:
            ConfigError: a guard would have no effect with these options.
            UserError: a guard refuses the request.
        """
        with self._lock:
            self.adapter = PipelineAdapter(self.pipe)  # its methods may have been replaced
            request = check_request(self.adapter, prompts, num_images_per_prompt, options)
            negative_prompts = request.options.get("negative_prompt") or [""]
            self._check_guards([guard.config for guard in self.guards], negative_prompts)
            self._check_options(request)
            return self._generate(request)

    def _check_guards(
        self, configs: Sequence[GuardConfig], negative_prompts: Sequence[str]
    ) -> None:
        """Refuse guards that cannot act on the pipeline as it is now, or beside each other."""
        for config in configs:
            check_config(config, configs, self.adapter, negative_prompts)
        for guard in self.guards:
            check_guard(guard, self.adapter)

    def _check_options(self, request: Request) -> None:
        """Refuse options under which a guard has no effect."""

        def names(points: frozenset[HookPoint]) -> list[str]:
            return [g.config.name for g in self.guards if g.hook_points & points]

        if request.copies > 1 and (guards := names(PER_IMAGE_POINTS)):
            raise ConfigError(
                f"num_images_per_prompt must be 1 with {', '.join(guards)}, got {request.copies}. "
                "Repeat the prompt."
            )
        check_options(
            self.adapter,
            request.options,
            guided=names(GUIDANCE_POINTS),
            inside=names(ALL_POINTS - EXTERNAL_POINTS),
            reading=names(ALL_POINTS - UNIVERSAL_POINTS),
        )
        output_type = request.options.get("output_type", "pil")
        if (guards := names(frozenset({"image"}))) and output_type not in IMAGE_OUTPUT_TYPES:
            raise ConfigError(
                f"output_type must be 'pil', 'np' or 'pt' with {', '.join(guards)}, got "
                f"{output_type!r}"
            )

    def _generate(self, request: Request) -> list[GeneratedImage]:
        """Return the images of a checked request. A guard that fails withholds them all."""
        n = request.num_images
        runners = [self._runner(guard, n) for guard in self.guards]
        images: list[Any] = [None] * n
        outputs: list[Any] = [None] * n
        flags: list[bool | None] = [None] * n
        faults = [""] * n
        try:
            self._check_prompts(runners, request)
            latents = self._run_probes(runners, request)
            allowed = allowed_images(runners, range(n))
            if allowed:
                prompts = sorted({i // request.copies for i in allowed})
                found = self._run(runners, self._with_latents(request, latents), prompts)
                checked = any(runner.acts_at("image") for runner in runners)
                for i, (output, fault, flag) in zip(allowed, found, strict=True):
                    outputs[i], faults[i], flags[i] = output, fault, flag
                    images[i] = to_pil(output) if checked else output
                self._check_images(
                    runners, images, request.image_prompts, [i for i in allowed if not faults[i]]
                )
        except GuardError as error:
            faults = [f"error: {error}"] * n
        built = [build_image(images[i], runners, i, faults[i]) for i in range(n)]
        return [
            replace(restore_format(image, output), nsfw_content_detected=flag)
            for image, output, flag in zip(built, outputs, flags, strict=True)
        ]

    @property
    def _device_type(self) -> str:
        return str(self.adapter.device.type)

    def _runner(self, guard: Guard, n: int) -> GuardRunner:
        return GuardRunner(guard, n, self._device_type)

    def _check_prompts(self, runners: Sequence[GuardRunner], request: Request) -> None:
        """Run the guards of prompts."""
        for runner in runners:
            if runner.acts_at("prompt"):
                with runner.timed_call():
                    results = runner.guard.check_prompts(request.prompts)
                    runner.merge_results(
                        [r for r in results for _ in range(request.copies)],
                        range(request.num_images),
                    )

    def _run_probes(self, runners: Sequence[GuardRunner], request: Request) -> dict[int, Tensor]:
        """Run the guards that probe, and return the initial latents that they changed, by image."""
        latents, device = dict[int, Tensor](), self._device_type
        autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        for runner in runners:
            images = allowed_images(runners, range(request.num_images))
            if not runner.acts_at("probe") or not images:
                continue
            options = self._with_latents(request, latents).select_options(images)
            options = {k: v for k, v in options.items() if k not in CALLBACK_OPTIONS}  # other steps
            generate = partial(self._generate_probes, runners, runner, options, autocast)
            with runner.timed_call():
                results = runner.guard.probe(
                    generate, [request.prompts[i] for i in images], options
                )
                runner.merge_results(results, images)
                moved = {
                    i: result.latents
                    for i, result in zip(images, results, strict=True)
                    if result.latents is not None
                }
                if moved:
                    initial, _ = self.adapter.initial_latents(options, runner.config.name)
                    latents |= {
                        i: check_tensor(x, initial[0], "latents of probe") for i, x in moved.items()
                    }
        return latents

    def _generate_probes(
        self,
        runners: Sequence[GuardRunner],
        caller: GuardRunner,
        options: Mapping[str, Any],
        autocast: torch.autocast,
        prompts: Sequence[str],
        changes: Mapping[str, Any],
        *,
        grad: bool = False,
        embedding_offset: Tensor | None = None,
    ) -> list[Any]:
        """Return probe images of one guard; see `ProbeFunction`."""
        guards = [r.guard for r in runners if not r.acts_at("image", "probe")]
        if embedding_offset is not None:
            guards = [EmbeddingOffset(caller.config, embedding_offset), *guards]
        inner = [self._runner(guard, len(prompts)) for guard in guards]
        request = Request(self.adapter, prompts, {**options, **changes})
        with autocast:
            found = self._run(inner, request, range(len(prompts)), grad=grad, is_probe=True)
        if faults := [fault for _, fault, _ in found if fault]:
            raise InvalidResultError(f"a probe was not guarded: {faults[0]}")
        return [image for image, _, _ in found]

    def _with_latents(self, request: Request, latents: Mapping[int, Tensor]) -> Request:
        """Return the request with the initial latents that guards changed."""
        if not latents:
            return request
        initial, generators = self.adapter.initial_latents(request.options, "probe")
        changed = torch.stack([latents.get(i, x).to(initial) for i, x in enumerate(initial)])
        options = {**request.options, "latents": changed, "generator": generators}
        return Request(self.adapter, request.prompts, options, request.copies)

    def _run(
        self,
        runners: Sequence[GuardRunner],
        request: Request,
        prompts: Sequence[int],
        *,
        grad: bool = False,
        is_probe: bool = False,
    ) -> list[tuple[Any, str, bool | None]]:
        """Call the pipeline for some prompts.

        Return each image, its fault or "", and the flag of the pipeline's own safety checker.
        """
        images = request.images_of(prompts)
        references = reference_streams(runners, [request.prompts[i] for i in prompts])
        call, arguments = request.build_call(prompts, references)
        call.is_probe = is_probe
        row_images = (*images, *(images[k] for k in references))
        active = start_hooks(runners, call, row_images)
        hooks = PipelineHooks(self.adapter, call, active, max_rows=self.max_rows)
        watch = CallbackWatch(call)
        if any(runner.guard.hook_points - UNIVERSAL_POINTS for runner in runners):
            arguments = watch.wrap(arguments)
        try:
            with hooks.attached():
                output = self._call_pipeline(arguments, grad=grad)
        except Exception as error:
            if not hooks.removed or isinstance(error, GuardError):
                raise
            fault = f"calls: {len(hooks.removed)} hooks were removed during the call"
            return [(None, fault, None)] * len(images)
        for runner, hook in active:
            with runner.timed_call():
                results = list(hook.results()) or [GuardResult()] * len(row_images)
                complete = len(results) == len(row_images)
                runner.merge_results(results[: len(images)] if complete else results, images)
        outputs: Sequence[Any] = output.images if hasattr(output, "images") else output.frames
        if len(outputs) != len(row_images):
            fault = f"calls: {len(outputs)} images returned for {len(row_images)} prompts"
            return [(None, fault, None)] * len(images)
        flags = getattr(output, "nsfw_content_detected", None) or [None] * len(outputs)
        faults = watch.faults(hooks.faults(len(row_images)))
        return list(zip(outputs, faults, flags, strict=True))[: len(images)]

    def _call_pipeline(self, arguments: Mapping[str, Any], *, grad: bool) -> Any:
        """Call the pipeline, for a gradient without its `no_grad` decorator."""
        if not grad:
            return self.pipe(**arguments)
        call: Any = type(self.pipe).__call__
        return call.__wrapped__(self.pipe, **arguments)

    def _check_images(
        self,
        runners: Sequence[GuardRunner],
        images: list[Any],
        prompts: Sequence[str],
        candidates: Sequence[int],
    ) -> None:
        """Run the guards of images in turn, each on the images that the one before left."""
        generated: dict[int, Any] = {}
        for runner in runners:
            allowed = allowed_images(runners, candidates)
            if not runner.acts_at("image") or not allowed:
                continue
            generated = generated or {i: images[i].copy() for i in allowed}
            with runner.timed_call():
                results = runner.guard.check_images(
                    [images[i] for i in allowed], [prompts[i] for i in allowed]
                )
                runner.merge_results(results, allowed, generated=[generated[i] for i in allowed])
            for i, result in zip(allowed, results, strict=True):
                images[i] = images[i] if result.image is None else result.image
