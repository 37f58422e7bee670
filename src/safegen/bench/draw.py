"""Drawing a run's pictures, batch by batch as the plan fixes them; each batch is handed on to be judged while the next is drawn."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from PIL import Image

from safegen.bench.batches import Batch, Tell, batches, is_blank
from safegen.bench.folder import PICTURES, SAMPLES, TIMINGS, Journal, Line, Planned, Run
from safegen.bench.watch import Look, Watcher
from safegen.errors import BadFile, BadSetting, wants_memory
from safegen.files import fresh_file
from safegen.guard import Drawn
from safegen.stack import Opened, Shelf, Stack


def work(
    run: Run, planned: Sequence[Planned], *, stacks: Sequence[Stack] = (), shelf: Shelf | None = None, look: Look | None = None, tell: Tell
) -> None:
    """Draw what is missing, judge what is unjudged, and write both down in plan order.

    Args:
        run: where.
        planned: every picture of a stack; with the prompts' texts if there is a shelf.
        stacks: the run's stacks, for drawing.
        shelf: opens them; nothing is drawn without.
        look: judges; nothing is judged without.
        tell: called with (stage, done, of).

    Raises:
        BadFile: a journal is damaged or in use, or a picture drawn again is not the one that is there.
        BadSetting: memory does not suffice for one picture.
    """
    every = list(batches(run, planned))
    with Journal(run.folder / SAMPLES) as samples, Journal(run.folder / TIMINGS) as timings, ExitStack() as on:
        pen = on.enter_context(Pen(run, stacks, shelf, samples, timings)) if shelf else None
        eye = on.enter_context(Watcher(run, look, timings, every, tell)) if look else None
        done: dict[str, int] = {}
        drawn = {line["key"] for line in samples.lines}
        for batch in every:
            images = None
            if pen and pen.lacks(batch):
                images = pen.draw(batch)
            elif not drawn.issuperset(batch.keys):
                continue  # not drawn yet, and nobody here to draw it
            name = batch.stack["name"]
            done[name] = done.get(name, 0) + len(batch.keys)
            if pen:
                tell(f"drawing: {name}", done[name], len(planned))
            if eye:
                eye.see(batch, images)


class Pen:
    """Draws batches whole, and writes what of them is missing."""

    def __init__(self, run: Run, stacks: Sequence[Stack], shelf: Shelf, samples: Journal, timings: Journal) -> None:
        self.run, self.shelf, self.samples, self.timings = run, shelf, samples, timings
        self.stacks = {stack.name: stack for stack in stacks}
        self.lines = {line["key"]: line for line in samples.lines}
        sizes = [t for t in timings.lines if "size" in t]
        self.sizes = {(t["stack"], t["batch"]): int(t["size"]) for t in sizes}
        self.size = min((int(t["size"]) for t in sizes if t["stage"] == "memory"), default=run.protocol.sampler.batch)
        self._ready: Opened | None = None
        self._on = ExitStack()
        for left in run.folder.glob(f"{PICTURES}/*/.*.tmp-*"):  # of a killed process; the journals are ours, so it is gone
            left.unlink(missing_ok=True)

    def lacks(self, batch: Batch) -> bool:
        """Return whether a picture of the batch, or its line, is missing."""
        return any(k not in self.lines or not (self.run.folder / f).exists() for k, f in zip(batch.keys, batch.files, strict=True))

    def draw(self, batch: Batch) -> list[Image.Image]:
        """Return the batch's pictures; afterwards all are written down."""
        from safegen.models.sampling import encode_picture

        ready, began = self._open(batch.stack), time.perf_counter()
        drawn, size = self._fit(ready, batch)
        images = [ready.shown(one) for one in drawn]
        trails = [{"guards": one.trail.to_json(times=False)} if ready.stack.guards else {} for one in drawn]  # equal pictures, equal bytes
        new, sampler = [], self.run.protocol.sampler.model_dump(mode="json")
        for row, key, file, image, trail in zip(batch.rows, batch.keys, batch.files, images, trails, strict=True):
            item = row.item
            facts = {"key": key, "stack": batch.stack["hash"], "prompt_sha256": row.prompt_sha256, "seed": item.seed, "index": item.index}
            data = encode_picture(image, facts | {"sampler": sampler} | trail)
            line = {
                "key": key, "stack": batch.stack["name"], "list": item.list_name, "role": item.role, "id": item.id, "seed": item.seed,
                "index": item.index, "prompt_sha256": row.prompt_sha256, "file": file, "sha256": hashlib.sha256(data).hexdigest(),
                "blank": is_blank(image),
            } | trail  # fmt: skip
            old = self.lines.get(key)
            if old is None:
                new.append(line)
            elif old != line:
                raise BadFile(f"{self.run.folder / file} is drawn otherwise now than {SAMPLES} says; start a new run with --out")
            _write(self.run.folder / file, data)
        self.samples.append(new)
        self.lines |= {line["key"]: line for line in new}
        seconds = round(time.perf_counter() - began, 4)
        guards = {"guards_ms": round(sum(n.ms for one in drawn for n in one.trail.guards), 3)} if ready.stack.guards else {}
        self._note("generate", batch, pictures=len(images), size=size, seconds=seconds, **guards)
        return images

    def _fit(self, ready: Opened, batch: Batch) -> tuple[list[Drawn], int]:
        """Return the batch's pictures and how many were drawn at once: fewer than the protocol says where memory is short.

        A smaller size rounds otherwise, so it is written down before a picture is, and kept: for the batch if it is drawn again, and
        for those that follow.
        """
        asks, sampler = [row.item.ask for row in batch.rows], self.run.protocol.sampler
        size = self.sizes.get((batch.stack["name"], batch.number), self.size)
        while True:
            try:
                return [i for at in range(0, len(asks), size) for i in ready.drawn(asks[at : at + size], sampler)], min(size, len(asks))
            except (MemoryError, RuntimeError) as error:
                if not wants_memory(error):
                    raise
                if size == 1:
                    raise BadSetting("there is not enough memory to draw a single picture; free some, or use another --device") from error
            self.size = size = (min(size, len(asks)) + 1) // 2
            self._note("memory", batch, size=size)
            ready.free()

    def _note(self, stage: str, batch: Batch, **facts: float) -> None:
        self.timings.append([{"stage": stage, "stack": batch.stack["name"], "batch": batch.number} | facts])

    def _open(self, entry: Line) -> Opened:
        if self._ready is None or self._ready.stack.name != entry["name"]:
            self._on.close()
            self._ready = None
            self._ready = self._on.enter_context(self.shelf.opened(self.stacks[entry["name"]]))
            if self._ready.hash != entry["hash"]:
                raise BadFile(f"the stack {entry['name']!r} has changed since the run began; start a new run with --out")
        return self._ready

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Take the last stack's patches off."""
        self._on.close()


def _write(path: Path, data: bytes) -> None:
    """Write a picture that is not there yet; one that is there must be the same."""
    if path.exists():
        if path.read_bytes() != data:
            raise BadFile(f"{path} is not what is drawn now (another device, thread count or hand); remove it, or start a new run")
        return
    with fresh_file(path) as tmp:
        tmp.write_bytes(data)
