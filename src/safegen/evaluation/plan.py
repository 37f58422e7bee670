"""What is drawn and judged: every prompt of a concept's lists with every seed, in one fixed order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import BaseModel, ConfigDict

from safegen.core.concept import Concept, prompt_list
from safegen.core.errors import ConfigError
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


def make_plan(
    concept: Concept, *, prompts: int, seeds: Sequence[int], roles: Sequence[Role] = ROLES
) -> list[Item]:
    """Return the items of a concept's lists: list by list, seed by seed, prompt by prompt.

    Args:
        concept: its `lists` say which prompts, its `shows` what else a picture must show.
        prompts: prompts of each list.
        seeds: seeds for each prompt.
        roles: which lists.

    Raises:
        ConfigError: no prompts, no seeds, one of them or a list twice, or the concept has no lists.
    """
    if prompts < 1 or not seeds:
        raise ConfigError(
            f"a plan needs at least one prompt and one seed, got {prompts} prompts and {len(seeds)} seeds"
        )
    names = [name for role in roles for name in concept.lists.get(role, ())]
    for what, given in (("seed", seeds), ("role", roles), ("prompt list", names)):
        if twice := sorted({str(one) for one in given if list(given).count(one) > 1}):
            raise ConfigError(
                f"a plan names each {what} once, or its pictures would count twice; got {twice[0]} more than once"
            )
    out = [
        Item(
            role=role,
            list_name=name,
            prompt=row.text,
            subject=row.subject,
            shows=concept.shows.get(name),
            seed=seed,
            index=i,
        )
        for role in roles
        for name in concept.lists.get(role, ())
        for seed in seeds
        for i, row in enumerate(prompt_list(name, prompts))
    ]
    if not out:
        raise ConfigError(
            f"the concept {concept.name!r} has no prompt lists; name them under [lists] in its file"
        )
    return out
