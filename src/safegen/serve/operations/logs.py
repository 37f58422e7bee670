"""Logs: one JSON object per line on stderr."""

from __future__ import annotations

import json
import logging
import traceback
from datetime import UTC, datetime
from typing import Any

from safegen.serve.operations.context import CONTEXT


class JsonFormatter(logging.Formatter):
    """Formats a record as one line of JSON.

    An exception is logged by its class and its places in the code; its text only with
    `log_prompts`, since it may quote a prompt.
    """

    def __init__(self, *, log_prompts: bool = False) -> None:
        super().__init__()
        self.log_prompts = log_prompts

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        context = CONTEXT.get()
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **({"request": context.id} if context else {}),
            **getattr(record, "fields", {}),
        }
        if record.exc_info and (error := record.exc_info[1]) is not None:
            frames = traceback.extract_tb(error.__traceback__)
            line["error"] = type(error).__name__
            line["places"] = [f"{f.filename}:{f.lineno} {f.name}" for f in frames]
            if self.log_prompts:
                line["error_message"] = str(error)
        return json.dumps(line, default=str)


def log_config(*, log_prompts: bool = False) -> dict[str, Any]:
    """Return the settings of `logging.config` that send all logs to stderr as JSON lines."""
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"json": {"()": JsonFormatter, "log_prompts": log_prompts}},
        "handlers": {
            "stderr": {
                "class": "logging.StreamHandler",
                "formatter": "json",
                "stream": "ext://sys.stderr",
            }
        },
        "root": {"handlers": ["stderr"], "level": "WARNING"},
        "loggers": {"safegen": {"level": "INFO"}, "uvicorn": {"level": "WARNING"}},
    }
