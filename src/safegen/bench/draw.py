"""Drawing and judging a run's pictures, batch by batch as the plan fixes them: a batch is judged while the next one is drawn."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from PIL import Image

from safegen.bench.folder import CHANGES, PICTURES, SAMPLES, TIMINGS, VERDICTS, Journal, Line, Planned, Run, to_line
from safegen.errors import BadFile, BadSetting
from safegen.files import fresh_file
from safegen.guard import Drawn
from safegen.judge import Judge, Verdict
from safegen.metrics.change import picture_change
from safegen.stack import Opened, Shelf, Stack

Tell = Callable[[str, int, int], None]
"""Called with (what is going on, how much is done, of how much)."""
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


@dataclass(frozen=True)
class Look:
    """A judge, and the id under which its verdicts are kept."""

    eye: Judge
    id: str


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn at once and judged at once, whatever came between."""

    stack: Line
    number: int
    rows: Sequence[Planned]
    keys: Sequence[str]
    base: Sequence[str]
    """Files of the pictures that these are held against; none for a base model."""

    @property
    def files(self) -> list[str]:
        """The pictures' files, relative to the run's folder."""
        return [picture_file(self.stack["name"], key) for key in self.keys]


def picture_file(stack: str, key: str) -> str:
    """Return where a picture lies in its run's folder."""
    return f"{PICTURES}/{stack}/{key}.png"


def batches(run: Run, planned: Sequence[Planned]) -> Iterator[Batch]:
    """Yield a run's batches: stack by stack, the plan cut into pieces of the sampler's batch, however far the run has come."""
    sampler = run.protocol.sampler
    hashes = {entry["name"]: entry["hash"] for entry in run.stacks}
    for stack in run.stacks:
        for number, start in enumerate(range(0, len(planned), sampler.batch)):
            rows = planned[start : start + sampler.batch]
            against = stack["against"]
            base = [picture_file(against, p.key(hashes[against], sampler)) for p in rows] if stack["kind"] != "base" else []
            yield Batch(stack, number, rows, [p.key(stack["hash"], sampler) for p in rows], base)


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
        eye = on.enter_context(Watcher(run, look, timings, sum(len(b.keys) for b in every), tell)) if look else None
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
                if not (isinstance(error, MemoryError) or any(word in str(error).lower() for word in NO_MEMORY)):
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


class Watcher:
    """Judges batches in one background thread, and measures how far their pictures are from the base model's; writes in order."""

    def __init__(self, run: Run, look: Look, timings: Journal, of: int, tell: Tell) -> None:
        self.run, self.look, self.timings, self.of, self.tell = run, look, timings, of, tell
        self.measures = "change" in run.protocol.metrics
        self._on, self._pending = ExitStack(), list[tuple[Batch, Future[tuple[list[Verdict], list[float], float]]]]()

    def __enter__(self) -> Self:
        """Open the journals and start the thread."""
        self.verdicts = self._on.enter_context(Journal(self.run.folder / VERDICTS))
        self.changes = self._on.enter_context(Journal(self.run.folder / CHANGES))
        self._pool = self._on.enter_context(ThreadPoolExecutor(1))
        self.judged = {line["key"] for line in self.verdicts.lines if line["judge"] == self.look.id}
        self.measured = {line["key"] for line in self.changes.lines}
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        """Write the last batch, unless something went wrong: then it is judged again when the run goes on."""
        with self._on:
            if kind is None:
                self._collect()

    def see(self, batch: Batch, images: Sequence[Image.Image] | None) -> None:
        """Judge a batch in the background, from its files when its pictures are not at hand; waits for the one before."""
        base = batch.base if self.measures and not self.measured.issuperset(batch.keys) else []
        if base or not self.judged.issuperset(batch.keys):
            self._collect()
            self._pending.append((batch, self._pool.submit(self._watch, batch, images, base)))

    def _watch(self, batch: Batch, images: Sequence[Image.Image] | None, base: Sequence[str]) -> tuple[list[Verdict], list[float], float]:
        began = time.perf_counter()
        images = images or [read_picture(self.run.folder / file) for file in batch.files]
        verdicts = self.look.eye.judge(images) if not self.judged.issuperset(batch.keys) else []
        changes = [picture_change(read_picture(self.run.folder / file), image) for file, image in zip(base, images, strict=bool(base))]
        return verdicts, changes, time.perf_counter() - began

    def _collect(self) -> None:
        while self._pending:
            batch, future = self._pending.pop(0)
            verdicts, changes, seconds = future.result()
            name, facts = batch.stack["name"], {"judge": self.look.id}
            fresh = [(k, v) for k, v in zip(batch.keys, verdicts, strict=bool(verdicts)) if k not in self.judged]
            known = {"known": list(self.look.eye.known)}
            self.verdicts.append([{"key": k, "stack": name} | facts | known | to_line(v) for k, v in fresh])
            moved = [(k, c) for k, c in zip(batch.keys, changes, strict=bool(changes)) if k not in self.measured]
            self.changes.append([{"key": k, "stack": name, "against": batch.stack["against"], "change": c} for k, c in moved])
            self.judged.update(k for k, _ in fresh)
            self.measured.update(k for k, _ in moved)
            note = {"stage": "judge", "stack": name, "batch": batch.number, "pictures": len(batch.keys), "seconds": round(seconds, 4)}
            self.timings.append([note | facts])
            self.tell("judging", len(self.judged), self.of)


def is_blank(image: Image.Image) -> bool:
    """Return whether a picture is of one colour: it was refused, not drawn."""
    return image.convert("RGB").getcolors(1) is not None


def read_picture(path: Path) -> Image.Image:
    """Return a picture.

    Raises:
        BadFile: it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise BadFile(f"{path} cannot be read: {error}; remove it and go on with the run to have it drawn again") from error


def _write(path: Path, data: bytes) -> None:
    """Write a picture that is not there yet; one that is there must be the same."""
    if path.exists():
        if path.read_bytes() != data:
            raise BadFile(f"{path} is not what is drawn now (another device, thread count or hand); remove it, or start a new run")
        return
    with fresh_file(path) as tmp:
        tmp.write_bytes(data)
