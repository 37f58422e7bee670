"""Images as files: uploads of unknown origin, and images for the client."""

from __future__ import annotations

import io
import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig
from safegen.guards.core.result import GuardTrace
from safegen.serve.engine.base import UpstreamError
from safegen.serve.gate import Outcome
from safegen.serve.images import encode_outcome, flatten, mask_from_alpha, read_upload, to_png
from safegen.serve.messages import ImageRequest, StackInfo
from safegen.serve.service import Answer
from safegen.serve.upstream.images import decode_image


def encode(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_upload_is_read_from_every_format(format):
    image = Image.new("RGB", (24, 16), (200, 30, 30))
    found = read_upload(encode(image, format), side=64)
    assert found.size == (24, 16)
    assert max(abs(a - b) for a, b in zip(found.getpixel((5, 5)), (200, 30, 30), strict=True)) < 6


def test_an_upload_is_turned_as_its_exif_says():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert read_upload(encode(Image.new("RGB", (24, 16)), "JPEG", exif=exif), side=64).size == (
        16,
        24,
    )


def test_a_decompression_bomb_is_refused_before_it_is_decoded():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0" * 99))
    with pytest.raises(ConfigError, match="image must"):
        read_upload(bomb, side=1024)
    large = encode(Image.new("1", (65, 8)))
    with pytest.raises(ConfigError, match="at most 64 pixels per side, got 65x8"):
        read_upload(large, side=64)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(mode):
    data = encode(Image.new(mode, (64, 64)), "JPEG", progressive=True)
    assert read_upload(data, side=64).size == (64, 64)
    scan = data[data.rindex(b"\xff\xda") : -2]  # the last one, without the end of the image
    bomb = data[:-2] + scan * 1000 + data[-2:]
    with pytest.raises(ConfigError, match="image must be a readable PNG, JPEG or WebP file"):
        read_upload(bomb, side=64)
    with pytest.raises(UpstreamError, match="an invalid image"):
        decode_image(bomb, 64)


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", encode(Image.effect_noise((32, 32), 80))[:400], b"RIFF"],
    ids=["empty", "gif", "header", "half", "webp"],
)
def test_a_damaged_upload_is_refused(data):
    with pytest.raises(ConfigError, match="mask must be a readable PNG, JPEG or WebP file"):
        read_upload(data, side=64, name="mask")


def test_a_format_beyond_the_three_is_refused():
    with pytest.raises(ConfigError, match="must be a readable"):
        read_upload(encode(Image.new("RGB", (8, 8)), "BMP"), side=64)


def test_transparent_parts_lie_over_white_and_are_redrawn():
    image = Image.new("RGBA", (16, 8), (255, 0, 0, 255))
    image.paste((0, 0, 255, 0), (0, 0, 8, 8))
    assert flatten(image).getpixel((0, 0)) == (255, 255, 255)
    assert flatten(image).getpixel((12, 0)) == (255, 0, 0)
    mask = mask_from_alpha(image)
    assert (mask.mode, mask.getpixel((0, 0)), mask.getpixel((12, 0))) == ("L", 255, 0)
    with pytest.raises(ConfigError, match="mask must have an alpha channel"):
        mask_from_alpha(image.convert("RGB"))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK"])
def test_every_mode_of_pixels_is_read(mode):
    gray = Image.new("L", (8, 8), 255 if mode == "1" else 150)
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 150 * 256, np.uint16))
    else:
        image = gray.convert(mode) if mode != "CMYK" else gray.convert("RGB").convert(mode)
    data = encode(image, "JPEG" if mode == "CMYK" else "PNG")
    found = flatten(read_upload(data, side=64))
    assert found.mode == "RGB"
    assert np.abs(np.asarray(found).astype(int) - gray.getpixel((0, 0))).max() <= 3


def test_a_png_for_the_engine_carries_no_metadata():
    image = read_upload(encode(Image.new("RGB", (8, 8)), "PNG", icc_profile=b"profile"), side=64)
    with Image.open(io.BytesIO(to_png(flatten(image)))) as found:
        assert not found.info


def outcome(image):
    config = GenerationConfig()
    request = ImageRequest("the-id", "a secret prompt", "s", (7,), config)
    released = Outcome("released", GuardTrace("none", ""), 7, image)
    return released, Answer(request, (released,), StackInfo("s", "mini", "ab" * 32))


def test_a_png_names_stack_request_and_seed_and_no_prompt():
    image = Image.effect_noise((16, 16), 80).convert("RGB")
    data = encode_outcome(*outcome(image))
    assert b"secret" not in data
    with Image.open(io.BytesIO(data)) as found:
        assert found.tobytes() == image.tobytes()
        assert json.loads(found.text["safegen"]) == {
            "request_id": "the-id",
            "seed": 7,
            "stack": "s",
            "stack_hash": "ab" * 32,
        }


def test_quality_makes_jpeg_and_webp_smaller():
    image = Image.effect_noise((64, 64), 80).convert("RGB")
    for kind in ("jpeg", "webp"):
        low, high = (encode_outcome(*outcome(image), kind, quality) for quality in (0, 100))
        assert len(low) < len(high)
        assert Image.open(io.BytesIO(low)).format == kind.upper()


def test_only_a_released_image_is_encoded():
    blocked = Outcome("blocked", GuardTrace("black", "f: unsafe"), 7)
    with pytest.raises(AssertionError):
        encode_outcome(blocked, outcome(Image.new("RGB", (8, 8)))[1])
