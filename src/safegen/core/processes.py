"""Processes that work on one job together, as torchrun starts them.

They do so inside `shared_job`. Elsewhere, and in a process alone, every function is that of a job
alone: it returns what it was given. Calls are in the same order on all processes. Before each
exchange all of them ask whether one has failed (`joint_errors`), so that none waits for a process
that has left.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from safegen.core.errors import SafegenError, UserError, first_line

if TYPE_CHECKING:
    import torch
    from torch import Tensor, distributed

T = TypeVar("T")
ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables by which torchrun and accelerate describe the processes."""
_gloo_groups: dict[distributed.ProcessGroup, distributed.ProcessGroup] = {}
"""Group that exchanges tensors of the CPU, for a default group that cannot."""


_blocks = [0]
"""Number of `shared_job` blocks that are open. Threads share them, as autograd has its own."""


def process_share() -> tuple[int, int]:
    """Return the rank of this process and the number of those that share the job, else (0, 1)."""
    return launched_processes() if _blocks[0] else (0, 1)


def launched_processes() -> tuple[int, int]:
    """Return the rank of this process and the number that were started together, else (0, 1)."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    values = [os.environ.get(name, "") for name in ENVIRONMENT]
    if not all(values) or not (values[0].isdecimal() and values[1].isdecimal()):
        return 0, 1
    return int(values[0]), int(values[1])


def is_main_process() -> bool:
    """Return whether this process prints, and writes files."""
    return process_share()[0] == 0


def local_rank() -> int | None:
    """Return the index of this process among those of its machine; None if it is alone."""
    text = os.environ.get("LOCAL_RANK", "")
    return int(text) if launched_processes()[1] > 1 and text.isdecimal() else None


def launcher() -> list[str]:
    """Return the words that start safegen in as many processes; for several machines, `safegen`."""
    count = process_share()[1]
    if count == 1 or os.environ.get("LOCAL_WORLD_SIZE") != str(count):
        return ["safegen"]
    return ["torchrun", "--nproc-per-node", str(count), "-m", "safegen"]


def check_alone(job: str, advice: str) -> None:
    """Check that a job that cannot be shared runs in one process.

    Raises:
        UserError: it runs in several.
    """
    if (count := launched_processes()[1]) > 1:
        raise UserError(f"{job} must be run by one process, got {count}. {advice}")


def is_accelerate_alone() -> bool:
    """Return whether accelerate was asked for several processes and started one, as on a CPU."""
    return {"ACCELERATE_USE_CPU", "MASTER_ADDR"} <= os.environ.keys() and "RANK" not in os.environ


def join_processes() -> None:
    """Connect the processes, unless they are.

    Tensors of the CPU go through gloo, those of an NVIDIA device through NCCL.

    Raises:
        SafegenError: the others cannot be reached, or do not connect.
    """
    from torch import cuda, distributed

    if distributed.is_initialized():
        return
    if cuda.is_available() and (rank := local_rank() or 0) < cuda.device_count():
        cuda.set_device(rank)  # with fewer devices a job may be on the CPU
    backend = "cpu:gloo,cuda:nccl" if cuda.is_available() else "gloo"
    try:
        distributed.init_process_group(backend)
    except RuntimeError as error:
        raise SafegenError(
            f"{launched_processes()[1]} processes must all start the same job, and could not be "
            f"connected: {first_line(error)}"
        ) from error


def leave_processes() -> None:
    """Disconnect the processes."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        _gloo_groups.clear()
        distributed.destroy_process_group()


