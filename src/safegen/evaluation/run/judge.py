"""Looking at a run's pictures while the next are drawn: verdicts, change against the base, features. Each picture is read once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from PIL import Image

from safegen.core.errors import ConfigError, FileError
from safegen.core.progress import ProgressCallback
from safegen.evaluation.run.batches import Batch, read_picture
from safegen.evaluation.run.folder import (
    CHANGES,
    FEATURES,
    JUDGES,
    VERDICTS,
    Journal,
    Line,
    Run,
    to_line,
    to_text,
)
from safegen.features.base import Extractor, TextExtractor
from safegen.judges import Judge
from safegen.metrics.clip_score import clip_scores
from safegen.metrics.image import pixel_mae

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from safegen.features.lpips import Lpips


@dataclass(frozen=True)
class Evaluators:
    """A judge, what is written of it, and what else looks at the pictures."""

    eye: Judge
    facts: Line
    """Its line in judges.jsonl: id under which its verdicts are kept, name, options, every label it has."""
    extractor: Extractor | None = None
    lpips: Lpips | None = None

    @property
    def id(self) -> str:
        """The id under which its verdicts are kept."""
        return str(self.facts["judge"])


@dataclass(frozen=True)
class Pending:
    """What is still to be done with a batch."""

    judge: bool
    change: bool
    features: bool


class ScoringWorker:
    """Judges and measures batches in one background thread, and writes what it sees in order.

    Raises (when entered):
        FileError: a journal is damaged or in use, or its features are another extractor's.
        ConfigError: the CLIP score needs prompts that the run keeps out of its folder.
    """

    def __init__(
        self,
        run: Run,
        look: Evaluators,
        timings: Journal,
        every: Sequence[Batch],
        progress: ProgressCallback,
    ) -> None:
        self.run, self.look, self.timings, self.every, self.progress = (
            run,
            look,
            timings,
            every,
            progress,
        )
        self.moves = not {"change", "lpips"}.isdisjoint(run.protocol.metrics)
        self.scores = "clip_score" in run.protocol.metrics
        self._texts = dict[int, "NDArray[np.float64]"]()
        self._on, self._pending = ExitStack(), list[tuple[Batch, Future[dict[str, list[Line]]]]]()

    def __enter__(self) -> Self:
        """Open the journals and start the thread."""
        with ExitStack() as on:
            names = (
                JUDGES,
                VERDICTS,
                *((CHANGES,) if self.moves else ()),
                *((FEATURES,) if self.look.extractor else ()),
            )
            self.journals = {
                name: on.enter_context(Journal(self.run.folder / name)) for name in names
            }
            self.done = {
                name: {line["key"] for line in self._own(name)} for name in names if name != JUDGES
            }
            self._write_judge()
            self._check_features()
            self._pool = on.enter_context(ThreadPoolExecutor(1))
            self._on = on.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Write the last batch, unless something went wrong: then it is looked at again when the run goes on."""
        with self._on:
            if kind is None:
                self._collect()

    def see(self, batch: Batch, images: Sequence[Image.Image] | None) -> None:
        """Look at a batch in the background, at its files when its pictures are not at hand.

        Waits for the one before.
        """

        def lacks(name: str) -> bool:
            return name in self.done and not self.done[name].issuperset(batch.keys)

        todo = Pending(lacks(VERDICTS), bool(batch.base) and lacks(CHANGES), lacks(FEATURES))
        if todo.judge or todo.change or todo.features:
            self._collect()
            self._pending.append((batch, self._pool.submit(self._watch, batch, images, todo)))

    def _own(self, name: str) -> list[Line]:
        lines = self.journals[name].lines
        return (
            [line for line in lines if line["judge"] == self.look.id] if name == VERDICTS else lines
        )

    def _write_judge(self) -> None:
        """Write the judge down once, before its first verdict."""
        said = [line for line in self.journals[JUDGES].lines if line["judge"] == self.look.id]
        if not said:
            self.journals[JUDGES].append([self.look.facts])
        elif said != [self.look.facts]:
            raise FileError(
                f"{self.run.folder / JUDGES} says otherwise of {self.look.id} than it is now; remove it and judge again"
            )

    def _check_features(self) -> None:
        if self.look.extractor is None:
            return
        old = {line["extractor"] for line in self.journals[FEATURES].lines} - {
            self.look.extractor.id
        }
        if old:
            raise FileError(
                f"{self.run.folder / FEATURES} is by {min(old)}, the extractor is now {self.look.extractor.id}; start a new run"
            )
        if self.scores and any(
            not row.item.prompt
            for batch in self.every
            for row in batch.rows
            if not self._measured(batch)
        ):
            raise ConfigError(
                "the CLIP score needs the prompts, which this run keeps out of its folder; go on with the command that began it"
            )

    def _measured(self, batch: Batch) -> bool:
        return self.done[FEATURES].issuperset(batch.keys)

    def _watch(
        self, batch: Batch, images: Sequence[Image.Image] | None, todo: Pending
    ) -> dict[str, list[Line]]:
        """Return the whole batch's lines for every journal that lacks some of them, and the line for the timings."""
        began = time.perf_counter()
        pictures = list(images or [read_picture(self.run.folder / file) for file in batch.files])
        out: dict[str, list[Line]] = {}
        if todo.judge:
            out[VERDICTS] = [
                {"judge": self.look.id} | to_line(d) for d in self.look.eye.detect(pictures)
            ]
        if todo.change:
            out[CHANGES] = self._changes(
                [read_picture(self.run.folder / file) for file in batch.base],
                pictures,
                batch.stack["against"],
            )
        if todo.features:
            out[FEATURES] = self._features(batch, pictures)
        for lines in out.values():
            for key, line in zip(batch.keys, lines, strict=True):
                line |= {"key": key, "stack": batch.stack["name"]}
        note = {
            "stage": "judge",
            "stack": batch.stack["name"],
            "batch": batch.number,
            "pictures": len(batch.keys),
            "judge": self.look.id,
        }
        return out | {"": [note | {"seconds": round(time.perf_counter() - began, 4)}]}

    def _changes(
        self, base: Sequence[Image.Image], own: Sequence[Image.Image], against: str
    ) -> list[Line]:
        lines: list[Line] = [
            {"against": against, "change": pixel_mae(a, b)} for a, b in zip(base, own, strict=True)
        ]
        if self.look.lpips:
            for line, far in zip(lines, self.look.lpips.distances(base, own), strict=True):
                line |= {"lpips": float(far), "lpips_by": self.look.lpips.id}
        return lines

    def _features(self, batch: Batch, pictures: Sequence[Image.Image]) -> list[Line]:
        """Return each picture's features and, where they are asked for, its CLIP score.

        None where a number is not finite.
        """
        extractor = self.look.extractor
        assert extractor is not None
        rows = extractor.features(pictures)
        scores: list[float | None] = [None] * len(rows)
        if self.scores:
            assert isinstance(extractor, TextExtractor)
            if batch.number not in self._texts:  # the same prompts for every stack
                self._texts[batch.number] = extractor.texts([row.item.prompt for row in batch.rows])
            scores = [_score(x, y) for x, y in zip(rows, self._texts[batch.number], strict=True)]
        kept = [to_text(x) if np.isfinite(x).all() else None for x in rows]
        own: dict[str, Any] = {"extractor": extractor.id}
        return [
            own | {"features": x} | ({"score": s} if self.scores else {})
            for x, s in zip(kept, scores, strict=True)
        ]

    def _collect(self) -> None:
        while self._pending:
            batch, future = self._pending.pop(0)
            seen = future.result()
            for name, lines in seen.items():
                if name:
                    self.journals[name].append(
                        [line for line in lines if line["key"] not in self.done[name]]
                    )
                    self.done[name].update(batch.keys)
            self.timings.append(seen[""])
            self.progress("judging", len(self.done[VERDICTS]), sum(len(b.keys) for b in self.every))


def _score(image: NDArray[np.float64], text: NDArray[np.float64]) -> float | None:
    try:
        return float(clip_scores(image[None], text[None])[0])
    except ValueError:  # an embedding that is not finite, or zero
        return None
