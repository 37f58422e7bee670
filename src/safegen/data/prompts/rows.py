"""Columns that prompt files share, and the reader of a row with them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from safegen.data.prompts.parsing import FileRow
from safegen.data.prompts.prompt import AttackInfo, Prompt, cluster_of

PROMPT_COLUMNS = ("prompt", "prompts", "text", "caption", "captions", "sentence", "description")
"""Prompt columns of files of no known benchmark; the first that exists is read."""
COLUMNS = {
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance"),
    # not `width` and `height`, which describe a photograph in caption files
    "width": ("sd_image_width",),
    "height": ("sd_image_height",),
    "categories": ("categories", "category"),
    "reference": ("coco_id", "image_id"),
    "key": ("case_number", "id"),
    "subject": ("subject", "classes", "class"),
    "background": ("background",),
}
"""Columns that mean the same in every dialect; the first of each with a value is read."""
HEADERLESS = ("prompt", "case_number", "evaluation_seed")
"""Columns of the one dialect that exists without a header."""
FOREIGN = (
    "adv_prompt",
    "target_prompt",
    "original_text",
    "perturbed_text",
    "sensitive prompt",
    "normal prompt",
)
PUBLISHED = [n for what in COLUMNS.keys() - {"subject", "background"} for n in COLUMNS[what]]
KNOWN_COLUMNS = frozenset((*PROMPT_COLUMNS, *PUBLISHED, *FOREIGN))
"""A first line with one of these columns is a header."""
ROW_ID = re.compile(r"[\w.-]{1,64}")
_FIELDS = set(Prompt.model_fields)


class InvalidRowError(ValueError):
    """Reason why a row cannot be used."""


@dataclass(frozen=True)
class RowContext:
    """What all rows of a file share: its name, hash and prompt column."""

    source: str
    sha256: str
    stem: str
    """File name without its extension."""
    column: str
    """Column that holds the prompt."""
    folder: Path = Path()
    """Folder of the file."""


def read_plain(
    record: FileRow,
    context: RowContext,
    *,
    target: str | None = None,
    attack: AttackInfo | None = None,
    categories: tuple[str, ...] | None = None,
    blank: bool = False,
) -> Prompt:
    """Return the prompt of a row from the columns that mean the same in every dialect.

    Args:
        record: the row.
        context: the file.
        target: column of the target text, which rows of one cluster share.
        attack: attack that wrote the prompt.
        categories: labels, if not those of a categories column.
        blank: whether the prompt may be blank.

    Raises:
        InvalidRowError: a cell is missing or invalid.
    """
    cells, used = record.cells, {context.column, ""}
    present = _present_columns(tuple(cells))

    def first(what: str) -> tuple[str, Any]:
        for name in present.get(what, ()):
            if not is_empty(cells[name]):
                used.add(name)
                return name, cells[name]
        return "", None

    prompt = cells.get(context.column)
    if not isinstance(prompt, str):
        problem = "is missing" if prompt is None else "is not text"
        raise InvalidRowError(f"{context.column} {problem}")
    reference = first("reference")[1]
    key, subject = first("key")[1] or reference, first("subject")[1]
    background = first("background")[1]
    fields: dict[str, Any] = {
        "seed": _integer(*first("seed"), low=0, high=2**63 - 1),
        "guidance": _number(*first("guidance")),
        "width": _integer(*first("width"), low=1, high=2**16),
        "height": _integer(*first("height"), low=1, high=2**16),
        "categories": _labels(first("categories")[1]) if categories is None else categories,
        "subject": None if subject is None else to_text(subject).strip(),
        "background": None if background is None else to_text(background).strip(),
        "reference_id": None if reference is None else to_text(reference).strip(),
        "extra": {n: to_text(v) for n, v in cells.items() if n not in used and not is_empty(v)},
    }
    target_text = cells.get(target) if target else None
    if not isinstance(target_text, str) or not target_text.strip():
        target_text = prompt
    key = None if key is None else to_text(key).strip()
    row_id = key if key and ROW_ID.fullmatch(key) else str(record.line)
    if not prompt.strip() and not (blank and prompt):
        raise InvalidRowError("the prompt is blank")
    texts = [prompt, target_text, key, fields["subject"], fields["background"]]
    texts += [fields["reference_id"], *fields["categories"]]
    _check_text([*texts, *fields["extra"], *fields["extra"].values()])
    return Prompt.model_construct(  # all values are checked above; one set for all saves memory
        _FIELDS,
        id=f"{context.stem}:{row_id}",
        prompt=prompt,
        source=context.source,
        source_sha256=context.sha256,
        line=record.line,
        cluster=cluster_of(target_text),
        attack=attack,
        start=None,
        guidance_scale=None,
        **fields,
    )


def _check_text(texts: Iterable[str | None]) -> None:
    """Refuse a row with a text that UTF-8 cannot encode."""
    try:
        "".join(filter(None, texts)).encode()
    except UnicodeEncodeError:
        raise InvalidRowError(
            "the row has half a surrogate pair, which is not valid text"
        ) from None


@lru_cache(maxsize=256)
def _present_columns(columns: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return those of `COLUMNS` that a row has."""
    present = {what: tuple(n for n in names if n in columns) for what, names in COLUMNS.items()}
    return {what: names for what, names in present.items() if names}


def is_empty(value: Any) -> bool:
    """Return whether a cell is empty; pandas writes some empty cells as nan."""
    return value is None or str(value).strip().lower() in {"", "nan"}


def to_text(value: Any) -> str:
    """Return a cell as text: a text as it is, another value as JSON."""
    if isinstance(value, str):
        return value
    if type(value) is int:
        return str(value)
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _labels(value: Any) -> tuple[str, ...]:
    """Return the distinct labels of a list or of "a, b"."""
    if value is None:
        return ()
    parts = value if isinstance(value, list) else to_text(value or "").split(",")
    return tuple(
        dict.fromkeys(label for label in (to_text(part).strip() for part in parts) if label)
    )


def _integer(name: str, value: Any, *, low: int, high: int) -> int | None:
    """Return an integer, exact up to int64; pandas may have written it as 7.0."""
    if value is None:
        return None
    is_plain = type(value) in (str, int, float)
    match = re.fullmatch(r"\s*([+-]?\d{1,20})(?:\.0+)?\s*", str(value)) if is_plain else None
    if not match:
        raise InvalidRowError(f"{name} is not an integer")
    if not low <= int(match[1]) <= high:
        raise InvalidRowError(f"{name} must be in {low}..{high}, got {match[1]}")
    return int(match[1])


def _number(name: str, value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise InvalidRowError(f"{name} is not a number") from None
    if not math.isfinite(number) or number < 0:
        raise InvalidRowError(f"{name} must be at least 0, got {number}")
    return number
