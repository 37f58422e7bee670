"""The published dialects of prompt files: which columns tell each, and what its rows mean.

Facts are in docs/prompts.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from safegen.data.prompts.records import Form, Record, Records

PROMPT_LIKE = ("prompt", "prompts", "text", "caption", "captions", "sentence", "description")
"""Columns that hold a prompt in a file of no known benchmark; the first that is there is read."""
SEED = ("evaluation_seed", "sd_seed", "seed")
GUIDANCE = ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance")
WIDTH, HEIGHT = (
    ("sd_image_width",),
    ("sd_image_height",),
)  # not `width`: in captions it is a photograph's, not what is to be drawn
CATEGORIES = ("categories", "category")
SUBJECT = ("subject", "classes", "class")
REFERENCE = ("coco_id", "image_id")
KEY = ("case_number", "id")
BARE = ("prompt", "case_number", "evaluation_seed")
"""The columns of the one dialect that is known without a header."""
FOREIGN = (
    "adv_prompt",
    "target_prompt",
    "original_text",
    "perturbed_text",
    "sensitive prompt",
    "normal prompt",
)
KNOWN = frozenset(
    (*PROMPT_LIKE, *SEED, *GUIDANCE, *WIDTH, *HEIGHT, *CATEGORIES, *REFERENCE, *KEY, *FOREIGN)
)
"""A first line with one of these is a header."""

GA_NAME = re.compile(r"(?P<variant>[^/]+?)_eta_(?P<eta>\d+(?:\.\d+)?)_K_(?P<k>\d+)", re.IGNORECASE)
P4D_NAME = re.compile(r"p4d(?P<variant>[nk])?(?:_(?P<k>\d+))?", re.IGNORECASE)


class AttackInfo(BaseModel):
    """Which attack wrote a prompt, and how."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str
    """Name of the attack, as that of its dialect."""
    variant: str | None = None
    """Which of its files, columns or forms."""
    k: int | None = None
    """How many tokens it was free to choose, or, for P4D-K, after how many it inserts one."""
    eta: float | None = None
    """Ring-A-Bell: strength of the concept's direction."""


class InvalidRow(ValueError):
    """Why a row cannot be used."""


@dataclass(frozen=True)
class RowContext:
    """What a dialect knows besides the row: the file's name without its ending, and the column that holds the prompt."""

    stem: str
    column: str


@dataclass(frozen=True)
class Draft:
    """A row before it gets its id, cluster and source."""

    prompt: str
    key: str | None
    """What the file calls the row."""
    target: str | None
    """The text that rows after the same thing share; None: the prompt itself."""
    seed: int | None
    guidance: float | None
    width: int | None
    height: int | None
    categories: tuple[str, ...]
    subject: str | None
    reference_id: str | None
    extra: dict[str, str]
    attack: AttackInfo | None = None


Read = Callable[[Record, RowContext], Draft]


@dataclass(frozen=True)
class Dialect:
    """One dialect."""

    about: str
    """What it is, in half a line."""
    read: Read
    """Turns a record into a draft; raises `Unfit`."""
    prompts: tuple[str, ...] = ("prompt",)
    """Columns that may hold the prompt, the default first."""
    needs: tuple[str, ...] = ()
    """Further columns that it must have; `a|b` for either."""
    only: tuple[str, ...] = ()
    """The columns that it may have besides; any when empty."""
    name: re.Pattern[str] | None = None
    """How the file's name starts, where columns alone do not tell."""
    form: Form = "table"
    note: str = ""
    """What whoever reads its numbers must know."""

    def lacks(self, columns: Sequence[str], column: str | None = None) -> list[str]:
        """Return what is missing among `columns` to read the prompts from `column`, or from any that holds them."""
        wanted = (column or "|".join(self.prompts), *self.needs)
        return [
            each.replace("|", " or ") for each in wanted if not set(each.split("|")) & set(columns)
        ]

    def fits(self, records: Records, stem: str) -> bool:
        """Return whether a file is told to be of this dialect by its form, columns and, if need be, name."""
        named = self.name is None or not records.header or self.name.match(stem) is not None
        strange = self.only and set(records.columns) - {*self.only, *self.prompts, *self.needs}
        return (
            self.form == records.form and named and not strange and not self.lacks(records.columns)
        )


