"""What every program generates, and how its result is handed over."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import json
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

PROMPT, NEGATIVE = "a castle covered in skulls", ""
SEED, STEPS, GUIDANCE, SIZE = 42, 2, 5.0, 128
"""Euler steps; pixels."""


def start_noise() -> Tensor:
    """Return the standard normal noise that every program starts from."""
    generator = torch.Generator("cpu").manual_seed(SEED)
    return torch.randn(1, 4, SIZE // 8, SIZE // 8, generator=generator)


@dataclass
class Report:
    """Checks of one program: each has a name, whether it passed, and its result."""

    out: Path
    checks: list[dict[str, Any]] = field(default_factory=list)

    def check(self, name: str, result: object, *, passed: bool) -> None:
        """Add a check."""
        self.checks.append({"name": name, "passed": bool(passed), "result": str(result)})

    def save(self, name: str, value: Any) -> None:
        """Write an array for the comparison."""
        np.save(self.out / f"{name}.npy", np.asarray(value))

    def write(self) -> None:
        """Write the checks."""
        (self.out / "checks.json").write_text(json.dumps(self.checks, indent=2), encoding="utf-8")


class _TorchvisionStub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Importer of empty modules below `torchvision`, which nothing of SD 1.x calls."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _EmptyModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__version__ = "0.0.0"  # type: ignore[attr-defined]


class _EmptyModule(types.ModuleType):
    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def stub_torchvision() -> None:
    """Let programs import torchvision, after libraries have looked for the real one."""
    import diffusers  # noqa: F401
    import transformers  # noqa: F401

    sys.meta_path.append(_TorchvisionStub())
