"""Memory that the C library keeps for the next tensor instead of returning it to the system."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Options of glibc's `mallopt`, see mallopt(3)."""
OPTIONS = {M_MMAP_THRESHOLD: 2**25, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 2**26}
"""Bytes from which on a block is mapped on its own (glibc's most), bytes of free memory at the end
of the heap that are kept, and bytes by which the heap grows."""
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")
"""Environment variables of glibc by which a user sets them."""


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for the next tensor; return whether it can.

    By default glibc returns the memory of large tensors to the system, and the next ones cost a
    page fault for every 4 KB: up to a tenth of the CPU time of images of the bundled model. Values
    do not change. The command line calls this before it generates; another program may.

    It has an effect on Linux with glibc, unless environment variables set these options.
    """
    if sys.platform != "linux" or any(name in os.environ for name in VARIABLES):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    return mallopt is not None and all(mallopt(*option) for option in OPTIONS.items())
