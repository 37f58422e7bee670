"""Attack interface: frozen settings, and the attacker that they build for a target."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from safegen.attacks.core.images import hash_source
from safegen.attacks.core.target import Target
from safegen.core.concept import Concept
from safegen.core.documents import read_bytes
from safegen.core.errors import UnknownNameError
from safegen.core.files import atomic_write
from safegen.core.generation import MAX_START_FILE, Start
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import ATTACKS, registered_name
from safegen.core.settings import MAX_BATCH, MethodSettings, Seed
from safegen.core.tensor_files import write_tensors
from safegen.evaluation.run.attack_records import Access, AttackRecord, Tier
from safegen.evaluation.samples import EvalSample, Role
from safegen.stack import Stack

__all__ = ["Access", "Attack", "AttackContext", "AttackRecord", "Attacker", "Tier"]


@dataclass
class AttackContext:
    """What an attacker works with."""

    target: Target
    """The attacked stack."""
    folder: Path
    """Folder for files that belong to the result, such as learned words; it may not exist yet."""
    progress: ProgressCallback = field(default=no_progress)
    """Called with (description, done, total)."""

    @property
    def concept(self) -> Concept:
        """Concept that the attack brings back."""
        return self.target.concept

    def start_from_image(
        self, name: str, image: Image.Image, *, strength: float, mask: Image.Image | None = None
    ) -> Start:
        """Write an image, and a mask, that generation starts from.

        Args:
            name: name of the files, without an extension; equal names must mean equal images.
            image: the image, of the model's size.
            strength: part of the schedule that it is noised to.
            mask: white where the image is redrawn.
        """
        parts = {"image": (f"{name}.png", image)}
        if mask is not None:
            parts["mask"] = (f"{name}-mask.png", mask)
        self.folder.mkdir(parents=True, exist_ok=True)
        for file, picture in parts.values():
            if not (self.folder / file).exists():
                with atomic_write(self.folder / file) as tmp:
                    picture.save(tmp, format="PNG")
        names = {part: f"{self.folder.name}/{file}" for part, (file, _) in parts.items()}
        return Start.of(self.folder.parent, strength=strength, **names)

    def start_from_latents(self, name: str, latents: Tensor) -> Start:
        """Write initial latents (c, h, w) of unit variance that generation starts from.

        Args:
            name: name of the file, without an extension.
            latents: what the pipeline takes as `latents`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            write_tensors(path, {"latents": latents.detach().float().cpu().contiguous()}, {})
        return Start.of(self.folder.parent, latents=f"{self.folder.name}/{path.name}")

    def inherit(self, record: AttackRecord, sample: EvalSample) -> AttackRecord:
        """Return a result with what its sample starts from, and its guidance, if it has none.

        Files that the sample starts from are copied.
        """
        update: dict[str, Any] = {}
        if record.guidance_scale is None:
            update["guidance_scale"] = sample.guidance_scale
        if record.start is None and sample.start is not None:
            update["start"] = self._copy_start(sample.start)
        return record.model_copy(update=update)

    def _copy_start(self, start: Start) -> Start:
        """Copy the files of a start to the folder, and return the start with the copies."""
        names: dict[str, str] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in ("image", "mask", "latents"):
            if (name := getattr(start, part)) is not None:
                path = self.folder / f"{start.sha256[:16]}-{part}{Path(name).suffix}"
                names[part] = f"{self.folder.name}/{path.name}"
                if not path.exists():
                    with atomic_write(path) as temporary:
                        temporary.write_bytes(read_bytes(start.path(name), limit=MAX_START_FILE))
        return Start.of(self.folder.parent, strength=start.strength, **names)


class Attacker(Protocol):
    """Attack on one target, built by `Attack.build`."""

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the results for each sample of a batch, in order: one by variant and control.

        A result depends on its sample, the settings and the target alone, not on the batch.
        Where the budget is exhausted, the best result so far is returned.
        """
        ...


class Attack(MethodSettings, ABC):
    """Settings of one attack. Build it, run it, write it to JSON; it is immutable."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """Settings by preset: `default`, and `paper` if there is a published run."""
    TINY: ClassVar[Mapping[str, Any]] = {}
    """Smallest settings, for tests and smoke runs."""
    access: ClassVar[Access]
    """What the attacker needs."""
    tier: ClassVar[Tier]
    """Whether the attack is made without the defended stack, or against it."""
    role: ClassVar[Role] = "benign"
    """Role of the concept's prompts that are attacked by default."""
    changes_prompts: ClassVar[bool] = True
    """Whether the attack changes what is asked for; False if it changes the stack alone."""

    seed: Seed = 0
    """Seed of every draw."""
    batch_size: int = Field(default=8, ge=1, le=MAX_BATCH)
    """Samples that are attacked together; it changes a result only by rounding."""

    @classmethod
    def method(cls) -> str:
        """Return the name of the attack in the registry, or that of its module if it has none."""
        return registered_name(ATTACKS, cls)

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

    def fingerprint(self, concept: Concept) -> dict[str, Any]:
        """Return the plain values that decide the attack, with hashes in place of paths.

        Args:
            concept: concept that the attack brings back.

        Raises:
            UserError: the concept or a file lacks something that the attack needs.
        """
        settings = self.model_dump(mode="json")
        paths = {k: v for k, v in dict(self).items() if isinstance(v, Path)}
        return settings | {name: hash_source(path) for name, path in paths.items()}

    def attacked_stacks(self, stack: Stack, folder: Path) -> Sequence[Stack]:
        """Return the stacks that the attack makes of one; none if it changes no stack.

        Args:
            stack: the attacked stack.
            folder: folder with the files of the attack.
        """
        return ()

    @property
    def variants(self) -> tuple[str, ...]:
        """Forms in which each sample is attacked, such as strengths; each has its own rate."""
        return ("",)

    @property
    def controls(self) -> tuple[str, ...]:
        """Forms that have nothing of the concept; their rates are what the attack starts from."""
        return ()

    @abstractmethod
    def build(self, context: AttackContext) -> Attacker:
        """Return the attacker of a target.

        Raises:
            ConfigError: the target or the concept lacks something that the attack needs.
        """
