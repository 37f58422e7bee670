"""PNG files in memory, with metadata that reads back as it was written."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from typing import Any

from PIL import Image


def encode_image(
    image: Image.Image,
    metadata: Mapping[str, Any],
    parameters: str | None = None,
    *,
    compress_level: int = 6,
) -> bytes:
    """Return a PNG with metadata under the text key `safegen`. Equal inputs give equal bytes.

    Args:
        image: the image.
        metadata: plain values.
        parameters: text for the key `parameters`, which web UIs read; see `parameters_text`.
        compress_level: effort of the compression, in [0, 9].
    """
    from PIL.PngImagePlugin import PngInfo

    info, buffer = PngInfo(), io.BytesIO()
    info.add_text("safegen", json.dumps(metadata, sort_keys=True))
    if parameters is not None:
        info.add_text("parameters", parameters)
    image.save(buffer, format="PNG", pnginfo=info, compress_level=compress_level)
    return buffer.getvalue()
