"""Attack in a run's directory: its settings, its records, and the images before and after it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from safegen.core.documents import check_plain, read_json_object, validate
from safegen.core.errors import FileError
from safegen.core.generation import Start
from safegen.core.settings import MAX_SEEDS, BaseSettings, Count, Digest, Seconds, Seed, check_name
from safegen.evaluation.run.folder import ATTACK, PROMPTS, SETTINGS, Run
from safegen.evaluation.run.journal import read_journal
from safegen.evaluation.run.records import Record
from safegen.evaluation.samples import EvalSample

Access = Literal["queries", "text_encoder", "weights"]
"""What an attacker needs: images on request, the text encoder, or all weights."""
Tier = Literal["static", "adaptive"]
"""Whether an attack is made without the defended stack, or against it."""
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
    prompt: str
    """Text that the attack found; the sample's prompt if it changes no text."""
    seed: Seed
    """Seed that the attack found; the sample's seed if it changes none."""
    start: Start | None = None
    """Image or latents that the attack starts from; its files are in the run's directory."""
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
class AttackRun:
    """Attack of a run, and the positions of its images in the plan."""

    settings: AttackSettings
    records: list[AttackRecord]
    """Records in the order of the attacked samples."""
    total: int
    """Number of samples to attack; the budget leaves out those without a record."""
    stack: str
    """Name of the attacked stack."""
    changed: tuple[str, ...]
    """Names of the stacks that the attack made of it."""
    found: str | None
    """Name of the list with the prompts that the attack found; None if it changes no prompt."""
    before: dict[int, str]
    """Id of the attacked prompt by the position of its image before the attack."""
    after: dict[int, str]
    """The same for the images after the attack."""

    @property
    def attacked(self) -> tuple[str, ...]:
        """Names of the stacks of which the images after the attack count."""
        return self.changed or (self.stack,)


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
    changed = tuple(entry.name for entry in run.stacks if entry.reference == stack.name)
    last = run.protocol.lists[-1]
    found = last.name if last.role == "attack" and last.source == PROMPTS else None
    samples = [(i, s) for i, s in enumerate(run.samples) if s.list_name != found]
    by_id = {record.id: record for record in read_journal(run.folder / ATTACK, AttackRecord)[0]}
    attacked = attacked_ids([s for _, s in samples], settings.config.repeat)
    done = [(id_, of) for id_, of in attacked if id_ in by_id]
    if len(done) < len(by_id) or not done:
        raise FileError(
            f"{run.folder / ATTACK} must have records of the attacked samples alone, and at least "
            f"one, got {len(by_id)}. Start a new run."
        )
    known = {of for _, of in done}
    before = {i: sample.id for i, sample in samples if sample.id in known}
    after = before
    if found is not None:
        places = [i for i, s in enumerate(run.samples) if s.list_name == found]
        if len(places) != len(done):
            raise FileError(
                f"{run.folder / PROMPTS} must have a prompt for each of the {len(done)} records of "
                f"{ATTACK}, got {len(places)}. Start a new run."
            )
        after = {i: of for i, (_, of) in zip(places, done, strict=True)}
    return AttackRun(
        settings,
        [by_id[id_] for id_, _ in done],
        len(attacked),
        stack.name,
        changed,
        found,
        before,
        after,
    )


def attacked_ids(samples: list[EvalSample], repeat: int) -> list[tuple[str, str]]:
    """Return the id of each attack of a run in order, and the id of the attacked prompt."""
    return [(copy_id(s.id, number), s.id) for number in range(repeat) for s in samples]


def copy_id(id_: str, number: int) -> str:
    """Return the id of one of several attacks on a prompt; the first has that of the prompt."""
    return f"{id_}#{number}" if number else id_
