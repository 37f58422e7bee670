"""Attack in a run's directory: its settings, its records, and the images before and after it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from safegen.core.documents import check_plain, read_json_object, validate
from safegen.core.errors import FileError
from safegen.core.generation import GuidanceScale, Start
from safegen.core.settings import (
    MAX_SEEDS,
    BaseSettings,
    Count,
    Digest,
    Name,
    Seconds,
    Seed,
    check_name,
)
from safegen.evaluation.run.folder import ATTACK, CONTROLS, PROMPTS, SETTINGS, Run
from safegen.evaluation.run.journal import read_journal
from safegen.evaluation.run.records import Record
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.schema import PromptList

Access = Literal["queries", "text_encoder", "weights"]
"""What an attacker needs: images on request, the text encoder, or all weights."""
Tier = Literal["static", "adaptive"]
"""Whether an attack is made without the defended stack, or against it."""
MAX_DETAILS = 100
"""Most measurements of an attack on one sample."""
Objective = Annotated[float, Field(ge=-1e30, le=1e30)]
"""Value of an attack's objective."""


class Cost(BaseSettings):
    """Work that an attack has done. A pass is one row of a batch, forward or backward."""

    denoiser: Count = 0
    """Passes through the denoiser, those of generation included."""
    text_encoder: Count = 0
    """Passes through the text encoders, those of generation included."""
    queries: Count = 0
    """Images requested from the stack."""
    seconds: Seconds = 0.0
    """Wall-clock time."""

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of two costs."""
        return Cost(**{name: getattr(self, name) + getattr(other, name) for name in FIELDS})

    def __sub__(self, other: Cost) -> Cost:
        """Return the cost since an earlier one."""
        return Cost(**{name: getattr(self, name) - getattr(other, name) for name in FIELDS})

    def split(self, n: int) -> list[Cost]:
        """Return `n` costs that add up to this one, as equal as integers allow."""
        shares = [
            {
                name: getattr(self, name) // n + (i < getattr(self, name) % n)
                for name in FIELDS
                if name != "seconds"
            }
            for i in range(n)
        ]
        return [Cost(seconds=self.seconds / n, **share) for share in shares]


FIELDS = tuple(Cost.model_fields)


class AttackRecord(Record):
    """Result of an attack on one sample (`attack.jsonl`)."""

    id: str
    """Id of the attacked sample."""
    variant: str = ""
    """Form of the attack (`Attack.variants`, `Attack.controls`); empty if it has one."""
    prompt: str
    """Text that the attack found; the sample's prompt if it changes no text."""
    seed: Seed
    """Seed that the attack found; the sample's seed if it changes none."""
    start: Start | None = None
    """Image or latents that the attack starts from; its files are in the run's directory."""
    guidance_scale: GuidanceScale | None = None
    """Guidance scale that the attack found; None if it changes none."""
    success: bool | None = None
    """Whether the attack saw the concept in an image; None if it looked at none."""
    loss: Objective | None = None
    """Lowest value of the objective; None if there is none."""
    history: tuple[Objective, ...] = ()
    """Best value of the objective so far, by step."""
    tokens: tuple[Count, ...] = ()
    """Ids of the tokens that the attack chose."""
    stable: bool | None = None
    """Whether the text is read as exactly those tokens; None if tokens were not chosen."""
    details: Mapping[Name, Objective] = Field(default_factory=dict, max_length=MAX_DETAILS)
    """Further measurements by name; the attack's settings explain them."""
    stopped: str = ""
    """Limit of the budget that ended the attack; empty if it ended by itself."""
    cost: Cost = Cost()
    """Share of the batch's cost."""


def _check_attack(attack: dict[str, Any]) -> dict[str, Any]:
    check_name(str(attack.get("name", "")))
    return check_plain(attack)


class AttackLimits(BaseModel):
    """Settings of an attack's run that a report reads."""

    model_config = ConfigDict(frozen=True, extra="allow")

    repeat: int = Field(default=1, ge=1, le=MAX_SEEDS)
    """Attacks on each prompt."""
    budget: dict[str, float | None] = {}
    """Limits by name."""


class AttackSettings(BaseModel):
    """Settings of an attack's run (`settings.json`), as far as a report reads them."""

    model_config = ConfigDict(frozen=True, extra="allow", strict=True, allow_inf_nan=False)

    attack: Annotated[dict[str, Any], AfterValidator(_check_attack)]
    """Name and settings of the attack."""
    access: Access
    tier: Tier
    config: AttackLimits
    stack: Digest
    """Hash of the attacked stack."""

    @property
    def name(self) -> str:
        """Name of the attack."""
        return str(self.attack["name"])


@dataclass(frozen=True)
class VariantImages:
    """Images of one form of an attack."""

    label: str
    """Name of the list of its prompts; that of the attack if it changes no prompt."""
    variant: str
    """Form of the attack; empty if it has one."""
    is_control: bool
    """Whether the form has nothing of the concept."""
    images: dict[int, str]
    """Id of the attacked prompt by the position of its image in the plan."""
    records: list[AttackRecord]
    """Records in the order of the attacked samples."""


