"""Rate limits of a client."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from safegen.core.errors import ConfigError, SafegenError


class RateLimitError(SafegenError):
    """The client has reached its rate limit. It may try again later."""

    def __init__(self, noun: str, per_minute: int, retry_after: int) -> None:
        """Build the message.

        Args:
            noun: what is limited: requests or images.
            per_minute: the limit.
            retry_after: seconds after which the request would pass.
        """
        super().__init__(
            f"{noun} must be <= {per_minute} per minute for this token. "
            f"Try again in {retry_after} seconds."
        )
        self.retry_after = retry_after


class TokenBucket:
    """Rate limit that permits a minute's share at once and refills evenly.

    Within any minute at most twice the limit passes; over longer times, the limit.
    """

    def __init__(
        self, noun: str, per_minute: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Start with a full bucket.

        Args:
            noun: what is limited: requests or images.
            per_minute: the limit.
            clock: time in seconds that never goes back.
        """
        self.noun, self.per_minute, self._clock = noun, per_minute, clock
        self._level, self._time = float(per_minute), clock()

    def take(self, count: int = 1) -> None:
        """Take out a number of requests or images.

        Raises:
            ConfigError: the number is larger than the bucket.
            RateLimitError: there are fewer left.
        """
        if count > self.per_minute:
            raise ConfigError(
                f"n must be <= {self.per_minute} for this token, got {count}. "
                f"It may make {self.per_minute} {self.noun} per minute"
            )
        now, rate = self._clock(), self.per_minute / 60
        self._level = min(self.per_minute, self._level + (now - self._time) * rate)
        self._time = now
        if count > self._level:
            missing = (count - self._level) / rate
            raise RateLimitError(self.noun, self.per_minute, max(1, math.ceil(missing)))
        self._level -= count
