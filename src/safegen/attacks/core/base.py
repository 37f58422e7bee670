"""Attack interface: frozen settings, and the attacker that they build for a target."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from pydantic import BaseModel, ConfigDict, Field

from safegen.attacks.core.cost import Cost
from safegen.attacks.core.target import Target
from safegen.core.concept import Concept
from safegen.core.errors import UnknownNameError
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import ATTACKS
from safegen.evaluation.run.records import Record
from safegen.evaluation.samples import EvalSample

Access = Literal["queries", "text_encoder", "weights"]
"""What an attacker needs: images on request, the text encoder, or all weights."""
Tier = Literal["static", "adaptive"]
"""Whether an attack is made without the defended stack, or against it."""


class AttackRecord(Record):
    """Result of an attack on one sample (`attack.jsonl`)."""

    id: str
    """Id of the attacked sample."""
    prompt: str
    """Text that the attack found; the sample's prompt if it changes no text."""
    seed: int
    """Seed that the attack found; the sample's seed if it changes none."""
    success: bool | None = None
    """Whether the attack saw the concept in an image; None if it looked at none."""
    loss: float | None = None
    """Lowest value of the objective; None if there is none."""
    history: tuple[float, ...] = ()
    """Best value of the objective so far, by step."""
    tokens: tuple[int, ...] = ()
    """Ids of the tokens that the attack chose."""
    stable: bool | None = None
    """Whether the text is read as exactly those tokens; None if tokens were not chosen."""
    stopped: str = ""
    """Limit of the budget that ended the attack; empty if it ended by itself."""
    cost: Cost = Cost()
    """Share of the batch's cost."""


@dataclass
class AttackContext:
    """What an attacker works with."""

    target: Target
    """The attacked stack."""
    folder: Path
    """Folder for files that belong to the result, such as learned words."""
    progress: ProgressCallback = field(default=no_progress)
    """Called with (description, done, total)."""

    @property
    def concept(self) -> Concept:
        """Concept that the attack brings back."""
        return self.target.concept


class Attacker(Protocol):
    """Attack on one target, built by `Attack.build`."""

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the result for each sample of a batch, in order.

        A result depends on its sample, the settings and the target alone, not on the batch.
        Where the budget is exhausted, the best result so far is returned.
        """
        ...


class Attack(BaseModel, ABC):
    """Settings of one attack. Build it, run it, write it to JSON; it is immutable."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """Settings by preset: `default`, and `paper` if there is a published run."""
    TINY: ClassVar[Mapping[str, Any]] = {}
    """Smallest settings, for tests and smoke runs."""
    paper: ClassVar[str]
    """Source of the method: an arXiv number such as "arXiv:2310.10012", or "ours"."""
    code_url: ClassVar[str] = ""
    """Address of the released code; empty if there is none."""
    code_commit: ClassVar[str] = ""
    """Commit of the released code that `parity` and `deviations` speak of."""
    parity: ClassVar[str] = ""
    """Comparison with the released code: what was run beside it, and how far apart the two are."""
    deviations: ClassVar[str]
    """Differences between this implementation and the paper or its code, and why."""
    access: ClassVar[Access]
    """What the attacker needs."""
    tier: ClassVar[Tier]
    """Whether the attack is made without the defended stack, or against it."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """Seed of every draw."""
    batch_size: int = Field(default=8, ge=1)
    """Samples that are attacked together; it changes a result only by rounding."""

    @classmethod
    def method(cls) -> str:
        """Return the name of the attack in the registry, or that of its module if it has none."""
        target = f"{cls.__module__}:{cls.__name__}"
        names = (name for name, value in ATTACKS.items() if value == target)
        return next(names, cls.__module__.rpartition(".")[2])

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """Return the settings of a preset, changed.

        Raises:
            UnknownNameError: no such preset.
        """
        if name not in cls.PRESETS:
            raise UnknownNameError(f"preset of {cls.method()}", name, cls.PRESETS)
        return cls(**{**cls.PRESETS[name], **changes})

    def generator(self, sample: EvalSample) -> torch.Generator:
        """Return the random generator of one sample, seeded by the attack's seed and its id."""
        digest = hashlib.sha256(f"{self.seed}:{sample.id}".encode()).digest()[:8]
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def stack_changes(self, folder: Path) -> Mapping[str, Any]:
        """Return settings of the stack that the attack changes; empty if it changes none.

        Args:
            folder: folder with the files of the attack.
        """
        return {}

    @abstractmethod
    def build(self, context: AttackContext) -> Attacker:
        """Return the attacker of a target.

        Raises:
            ConfigError: the target or the concept lacks something that the attack needs.
        """