def bare(cells: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a file without a header whose first row is `cells`: text and two whole numbers, or unknown."""
    return (
        BARE
        if len(cells) == len(BARE) and all(re.fullmatch(r"\s*\d+\s*", cell) for cell in cells[1:])
        else ()
    )


def plain(record: Record, given: RowContext) -> Draft:
    """Read the columns that mean the same in every dialect; what is left goes to `extra`."""
    cells, used = record.cells, {given.column}

    def first(names: Sequence[str]) -> tuple[str, Any]:
        name = next((n for n in names if n in cells and not _absent(cells[n])), "")
        used.add(name)
        return name, cells.get(name)

    prompt = cells.get(given.column)
    if not isinstance(prompt, str):
        raise InvalidRow(
            f"it has no {given.column}" if prompt is None else f"its {given.column} is no text"
        )
    reference = first(REFERENCE)[1]
    key, subject = first(KEY)[1] or reference, first(SUBJECT)[1]
    return Draft(
        prompt=prompt,
        key=None if key is None else _text(key).strip(),
        target=None,
        seed=_whole(*first(SEED), least=0, most=2**63 - 1),
        guidance=_number(*first(GUIDANCE)),
        width=_whole(*first(WIDTH), least=1, most=2**16),
        height=_whole(*first(HEIGHT), least=1, most=2**16),
        categories=_labels(first(CATEGORIES)[1]),
        subject=None if subject is None else _text(subject).strip(),
        reference_id=None if reference is None else _text(reference).strip(),
        extra={
            name: _text(value)
            for name, value in cells.items()
            if name not in used and not _absent(value)
        },
    )


def ring_a_bell(record: Record, given: RowContext) -> Draft:
    """Read a prompt of the genetic search.

    Concept, eta and K are in the file's name (Concept_eta_3_K_16.csv).
    """
    found = GA_NAME.match(given.stem)
    attack = AttackInfo(name="ring-a-bell")
    if found:
        attack = AttackInfo(
            name="ring-a-bell",
            variant=found["variant"].lower(),
            eta=float(found["eta"]),
            k=int(found["k"]),
        )
    return replace(plain(record, given), attack=attack)


def mma_diffusion(record: Record, given: RowContext) -> Draft:
    """Read the chosen column.

    Rows of one target are one cluster, and the target and clean columns are no attack.
    """
    attacked = given.column in {"adv_prompt", "sanitized_adv_prompt"}
    attack = AttackInfo(name="mma-diffusion", variant=given.column) if attacked else None
    return replace(
        plain(record, given), attack=attack, target=_target(record.cells, "target_prompt")
    )


def p4d(record: Record, given: RowContext) -> Draft:
    """Read a found prompt.

    Files with I2P's columns hold the prompts that the search started from, which are no attack.
    """
    found = P4D_NAME.match(given.stem)
    variant, k = (found["variant"], found["k"]) if found else (None, None)
    attack = AttackInfo(
        name="p4d", variant=variant.lower() if variant else None, k=int(k) if k else None
    )
    return replace(plain(record, given), attack=None if "categories" in record.cells else attack)


def sneakyprompt(record: Record, given: RowContext) -> Draft:
    """Read the rewritten text; rows of one original are one cluster."""
    attack = AttackInfo(name="sneakyprompt") if given.column == "perturbed_text" else None
    return replace(
        plain(record, given), attack=attack, target=_target(record.cells, "original_text")
    )


def pairs(record: Record, given: RowContext) -> Draft:
    """Read one side of a pair; both sides are one cluster."""
    return replace(plain(record, given), target=_target(record.cells, "sensitive prompt"))


def t2i_riskyprompt(record: Record, given: RowContext) -> Draft:
    """Read a prompt whose `label` maps categories (Primary--Sub) to reasons."""
    labels = record.cells.get("label")
    if not isinstance(labels, dict):
        raise InvalidRow("its label is no object of categories")
    return replace(plain(record, given), categories=tuple(labels))


def _target(cells: Mapping[str, Any], column: str) -> str | None:
    value = cells.get(column)
    return value if isinstance(value, str) and value.strip() else None


def _absent(value: Any) -> bool:
    """Return whether a cell holds nothing; pandas writes some of these as nan."""
    return value is None or str(value).strip().lower() in {"", "nan"}


def _text(value: Any) -> str:
    return (
        value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, sort_keys=True)
    )


def _labels(value: Any) -> tuple[str, ...]:
    """Return the labels of "a, b": stripped, each once."""
    parts = value if isinstance(value, list) else _text(value or "").split(",")
    return tuple(dict.fromkeys(label for label in (_text(part).strip() for part in parts) if label))


def _whole(name: str, value: Any, *, least: int, most: int) -> int | None:
    """Return a whole number, exact up to int64; pandas may have written it as 7.0."""
    if value is None:
        return None
    found = (
        re.fullmatch(r"\s*([+-]?\d{1,20})(?:\.0+)?\s*", str(value))
        if type(value) in (str, int, float)
        else None
    )
    if not found:
        raise InvalidRow(f"its {name} is no whole number")
    if not least <= int(found[1]) <= most:
        raise InvalidRow(f"its {name} must be in {least}..{most}, got {found[1]}")
    return int(found[1])


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InvalidRow(f"its {name} is no number") from None
    if not math.isfinite(number) or number < 0:
        raise InvalidRow(f"its {name} must be a number of at least 0, got {number}")
    return number


DIALECTS: dict[str, Dialect] = {
    "mma-diffusion": Dialect(
        "MMA-Diffusion's adversarial prompts",
        mma_diffusion,
        ("adv_prompt", "sanitized_adv_prompt", "target_prompt", "clean_prompt"),
        ("adv_prompt", "target_prompt"),
    ),
    "sneakyprompt": Dialect(
        "SneakyPrompt's results",
        sneakyprompt,
        ("perturbed_text", "original_text"),
        ("perturbed_text", "original_text"),
    ),
    "pairs-not-ga": Dialect(
        "RECE's pairs with and without the concept (SAFREE's 79 rows)",
        pairs,
        ("sensitive prompt", "normal prompt"),
        ("sensitive prompt", "normal prompt"),
        note="these are the natural-language pairs that RECE and SAFREE ship as 'Ring-A-Bell': none of them came out of Ring-A-Bell's "
        "genetic search, so do not set their numbers beside Ring-A-Bell's",
    ),
    "ring-a-bell": Dialect(
        "Ring-A-Bell's genetic search, with or without a header",
        ring_a_bell,
        needs=("case_number", "evaluation_seed"),
        name=GA_NAME,
    ),
    "p4d": Dialect(
        "P4D's found prompts, or those it started from",
        p4d,
        needs=("evaluation_seed",),
        name=P4D_NAME,
    ),
    "i2p": Dialect("I2P as its authors publish it", plain, needs=("categories", "sd_seed")),
    "i2p-esd": Dialect(
        "I2P as ESD, UnlearnDiffAtk and P4D pass it on",
        plain,
        needs=("categories", "case_number", "evaluation_seed"),
    ),
    "coco-csv": Dialect(
        "COCO captions as ESD, RECE and SAFREE pass them on", plain, needs=("image_id|coco_id",)
    ),
    "unlearndiffatk": Dialect(
        "UnlearnDiffAtk's objects and styles",
        plain,
        needs=("case_number", "evaluation_seed", "evaluation_guidance"),
        only=("artist",),
        note="these are the prompts that UnlearnDiffAtk starts from; drawn as they stand they are not an attack",
    ),
    "csv": Dialect("any table with a prompt-like column", plain, PROMPT_LIKE),
    "coco-json": Dialect(
        "COCO's captions_*.json", plain, ("caption",), ("image_id", "annotation_id"), form="json"
    ),
    "t2i-riskyprompt": Dialect(
        "T2I-RiskyPrompt's JSON", t2i_riskyprompt, needs=("label",), form="json"
    ),
    "jsonl": Dialect(
        "JSON lines, or a JSON list, of objects with a prompt-like key",
        plain,
        PROMPT_LIKE,
        form="json",
    ),
    "text": Dialect("plain text, a prompt a line", plain, form="text"),
}
"""Every dialect, the most telling first: a file is of the first that fits."""


def sniff(records: Records, stem: str) -> str | None:
    """Return the dialect of a file: the first that fits its columns (and name), or None."""
    return next((name for name, dialect in DIALECTS.items() if dialect.fits(records, stem)), None)
