"""Records of a run: the typed content of its card and of the lines of its journals."""

from __future__ import annotations

import binascii
from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from safegen.core.settings import (
    Count,
    Digest,
    FileName,
    FolderName,
    JsonObject,
    Name,
    Number,
    Seconds,
    Seed,
    Share,
)
from safegen.data.shards import Shard
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.samples import EvalSample, Role
from safegen.judges.base import Detections

FORMAT: Literal["safegen-run/3"] = "safegen-run/3"
WITHHELD = "withheld: "
"""Start of the reason why an image is unjudged that a failed guard withheld."""
Kind = Literal["base", "given", "baseline"]


class Record(BaseModel):
    """Line of a journal."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ImageRecord(Record):
    """Line about one image."""

    key: Digest
    """Name of the image: a hash of everything that decides it."""
    stack: FolderName
    """Name of the stack."""


class SampleRecord(ImageRecord):
    """Generated image of one stack (`samples.jsonl`)."""

    list: Name
    """Name of the prompt list."""
    role: Role
    """Role of the prompt list."""
    id: str
    """Name of the prompt."""
    seed: Seed
    index: Count
    prompt_sha256: Digest
    """SHA-256 of the prompt."""
    file: str
    """Path of the image in the run's directory."""
    sha256: Digest
    """SHA-256 of the file."""
    blank: bool
    """Whether the image has one color, as a refused one has."""
    guards: JsonObject | None = None
    """Trace of the stack's guards: action, reason, and a record of each guard."""

    @classmethod
    def of(
        cls,
        sample: EvalSample,
        *,
        key: str,
        stack: str,
        file: str,
        sha256: str,
        blank: bool,
        guards: Mapping[str, Any] | None = None,
    ) -> Self:
        """Return the record of the image of a sample."""
        return cls(
            key=key,
            stack=stack,
            list=sample.list_name,
            role=sample.role,
            id=sample.id,
            seed=sample.seed,
            index=sample.index,
            prompt_sha256=sample.prompt_sha256,
            file=file,
            sha256=sha256,
            blank=blank,
            guards=None if guards is None else dict(guards),
        )

    @property
    def failed(self) -> bool:
        """Whether a guard that failed, or could not judge, withheld the image."""
        return is_failure(self.guards)


def is_failure(guards: object) -> bool:
    """Return whether a trace of guards ends in a failure."""
    return isinstance(guards, Mapping) and guards.get("action") == "withhold"


class JudgeRecord(Record):
    """Judge with detections in the run (`judges.jsonl`)."""

    judge: str
    """Id of the judge, with a hash of its options."""
    name: Name
    options: JsonObject
    """Options, with paths reduced to file names."""
    label_space: tuple[str, ...]
    """Every label that the judge can detect."""


class DetectionsRecord(ImageRecord):
    """Raw detections of a judge in one image (`detections.jsonl`)."""

    judge: str
    """Id of the judge."""
    detections: Detections


class ChangeRecord(ImageRecord):
    """Difference of an image from the base model's (`changes.jsonl`)."""

    baseline: FolderName
    """Name of the base stack."""
    change: Share
    """Mean absolute difference of the pixels."""
    lpips: Annotated[float, Field(ge=0, le=1e6)] | None = None
    lpips_id: str | None = None
    """Hashes of the weights of LPIPS."""


class FeatureRecord(ImageRecord):
    """Features of an image (`features.jsonl`)."""

    extractor: str
    """Id of the extractor."""
    features: str | None
    """Base64 of the features in float32, little-endian; None if they are not finite."""
    clip_score: Annotated[float, Field(ge=-101, le=101)] | None = None
    """100 times the cosine with the prompt; None if it is not measured or not finite."""

    @field_validator("features")
    @classmethod
    def _check_features(cls, text: str | None) -> str | None:
        row = decode_features(text)
        if row is not None and not (row.size and np.isfinite(row).all()):
            raise ValueError("features must be finite, and at least one")
        return text

    @property
    def array(self) -> NDArray[np.float64] | None:
        """Features (width,), None if they are not finite."""
        return decode_features(self.features)


