"""Make a checkpoint safe: triplets, edit, check and export in one job that can be resumed."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, InterruptedRunError, check_names, explain
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import EDITS, resolve
from safegen.stack_loader import StackLoader
from safegen.workflows.removal.check import CheckConfig
from safegen.workflows.removal.files import JobFiles
from safegen.workflows.removal.images import GeneratedImages, TrainingImages
from safegen.workflows.removal.job import MakeSafeResult, Notify, RemovalJob

IMAGE_METHOD, WORD_METHOD = "safegen", "rece"
"""Default edits from images and from words."""


def make_safe(
    model: str,
    *,
    concept: str | Path,
    out: str | Path,
    words: bool = False,
    lora: bool = False,
    unsafe: str | Path | None = None,
    benign: str | Path | None = None,
    triplets: str | Path | None = None,
    method: str | None = None,
    preset: str | None = None,
    generated: GeneratedImages | Mapping[str, Any] | None = None,
    check: CheckConfig | Mapping[str, Any] | None = None,
    config: Path | None = None,
    loader: StackLoader | None = None,
    notify: Notify | None = None,
    progress: ProgressCallback = no_progress,
    **settings: Any,
) -> MakeSafeResult:
    """Remove a concept from a model, check the result, and write it if the check passes.

    The same call resumes an interrupted job from `OUT.work`, which is removed at the end. If the
    check does not find the concept removed, nothing is written to `out`: the model lies beside it
    as `NAME.not-safe`, with its report.

    Args:
        model: a built-in model, a diffusers folder, a one-file checkpoint, or hub:owner/name.
        concept: a built-in name or a TOML file.
        out: new .safetensors file in the original layout and fp16, or new diffusers folder.
        words: edit by the concept's phrases, without images.
        lora: also write the change as a LoRA of rank 16, `NAME.lora.safetensors`, checked too.
        unsafe: folder of images that show the concept. Default: the model generates them.
        benign: folder of images without it. Default: those of `unsafe` that the judge finds safe.
        triplets: triplets in place of images: a folder, a CSV file, or a bundled set.
        method: name of the edit. Default: safegen, or rece with `words`.
        preset: preset of the edit. Default: the one for the model's size.
        generated: how many images the model generates, and how.
        check: images and limits of the check, as settings by name or a `CheckConfig`.
        config: for a one-file checkpoint, a diffusers folder with configuration files.
        loader: loads the model; on an accelerator, or the CPU, if not given.
        notify: called with lines for the user: the model, and the plan of a new job, which takes a
            probe of some seconds. Default: no plan is made.
        progress: called with (stage, done, total).
        **settings: settings of the edit to change.

    Returns:
        The files and the outcome of the check.

    Raises:
        UserError: an argument cannot be used, the judge cannot be loaded, or there are too few
            images of the concept.
        InterruptedRunError: SIGINT or SIGTERM arrived during training.

    Example:
        >>> few = {"images": 2, "max_share": 0.7, "generation": {"num_inference_steps": 4}}
        >>> words = {"words": True, "method": "uce", "concept": "skulls"}
        >>> result = safegen.make_safe("mini", out="safe.safetensors", check=few, **words)
        >>> result.report.is_dir()
        True
    """
    job = prepare_job(
        model,
        concept=concept,
        out=out,
        words=words,
        lora=lora,
        unsafe=unsafe,
        benign=benign,
        triplets=triplets,
        method=method,
        preset=preset,
        generated=generated,
        check=check,
        config=config,
        loader=loader,
        notify=notify,
        progress=progress,
        **settings,
    )
    with job.files.claimed():
        try:
            return job.run()
        except InterruptedRunError as error:
            raise InterruptedRunError(
                f"stopped. Finished work is in {job.files.work}; re-run the same command to resume."
            ) from error


def prepare_job(
    model: str,
    *,
    concept: str | Path,
    out: str | Path,
    words: bool = False,
    lora: bool = False,
    unsafe: str | Path | None = None,
    benign: str | Path | None = None,
    triplets: str | Path | None = None,
    method: str | None = None,
    preset: str | None = None,
    generated: GeneratedImages | Mapping[str, Any] | None = None,
    check: CheckConfig | Mapping[str, Any] | None = None,
    config: Path | None = None,
    loader: StackLoader | None = None,
    notify: Notify | None = None,
    progress: ProgressCallback = no_progress,
    **settings: Any,
) -> RemovalJob:
    """Return a job, checked before the model is loaded; arguments and errors as in `make_safe`."""
    method = method or (WORD_METHOD if words else IMAGE_METHOD)
    edit_class = resolve(EDITS, method, "edit")
    arguments = [*edit_class.model_fields, *signature(make_safe).parameters]
    check_names(f"setting of {method!r}", settings, arguments)
    if words and edit_class.inputs != "words":
        raise ConfigError(
            f"method must learn from words alone (uce, rece), got {method!r}. Leave out words."
        )
    job = RemovalJob(
        model=model,
        config=config,
        concept=load_concept(str(concept)),
        method=method,
        preset=preset,
        changes=settings,
        files=JobFiles(Path(out), lora),
        images=_training_images(unsafe, benign, triplets, generated),
        check=_read_check(check),
        loader=loader or StackLoader(),
        notify=notify,
        progress=progress,
    )
    job.preflight()
    return job


def _training_images(
    unsafe: str | Path | None,
    benign: str | Path | None,
    triplets: str | Path | None,
    generated: GeneratedImages | Mapping[str, Any] | None,
) -> TrainingImages:
    folders = {"unsafe": unsafe, "benign": benign, "triplets": triplets and str(triplets)}
    try:
        return TrainingImages.model_validate(
            folders | ({"generated": generated} if generated else {})
        )
    except ValidationError as error:
        raise ConfigError(explain(error, TrainingImages)) from error


def _read_check(check: CheckConfig | Mapping[str, Any] | None) -> CheckConfig:
    try:
        return CheckConfig.model_validate(check or {})
    except ValidationError as error:
        raise ConfigError(f"check: {explain(error, CheckConfig)}") from error
