"""Images for `response_format: url`: in memory, under names that cannot be guessed, for a while."""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from safegen.core.errors import ConfigError

NAME_BYTES = 32
"""Random bytes of a name: it is the only permission that its image needs."""


@dataclass(frozen=True)
class StoredImage:
    """A released image as a file."""

    data: bytes
    media_type: str
    expires: float
    """Time after which it is gone, of the store's clock."""


class ImageStore:
    """Released images of the last seconds, the oldest of which make place for new ones."""

    def __init__(
        self, max_bytes: int, seconds: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Store the limits.

        Args:
            max_bytes: most bytes of all images.
            seconds: time for which an image is stored.
            clock: the time in seconds.
        """
        self.max_bytes, self.seconds, self.num_bytes = max_bytes, seconds, 0
        self._clock, self._images = clock, OrderedDict[str, StoredImage]()

    def add(self, data: bytes, media_type: str) -> str:
        """Store an image and return its name.

        Raises:
            ConfigError: it is larger than the store.
        """
        if len(data) > self.max_bytes:
            raise ConfigError(
                f"response_format must be b64_json for an image of {len(data)} bytes, got 'url'. "
                f"The server stores {self.max_bytes} bytes."
            )
        self._remove_old(self.max_bytes - len(data))
        name = secrets.token_urlsafe(NAME_BYTES)
        self._images[name] = StoredImage(data, media_type, self._clock() + self.seconds)
        self.num_bytes += len(data)
        return name

    def get(self, name: str) -> StoredImage | None:
        """Return an image by its name; None if there is none, or no longer."""
        self._remove_old(self.max_bytes)
        return self._images.get(name)

    def _remove_old(self, max_bytes: int) -> None:
        """Remove what has expired, and the oldest images until the rest has `max_bytes`."""
        while self._images:
            oldest = next(iter(self._images.values()))
            if oldest.expires > self._clock() and self.num_bytes <= max_bytes:
                return
            self._images.popitem(last=False)
            self.num_bytes -= len(oldest.data)
