"""Shards of a run: whole batches, so that each image is generated with the same others."""

from __future__ import annotations

import re
from collections.abc import Sequence

from safegen.core.errors import FileError
from safegen.data.shards import Shard, deal_units
from safegen.evaluation.run.folder import Run
from safegen.evaluation.samples import EvalSample, canonical


def select_batches(shard: Shard | None, samples: Sequence[EvalSample], size: int) -> frozenset[int]:
    """Return the numbers of the batches that belong to a shard; all without one.

    A batch belongs to one shard for every stack, so that an edited image and the base model's lie
    in the same run.

    Args:
        shard: the shard.
        samples: samples of one stack.
        size: samples of a batch.
    """
    count, index = (1, 1) if shard is None else (shard.count, shard.index)
    owners = deal_batches(samples, size, count)
    return frozenset(number for number, owner in enumerate(owners) if owner == index)


def deal_batches(samples: Sequence[EvalSample], size: int, count: int) -> list[int]:
    """Return the index of the shard that each batch belongs to, from 1.

    Args:
        samples: samples of one stack.
        size: samples of a batch.
        count: number of shards.
    """
    starts = range(0, len(samples), size)
    if count == 1:
        return [1] * len(starts)
    names = [canonical([(s.id, s.seed) for s in samples[at : at + size]]) for at in starts]
    return deal_units(names, count)


def count_samples(run: Run) -> int:
    """Return how many samples of one stack belong to the shard of a run."""
    size = run.protocol.generation.batch_size
    numbers = select_batches(run.card.shard, run.samples, size)
    return sum(i // size in numbers for i in range(len(run.samples)))


def device_kind(device: str) -> str:
    """Return a device of a card without the number of the GPU, which decides nothing."""
    return re.sub(r":\d+", "", device)


def check_whole(run: Run) -> None:
    """Raise if a run is one shard of several.

    Raises:
        FileError: it is.
    """
    if run.card.shard is not None:
        raise FileError(
            f"{run.folder} must be a whole run, got shard {run.card.shard}. "
            "Merge the shards first: safegen merge RUN... --out RUN"
        )
