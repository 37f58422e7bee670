"""What a job will cost: images, network passes, time and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Plan:
    """Cost of a job that has not begun, extrapolated from a probe on the same machine."""

    title: str
    """What the job does, in a few words."""
    model: str
    """The model, its device and the type of its weights (`Model.describe`)."""
    images: int
    """Images that are generated."""
    passes: int
    """Samples that go through the denoiser, and once more where a gradient flows back."""
    seconds: float
    """Wall-clock time."""
    memory: int
    """Peak memory in bytes: of the accelerator, or of this process on a CPU."""
    notes: tuple[str, ...] = ()
    """What the figures leave out or assume."""

    def __add__(self, other: Plan) -> Plan:
        """Return the cost of both jobs, one after the other."""
        return replace(
            self,
            title=f"{self.title}, {other.title}",
            images=self.images + other.images,
            passes=self.passes + other.passes,
            seconds=self.seconds + other.seconds,
            memory=max(self.memory, other.memory),
            notes=tuple(dict.fromkeys(self.notes + other.notes)),
        )

    def lines(self) -> list[str]:
        """Return the plan as lines of text."""
        return [
            f"plan: {self.title}",
            f"  model    {self.model}",
            f"  images   {self.images:,} to generate",
            f"  passes   {self.passes:,} samples through the network",
            f"  time     {format_seconds(self.seconds)}",
            f"  memory   {self.memory / 2**30:.1f} GiB at the peak",
            *(f"  note     {note}" for note in self.notes),
        ]


def format_seconds(seconds: float) -> str:
    """Return a time for people, such as `45 s`, `2.4 min` or `3.1 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
