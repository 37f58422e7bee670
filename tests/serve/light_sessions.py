"""Sessions of worker processes that load no model: the prompt says what happens."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import numpy as np
from PIL import Image

from safegen.core.errors import ConfigError
from safegen.guards.core.result import GeneratedImage, GuardRecord, GuardTrace
from safegen.serve.messages import GuardInfo, StackInfo

GUARDS = ("prompt-filter", "judge-filter")


def noise(seed: int) -> Image.Image:
    """Return the image of a seed."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8))


def describe(name: str, **more) -> StackInfo:
    """Return a stack with two guards."""
    guards = GuardInfo(GUARDS[0], True, False), GuardInfo(GUARDS[1], False, True, "j", ("skulls",))
    return StackInfo(name, "light", "a" * 64, guards, size=(8, 8), **more)


class LightSession:
    """Makes noise. The `ms` of a record is the number of requests in its batch."""

    def __init__(self, info: StackInfo) -> None:
        self.info = info

    def generate(self, requests, report):
        prompts = " ".join(request.prompt for request in requests)
        for step in range(60 if "slow" in prompts else 2):
            report(step / 60)
            time.sleep(0.05 if "slow" in prompts else 0)
        if "hang" in prompts:
            time.sleep(1000)
        if "kill" in prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        if "exit" in prompts:
            raise SystemExit(3)
        if "memory" in prompts:
            raise MemoryError
        if "device" in prompts:
            raise RuntimeError("CUDA error: device-side assert triggered")
        if "refuse" in prompts:
            raise ConfigError("prompt must be polite")
        if "poison" in prompts:
            raise RuntimeError("secret prompt")
        if "function" in prompts:
            return lambda: None
        records = tuple(GuardRecord(name, calls=1, ms=len(requests)) for name in GUARDS)
        trace = GuardTrace("none", "", records)
        images = [[GeneratedImage(noise(s), trace) for s in r.seeds] for r in requests]
        return images[1:] if "short" in prompts else images

    def check_prompts(self, prompts):
        return [GuardTrace("none", "", (GuardRecord(GUARDS[0], calls=1),)) for _ in prompts]


@contextmanager
def open_light(config, spec):
    """Yield a session; `missing` cannot be loaded, and `slow` takes a while."""
    if spec == "missing":
        raise ConfigError("the stack 'missing' does not exist")
    if spec == "slow":
        time.sleep(1000)
    yield LightSession(describe(spec))
