"""What a resilience test has finished, in the folder that it ends in, so that a stopped one goes on."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from PIL import Image

from safegen.core.errors import FileError
from safegen.core.files import STAGING_DIR, atomic_write, is_incomplete
from safegen.evaluation.run.folder import Journal, from_line, to_line
from safegen.judges import Detections

CARD, ROWS, PICTURES, RESULTS = "card.json", "rows.jsonl", "pictures", "resilience.json"


class Kept:
    """A new folder, or an unfinished one of the same test. Everything lies in its `.unfinished` until the end; then the results move up.

    A row is one side of the test: its pictures, then a line of verdicts in a journal, so that what
    a kill has torn is made again.
    """

    def __init__(self, out: Path, facts: Mapping[str, Any]) -> None:
        """Open the folder.

        Args:
            out: the folder.
            facts: what decides the results, as plain values: an unfinished folder of others is
                refused.

        Raises:
            FileError: `out` exists and is no unfinished test of these facts, cannot be written, or
                another process is at work there.
        """
        self.out, self.place = out, out / STAGING_DIR
        self._around: list[Path] = []
        refuse_finished(out)
        try:
            if not self.place.is_dir():
                self._around = [
                    folder for folder in (out, *out.parents) if not folder.exists()
                ]  # the nearest first
                self.place.mkdir(parents=True)
            self.journal = Journal(self.place / ROWS)
        except OSError as error:
            raise FileError(f"{out} cannot be written: {error.strerror or error}") from error
        try:
            self._agree(facts)
        except BaseException:
            self.journal.close()
            raise

    def _agree(self, facts: Mapping[str, Any]) -> None:
        card, text = self.place / CARD, json.dumps(facts, indent=1, sort_keys=True) + "\n"
        if not card.exists() and {path.name for path in self.place.iterdir()} - {ROWS}:
            raise FileError(
                f"{self.out} is unfinished, and of another command; remove that folder, or name another"
            )
        if not card.exists():
            with atomic_write(card) as tmp:
                tmp.write_text(text, encoding="utf-8")
        elif card.read_text(encoding="utf-8") != text:
            raise FileError(
                f"{self.out} is an unfinished test of other settings, data, weights or patches; go on with the same, remove that folder, "
                "or name another"
            )

    def row(self, side: str) -> tuple[list[Image.Image], list[Detections]] | None:
        """Return a finished side's pictures and detections; None if it is not finished.

        Raises:
            FileError: a picture or a line is missing or damaged.
        """
        line = next((line for line in self.journal.lines if line.get("side") == side), None)
        if line is None:
            return None
        try:
            verdicts = [from_line(found) for found in line["verdicts"]]
            return [_read(self._picture(side, i)) for i in range(len(verdicts))], verdicts
        except (KeyError, TypeError, OSError) as error:
            raise FileError(
                f"{self.place} is damaged at {side} ({error}); remove {self.out} and start again"
            ) from error

    def add(
        self, side: str, pictures: Sequence[Image.Image], verdicts: Sequence[Detections]
    ) -> None:
        """Keep a finished side.

        Raises:
            FileError: it cannot be written.
        """
        for i, picture in enumerate(pictures):
            path = self._picture(side, i)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, replace=True) as tmp:
                picture.save(tmp, "PNG")
        try:
            self.journal.append(
                [{"side": side, "verdicts": [to_line(verdict) for verdict in verdicts]}]
            )
        except OSError as error:
            raise FileError(f"{self.place} cannot be written: {error.strerror or error}") from error

    def tuning(self, side: str) -> Path:
        """Return the folder of a fine-tune's checkpoint, log and patches."""
        return self.place / "tuned" / side

    def finish(self, write: Callable[[Path], None]) -> None:
        """Write the results and move them up, `resilience.json` last; then nothing else is left.

        Args:
            write: puts every file of the results into the folder that it is given.

        Raises:
            FileError: they cannot be written.
        """
        results = self.place / "results"
        try:
            shutil.rmtree(results, ignore_errors=True)
            results.mkdir()
            write(results)
            for entry in sorted(results.iterdir(), key=lambda path: path.name == RESULTS):
                entry.replace(self.out / entry.name)
        except OSError as error:
            raise FileError(f"{self.out} cannot be written: {error.strerror or error}") from error
        self.journal.close()
        shutil.rmtree(self.place, ignore_errors=True)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close; a folder in which nothing is finished goes."""
        self.journal.close()
        if self.place.is_dir() and not self.journal.lines:
            shutil.rmtree(self.place, ignore_errors=True)
            for folder in self._around:
                if not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()

    def _picture(self, side: str, i: int) -> Path:
        return self.place / PICTURES / side / f"{i:04d}.png"


def refuse_finished(out: Path) -> None:
    """Refuse a folder that is not new and no unfinished test, before the work begins.

    Raises:
        FileError: it is.
    """
    if os.path.lexists(out) and not is_incomplete(out, last=RESULTS):
        raise FileError(f"{out} already exists; name another folder or remove it")


def _read(path: Path) -> Image.Image:
    with Image.open(path) as opened:
        return opened.convert("RGB")
