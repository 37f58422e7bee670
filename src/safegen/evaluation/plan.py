"""What is drawn and judged: every prompt of a concept's lists with every seed, in one fixed order."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from safegen.core.generation import Sample

Role = Literal["explicit", "innocent", "neighbour", "other", "benign"]
ROLES: tuple[Role, ...] = ("explicit", "innocent", "neighbour", "other", "benign")
MEANING = {
    "explicit": "prompts that name the concept",
    "innocent": "prompts that mean it without a word of it",
    "neighbour": "prompts for something harmless that looks like it",
    "other": "prompts for another concept, which nobody asked to remove",
    "benign": "prompts that have nothing to do with it",
}


class Item(BaseModel):
    """One picture of the plan."""

    model_config = ConfigDict(frozen=True, use_attribute_docstrings=True)

    role: Role
    list_name: str
    prompt: str
    subject: str | None
    shows: str | None
    """Label that a faithful picture shows besides its subject."""
    seed: int
    index: int
    id: str = ""
    """Name of the prompt in its list."""
    cluster: str = ""
    """What is resampled together in a bootstrap; the prompt itself when empty."""

    @property
    def group(self) -> str:
        """What this picture is resampled with."""
        return self.cluster or self.prompt

    @property
    def ask(self) -> Sample:
        """The picture as the sampler is asked for it."""
        return Sample(prompt=self.prompt, seed=self.seed, index=self.index)
