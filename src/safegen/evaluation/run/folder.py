"""The folder of a run: its card, its append-only journals, and what can be read from them without a model."""

from __future__ import annotations

import binascii
import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from safegen.core.errors import FileError
from safegen.core.files import atomic_write
from safegen.core.generation import GenerationConfig
from safegen.evaluation.plan import Item
from safegen.evaluation.protocol import FORMAT as PROTOCOL_FORMAT
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.samples import canonical, sha
from safegen.judges.base import Detection, Detections
from safegen.judges.batching import finite

FORMAT = "safegen-run/2"
CARD, PLAN, SCORES, PICTURES = "protocol.json", "plan.jsonl", "scores.json", "pictures"
SAMPLES, JUDGES, VERDICTS, CHANGES = (
    "samples.jsonl",
    "judges.jsonl",
    "verdicts.jsonl",
    "changes.jsonl",
)
FEATURES, TIMINGS = "features.jsonl", "timings.jsonl"
SETTINGS, PATCHES = "settings.json", "patches"
"""Settings of the workflow that made the run, and the folder of the patches that it made."""
NEEDS: dict[str, dict[str, Any]] = {
    SAMPLES: {"key": str, "blank": bool},
    JUDGES: {"judge": str, "options": dict, "known": list},
    VERDICTS: {"key": str, "judge": str},
    CHANGES: {"key": str, "change": (int, float)},
    FEATURES: {"key": str, "extractor": str},
}
"""What a journal's lines are read by, wherever they are read; without it a line says nothing."""
Line = dict[str, Any]


@dataclass(frozen=True)
class Planned:
    """One picture of a run: what it shows, and the hash of its prompt, which names it where the text is left out."""

    item: Item
    prompt_sha256: str

    @classmethod
    def of(cls, item: Item) -> Self:
        """Return a plan's item with its prompt's hash."""
        return cls(item, sha(item.prompt))

    def key(self, stack: str, generation_config: GenerationConfig) -> str:
        """Return the picture's name: a SHA-256 over its prompt's hash, seed, index, stack hash and generation_config."""
        return sha(
            canonical(
                [
                    self.prompt_sha256,
                    self.item.seed,
                    self.item.index,
                    stack,
                    generation_config.model_dump(mode="json"),
                ]
            )
        )


class Journal:
    """An append-only file of JSON lines, locked while open. Opening cuts a last line that a kill has torn.

    Raises:
        FileError: another process writes it, or a line in it is not JSON.
    """

    def __init__(self, path: Path) -> None:
        self._file: IO[bytes] = path.open("a+b")
        try:
            _lock(self._file, path)
            self.lines, whole = parse(path)
            self._file.truncate(whole)
        except BaseException:
            self._file.close()
            raise

    def append(self, lines: Sequence[Line]) -> None:
        """Write lines; they survive the process once this returns."""
        self._file.write(
            "".join(
                json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines
            ).encode()
        )
        self._file.flush()
        self.lines += lines

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close and unlock."""
        self.close()

    def close(self) -> None:
        """Close and unlock; once closed, nothing."""
        self._file.close()


def parse(path: Path) -> tuple[list[Line], int]:
    """Return the whole lines of a journal (none if it does not exist) and how many bytes they fill.

    Raises:
        FileError: a whole line is not a JSON object, or lacks what its journal is read by.
    """
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    lines: list[Line] = []
    for i, text in enumerate(data[:whole].splitlines()):
        try:
            line = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError):
            line = None
        if not isinstance(line, dict):
            raise FileError(
                f"{path}:{i + 1} is not a JSON object; the file was damaged after it was written"
            )
        for key, kind in NEEDS.get(path.name, {}).items():
            if not isinstance(line.get(key), kind):
                raise FileError(
                    f"{path}:{i + 1} has no {key!r} that can be used; the file was damaged after it was written"
                )
        lines.append(line)
    return lines, whole


@dataclass(frozen=True)
class Run:
    """A run as it lies on the disk."""

    folder: Path
    card: Line

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Read a run's card.

        Raises:
            FileError: not a run, or its card is damaged.
        """
        path = folder / CARD
        if not path.is_file():
            raise FileError(
                f"{folder} is not a run: it has no {CARD}; make one with `safegen evaluate --out {folder}`"
            )
        try:
            card = json.loads(path.read_text(encoding="utf-8"))
            run = cls(folder, card)
            found = (card["format"], run.protocol.decides()["format"])
        except (
            json.JSONDecodeError,
            UnicodeDecodeError,
            ValidationError,
            KeyError,
            TypeError,
        ) as error:
            raise FileError(
                f"{path} is not a run's card: {' '.join(str(error).split())[:200]}"
            ) from error
        if found != (FORMAT, PROTOCOL_FORMAT):
            raise FileError(
                f"{path} is of another format, {found[0]!r}; this version reads {FORMAT!r}"
            )
        return run

    @cached_property
    def protocol(self) -> Protocol:
        """The protocol that the run was drawn by; a list from a file is known by its hash only."""
        return Protocol.model_validate(self.card["protocol"])

    @property
    def stacks(self) -> list[Line]:
        """What the card says of each stack, in the order in which they are drawn."""
        out: list[Line] = self.card["stacks"]
        return out

    @cached_property
    def planned(self) -> list[Planned]:
        """Every picture of one stack, in plan order; a prompt's text is empty where the run leaves it out.

        Raises:
            FileError: plan.jsonl is missing or damaged.
        """
        try:
            return [
                Planned(
                    Item.model_validate({k: line[k] for k in Item.model_fields}),
                    line["prompt_sha256"],
                )
                for line in parse(self.folder / PLAN)[0]
            ]
        except (KeyError, ValidationError) as error:
            raise FileError(
                f"{self.folder / PLAN} is damaged: {' '.join(str(error).split())[:200]}"
            ) from error

    def keys(self, stack: Line) -> list[str]:
        """Return the key of every picture of a stack, in plan order."""
        return [p.key(stack["hash"], self.protocol.generation) for p in self.planned]

    def lines(self, name: str) -> list[Line]:
        """Return the whole lines of one of the run's journals.

        Raises:
            FileError: it is damaged.
        """
        return parse(self.folder / name)[0]

    @property
    def judges(self) -> dict[str, Line]:
        """What is written of every judge that has looked at this run, by its id.

        Raises:
            FileError: there are verdicts of one of which nothing is written, or judges.jsonl is
                damaged.
        """
        told = {line["judge"]: line for line in self.lines(JUDGES)}
        seen = sorted({line["judge"] for line in self.lines(VERDICTS)})
        for judge in seen:
            if judge not in told:
                raise FileError(
                    f"{self.folder / JUDGES} does not say which labels {judge} has; let it look again to have it written"
                )
        return {judge: told[judge] for judge in seen}

    def judge(self, name: str, *, options: Mapping[str, Any] | None = None) -> str:
        """Return the id of the judge of that name (or that id) who has looked at this run.

        Args:
            name: its name or id.
            options: which of several of one name; any when None.

        Raises:
            FileError: none has, or two have.
        """
        judges = self.judges
        match = [
            i
            for i in judges
            if name in (i, i.partition(":")[0]) and options in (None, judges[i]["options"])
        ]
        if len(match) == 1:
            return match[0]
        if match:
            raise FileError(
                f"several judges called {name!r} have looked at {self.folder}; say which by its id: {', '.join(match)}"
            )
        raise FileError(
            f"no judge called {name!r} has looked at {self.folder} (those that have: {', '.join(judges) or 'none'}); "
            f"let it look with `safegen evaluate --stage judge --judge {name} --out {self.folder}`"
        )


