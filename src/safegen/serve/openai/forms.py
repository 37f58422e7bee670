"""Multipart forms of the OpenAI client: files, and fields with objects in brackets."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect

from safegen.core.errors import ConfigError
from safegen.serve.http import ClientLeftError
from safegen.serve.images import flatten, mask_from_alpha, read_upload, to_png
from safegen.serve.messages import StartImage

MAX_FILES = 20
"""Most files of a form."""
MAX_FIELDS = 200
"""Most other fields of a form."""
PART = re.compile(r"\[([^\[\]]*)\]")
"""Name in brackets."""
IMAGE_STRENGTH, MASK_STRENGTH = 0.8, 1.0
"""Strengths by default: those of diffusers' pipelines."""


EDIT_FORM: dict[str, Any] = {
    "required": True,
    "content": {
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "required": ["image", "prompt"],
                "properties": {
                    "image": {"type": "string", "format": "binary"},
                    "mask": {"type": "string", "format": "binary"},
                    "prompt": {"type": "string"},
                    "model": {"type": "string"},
                    "n": {"type": "integer", "minimum": 1},
                    "size": {"type": "string"},
                    "response_format": {"enum": ["b64_json", "url"]},
                    "output_format": {"enum": ["png", "jpeg", "webp"]},
                    "output_compression": {"type": "integer", "minimum": 0, "maximum": 100},
                    "stream": {"type": "boolean"},
                    "safegen": {"type": "string", "description": "JSON, or safegen[seed] ..."},
                },
            }
        }
    },
}
"""Schema of the form of an edit, which FastAPI cannot derive."""


@dataclass
class EditForm:
    """Fields and files of an edit."""

    fields: dict[str, Any] = field(default_factory=dict)
    files: dict[str, list[bytes]] = field(default_factory=dict)
    """Files by the name of their field, without brackets."""


async def read_form(request: Request) -> EditForm:
    """Return the form of a request, its files in memory.

    Raises:
        HTTPException: it is no valid form, or has too many fields.
        ConfigError: a field is both a value and an object.
        ClientLeftError: the client left.
    """
    found = EditForm()
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    data = await value.read()
                    found.files.setdefault(name.removesuffix("[]"), []).append(data)
                elif value or name == "prompt":
                    add_field(found.fields, name, value)
    except ClientDisconnect as error:
        raise ClientLeftError from error
    return found


def add_field(fields: dict[str, Any], name: str, value: str) -> None:
    """Add a field to the values of a form; `safegen[seed]` goes into the object `safegen`.

    Raises:
        ConfigError: a field is both a value and an object.
    """
    root, parts = name.partition("[")[0], PART.findall(name)
    path = [root, *parts] if name == root + "".join(f"[{part}]" for part in parts) else [name]
    if path == ["safegen"]:
        fields["safegen"] = {**_object(fields.get("safegen", {})), **_object(_parse(value))}
        return
    for part in path[:-1]:
        fields = fields.setdefault(part, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{name} must be a value or an object, got both")
    if isinstance(fields.get(path[-1]), dict):
        raise ConfigError(f"{name} must be a value or an object, got both")
    fields[path[-1]] = value


def _parse(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _object(value: object) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ConfigError("safegen must be a JSON object, or fields such as safegen[seed]")
    return value


def read_start(form: EditForm, strength: float | None, side: int) -> StartImage:
    """Return the image that an edit starts from. Takes a thread.

    Args:
        form: the form.
        strength: part of the schedule that the image is noised to; None for the default.
        side: most pixels of a side.

    Raises:
        ConfigError: a file is missing, unreadable or too large, or there are several.
    """
    for name in form.files.keys() - {"image", "mask"}:
        raise ConfigError(
            f"{name} must be left out, got a file. Only image and mask are supported."
        )
    image = read_upload(_single_file(form, "image"), side=side, name="image")
    mask = None
    if "mask" in form.files:
        upload = read_upload(_single_file(form, "mask"), side=side, name="mask")
        if upload.size != image.size:
            raise ConfigError(
                f"mask must have the size of the image, {image.width}x{image.height}, got "
                f"{upload.width}x{upload.height}"
            )
        mask = to_png(mask_from_alpha(upload))
    default = IMAGE_STRENGTH if mask is None else MASK_STRENGTH
    return StartImage(to_png(flatten(image)), strength or default, mask)


def _single_file(form: EditForm, name: str) -> bytes:
    files = form.files.get(name, [])
    if len(files) != 1:
        raise ConfigError(f"{name} must be one file, got {len(files)} files")
    return files[0]
