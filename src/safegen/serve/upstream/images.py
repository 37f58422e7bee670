"""Images of the other server: decoded within limits, without their metadata."""

from __future__ import annotations

import base64
import io

from PIL import Image

from safegen.serve.engine.base import UpstreamError
from safegen.serve.images import UPLOAD_FORMATS, check_scans, flatten


def decode_base64(text: object) -> bytes:
    """Return the bytes of a base64 text, with or without the start of a data address.

    Raises:
        UpstreamError: it is none.
    """
    if not isinstance(text, str):
        raise UpstreamError("the other server answered with an image that is not base64")
    head, comma, rest = text.partition(",")
    if comma and head.startswith("data:") and head.endswith(";base64"):
        text = rest
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise UpstreamError("the other server answered with an image that is not base64") from error


def decode_image(data: bytes, max_side: int) -> Image.Image:
    """Return the pixels of an image file in RGB, and nothing else of it.

    Args:
        data: PNG, JPEG or WebP file.
        max_side: most pixels of a side. The size is read before the pixels are decoded.

    Raises:
        UpstreamError: it is no such file, is cut off, or is larger.
    """
    try:
        check_scans(data)
        with Image.open(io.BytesIO(data), formats=UPLOAD_FORMATS) as image:
            size = image.size
            if max(size) <= max_side:
                pixels = flatten(image)  # decodes the first frame
                return Image.frombytes("RGB", pixels.size, pixels.tobytes())  # no metadata
    except Exception as error:  # Pillow raises many kinds, and warnings may be errors
        raise UpstreamError(
            f"the other server answered with an invalid image: {type(error).__name__}"
        ) from error
    raise UpstreamError(
        f"an image of the other server must have sides of at most {max_side} pixels (max_side), "
        f"got {size[0]} x {size[1]}"
    )
