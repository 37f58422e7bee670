"""Drawing a run's pictures, batch by batch as the plan fixes them.

Each batch is handed on to be judged while the next is drawn.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from PIL import Image

from safegen.core.errors import ConfigError, FileError, is_out_of_memory
from safegen.core.files import atomic_write
from safegen.core.progress import ProgressCallback
from safegen.evaluation.run.batches import Batch, batches, is_blank, read_picture
from safegen.evaluation.run.folder import PICTURES, SAMPLES, TIMINGS, Journal, Line, Planned, Run
from safegen.evaluation.run.judge import Evaluators, ScoringWorker
from safegen.evaluation.scoring.results import FAULT
from safegen.guards import GeneratedImage
from safegen.stack import Stack
from safegen.stack_loader import LoadedStack, StackLoader


def run_stages(
    run: Run,
    planned: Sequence[Planned],
    *,
    stacks: Sequence[Stack] = (),
    shelf: StackLoader | None = None,
    look: Evaluators | None = None,
    progress: ProgressCallback,
) -> None:
    """Draw what is missing, judge what is unjudged, and write both down in plan order.

    Args:
        run: where.
        planned: every picture of a stack; with the prompts' texts if there is a shelf.
        stacks: the run's stacks, for drawing.
        shelf: opens them; nothing is drawn without.
        look: judges; nothing is judged without.
        progress: called with (description, done, total).

    Raises:
        FileError: a journal is damaged or in use, or a picture drawn again is not the one that is
            there.
        ConfigError: memory does not suffice for one picture.
    """
    every = list(batches(run, planned))
    with (
        Journal(run.folder / SAMPLES) as samples,
        Journal(run.folder / TIMINGS) as timings,
        ExitStack() as on,
    ):
        pen = on.enter_context(ImageWorker(run, stacks, shelf, samples, timings)) if shelf else None
        eye = on.enter_context(ScoringWorker(run, look, timings, every, progress)) if look else None
        done: dict[str, int] = {}
        drawn = {line["key"] for line in samples.lines}
        for batch in every:
            name, images = batch.stack["name"], None
            if pen and name not in done:
                progress(f"drawing: {name}", 0, len(planned))
            if pen and pen.lacks(batch):
                images = pen.draw(batch)
            elif not drawn.issuperset(batch.keys):
                continue  # not drawn yet, and nobody here to draw it
            done[name] = done.get(name, 0) + len(batch.keys)
            if pen:
                progress(f"drawing: {name}", done[name], len(planned))
            if eye:
                eye.see(batch, images)


class ImageWorker:
    """Draws batches whole, and writes what of them is missing."""

    def __init__(
        self,
        run: Run,
        stacks: Sequence[Stack],
        shelf: StackLoader,
        samples: Journal,
        timings: Journal,
    ) -> None:
        self.run, self.shelf, self.samples, self.timings = run, shelf, samples, timings
        self.stacks = {stack.name: stack for stack in stacks}
        self.lines = {line["key"]: line for line in samples.lines}
        sizes = [t for t in timings.lines if "size" in t]
        self.sizes = {(t["stack"], t["batch"]): int(t["size"]) for t in sizes}
        self.size = min(
            (int(t["size"]) for t in sizes if t["stage"] == "memory"),
            default=run.protocol.generation.batch_size,
        )
        self._ready: LoadedStack | None = None
        self._on = ExitStack()
        for left in run.folder.glob(
            f"{PICTURES}/*/.*.tmp-*"
        ):  # of a killed process; the journals are ours, so it is gone
            left.unlink(missing_ok=True)

    def lacks(self, batch: Batch) -> bool:
        """Return whether a picture of the batch, or its line, is missing."""
        return any(
            k not in self.lines or not (self.run.folder / f).exists()
            for k, f in zip(batch.keys, batch.files, strict=True)
        )

    def draw(self, batch: Batch) -> list[Image.Image]:
        """Return the batch's pictures as the run has them; afterwards all are written down."""
        ready, began = self._open(batch.stack), time.perf_counter()
        drawn, size = self._fit(ready, batch)
        images, new = [], []
        for at, one in enumerate(drawn):
            image, line = self._put(ready, batch, at, one)
            images.append(image)
            new += [] if line["key"] in self.lines else [line]
        self.samples.append(new)
        self.lines |= {line["key"]: line for line in new}
        seconds = round(time.perf_counter() - began, 4)
        guards = (
            {"guards_ms": round(sum(n.ms for one in drawn for n in one.trace.guards), 3)}
            if ready.stack.guards
            else {}
        )
        self._note("generate", batch, pictures=len(images), size=size, seconds=seconds, **guards)
        return images

    def _put(
        self, ready: LoadedStack, batch: Batch, at: int, one: GeneratedImage
    ) -> tuple[Image.Image, Line]:
        """See that a picture lies in its file, and return it as the run has it, with its line.

        A guard's fault is a fact of the run, and need not come again: what the journal says stands,
        be the fault then or now, and is not drawn until it goes well. What has no line yet was no
        part of the run, so a fault and a picture there give way to each other.

        Raises:
            FileError: it is not the picture that the run has, or that one is gone and a guard fails
                now.
        """
        key, path = batch.keys[at], self.run.folder / batch.files[at]
        image, trail = (
            ready.display_image(one),
            {"guards": one.trace.to_json(times=False)} if ready.stack.guards else {},
        )  # equal, but for times
        data, line = self._written(batch, at, image, trail)
        old = self.lines.get(key)
        if old is None:
            if _faulty(line) or (path.exists() and _faulty(_facts(path))):
                path.unlink(missing_ok=True)
        elif old != line and _faulty(old):
            image = ready.black()
            data, line = self._written(batch, at, image, {"guards": old["guards"]})
        elif old != line and _faulty(line):
            if not path.exists():
                raise FileError(
                    f"{path} is gone and cannot be drawn again ({one.trace.reason}); mend that and give the same command again"
                )
            image, data, line = read_picture(path), path.read_bytes(), old
        if old is not None and (old != line or hashlib.sha256(data).hexdigest() != old["sha256"]):
            raise FileError(
                f"{path} is drawn otherwise now than {SAMPLES} says; start a new run with --out"
            )
        _write(path, data)
        return image, line

    def _written(
        self, batch: Batch, at: int, image: Image.Image, trail: Line
    ) -> tuple[bytes, Line]:
        """Return a picture's file and its line."""
        from safegen.models.generation import encode_image

        row, key, item = batch.rows[at], batch.keys[at], batch.rows[at].item
        facts = {
            "key": key,
            "stack": batch.stack["hash"],
            "prompt_sha256": row.prompt_sha256,
            "seed": item.seed,
            "index": item.index,
        }
        data = encode_image(
            image,
            facts | {"generation": self.run.protocol.generation.model_dump(mode="json")} | trail,
        )
        return data, {
            "key": key,
            "stack": batch.stack["name"],
            "list": item.list_name,
            "role": item.role,
            "id": item.id,
            "seed": item.seed,
            "index": item.index,
            "prompt_sha256": row.prompt_sha256,
            "file": batch.files[at],
            "sha256": hashlib.sha256(data).hexdigest(),
            "blank": is_blank(image),
        } | trail

    def _fit(self, ready: LoadedStack, batch: Batch) -> tuple[list[GeneratedImage], int]:
        """Return the batch's pictures and how many were drawn at once: fewer than the protocol says where memory is short.

        A smaller size rounds otherwise, so it is written down before a picture is, and kept: for
        the batch if it is drawn again, and for those that follow.
        """
        asks, generation_config = [row.item.ask for row in batch.rows], self.run.protocol.generation
        size = self.sizes.get((batch.stack["name"], batch.number), self.size)
        while True:
            try:
                return [
                    i
                    for at in range(0, len(asks), size)
                    for i in ready.generate(asks[at : at + size], generation_config)
                ], min(size, len(asks))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if size == 1:
                    raise ConfigError(
                        "there is not enough memory to draw a single picture; free some, or use another --device"
                    ) from error
            self.size = size = (min(size, len(asks)) + 1) // 2
            self._note("memory", batch, size=size)
            ready.free()

    def _note(self, stage: str, batch: Batch, **facts: float) -> None:
        self.timings.append(
            [{"stage": stage, "stack": batch.stack["name"], "batch": batch.number} | facts]
        )

    def _open(self, entry: Line) -> LoadedStack:
        if self._ready is None or self._ready.stack.name != entry["name"]:
            self._on.close()
            self._ready = None
            self._ready = self._on.enter_context(self.shelf.open(self.stacks[entry["name"]]))
            if self._ready.hash != entry["hash"]:
                raise FileError(
                    f"the stack {entry['name']!r} has changed since the run began; start a new run with --out"
                )
        return self._ready

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last stack's patches off."""
        self._on.close()


def _faulty(facts: Line) -> bool:
    """Return whether a picture's line, or the facts in its file, say that a guard's fault withheld it."""
    return bool(facts.get("guards", {}).get("action") == FAULT)


def _facts(path: Path) -> Line:
    """Return what a picture's file says of it; nothing where it cannot be read."""
    try:
        with Image.open(path) as image:
            found: Line = json.loads(image.text["safegen"])  # type: ignore[attr-defined]
    except (OSError, SyntaxError, ValueError, KeyError, AttributeError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, data: bytes) -> None:
    """Write a picture that is not there yet; one that is there must be the same."""
    if path.exists():
        if path.read_bytes() != data:
            raise FileError(
                f"{path} is not what is drawn now (another device, thread count or hand); remove it, or start a new run"
            )
        return
    with atomic_write(path) as tmp:
        tmp.write_bytes(data)