@contextmanager
def without_launcher() -> Iterator[None]:
    """Hide the launcher's variables inside the block, for a library that would share the job."""
    names = (*ENVIRONMENT, "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    hidden = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def shared_job() -> Iterator[None]:
    """Let the processes that were started together share the job of the block; see `joint_errors`.

    Blocks can be nested.
    """
    if launched_processes()[1] == 1:
        yield
        return
    join_processes()
    _blocks[0] += 1
    try:
        with joint_errors():
            yield
    finally:
        _blocks[0] -= 1


@contextmanager
def joint_errors() -> Iterator[None]:
    """Raise the error of one process on all that share the job, and end the block on all at once.

    If several fail, the error of the first in the order of ranks is raised.
    """
    if process_share()[1] == 1:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not getattr(error, "is_joint", False):
            _agree(error)
        raise
    _agree()


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes in the order of ranks; they are pickled."""
    count = process_share()[1]
    if count == 1:
        return [value]
    from torch import distributed

    _agree()
    found: list[Any] = [None] * count
    with _connection_errors():
        distributed.all_gather_object(found, value, group=_cpu_group())
    return found


def sum_values(values: Sequence[float]) -> list[float]:
    """Return the sum of each number over all processes, in float64."""
    if process_share()[1] == 1:
        return list(values)
    import torch
    from torch import distributed

    sums = torch.tensor(list(values), dtype=torch.float64)
    _agree()
    with _connection_errors():
        distributed.all_reduce(sums, group=_cpu_group())
    return sums.tolist()


def gather_rows(value: Tensor, rows: Tensor, size: int) -> Tensor:
    """Return the rows that all processes have computed, each in its place, (size, ...).

    Args:
        value: rows of this process on the CPU, (n, ...).
        rows: their places, (n,); every place is that of one process.
        size: number of places.
    """
    if process_share()[1] == 1:
        return value
    import torch
    from torch import distributed

    kind = torch.uint8 if value.dtype == torch.bool else value.dtype
    whole = torch.zeros(size, *value.shape[1:], dtype=kind)
    whole[rows] = value.to(kind)
    _agree()
    with _connection_errors():
        distributed.all_reduce(whole, group=_cpu_group())
    return whole.to(value.dtype)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace the gradient of each parameter by its sum over all processes."""
    if process_share()[1] == 1:
        return
    import torch
    from torch import distributed

    own = list(parameters)
    used = torch.tensor([p.grad is not None for p in own], dtype=torch.uint8)
    _agree()
    with _connection_errors():
        distributed.all_reduce(used, op=distributed.ReduceOp.MAX, group=_cpu_group())
        for p, is_used in zip(own, used.tolist(), strict=True):
            if is_used:
                gradient = torch.zeros_like(p) if p.grad is None else p.grad
                p.grad = gradient.contiguous()
                distributed.all_reduce(p.grad)


def _agree(error: BaseException | None = None) -> None:
    """Raise the error that a process has, on all of them; they wait here for each other.

    Args:
        error: that of this process.
    """
    import torch
    from torch import distributed

    failed = torch.tensor([error is not None], dtype=torch.uint8)
    found: list[Any] = [None] * process_share()[1]
    with _connection_errors():
        distributed.all_reduce(failed, op=distributed.ReduceOp.MAX, group=_cpu_group())
        if not failed:
            return
        description = None if error is None else _describe(error)
        distributed.all_gather_object(found, description, group=_cpu_group())
    rank = next(i for i, one in enumerate(found) if one is not None)
    is_own = error is not None and rank == process_share()[0]
    joint = error if is_own else _restore(rank, *found[rank])
    joint.is_joint = True  # type: ignore[union-attr]
    raise joint  # type: ignore[misc]


def _describe(error: BaseException) -> tuple[type[BaseException] | None, Any, bool]:
    """Return what other processes need to raise an error; no class for one that is not ours."""
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return type(error), error.args, False
    if isinstance(error, SafegenError):
        return type(error), (str(error),), getattr(error, "is_resumable", False)
    return None, f"{type(error).__name__}: {first_line(error)}", False


def _restore(
    rank: int, kind: type[BaseException] | None, args: Any, is_resumable: bool
) -> BaseException:
    """Return the error of another process."""
    if kind is None:
        return SafegenError(f"process {rank} failed: {args}")
    error = kind.__new__(kind)
    error.args = args
    if isinstance(error, SystemExit):
        error.code = args[0] if args else None
    if is_resumable:
        error.is_resumable = True  # type: ignore[attr-defined]
    return error


@contextmanager
def _connection_errors() -> Iterator[None]:
    """Raise a lost connection as an error in one line."""
    try:
        yield
    except RuntimeError as error:
        lost = SafegenError(
            "a process of this job ended while the others waited for it. See its output; a "
            "training goes on from its last checkpoint with --resume."
        )
        lost.is_joint = True  # type: ignore[attr-defined]
        raise lost from error


def _cpu_group() -> distributed.ProcessGroup | None:
    """Return a group that exchanges tensors of the CPU; None is the default group."""
    from torch import distributed

    default = distributed.group.WORLD
    assert default is not None
    if "gloo" in distributed.get_backend_config(default):
        return None
    if default not in _gloo_groups:
        _gloo_groups[default] = distributed.new_group(backend="gloo")
    return _gloo_groups[default]
