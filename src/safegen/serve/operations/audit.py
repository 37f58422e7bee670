"""The audit log: one JSON line per request, on the disk before its answer is sent."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen.core.documents import check_regular, parse_json
from safegen.core.errors import FileError
from safegen.serve.engine.base import EngineFaultError

if TYPE_CHECKING:
    from PIL import Image

    from safegen.serve.gate import Outcome
    from safegen.serve.service import Answer

logger = logging.getLogger(__name__)
FLAGS = os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
BLOCK = 2**16
"""Bytes that are read at a time to find the last line."""


class AuditLogError(EngineFaultError):
    """The audit log could not be written, so that no image may leave."""

    def __init__(self) -> None:
        """Build the message."""
        super().__init__("the audit log could not be written")


class AuditLog:
    """Append-only file of JSON lines that no other process writes. None as path writes nothing.

    A record is one write and one `fsync`, in a thread of its own. A record that could not be
    written whole is removed again. After a rename it is created again. Opening the file moves
    an incomplete last line, as a killed process leaves it, to `FILE.torn-TIME`.
    """

    def __init__(self, path: Path | None = None, *, log_prompts: bool = False) -> None:
        """Open and lock the file.

        Raises:
            FileError: it cannot be written, or another process writes it.
        """
        self.path, self.log_prompts = path, log_prompts
        self._thread = ThreadPoolExecutor(1, "audit-log")
        self._file: int | None = None
        self._torn_at: int | None = None
        if path is not None:
            try:
                self._open(path)
            except OSError as error:
                raise FileError(f"{str(path)!r} cannot be written: {error.strerror}") from error

    async def write_answer(self, answer: Answer, client: str) -> None:
        """Append what became of a request; it is on the disk once this returns.

        Raises:
            AuditLogError: it is not.
        """
        if self.path is not None:
            await self._run(self._write_answer, answer, client)

    async def write(self, record: dict[str, Any]) -> None:
        """Append a record; it is on the disk once this returns.

        Raises:
            AuditLogError: it is not.
        """
        if self.path is not None:
            await self._run(self._write, record)

    async def _run(self, function: Any, *arguments: Any) -> None:
        loop = asyncio.get_running_loop()
        try:
            # a record whose request is cancelled is written all the same
            await asyncio.shield(loop.run_in_executor(self._thread, function, *arguments))
        except Exception as error:
            logger.exception("the audit log could not be written")
            raise AuditLogError from error

    def _write_answer(self, answer: Answer, client: str) -> None:
        self._write(describe(answer, client, log_prompts=self.log_prompts))

    def _write(self, record: dict[str, Any]) -> None:
        """Append a record, or none of it."""
        assert self.path is not None
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = (json.dumps({"time": time, **record}, sort_keys=True) + "\n").encode()
        if self._is_renamed(self.path):
            self._release()
        if self._file is None:
            self._open(self.path)
        assert self._file is not None
        if self._torn_at is not None:
            os.ftruncate(self._file, self._torn_at)
        self._torn_at = os.fstat(self._file).st_size
        try:
            if os.write(self._file, line) != len(line):
                raise OSError("the line was written in part")
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, self._torn_at)
            self._torn_at = None
            raise
        self._torn_at = None

    def _open(self, path: Path) -> None:
        """Open and lock the file, and move away an incomplete last line."""
        is_new = not path.exists()
        self._file = os.open(path, FLAGS, 0o600)
        try:
            check_regular(path, os.fstat(self._file).st_mode)
            lock(self._file, path)
            move_torn_line(self._file, path)
            self._torn_at = None
            if is_new:
                sync_folder(path.parent)
        except BaseException:
            self._release()
            raise

    def _is_renamed(self, path: Path) -> bool:
        if self._file is None:
            return False
        try:
            return not os.path.samestat(path.stat(), os.fstat(self._file))
        except FileNotFoundError:
            return True

    def _release(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def close(self) -> None:
        """Write what is still to be written, and close the file."""
        self._thread.shutdown()
        self._release()


def describe(answer: Answer, client: str, *, log_prompts: bool = False) -> dict[str, Any]:
    """Return what became of a request as plain values, with hashes in place of its texts."""
    request = answer.request
    texts = {"prompt": request.prompt, "negative_prompt": request.negative_prompt}
    given = {name: text for name, text in texts.items() if text is not None}
    start, settings = request.start, request.generation_config.model_dump(mode="json")
    if answer.stack.is_remote:  # the other server used its own
        settings = {name: v for name, v in settings.items() if name not in request.unset}
    return {
        "request": request.id,
        "client": client,
        "stack": answer.stack.name,
        "stack_hash": answer.stack.hash,
        **{f"{name}_sha256": hash_text(text) for name, text in given.items()},
        **(given if log_prompts else {}),
        **({"start_image_sha256": hashlib.sha256(start.image).hexdigest()} if start else {}),
        **({"strength": start.strength} if start else {}),
        "settings": settings,
        "seconds": round(answer.seconds, 3),
        "images": [describe_outcome(outcome) for outcome in answer.outcomes],
    }


def describe_outcome(outcome: Outcome) -> dict[str, Any]:
    """Return what became of one image as plain values."""
    values = {
        "seed": outcome.seed,
        "status": outcome.status,
        "stage": outcome.stage,
        "guard": outcome.guard,
        "reason": outcome.reason,
        "categories": list(outcome.categories),
        "pixels_sha256": hash_pixels(outcome.image) if outcome.image is not None else None,
        "trace": outcome.trace.to_json(times=False),
    }
    return {name: value for name, value in values.items() if value not in (None, "", [])}


def hash_pixels(image: Image.Image) -> str:
    """Return the SHA-256 of an image's RGB bytes, the same for every lossless file of it."""
    return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def read_audit_log(path: Path) -> list[dict[str, Any]]:
    """Return the records of an audit log. An incomplete last line is left out.

    Raises:
        FileError: it cannot be read, or a complete line is no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")[:-1]
    except OSError as error:
        raise FileError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    records = [parse_json(line, f"{path} line {n}") for n, line in enumerate(lines, 1)]
    for number, record in enumerate(records, 1):
        if not isinstance(record, dict):
            raise FileError(f"{path} line {number} must be a record, got {type(record).__name__}")
    return records


def lock(file: int, path: Path) -> None:
    """Lock a file against other processes, on systems that can.

    Raises:
        FileError: another process has locked it.
    """
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise FileError(
            f"{str(path)!r} is being written by another server. Stop it, or name another audit log."
        ) from error


def move_torn_line(file: int, path: Path) -> None:
    """Move a last line that is not a complete record to a file of its own."""
    size = os.fstat(file).st_size
    start = find_last_line(file, size)
    line = read_at(file, start, size - start)
    if not line or (line.endswith(b"\n") and is_record(line)):
        return
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    torn = path.with_name(f"{path.name}.torn-{stamp}")
    with os.fdopen(os.open(torn, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
        copy.write(line)
        copy.flush()
        os.fsync(copy.fileno())
    os.ftruncate(file, start)
    os.fsync(file)
    logger.warning("the last line of %s was incomplete; it is in %s", path, torn.name)


def find_last_line(file: int, size: int) -> int:
    """Return the offset at which the last line of a file starts."""
    end = max(0, size - 1)  # a line break at the very end belongs to the last line
    while end > 0:
        begin = max(0, end - BLOCK)
        if (found := read_at(file, begin, end - begin).rfind(b"\n")) >= 0:
            return begin + found + 1
        end = begin
    return 0


def read_at(file: int, offset: int, count: int) -> bytes:
    """Return a number of bytes from an offset on."""
    os.lseek(file, offset, os.SEEK_SET)
    parts = []
    while count > 0 and (part := os.read(file, count)):
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def is_record(line: bytes) -> bool:
    """Return whether a line is a JSON object."""
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def sync_folder(folder: Path) -> None:
    """Write a folder to the disk, so that a new file in it survives a power cut."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
