"""Checks of an edit's inputs and of a training before it starts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, DivergedError
from safegen.core.processes import process_share
from safegen.core.registry import collapse_labels
from safegen.edits.training.checkpoint import check_resumable
from safegen.edits.training.config import Training

if TYPE_CHECKING:
    from safegen.edits.base import Edit


def check_inputs(
    edit: Edit,
    triplets: object = None,
    checkpoint_dir: object = None,
    resume: bool = False,
    *,
    concept: Concept | None = None,
) -> None:
    """Check that an edit gets the inputs that it learns from, and no others.

    Args:
        edit: the edit.
        triplets: triplets, or None.
        checkpoint_dir: directory for checkpoints, or None.
        resume: whether a training is resumed.
        concept: the concept; the message names its judge and triplets.

    Raises:
        ConfigError: triplets or phrases are missing, triplets are given to an edit that learns from
            phrases, or a checkpoint directory or `resume` to a closed form.
        FileError: there is no checkpoint to resume, or a damaged one.
    """
    method = edit.method()
    if edit.inputs == "words" and triplets is not None:
        raise ConfigError(
            f"{method} learns from phrases, and triplets have no effect. Leave them out."
        )
    if edit.inputs != "words" and triplets is None:
        raise ConfigError(
            f"{method} learns from images, and there are no triplets. {_triplets_hint(concept)}, "
            "and give them as triplets (--triplets). Or edit by words, without images: method uce "
            "(--method uce). `safegen make-safe` does all steps in one job."
        )
    if edit.needs_phrases and not getattr(edit, "erase", ()):
        raise ConfigError(
            f"{method} has no phrases to erase. Give a concept that has some, or set erase."
        )
    if not edit.is_trained and (checkpoint_dir is not None or resume):
        raise ConfigError(
            f"{method} is a closed form, and {'resume' if resume else 'checkpoint_dir'} has "
            "no effect. Leave it out."
        )
    if resume and isinstance(checkpoint_dir, Path):
        check_resumable(checkpoint_dir)


def _triplets_hint(concept: Concept | None) -> str:
    """Return how to get triplets of a concept."""
    if concept is not None and concept.triplets:
        return f"Take the bundled {concept.triplets}"
    judge = "JUDGE" if concept is None else concept.judge
    labels = () if concept is None else collapse_labels(concept.labels)
    options = "".join(f" --label {label}" for label in labels)
    return (
        "Make some of images that show the concept, and of others: `safegen triplets make --unsafe "
        f"DIR --benign DIR --judge {judge}{options} --out TRIPLETS`"
    )


def check_training(
    denoiser: nn.Module,
    names: Sequence[str],
    config: Training,
    *,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
) -> None:
    """Check what `train` needs, before an edit spends time on preparing its batches.

    Raises:
        ConfigError: `resume` lacks a directory, the precision does not fit model and device, or
            there are fewer samples in a batch than processes.
        FileError: there is no checkpoint to resume, or a damaged one.
    """
    if resume and checkpoint_dir is None:
        raise ConfigError("resume needs the checkpoint directory of the stopped run, got none.")
    if resume and checkpoint_dir is not None:
        check_resumable(checkpoint_dir)
    processes = process_share()[1]
    if config.batch < processes:
        raise ConfigError(
            f"training.batch must be at least {processes}, the number of processes that share it, "
            f"got {config.batch}. Raise it and lower training.accumulation, or start fewer."
        )
    parameters = dict(denoiser.named_parameters())
    if config.precision == "fp16" and parameters[names[0]].device.type == "cpu":
        raise ConfigError("training.precision must be bf16 or fp32 on a CPU, got fp16.")
    frozen = {p.dtype for name, p in parameters.items() if name not in names}
    if config.precision == "fp32" and frozen - {torch.float32}:
        raise ConfigError(
            "training.precision fp32 needs a model loaded in fp32. "
            "Load it with dtype fp32, or set training.precision to bf16 or fp16."
        )


def check_new_weights(tensors: Mapping[str, Tensor], config: Training) -> None:
    """Check that new weights are finite.

    Raises:
        DivergedError: one is not.
    """
    for name, value in tensors.items():
        if not bool(value.isfinite().all()):
            raise DivergedError(
                f"the new {name} has values that are not finite. Lower lr ({config.lr})."
            )