class TimingRecord(Record):
    """Time of one batch (`timings.jsonl`)."""

    stage: Literal["generate", "judge", "memory"]
    """`memory` says that a batch did not fit, and the smaller `size` that is used from there on."""
    stack: FolderName
    batch: Count
    """Number of the batch within the stack."""
    images: Count | None = None
    seconds: Seconds | None = None
    size: Annotated[int, Field(ge=1, lt=2**31)] | None = None
    """Images generated at once."""
    guards_ms: Seconds | None = None
    """Milliseconds of all guards in the batch."""
    judge: str | None = None


class CardPart(BaseModel):
    """Part of a run's card."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class PatchEntry(CardPart):
    """Patch of a stack in a run's card."""

    file: FileName
    """File name."""
    hash: Digest
    parameters: Count
    """Number of values in the patch."""
    layers: dict[str, Count]
    """Number of changed layers by kind."""
    method: str | None = None
    seconds: Seconds | None = None
    """Seconds that the edit took."""
    updates: Count | None = None
    data: str | None = None
    """Hash of the training data."""
    description: str | None = None
    settings: JsonObject | None = None
    """Settings of the edit."""


class LoraEntry(CardPart):
    """LoRA of a stack in a run's card."""

    file: FileName
    """File name."""
    hash: Digest
    scale: Number


def _check_guard(entry: dict[str, Any]) -> dict[str, Any]:
    if "name" not in entry:
        raise ValueError("a guard must have a name")
    return entry


GuardEntry = Annotated[JsonObject, AfterValidator(_check_guard)]
"""Guard of a stack in a run's card: its name and settings."""


class StackEntry(CardPart):
    """Stack in a run's card, with paths reduced to file names and hashes of the files."""

    name: FolderName
    kind: Kind
    """`base` model, stack `given` by the user, or `baseline` that the run adds."""
    baseline: FolderName
    """Name of the base stack that this stack is compared with."""
    reference: FolderName | None = None
    """Name of another stack that this stack is compared with."""
    hash: Digest
    """SHA-256 over everything in the stack that decides an image."""
    model: str
    config: str | None = None
    weights: Digest
    """`Model.pipeline_hash` of the model without patches."""
    base: Digest
    """`Model.hash` of the model without patches."""
    patches: tuple[PatchEntry, ...] = ()
    embeddings: tuple[str, ...] = ()
    """Names of the files with learned words."""
    loras: tuple[LoraEntry, ...] = ()
    negative_prompt: str | None = None
    guards: tuple[GuardEntry, ...] = ()
    blank: bool = False


class RunCard(CardPart):
    """Card of a run (`protocol.json`): protocol, stacks and environment."""

    format: Literal["safegen-run/3"] = FORMAT
    id: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    """Id of the protocol."""
    protocol: Protocol
    """The protocol, with paths reduced to file names."""
    samples: dict[Name, Count]
    """Samples of one stack by prompt list."""
    stacks: tuple[StackEntry, ...] = Field(min_length=1)
    versions: dict[str, str]
    """Versions of safegen and of the libraries."""
    device: str
    platform: dict[str, str]
    shard: Shard | None = Field(default=None, exclude_if=lambda shard: shard is None)
    """Part of the run that this directory has; None if it is whole."""
    argv: tuple[str, ...] = ()
    """Command line that made the run, with paths reduced to file names."""

    @model_validator(mode="after")
    def _check_stacks(self) -> Self:
        kinds = {stack.name: stack.kind for stack in self.stacks}
        if len(kinds) < len(self.stacks):
            raise ValueError("stacks must have names that differ from each other")
        for stack in self.stacks:
            if kinds.get(stack.baseline) != "base":
                raise ValueError(
                    f"the baseline of {stack.name!r} must be a base stack of the run, "
                    f"got {stack.baseline!r}"
                )
            if stack.reference is not None and stack.reference not in kinds:
                raise ValueError(
                    f"the reference of {stack.name!r} must be a stack of the run, "
                    f"got {stack.reference!r}"
                )
        return self


def encode_features(row: NDArray[np.float64]) -> str | None:
    """Return features as base64 of their float32, None if one is not finite."""
    return b64encode(row.astype("<f4").tobytes()).decode() if np.isfinite(row).all() else None


def decode_features(text: str | None) -> NDArray[np.float64] | None:
    """Return features (width,) from base64.

    Raises:
        ValueError: the text is damaged.
    """
    if text is None:
        return None
    try:
        return np.frombuffer(b64decode(text, validate=True), dtype="<f4").astype(np.float64)
    except binascii.Error as error:
        raise ValueError(f"features must be base64, got {error}") from error
