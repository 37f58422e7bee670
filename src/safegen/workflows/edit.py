"""Remove a concept from a model: settings, checks and the edit in one call."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import (
    ConfigError,
    FileError,
    MissingExtraError,
    SafegenWarning,
    UnusedSettingWarning,
    check_names,
    explain,
)
from safegen.core.files import atomic_write
from safegen.core.processes import shared_job
from safegen.core.registry import EDITS, resolve
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TEXTS, Edit
from safegen.edits.training.check import check_inputs
from safegen.edits.training.checkpoint import CHECKPOINT_FILE, LOG_FILE
from safegen.edits.training.config import TrainingCallback
from safegen.edits.training.latents import LATENTS
from safegen.edits.training.presets import default_preset, default_presets, warn_of_mini_lists
from safegen.evaluation.run.training_log import LOG_SUFFIX
from safegen.judges import judge_images, load_concept_judge
from safegen.models.model import Model, check_is_loaded
from safegen.patches.arithmetic import include
from safegen.patches.patch import Patch

JUDGE_BATCH_SIZE = 16
"""Unsafe images that are judged at once, until one of them shows the concept."""


FEW_TRIPLETS = 20
"""Triplets below which an edit is warned of; the bundled sets and the published run have 100."""


class FewTripletsWarning(SafegenWarning):
    """Triplets of too few images to learn a concept from."""


class UncheckedTripletsWarning(SafegenWarning):
    """Triplets that no judge could check for the concept."""


def edit(
    model: Model,
    method: str = "safegen",
    *,
    triplets: Triplets | str | Path | None = None,
    preset: str | None = None,
    concept: Concept | str | Path | None = None,
    from_patch: Patch | str | Path | None = None,
    checkpoint_dir: str | Path | None = None,
    resume: bool = False,
    callback: TrainingCallback | None = None,
    **settings: Any,
) -> Patch:
    """Remove a visual concept from a model and return the change as a patch.

    The model itself does not change. Processes that torchrun started share the training: call it on
    all of them. All return the same patch, and one of them saves it.

    Args:
        model: model from `safegen.load`.
        method: name of the edit, such as `safegen`, `esd` or `uce`.
        triplets: <unsafe, censored, benign> images, for a method that learns from images: a
            `Triplets`, its folder or CSV file, or a bundled set such as `mini:skulls`.
        preset: settings to start from. `mini` is tuned on the miniature model, `full` is for
            full-size models, `paper` is the published run. Default: `mini` or `full`, by the size
            of the model.
        concept: a name, a TOML file or a `Concept`. It supplies the phrases and captions of methods
            that use them, and the judge that checks the triplets.
        from_patch: patch to start from, or its file. The result contains it.
        checkpoint_dir: folder for checkpoints and the log of a method that trains.
        resume: continue the run that was stopped in `checkpoint_dir`.
        callback: called after every update with (done, total, row of the log).
        **settings: settings of the method to change.

    Returns:
        The new weight values with their provenance. `Patch.apply` puts them on the model.

    Raises:
        UserError: an argument cannot be used.
        DivergedError: a loss or a weight became NaN or infinite.
        InterruptedRunError: SIGINT or SIGTERM stopped the training.

    Warns:
        UnusedSettingWarning: the concept has no effect.
        UncheckedTripletsWarning: no judge could check the triplets.
        FewTripletsWarning: there are fewer than `FEW_TRIPLETS`.
        MiniatureSettingsWarning: settings tuned on the miniature are used on a full-size model.

    Example:
        >>> model = safegen.load("mini")
        >>> trial = {"updates": 1, "warmup": 0}  # without it: minutes
        >>> patch = safegen.edit(model, triplets="mini:skulls", training=trial)  # from images
        >>> patch.metadata.method
        'safegen'
    """
    check_is_loaded(model)
    arguments = [*resolve(EDITS, method, "edit").model_fields, *signature(edit).parameters]
    check_names(f"setting of {method!r}", settings, arguments)
    folder = None if checkpoint_dir is None else Path(checkpoint_dir)
    with shared_job():
        prepared = prepare_edit(
            method,
            preset,
            triplets=triplets,
            concept=concept,
            checkpoint_dir=folder,
            resume=resume,
            **settings,
        )
        start = Patch.load(from_patch) if isinstance(from_patch, str | Path) else from_patch
        return apply_edit(
            prepared.for_model(model),
            model,
            prepared.triplets,
            from_patch=start,
            checkpoint_dir=folder,
            resume=resume,
            callback=callback,
        )


def apply_edit(
    config: Edit,
    model: Model,
    triplets: Triplets | None = None,
    *,
    from_patch: Patch | None = None,
    **options: Any,
) -> Patch:
    """Apply an edit, on a model with a patch if one is given, and return the whole change.

    Args:
        config: settings of the edit.
        model: the model; it does not change.
        triplets: training images, for an edit that learns from them.
        from_patch: patch to start from. It is on the model while the edit is made, so that all
            that an edit compares with the original model is compared with the patched one.
        options: `checkpoint_dir`, `resume` and `callback` of `Edit.apply`.

    Returns:
        One patch for the model as it is; where a patch is given, it holds that one's values too
        (`safegen.patches.arithmetic.include`).

    Raises:
        UserError: see `Edit.apply`, or the patch does not fit the model.
    """
    lists = (name for field in TEXTS for name in getattr(config, field, ()))
    warn_of_mini_lists(lists, model)
    if from_patch is None:
        return config.apply(model, triplets, **options)
    with from_patch.apply(model):
        return include(from_patch, config.apply(model, triplets, **options))


@dataclass(frozen=True)
class PreparedEdit:
    """Arguments of an edit, checked before the model is loaded."""

    by_preset: Mapping[str, Edit]
    """Settings by preset: those of one preset if it was given, otherwise of `default_presets`."""
    triplets: Triplets | None
    """Training images, for an edit that learns from them."""

    @property
    def is_trained(self) -> bool:
        """Whether the edit is trained and has checkpoints."""
        return next(iter(self.by_preset.values())).is_trained

    def preset_for(self, model: Model) -> str:
        """Return the preset that was given, or that for a model."""
        given = list(self.by_preset)
        return given[0] if len(given) == 1 else default_preset(model, given)

    def for_model(self, model: Model) -> Edit:
        """Return the settings for a model."""
        return self.by_preset[self.preset_for(model)]


def prepare_edit(
    method: str,
    preset: str | None = None,
    *,
    triplets: Triplets | str | Path | None = None,
    concept: Concept | str | Path | None = None,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
    **settings: Any,
) -> PreparedEdit:
    """Return the settings and triplets of an edit, checked; no model is needed.

    Arguments, errors and warnings are those of `edit`.
    """
    concept = load_concept(str(concept)) if isinstance(concept, str | Path) else concept
    kind: type[Edit] = resolve(EDITS, method, "edit")
    presets = default_presets(kind.PRESETS) if preset is None else (preset,)
    edits = {name: make_edit(method, name, concept=concept, **settings) for name in presets}
    config = edits[presets[0]]
    check_inputs(config, triplets, checkpoint_dir, resume, concept=concept)
    rows = Triplets.load(Path(triplets)) if isinstance(triplets, str | Path) else triplets
    if rows is not None:
        warn_of_few(rows, stacklevel=4)
    if concept is not None and rows is not None:
        check_triplets(concept, rows)
    elif concept is not None and config == make_edit(method, presets[0], **settings):
        with_preset = f" with preset {preset!r}" if preset else ""
        warnings.warn(
            f"concept {concept.name!r} has no effect on {method}{with_preset}",
            UnusedSettingWarning,
            stacklevel=3,
        )
    return PreparedEdit(edits, rows)


def keep_log(checkpoint_dir: Path, patch: Path, *, keep_checkpoints: bool) -> Path:
    """Copy the log of a finished training to a file beside its patch, and return that file.

    Args:
        checkpoint_dir: folder of the training.
        patch: the patch file. `safegen evaluate` finds the log by its name.
        keep_checkpoints: whether the folder stays as it is; otherwise checkpoint, log and latents
            are removed, and so is the folder if nothing else is in it when its claim ends.

    Raises:
        FileError: the log cannot be written.
    """
    path = patch.with_name(patch.name + LOG_SUFFIX)
    with atomic_write(path, replace=True) as temporary:
        shutil.copyfile(checkpoint_dir / LOG_FILE, temporary)
    if not keep_checkpoints:
        for name in (CHECKPOINT_FILE, LOG_FILE):
            (checkpoint_dir / name).unlink(missing_ok=True)
        shutil.rmtree(checkpoint_dir / LATENTS, ignore_errors=True)
    return path


def make_edit(
    method: str, preset: str = "mini", *, concept: Concept | str | None = None, **settings: Any
) -> Edit:
    """Return the settings of an edit: a preset, the defaults of a concept, and changes.

    Raises:
        UnknownNameError: no such method, preset or concept.
        ConfigError: a setting is unknown or breaks its rule.
    """
    config_class: type[Edit] = resolve(EDITS, method, "edit")
    concept = load_concept(concept) if isinstance(concept, str) else concept
    try:
        return config_class.preset(preset, concept=concept, **settings)
    except ValidationError as error:
        raise ConfigError(explain(error, config_class)) from error


def warn_of_few(triplets: Triplets, stacklevel: int = 3) -> None:
    """Warn if there are fewer than `FEW_TRIPLETS` triplets to learn from."""
    if len(triplets) < FEW_TRIPLETS:
        warnings.warn(
            f"triplets should be {FEW_TRIPLETS} or more, got {len(triplets)}: an edit of few "
            "images learns these images, not the concept. Add others, of as many subjects as you "
            "can.",
            FewTripletsWarning,
            stacklevel=stacklevel,
        )


def check_triplets(concept: Concept, triplets: Triplets) -> None:
    """Raise if no unsafe image shows the concept; the edit would remove something else.

    Raises:
        ConfigError: no image that could be judged shows the concept.
        FileError: an image is missing or changed.

    Warns:
        UncheckedTripletsWarning: the judge cannot be loaded, or all images are unjudged.
    """
    try:
        judge = load_concept_judge(concept)
    except (MissingExtraError, FileError, ConfigError) as error:
        _warn_unchecked(str(error))
        return
    judged = 0
    for start in range(0, len(triplets), JUDGE_BATCH_SIZE):
        batch = range(start, min(start + JUDGE_BATCH_SIZE, len(triplets)))
        verdicts = judge_images(judge, [triplets.images(i)[0] for i in batch])
        if "unsafe" in verdicts:
            return
        judged += len(verdicts) - verdicts.count("unjudged")
    if judged:
        raise ConfigError(
            f"unsafe images of the triplets must show {concept.name!r}, but judge "
            f"{concept.judge!r} sees it in none of {judged}. Choose another concept or triplets."
        )
    _warn_unchecked(f"judge {concept.judge!r} left all images unjudged")


def _warn_unchecked(reason: str) -> None:
    warnings.warn(f"triplets were not checked: {reason}", UncheckedTripletsWarning, stacklevel=4)
