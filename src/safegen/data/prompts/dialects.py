"""Published dialects of prompt files: the columns that identify each, and how its rows are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pydantic import ValidationError

from safegen.core.errors import FileError, explain
from safegen.core.generation import Start
from safegen.data.prompts.parsing import FileForm, FileRow, FileRows
from safegen.data.prompts.prompt import AttackInfo, Prompt
from safegen.data.prompts.rows import (
    HEADERLESS,
    PROMPT_COLUMNS,
    InvalidRowError,
    RowContext,
    is_empty,
    read_plain,
    to_text,
)

RING_A_BELL_NAME = re.compile(
    r"(?P<variant>[^/]+?)_eta_(?P<eta>\d+(?:\.\d+)?)_K_(?P<k>\d+)", re.IGNORECASE
)
P4D_NAME = re.compile(r"p4d(?P<variant>[nk])?(?:_(?P<k>\d+))?", re.IGNORECASE)
Reader = Callable[[FileRow, RowContext], Prompt]


@dataclass(frozen=True)
class Dialect:
    """Columns, file name and row reader of a published kind of file."""

    about: str
    """Short description."""
    read: Reader
    """Function that turns a record into a prompt; raises `InvalidRowError`."""
    prompts: tuple[str, ...] = ("prompt",)
    """Columns that may hold the prompt, the default first."""
    needs: tuple[str, ...] = ()
    """Other required columns; `a|b` means either."""
    only: tuple[str, ...] = ()
    """Optional columns; any if empty."""
    name: re.Pattern[str] | None = None
    """Start of the file's name, if columns do not identify the dialect."""
    form: FileForm = "table"
    note: str = ""
    """Remark for the reader of the numbers."""

    def missing_columns(self, columns: Sequence[str], column: str | None = None) -> list[str]:
        """Return the required columns that `columns` lack; `column` replaces the prompt columns."""
        required = (column or "|".join(self.prompts), *self.needs)
        return [
            each.replace("|", " or ")
            for each in required
            if not set(each.split("|")) & set(columns)
        ]

    def matches(self, records: FileRows, stem: str) -> bool:
        """Return whether a file has the form, columns and name of the dialect."""
        if self.form != records.form or self.missing_columns(records.columns):
            return False
        if self.only and set(records.columns) - {*self.only, *self.prompts, *self.needs}:
            return False
        return self.name is None or not records.header or self.name.match(stem) is not None


def headerless_columns(cells: Sequence[str]) -> tuple[str, ...]:
    """Return the columns of a file without a header from its first row; empty if unknown.

    Known is a text followed by two integers.
    """
    integers = all(re.fullmatch(r"\s*\d+\s*", cell) for cell in cells[1:])
    return HEADERLESS if len(cells) == len(HEADERLESS) and integers else ()


def detect_dialect(records: FileRows, stem: str) -> str | None:
    """Return the first dialect that matches a file's columns and name, or None."""
    return next((name for name, d in DIALECTS.items() if d.matches(records, stem)), None)


def read_ring_a_bell(record: FileRow, context: RowContext) -> Prompt:
    """Return a prompt of the genetic search; concept, eta and K are in the file's name."""
    attack = AttackInfo(name="ring-a-bell")
    if match := RING_A_BELL_NAME.match(context.stem):
        attack = AttackInfo(
            name="ring-a-bell",
            variant=match["variant"].lower(),
            eta=float(match["eta"]),
            k=int(match["k"]),
        )
    return read_plain(record, context, attack=attack)


def read_mma_diffusion(record: FileRow, context: RowContext) -> Prompt:
    """Return the chosen column; rows of one target are one cluster.

    The columns of targets and clean prompts are not attacks.
    """
    attacked = context.column in {"adv_prompt", "sanitized_adv_prompt"}
    attack = AttackInfo(name="mma-diffusion", variant=context.column) if attacked else None
    return read_plain(record, context, attack=attack, target="target_prompt")


def read_p4d(record: FileRow, context: RowContext) -> Prompt:
    """Return an optimized prompt; files with I2P's columns hold initial prompts, not attacks."""
    match = P4D_NAME.match(context.stem)
    variant, k = (match["variant"], match["k"]) if match else (None, None)
    attack = AttackInfo(
        name="p4d", variant=variant.lower() if variant else None, k=int(k) if k else None
    )
    return read_plain(record, context, attack=None if "categories" in record.cells else attack)


def read_sneakyprompt(record: FileRow, context: RowContext) -> Prompt:
    """Return the rewritten text; rows of one original text are one cluster."""
    attack = AttackInfo(name="sneakyprompt") if context.column == "perturbed_text" else None
    return read_plain(record, context, attack=attack, target="original_text")