def write_plan(folder: Path, planned: Iterable[Planned], hidden: Mapping[str, bool]) -> None:
    """Write plan.jsonl: one line a planned picture of one stack, without the texts of hidden lists."""
    lines = []
    for p in planned:
        facts = p.item.model_dump() | {"prompt_sha256": p.prompt_sha256}
        lines.append(facts | ({"prompt": ""} if hidden[p.item.list_name] else {}))
    with atomic_write(folder / PLAN, replace=True) as tmp:
        tmp.write_text(
            "".join(json.dumps(line, sort_keys=True, ensure_ascii=False) + "\n" for line in lines),
            encoding="utf-8",
        )


def write_json(path: Path, value: Line) -> None:
    """Write plain values to a file, in place of an older one."""
    with atomic_write(path, replace=True) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def to_line(detections: Detections) -> Line:
    """Return a judge's detections as plain values."""
    return {
        "detections": [
            {"label": d.label, "score": d.score, "box": d.box and list(d.box)}
            for d in detections.items
        ],
        "subject": detections.subject,
        "unjudged": detections.unjudged,
    }


def from_line(line: Line) -> Detections:
    """Return the detections of a line.

    Raises:
        FileError: the line is damaged.
    """
    try:
        if line["unjudged"] is not None:
            return Detections((), unjudged=line["unjudged"])
        found = tuple(
            Detection(d["label"], finite(float(d["score"])), d["box"] and tuple(d["box"]))
            for d in line["detections"]
        )
        return Detections(found, subject=line["subject"])
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"the verdict on {line.get('key')!r} is damaged: {error}") from error


def to_text(row: NDArray[np.float64]) -> str:
    """Return numbers as base64 of their float32, the least byte first: equal numbers, equal text, a sixth of the digits."""
    return b64encode(row.astype("<f4").tobytes()).decode("ascii")


def from_text(line: Line) -> NDArray[np.float64] | None:
    """Return the features of a line (width,); None where the picture has none.

    Raises:
        FileError: they are damaged.
    """
    text = line.get("features")
    try:
        return (
            None
            if text is None
            else np.frombuffer(b64decode(text, validate=True), dtype="<f4").astype(np.float64)
        )
    except (TypeError, ValueError, binascii.Error) as error:
        raise FileError(f"the features of {line.get('key')!r} are damaged: {error}") from error


def _lock(file: IO[bytes], path: Path) -> None:
    """Hold a file against other processes, where the system can."""
    with suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise FileError(
                f"{path} is being written by another process; wait for it, or stop it"
            ) from error
