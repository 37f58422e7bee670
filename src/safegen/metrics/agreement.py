"""How far two judges agree on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from safegen.metrics.rates import wilson


@dataclass(frozen=True)
class Agreement:
    """Two judges side by side.

    Images that either could not judge stand apart from the four counts.
    """

    both: int
    """Unsafe to both."""
    first: int
    """Unsafe to the first alone."""
    second: int
    """Unsafe to the second alone."""
    neither: int
    unjudged: int
    disagreements: tuple[int, ...]
    """Places in the lists where one says unsafe and the other safe."""

    @property
    def judged(self) -> int:
        """Images that both judged."""
        return self.both + self.first + self.second + self.neither

    @property
    def chance(self) -> float:
        """Agreement to be expected of two judges with these rates that know nothing of each other."""
        n = self.judged
        one, two = (self.both + self.first) / n, (self.both + self.second) / n
        return one * two + (1 - one) * (1 - two)

    @property
    def kappa(self) -> float | None:
        """Cohen's kappa, in [-1, 1]: 1 agrees, 0 is chance.

        None where both gave one and the same answer throughout: undefined.
        """
        return self._kappa((self.both + self.neither) / self.judged)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of kappa: the Wilson interval of the observed agreement, chance held fixed (Cohen 1960, with Wilson for Wald)."""
        low, high = (self._kappa(p) for p in wilson(self.both + self.neither, self.judged))
        return None if low is None or high is None else (max(low, -1.0), high)

    def to_json(self) -> dict[str, Any]:
        """Return plain values for a results file."""
        low, high = self.interval or (None, None)
        return {
            **self.__dict__,
            "disagreements": list(self.disagreements),
            "n": self.judged,
            "kappa": self.kappa,
            "low": low,
            "high": high,
        }

    def _kappa(self, observed: float) -> float | None:
        """(observed - chance) / (1 - chance), Cohen 1960, eq. 1."""
        if self.judged in (self.both, self.neither):
            return None
        return (observed - self.chance) / (1 - self.chance)


def agreement(first: Sequence[bool | None], second: Sequence[bool | None]) -> Agreement:
    """Return how two judges agree on the same images, in the same order.

    Args:
        first: whether each image is unsafe to the first judge; None where it could not judge.
        second: the same for the second.

    Raises:
        ValueError: lengths differ, or there is no image that both judged.
    """
    if len(first) != len(second):
        raise ValueError(
            f"both judges must have seen the same images, got {len(first)} and {len(second)} answers"
        )
    pairs = [(a, b) for a, b in zip(first, second, strict=True) if a is not None and b is not None]
    if not pairs:
        raise ValueError("agreement needs at least one image that both judged, got none")
    return Agreement(
        both=pairs.count((True, True)),
        first=pairs.count((True, False)),
        second=pairs.count((False, True)),
        neither=pairs.count((False, False)),
        unjudged=len(first) - len(pairs),
        disagreements=tuple(
            i
            for i, (a, b) in enumerate(zip(first, second, strict=True))
            if None not in (a, b) and a != b
        ),
    )
