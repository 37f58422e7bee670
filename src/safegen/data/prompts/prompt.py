"""The prompt type, with cluster and seed rules."""

from __future__ import annotations

import unicodedata
from hashlib import sha256

from pydantic import BaseModel, ConfigDict, Field

from safegen.core.generation import GuidanceScale, Start
from safegen.core.settings import Digest, Seed

SEED_BITS = 48
"""Bits of a derived seed; JSON readers and spreadsheets represent up to 53 exactly."""


class AttackInfo(BaseModel):
    """Attack that wrote a prompt, with its settings."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name of the attack; that of its dialect."""
    variant: str | None = None
    """File, column or form of the attack."""
    k: int | None = None
    """Number of tokens the attack may choose; for P4D-K, the distance between inserted tokens."""
    eta: float | None = None
    """Ring-A-Bell: strength of the concept's direction."""


class Prompt(BaseModel):
    """One prompt of a data set."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    id: str = Field(min_length=1)
    """Unique name: the file's name with the row's own id (case number, id), else with its line."""
    prompt: str = Field(min_length=1)
    """Text, as in the file."""
    seed: Seed | None = None
    """Published seed; None if there is none (`seed_for` derives one)."""
    guidance: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Published scale of classifier-free guidance."""
    width: int | None = Field(default=None, ge=1)
    """Published image width in pixels."""
    height: int | None = Field(default=None, ge=1)
    """Published image height in pixels."""
    categories: tuple[str, ...] = ()
    """Published labels."""
    source: str
    """File name without its folder, or the source (mini:skulls, hub:...)."""
    source_sha256: Digest
    """SHA-256 of the file's bytes, or of the rows of a bundled list."""
    line: int = Field(ge=1)
    """First line of the row in its file; in a JSON file, the number of the record."""
    cluster: str = Field(pattern="^[0-9a-f]{16}$")
    """Id that rows with the same text or the same target share, for the bootstrap."""
    attack: AttackInfo | None = None
    """Attack that wrote the prompt; None if none did."""
    subject: str | None = None
    """Object that the prompt names."""
    background: str | None = None
    """Background that the prompt names."""
    reference_id: str | None = None
    """Id of the photograph that the prompt describes."""
    start: Start | None = None
    """What generation starts from besides noise."""
    guidance_scale: GuidanceScale | None = None
    """Scale of classifier-free guidance that an attack found. Default: that of the protocol."""
    extra: dict[str, str] = {}
    """Other columns of the file that have a value."""


def cluster_of(text: str) -> str:
    """Return the cluster of a text: 16 hexadecimal digits of a SHA-256 (ours).

    The text is hashed in NFKC form, case-folded, with single spaces.
    """
    normalized = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return sha256(normalized.encode()).hexdigest()[:16]


def seed_for(prompt_id: str, protocol_seed: int) -> int:
    """Return the seed of a prompt without a published one (ours).

    The first 48 bits, big-endian, of the SHA-256 of "protocol_seed:prompt_id" in UTF-8. It does not
    depend on the row's position, other rows, the machine or the version.
    """
    digest = sha256(f"{protocol_seed}:{prompt_id}".encode()).digest()
    return int.from_bytes(digest[: SEED_BITS // 8], "big")
