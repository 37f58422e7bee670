"""The audit log: one JSON line per request, written before its answer is sent."""

from __future__ import annotations

import hashlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safegen.serve.service import Answer


class AuditLog:
    """Append-only file of JSON lines. None as path writes nothing."""

    def __init__(self, path: Path | None = None, *, log_prompts: bool = False) -> None:
        self.path, self.log_prompts = path, log_prompts
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        self._file = os.open(path, flags, 0o600) if path is not None else None

    def write(self, record: dict[str, Any]) -> None:
        """Append one record; it is on the disk once this returns."""
        if self._file is not None:
            stamped = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), **record}
            os.write(self._file, (json.dumps(stamped, sort_keys=True) + "\n").encode())
            os.fsync(self._file)

    def write_answer(self, answer: Answer, client: str) -> None:
        """Append what became of a request: hashes of its texts, its stack, traces and actions."""
        request = answer.request
        self.write(
            {
                "request": request.id,
                "client": client,
                "stack": answer.stack.name,
                "stack_hash": answer.stack.hash,
                "prompt_sha256": hash_text(request.prompt),
                **({"prompt": request.prompt} if self.log_prompts else {}),
                "images": [
                    {"seed": o.seed, "status": o.status, "trace": o.trace.to_json(times=False)}
                    for o in answer.outcomes
                ],
            }
        )

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def hash_text(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
