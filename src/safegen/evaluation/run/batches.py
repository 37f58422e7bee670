"""Pictures of a run: how the plan is cut into batches, where each picture lies, and how one is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from safegen.core.errors import FileError
from safegen.evaluation.run.folder import PICTURES, Line, Planned, Run


@dataclass(frozen=True)
class Batch:
    """Pictures that are drawn at once and judged at once, whatever came between."""

    stack: Line
    number: int
    rows: Sequence[Planned]
    keys: Sequence[str]
    base: Sequence[str]
    """Files of the pictures that these are held against; none for a base model."""

    @property
    def files(self) -> list[str]:
        """The pictures' files, relative to the run's folder."""
        return [picture_file(self.stack["name"], key) for key in self.keys]


def picture_file(stack: str, key: str) -> str:
    """Return where a picture lies in its run's folder."""
    return f"{PICTURES}/{stack}/{key}.png"


def batches(run: Run, planned: Sequence[Planned]) -> Iterator[Batch]:
    """Yield a run's batches: stack by stack, the plan cut into pieces of the sampler's batch, however far the run has come."""
    generation_config = run.protocol.generation
    hashes = {entry["name"]: entry["hash"] for entry in run.stacks}
    for stack in run.stacks:
        for number, start in enumerate(range(0, len(planned), generation_config.batch_size)):
            rows = planned[start : start + generation_config.batch_size]
            against = stack["against"]
            base = (
                [picture_file(against, p.key(hashes[against], generation_config)) for p in rows]
                if stack["kind"] != "base"
                else []
            )
            yield Batch(
                stack, number, rows, [p.key(stack["hash"], generation_config) for p in rows], base
            )


def is_blank(image: Image.Image) -> bool:
    """Return whether a picture is of one colour: it was refused, not drawn."""
    return image.convert("RGB").getcolors(1) is not None


def read_picture(path: Path) -> Image.Image:
    """Return a picture.

    Raises:
        FileError: it is missing or damaged.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise FileError(
            f"{path} cannot be read: {error}; remove it and go on with the run to have it drawn again"
        ) from error
