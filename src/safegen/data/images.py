"""Reader of image files that people provide."""

from __future__ import annotations

import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from safegen.core.errors import FileError
from safegen.judges.images import flatten_image

CONTACT_SHEET_MARK = "safegen-sheet"
"""Text key of a PNG that is a contact sheet of other images."""
MIN_SIZE = 32
"""Least width and height of an image in pixels."""


def read_image(path: Path) -> Image.Image:
    """Return an image as RGB without metadata, rotated as its EXIF says, transparency on white.

    Raises:
        FileError: the file is missing, or is not a readable image.
    """
    return decode_image(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """Return the bytes of a file.

    Raises:
        FileError: the file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise FileError(f"{path} is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or error
        raise FileError(f"{path} cannot be read: {reason}") from error


def decode_image(data: bytes, path: Path) -> Image.Image:
    """Return the image in the bytes of a file; see `read_image`."""
    try:
        with Image.open(BytesIO(data)) as file:
            if file.mode.startswith(("I", "F")):
                raise FileError(
                    f"{path} must have 8 bits per channel, got mode {file.mode}. Convert it first."
                )
            # a new image from the pixels only, without EXIF, profile or text
            return Image.fromarray(np.asarray(flatten_image(file)))
    except UnidentifiedImageError as error:
        raise FileError(f"{path} is not an image of a known format") from error
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        reason = " ".join(str(error).split())
        raise FileError(f"{path} is an image that cannot be read: {reason}") from error


def crop_square(
    image: Image.Image, size: int, resample: Image.Resampling = Image.Resampling.BILINEAR
) -> Image.Image:
    """Return the middle of an image as a square of `size` pixels, resized by its short side."""
    scale = size / min(image.size)
    if scale != 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def is_contact_sheet(path: Path) -> bool:
    """Return whether a file is a contact sheet of a report; False if it cannot be read."""
    try:
        with Image.open(path) as image:
            return CONTACT_SHEET_MARK in image.info
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return False


def format_size(image: Image.Image) -> str:
    """Return an image's size as WIDTHxHEIGHT."""
    return f"{image.width}x{image.height}"


def size_error(image: Image.Image) -> str | None:
    """Return the reason why an image is too small, or None."""
    if min(image.size) >= MIN_SIZE:
        return None
    return f"a side must be at least {MIN_SIZE} pixels, got {format_size(image)}"
