"""Metadata schema of patches and checkpoints, for writing and reading."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from safegen.core.documents import parse_json, validate
from safegen.core.errors import FileError, explain
from safegen.core.text import has_control

METADATA_FILE = "safegen.json"
"""File with the metadata of a diffusers folder that safegen wrote."""
PATCH_FORMAT = "safegen-patch/1"
"""Format in the header of a patch."""
METADATA_KEY = "safegen"
"""Header key with the metadata of a safetensors checkpoint or LoRA that safegen wrote."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def _check_printable(text: str) -> str:
    if has_control(text):
        raise ValueError(f"text must be one line of printable characters, got {text[:80]!r}")
    return text


Label = Annotated[str, Field(max_length=500), AfterValidator(_check_printable)]
"""A name in metadata that messages and model cards show."""
Component = Annotated[str, Field(pattern=r"^text_encoder(_[23])?$")]
"""Part of a pipeline, besides the denoiser, that a patch can change."""


class ShownSettings(BaseModel):
    """Settings of an edit that model cards and commands read; others are passed on."""

    erase: tuple[str, ...] | None = None
    debias: dict[str, float] | None = None


def _check_settings(settings: dict[str, Any]) -> dict[str, Any]:
    try:
        ShownSettings.model_validate(settings)
    except ValidationError as error:
        raise ValueError(explain(error)) from error
    return settings


class ParentRef(BaseModel):
    """A patch that was on the model when another was made."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    method: Label
    """Name of the edit that made it."""
    hash: Sha256
    """SHA-256 over its values."""


class PatchMetadata(BaseModel):
    """Provenance of a patch, stored in the header of its file.

    Extra keys are kept: methods add figures of their own.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="allow", use_attribute_docstrings=True
    )

    method: Label | None = None
    """Name of the edit, or of the operation on patches."""
    model: Annotated[str, Field(max_length=500)] | None = None
    """Name of the model that it was made on, without folders."""
    base: Sha256 | None = None
    """Hash of that model's denoiser without patches (`Model.hash`)."""
    family: Label | None = None
    """Architecture of the denoiser (`Model.family`)."""
    components: dict[Component, Sha256] = Field(default_factory=dict)
    """Hash of each text encoder that the patch changes, without patches."""
    settings: Annotated[dict[str, Any], AfterValidator(_check_settings)] = Field(
        default_factory=dict
    )
    """Settings of the edit."""
    description: str | None = None
    """What the edit learns from and what it does (`Edit.describe`)."""
    parents: tuple[ParentRef, ...] = ()
    """Patches that were on the model when this one was made, in order."""
    data: Label | None = None
    """Hash of the training images."""
    updates: int | None = Field(default=None, ge=0)
    """Training updates."""
    seconds: float | None = Field(default=None, ge=0)
    """Time that the edit took."""
    metrics: tuple[dict[str, Any], ...] = ()
    """Results of evaluations of this very patch."""
    parts: tuple[PatchRecord, ...] = ()
    """Patches that this one was computed from."""
    overlap: Label | None = None
    """How a merge treated weights that several patches change."""
    moved: Any = None
    """Relative size of the change, as the method defines it."""

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as plain values, without entries that are not set."""
        return self.model_dump(mode="json", exclude_defaults=True)


class PatchRecord(BaseModel):
    """Hash and metadata of a patch."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    hash: Sha256
    metadata: PatchMetadata = Field(default_factory=lambda: PatchMetadata())


class CheckpointMetadata(BaseModel):
    """Provenance of a whole model, stored in the header of its file or in `METADATA_FILE`."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, use_attribute_docstrings=True)

    model: Annotated[str, Field(max_length=500)] | None = None
    """Name of the base model, without folders."""
    base: Sha256
    """Hash of the denoiser without the patches below."""
    weights: Sha256 | None = None
    """Hash of the denoiser as stored, patches included. Set when the checkpoint is written."""
    components: dict[Component, Sha256] = Field(default_factory=dict)
    """Hash of each text encoder that a patch changes, as stored. Set with `weights`."""
    patches: tuple[PatchRecord, ...] = ()
    """Patches in the weights, the oldest first."""
    metrics: tuple[dict[str, Any], ...] = ()
    """Results of evaluations of this very model."""

    @property
    def patched_components(self) -> set[str]:
        """Names of the text encoders that a patch changes."""
        return {name for record in self.patches for name in record.metadata.components}

    def to_json(self) -> dict[str, Any]:
        """Return the metadata as plain values, without entries that are not set."""
        return self.model_dump(mode="json", exclude_defaults=True)


def read_patch_metadata(text: str, path: Path) -> PatchMetadata:
    """Return the metadata of a patch or LoRA from the header of its file.

    Raises:
        FileError: the text does not follow the schema; the message names file and field.
    """
    source = f"metadata of {path}"
    try:
        return validate(PatchMetadata, parse_json(text, source), source)
    except FileError as error:
        raise FileError(f"{error}. Make or fetch the file again") from error


def parse_metadata(text: str) -> CheckpointMetadata | None:
    """Return the metadata of a checkpoint, or None if the text does not follow the schema.

    It is a claim about the weights beside it: `Model.verified_metadata` checks it.
    """
    try:
        return validate(CheckpointMetadata, parse_json(text, "metadata"), "metadata")
    except FileError:
        return None