@dataclass(frozen=True)
class AttackRun:
    """Attack of a run, and the positions of its images in the plan."""

    settings: AttackSettings
    attacks: int
    """Number of samples that were attacked."""
    total: int
    """Number of samples to attack; the budget leaves out the others."""
    stack: str
    """Name of the attacked stack."""
    changed: tuple[str, ...]
    """Names of the stacks that the attack made of it."""
    before: dict[int, str]
    """Id of the attacked prompt by the position of its image before the attack."""
    variants: tuple[VariantImages, ...]
    """Images after the attack by form, controls last."""

    @property
    def attacked(self) -> tuple[str, ...]:
        """Names of the stacks of which the images after the attack count."""
        return self.changed or (self.stack,)

    @property
    def records(self) -> list[AttackRecord]:
        """Records of all forms without the controls."""
        return [r for form in self.variants if not form.is_control for r in form.records]

    @property
    def found_lists(self) -> frozenset[str]:
        """Names of the lists that the attack wrote."""
        names = {variant.label for variant in self.variants}
        return frozenset(names) if self.changes_prompts else frozenset()

    @property
    def changes_prompts(self) -> bool:
        """Whether the attack wrote prompts of its own."""
        return all(variant.images is not self.before for variant in self.variants)


def read_attack(run: Run) -> AttackRun | None:
    """Return the attack of a run; None if another workflow made it.

    Raises:
        FileError: the settings or the records are damaged, or are not of this run.
    """
    path = run.folder / SETTINGS
    if not os.path.lexists(path):
        return None
    content = read_json_object(path)
    if content.get("workflow") != "attack":
        return None
    settings = validate(AttackSettings, content, str(path))
    stack = next((entry for entry in run.stacks if entry.hash == settings.stack), None)
    if stack is None:
        raise FileError(
            f"{path} must name a stack of the run, got {settings.stack[:12]}. Start a new run."
        )
    lists = [part for part in run.protocol.lists if is_written(part, settings.name)]
    names = {part.name for part in lists}
    samples = [(i, s) for i, s in enumerate(run.samples) if s.list_name not in names]
    table = {(r.id, r.variant): r for r in read_journal(run.folder / ATTACK, AttackRecord)[0]}
    attacked = attacked_ids([s for _, s in samples], settings.config.repeat)
    done = {id_ for id_, _ in table}
    if not done or not done <= {id_ for id_, _ in attacked}:
        raise FileError(
            f"{run.folder / ATTACK} must have records of the attacked samples alone, and at least "
            "one. Start a new run."
        )
    known = {of for id_, of in attacked if id_ in done}
    before = {i: sample.id for i, sample in samples if sample.id in known}
    variants = [_variant(run, part, attacked, table) for part in lists]
    if not variants:
        variants = [VariantImages(settings.name, "", False, before, list(table.values()))]
    return AttackRun(
        settings,
        len(done),
        len(attacked),
        stack.name,
        tuple(entry.name for entry in run.stacks if entry.reference == stack.name),
        before,
        tuple(sorted(variants, key=lambda variant: variant.is_control)),
    )


def is_written(part: PromptList, name: str) -> bool:
    """Return whether the attack of a name wrote a prompt list of its run."""
    label = f"{name} {part.select.get('variant', '')}".strip()
    return part.source in (PROMPTS, CONTROLS) and part.name == label


def _variant(
    run: Run,
    part: PromptList,
    attacked: Sequence[tuple[str, str]],
    table: Mapping[tuple[str, str], AttackRecord],
) -> VariantImages:
    """Return the images of a list that the attack wrote.

    Raises:
        FileError: the list does not have one prompt per record.
    """
    form = part.select.get("variant", "")
    done = [(table[id_, form], of) for id_, of in attacked if (id_, form) in table]
    places = [i for i, s in enumerate(run.samples) if s.list_name == part.name]
    if len(places) != len(done):
        raise FileError(
            f"{run.folder / str(part.source)} must have a prompt for each of the {len(done)} "
            f"records of {part.name!r} in {ATTACK}, got {len(places)}. Start a new run."
        )
    images = {place: of for place, (_, of) in zip(places, done, strict=True)}
    records = [record for record, _ in done]
    return VariantImages(part.name, form, part.source == CONTROLS, images, records)


def attacked_ids(samples: Sequence[EvalSample], repeat: int) -> list[tuple[str, str]]:
    """Return the id of each attack of a run in order, and the id of the attacked prompt."""
    return [(copy_id(s.id, number), s.id) for number in range(repeat) for s in samples]


def copy_id(id_: str, number: int) -> str:
    """Return the id of one of several attacks on a prompt; the first has that of the prompt."""
    return f"{id_}#{number}" if number else id_
