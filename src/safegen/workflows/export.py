"""Write patches and whole models to disk, each with its model card."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal, get_args

import torch

from safegen.core.device import resolve_dtype
from safegen.core.errors import ConfigError, check_keywords
from safegen.core.files import display_name
from safegen.evaluation.report import model_card as cards
from safegen.models.applied_patch import AppliedPatch
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.metadata import CheckpointMetadata, PatchRecord
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.model import Model, check_is_loaded
from safegen.patches.arithmetic import warn_of_overlap
from safegen.patches.patch import Patch

ExportFormat = Literal["single-file", "diffusers"]
TRANSFORMER_ALONE = (
    "The file holds the transformer alone: put it in ComfyUI's models/diffusion_models, and take "
    "text encoders and autoencoder from the base model."
)
"""Sentence for single files of SD 3 and FLUX."""


@check_keywords
def save_patch(
    patch: Patch, out: str | Path, *, card: bool = True, metrics: Sequence[str | Path] = ()
) -> None:
    """Write a patch to a new file, and its model card to `OUT.md`.

    Args:
        patch: the patch.
        out: the new .safetensors file.
        card: whether to write the card.
        metrics: folders with results of this patch, for the card and the header of the file.

    Raises:
        FileError: the file or the card exists or cannot be written, or a result cannot be read.
            Nothing is written then.
        ConfigError: the results are of another patch.

    Example:
        >>> patch = safegen.edit(safegen.load("mini"), "uce", concept="skulls")
        >>> safegen.save_patch(patch, "patch.safetensors")
    """
    out, results = Path(out), [Path(path) for path in metrics]
    text = cards.model_card(cards.CardSubject.of_patch(patch, out.name), results) if card else None
    cards.write_with_card(out, text, lambda: cards.with_metrics(patch, results).save(out))


@check_keywords
def export(
    model: Model,
    out: str | Path,
    *,
    format: ExportFormat = "single-file",
    patches: Sequence[Patch] = (),
    dtype: str | torch.dtype | None = None,
    card: bool = True,
    metrics: Sequence[str | Path] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write a model with its patches as one checkpoint file or as a diffusers folder.

    The file or folder carries the provenance of the patches. The model itself does not change.

    Args:
        model: model from `safegen.load`, with or without patches.
        out: the new .safetensors file or the new folder.
        format: `single-file` for A1111, ComfyUI and InvokeAI, of SD 3 and FLUX the transformer
            alone for ComfyUI; or `diffusers` for a folder.
        patches: applied in this order, after those that the model has.
        dtype: type of the weights: fp16, bf16 or fp32, or torch's name or object for it. Default:
            fp16 in a single file; in a folder that of the files that the model was read from, if
            all have one, else that of the model.
        card: whether to write a model card: `OUT.md`, or README.md in the folder.
        metrics: folders with results of exactly these patches, for the card and the metadata.
        notes: sentences at the start of the card.

    Raises:
        UnknownNameError: there is no such `dtype`.
        ConfigError: `out` has another ending, a weight does not fit `dtype`, the file has no place
            for a patch of a text encoder, or the results are of other patches.
        FileError: the output exists or cannot be written, or a result cannot be read. Nothing is
            written then.
        PatchError: a patch does not fit the model.

    Warns:
        BaseMismatchWarning: a patch was made on other weights.
        PatchOverlapWarning: two patches change the same weights.
        MetadataMismatchWarning: the model's metadata do not match its weights and are left out.

    Example:
        >>> model = safegen.load("mini")
        >>> patch = safegen.edit(model, "uce", concept="skulls")
        >>> safegen.export(model, "safe.safetensors", patches=[patch])
        >>> safegen.export(model, "safe", format="diffusers", patches=[patch])
    """
    check_is_loaded(model)
    out, results = Path(out), [Path(path) for path in metrics]
    if format not in get_args(ExportFormat):
        raise ConfigError(f"format must be single-file or diffusers, got {format!r}")
    is_file = format == "single-file"
    weights = export_dtype(model.stored_dtype, format, dtype)
    check_suffix(out, format)
    precision = f"Weights are {weights}. Results were measured before this conversion."
    sentences = [*notes, *([precision] if is_file or weights not in (None, "fp32") else [])]
    if is_file and model.denoiser_name == "transformer":
        sentences.append(TRANSFORMER_ALONE)
    subject = _card_subject(model, out, "file" if is_file else "folder", patches, sentences)
    text = cards.model_card(subject, results) if card else None
    metadata = _metadata(model, subject, results)
    warn_of_overlap([*model.patches, *patches])
    with ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch.apply(model))
        if is_file:
            cards.write_with_card(
                out,
                text,
                lambda: save_single_file(model, out, dtype=weights or "fp16", metadata=metadata),
            )
        else:
            save_folder(model, out, dtype=weights, card=text, metadata=metadata)


def export_dtype(
    stored: str | None, format: ExportFormat, dtype: str | torch.dtype | None = None
) -> str | None:
    """Return the type of the weights in an export, a key of `DTYPES`; None if types stay.

    Args:
        stored: type of the weights in the model's files (`Model.stored_dtype`).
        format: see `export`.
        dtype: what the user asks for.

    Raises:
        UnknownNameError: there is no such `dtype`.
    """
    if dtype is not None:
        return resolve_dtype(dtype)
    return "fp16" if format == "single-file" else stored


def check_suffix(out: Path, format: ExportFormat) -> None:
    """Raise ConfigError if a single file does not end in .safetensors."""
    if format == "single-file" and out.suffix != ".safetensors":
        raise ConfigError(
            f"out must end in .safetensors, got {str(out)!r}. "
            "Use format 'diffusers' to write a folder."
        )


def _card_subject(
    model: Model, out: Path, kind: str, patches: Sequence[Patch], notes: Sequence[str]
) -> cards.CardSubject:
    earlier = model.verified_metadata
    applied: list[Patch | AppliedPatch] = [*model.patches, *patches]
    return cards.CardSubject(
        kind,
        out.name,
        display_name(model.name),
        model.hash,
        [(patch.hash, patch.metadata.to_json()) for patch in applied],
        notes,
        [record.hash for record in earlier.patches] if earlier else [],
        model.metadata is not None,
    )


def _metadata(
    model: Model, subject: cards.CardSubject, results: Sequence[Path]
) -> CheckpointMetadata:
    """Return the metadata of the exported model and of all patches in its weights."""
    earlier = model.verified_metadata
    records = [
        PatchRecord.model_validate({"hash": digest, "metadata": entries})
        for digest, entries in subject.patches
    ]
    return CheckpointMetadata(
        model=earlier.model if earlier else subject.model,
        base=earlier.base if earlier else model.hash,
        patches=(*(earlier.patches if earlier else ()), *records),
        metrics=tuple(subject.read_metrics(path).to_dict() for path in results),
    )
