"""Memory that is kept for the next tensor: fewer page faults, and only where nobody set it."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from safegen.core.allocator import VARIABLES

ROUNDS, BLOCK = 3, 20_000_000
CODE = f"""
import resource, sys
from safegen.core.allocator import keep_freed_memory

def fault():
    blocks = [bytearray(range(1)) * {BLOCK} for _ in range(3)]

if "keep" in sys.argv:
    print(keep_freed_memory())
fault()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range({ROUNDS}):
    fault()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(*arguments, **environment):
    """Return the lines that the code prints in a process of its own."""
    plain = {k: v for k, v in os.environ.items() if k not in VARIABLES}
    command = [sys.executable, "-c", CODE, *arguments]
    found = subprocess.run(
        command, env=plain | environment, capture_output=True, text=True, check=True
    )
    return found.stdout.split()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_freed_memory_is_used_again_without_a_page_fault():
    (returned,) = run()
    known, kept = run("keep")
    assert known == "True"
    assert int(kept) < 0.05 * int(returned)


def test_what_the_environment_sets_is_left_alone():
    assert run("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
