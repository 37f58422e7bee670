"""Images as files: uploads of unknown origin, and images for the client."""

from __future__ import annotations

import io
from typing import Literal

from PIL import Image, ImageOps

from safegen.core.errors import ConfigError
from safegen.core.png import encode_image
from safegen.serve.gate import Outcome
from safegen.serve.service import Answer

OutputFormat = Literal["png", "jpeg", "webp"]
"""Format of an image for the client."""
UPLOAD_FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats of uploads, as Pillow names them."""
MAX_SCANS = 100
"""Most scans of a JPEG file. Encoders write about ten; one of a few bytes passes every pixel."""
BLACK, WHITE = 0, 255
COMPRESS_LEVEL = 3
"""Effort of the compression of PNGs: a third of the time of Pillow's 6, for a tenth more bytes."""


def read_upload(data: bytes, *, side: int, name: str = "image") -> Image.Image:
    """Return the image in an uploaded file, turned as its EXIF says. Takes a thread.

    Of an animation it is the first frame. The size is checked before any pixel is decoded.

    Args:
        data: PNG, JPEG or WebP file.
        side: most pixels of a side.
        name: name of the field, for errors.

    Raises:
        ConfigError: it is no readable image of these formats, or too large.
    """
    try:
        check_scans(data)
        with Image.open(io.BytesIO(data), formats=UPLOAD_FORMATS) as image:
            _check_size(image.size, side, name)
            image.load()
            return ImageOps.exif_transpose(_to_8_bits(image))
    except ConfigError:
        raise
    except Exception as error:  # Pillow raises many kinds for a damaged file
        raise ConfigError(
            f"{name} must be a readable PNG, JPEG or WebP file, got {type(error).__name__}"
        ) from error


def check_scans(data: bytes) -> None:
    """Check that a JPEG file does not keep the decoder busy: 16 MB of scans would for minutes.

    Raises:
        ValueError: it has too many scans.
    """
    if data.startswith(b"\xff\xd8") and data.count(b"\xff\xda") > MAX_SCANS:
        raise ValueError(f"more than {MAX_SCANS} scans")


def flatten(image: Image.Image) -> Image.Image:
    """Return an image as RGB, its transparent parts over white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGBA", rgba.size, (WHITE, WHITE, WHITE, WHITE))
    return Image.alpha_composite(white, rgba).convert("RGB")


def mask_from_alpha(mask: Image.Image) -> Image.Image:
    """Return the mask of OpenAI as ours: its transparent parts are white and redrawn.

    Raises:
        ConfigError: it has no alpha channel.
    """
    if not mask.has_transparency_data:
        raise ConfigError(
            "mask must have an alpha channel, which is 0 where the image is redrawn, got a file "
            "without. Save it as RGBA."
        )
    alpha = mask.convert("RGBA").getchannel("A")
    return alpha.point(lambda value: WHITE if value == 0 else BLACK)


def to_png(image: Image.Image) -> bytes:
    """Return an image as a PNG file without metadata."""
    buffer = io.BytesIO()
    Image.frombytes(image.mode, image.size, image.tobytes()).save(buffer, format="PNG")
    return buffer.getvalue()


def encode_outcome(
    outcome: Outcome,
    answer: Answer,
    output_format: OutputFormat = "png",
    quality: int = 100,
    parameters: str | None = None,
) -> bytes:
    """Return a released image as a file. Takes a thread.

    A PNG has the stack, the request id and the seed under the text key `safegen`, and no prompt.

    Args:
        outcome: a released image.
        answer: the answer that it belongs to.
        output_format: format of the file.
        quality: quality of JPEG and WebP, in [0, 100].
        parameters: text for the key `parameters` of a PNG.

    Raises:
        EngineFaultError: the server signs its images, and this one cannot be signed.
    """
    data, signer = _encode(outcome, answer, output_format, quality, parameters), answer.signer
    if signer is None:
        return data
    media_type = f"image/{output_format}"
    return signer.sign_image(data, media_type, answer.request, outcome.seed, answer.stack)


def _encode(
    outcome: Outcome,
    answer: Answer,
    output_format: OutputFormat,
    quality: int,
    parameters: str | None,
) -> bytes:
    """Return a released image as a file without a signature."""
    image = outcome.image
    assert image is not None, "only a released image is encoded"
    if output_format == "png":
        metadata = {
            "stack": answer.stack.name,
            "stack_hash": answer.stack.hash,
            "request_id": answer.request.id,
            "seed": outcome.seed,
        }
        return encode_image(image, metadata, parameters, compress_level=COMPRESS_LEVEL)
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format=output_format, quality=quality)
    return buffer.getvalue()


def _to_8_bits(image: Image.Image) -> Image.Image:
    """Return an image with 8 bits per channel; Pillow would show 16 bits of gray as white."""
    if not image.mode.startswith("I"):
        return image
    return image.convert("I").point(lambda value: value * (1 / 256)).convert("L")


def _check_size(size: tuple[int, int], side: int, name: str) -> None:
    if max(size) > side:
        raise ConfigError(
            f"{name} must have at most {side} pixels per side, got {size[0]}x{size[1]}. Scale it "
            "down."
        )