def read_attack(record: FileRow, context: RowContext) -> Prompt:
    """Return a prompt that `safegen attack` found; rows of one attacked prompt are one cluster.

    A prompt that generation starts from an image or latents with may be blank: one space.
    """
    for column in ("attack", "attacked_prompt"):
        if record.cells.get(column) is None:
            raise InvalidRowError(f"{column} is missing")
    variant = record.cells.get("variant")
    name, form = to_text(record.cells["attack"]), None if is_empty(variant) else to_text(variant)
    attack = AttackInfo(name=name, variant=form)
    start = record.cells.get("start")
    row = read_plain(
        record, context, attack=attack, target="attacked_prompt", blank=start is not None
    )
    if row.guidance is not None:
        if not 1 <= row.guidance <= 50:
            raise InvalidRowError(f"guidance_scale must be from 1 to 50, got {row.guidance:g}")
        row = row.model_copy(update={"guidance_scale": row.guidance})
    if start is None:
        return row
    try:
        located = Start.model_validate(start).located(context.folder)
    except ValidationError as error:
        raise InvalidRowError(f"start: {explain(error, Start)}") from None
    except FileError as error:
        raise InvalidRowError(str(error)) from None
    extra = {name: value for name, value in row.extra.items() if name != "start"}
    return row.model_copy(update={"start": located, "extra": extra})


def read_pair(record: FileRow, context: RowContext) -> Prompt:
    """Return one prompt of a pair; both prompts of a pair are one cluster."""
    return read_plain(record, context, target="sensitive prompt")


def read_t2i_riskyprompt(record: FileRow, context: RowContext) -> Prompt:
    """Return a prompt with the keys of its `label`, which are categories (Primary--Sub)."""
    labels = record.cells.get("label")
    if not isinstance(labels, dict):
        raise InvalidRowError("label is not an object of categories")
    return read_plain(record, context, categories=tuple(labels))


DIALECTS: dict[str, Dialect] = {
    "safegen-attack": Dialect(
        "Prompts found by `safegen attack`",
        read_attack,
        needs=("attack", "attacked_prompt", "seed"),
        form="json",
    ),
    "mma-diffusion": Dialect(
        "MMA-Diffusion's adversarial prompts",
        read_mma_diffusion,
        ("adv_prompt", "sanitized_adv_prompt", "target_prompt", "clean_prompt"),
        ("adv_prompt", "target_prompt"),
    ),
    "sneakyprompt": Dialect(
        "SneakyPrompt's results",
        read_sneakyprompt,
        ("perturbed_text", "original_text"),
        ("perturbed_text", "original_text"),
    ),
    "pairs-not-ga": Dialect(
        "RECE's pairs with and without the concept (SAFREE's 79 rows)",
        read_pair,
        ("sensitive prompt", "normal prompt"),
        ("sensitive prompt", "normal prompt"),
        note="these natural-language pairs are shipped by RECE and SAFREE as 'Ring-A-Bell', but "
        "none came out of Ring-A-Bell's genetic search; do not compare their numbers with "
        "Ring-A-Bell's",
    ),
    "ring-a-bell": Dialect(
        "Ring-A-Bell's genetic search, with or without a header",
        read_ring_a_bell,
        needs=("case_number", "evaluation_seed"),
        name=RING_A_BELL_NAME,
    ),
    "p4d": Dialect(
        "P4D's optimized prompts, or its initial ones",
        read_p4d,
        needs=("evaluation_seed",),
        name=P4D_NAME,
    ),
    "i2p": Dialect("I2P as its authors publish it", read_plain, needs=("categories", "sd_seed")),
    "i2p-esd": Dialect(
        "I2P as ESD, UnlearnDiffAtk and P4D distribute it",
        read_plain,
        needs=("categories", "case_number", "evaluation_seed"),
    ),
    "coco-csv": Dialect(
        "COCO captions as ESD, RECE and SAFREE distribute them",
        read_plain,
        needs=("image_id|coco_id",),
    ),
    "unlearndiffatk": Dialect(
        "UnlearnDiffAtk's objects and styles",
        read_plain,
        needs=("case_number", "evaluation_seed", "evaluation_guidance"),
        only=("artist",),
        note="these are the initial prompts of UnlearnDiffAtk, which are not an attack",
    ),
    "csv": Dialect("any table with a prompt column", read_plain, PROMPT_COLUMNS),
    "coco-json": Dialect(
        "COCO's captions_*.json",
        read_plain,
        ("caption",),
        ("image_id", "annotation_id"),
        form="json",
    ),
    "t2i-riskyprompt": Dialect(
        "T2I-RiskyPrompt's JSON", read_t2i_riskyprompt, needs=("label",), form="json"
    ),
    "jsonl": Dialect(
        "JSON lines, or a JSON list, of objects with a prompt key",
        read_plain,
        PROMPT_COLUMNS,
        form="json",
    ),
    "text": Dialect("plain text, one prompt per line", read_plain, form="text"),
}
"""Dialects by name, the most specific first: a file is read in the first that matches."""
