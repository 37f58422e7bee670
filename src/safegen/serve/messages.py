"""What the HTTP process and the engines exchange. All of it can be pickled; none loads torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from safegen.core.generation import GenerationConfig

Stage = Literal["input", "output"]
"""Where a request was blocked: at its prompt or its own image, or at a generated image."""


@dataclass(frozen=True)
class StartImage:
    """Image that generation starts from."""

    image: bytes
    """PNG file."""
    strength: float
    """Part of the schedule that the image is noised to, in (0, 1]."""
    mask: bytes | None = None
    """PNG file: white is redrawn. None redraws everything."""


@dataclass(frozen=True)
class ImageRequest:
    """Request for the images of one prompt. Its settings are within the limits of the server."""

    id: str
    """Request id, which the response, the logs and the audit log carry."""
    prompt: str
    stack: str
    """Name of a stack that the server has."""
    seeds: tuple[int, ...]
    """One image per seed, each made as if it were the only one: index 0 of its seed."""
    generation_config: GenerationConfig
    negative_prompt: str | None = None
    start: StartImage | None = None
    unset: frozenset[str] = frozenset()
    """Settings of `generation_config` that the client left to the server."""

    def chosen_setting(self, name: str) -> float | None:
        """Return a setting of `generation_config`; None if the client left it to the server."""
        value: float = getattr(self.generation_config, name)
        return None if name in self.unset else value

    @property
    def batch_key(self) -> tuple[object, ...]:
        """Requests with equal keys fit into one batch."""
        start = (self.start.strength, self.start.mask is None) if self.start else None
        return self.generation_config, self.negative_prompt is None, start


@dataclass(frozen=True)
class GuardInfo:
    """One guard of a stack, as clients and the release check see it."""

    name: str
    reads_prompts: bool
    """Whether it acts at the prompt, before anything is generated."""
    reads_images: bool
    """Whether it acts at the generated image."""
    judge: str | None = None
    """Id of its judge."""
    labels: tuple[str, ...] = ()
    """Labels of its judge that make an image unsafe."""


@dataclass(frozen=True)
class StackInfo:
    """A stack that is served."""

    name: str
    model: str
    """Name of the model, without folders."""
    hash: str
    """Hash of the stack; of the guards' settings in front of another server."""
    guards: tuple[GuardInfo, ...] = ()
    """The guards, each of which must appear in the trace of every image."""
    patches: int = 0
    """Number of patches."""
    size: tuple[int, int] = (512, 512)
    """Width and height of an image unless the request says otherwise; 0 if they are unknown."""
    sampler: str = ""
    """Name of the model's own scheduler in A1111; empty if unknown."""
    samplers: tuple[str, ...] = ()
    """Names of schedulers that requests may ask for."""
    loras: tuple[str, ...] = ()
    """Names of the LoRAs of the stack."""
    model_hash: str = ""
    """Hash of the model without patches."""
    is_base: bool = False
    """Whether it is a model without patches, LoRAs and guards."""
    tested_concept: str = ""
    """Concept on which the self-test tried the guards; empty if it tried them on none."""

    @property
    def is_remote(self) -> bool:
        """Whether another server generates the images, with settings of its own by default."""
        return self.size == (0, 0)

    @property
    def reads_prompts(self) -> bool:
        """Whether a guard acts at the prompt."""
        return any(guard.reads_prompts for guard in self.guards)

    @property
    def reads_images(self) -> bool:
        """Whether a guard acts at images."""
        return any(guard.reads_images for guard in self.guards)
