"""Let programs that others wrote read our files: `python -m tools.interop --cache FOLDER`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tools.interop.files import Files
from tools.interop.packages import MissingPackageError, fetch
from tools.interop.scene import Report

READERS = {
    "diffusers": "read_diffusers",
    "stable-diffusion.cpp": "read_sd_cpp",
    "comfyui": "read_comfyui",
    "invokeai": "read_invokeai",
}
"""Program: module here that runs it, in a process of its own."""
MIN_CORRELATION = {"base": 0.999, "patched": 0.999, "kohya": 0.999, "diffusers": 0.999}
"""Result: smallest correlation of its image with diffusers' image of the same weights."""
MAX_LATENT_GAP = {"base": 0.01, "patched": 0.01, "kohya": 0.01}
"""Result: largest |latents - diffusers'| / |diffusers'|. Programs round differently, and ComfyUI
starts from a noise level that is 0.2 % larger."""
FAILED, MISSING = 1, 3
"""Exit status: a check failed; a package cannot be had, and no check failed."""
ROOT = Path(__file__).parents[2]

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def main(
    cache: Annotated[Path, typer.Option(help="Folder for wheels, 4 GB of files, and results.")],
    programs: Annotated[str, typer.Option(help="Comma-separated programs.")] = ",".join(READERS),
) -> None:
    """Write full-size SD 1.x files of random weights, and check how other programs read them.

    Each program needs about 6 GB of memory and a few minutes of one CPU core. Exit status: 0 all
    checks passed, 1 a check failed, 3 a package cannot be had.
    """
    names = programs.split(",")
    if unknown := set(names) - set(READERS):
        raise typer.BadParameter(
            f"unknown {', '.join(sorted(unknown))}; known: {', '.join(READERS)}"
        )
    cache = cache.resolve()
    Files(cache / "files").write()
    missing, failed = 0, 0
    for name in names:
        try:
            folders = fetch(name, cache)
        except MissingPackageError as error:
            typer.echo(f"{name}: not checked: {error}")
            missing += 1
            continue
        start = time.monotonic()
        checks = _run(name, folders, cache)
        checks += [] if name == "diffusers" else _compare(cache / "out", name)
        for check in checks:
            mark = "ok" if check["passed"] else "FAILED"
            typer.echo(f"{name}: {mark}: {check['name']}: {check['result']}")
            failed += not check["passed"]
        typer.echo(f"{name}: {len(checks)} checks in {time.monotonic() - start:.0f} s")
    raise typer.Exit(FAILED if failed else MISSING if missing else 0)


def _run(name: str, folders: list[Path], cache: Path) -> list[dict[str, object]]:
    """Return the checks that a program's process makes."""
    out = cache / "out" / name
    out.mkdir(parents=True, exist_ok=True)
    (out / "checks.json").unlink(missing_ok=True)
    paths = [ROOT, ROOT / "src", *folders]
    code = f"from tools.interop.__main__ import run; run({name!r}, {str(cache)!r})"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "HOME": str(cache)}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=cache,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        last = (process.stderr.strip().splitlines() or ["no message"])[-1]
        result = f"status {process.returncode}: {last}"
        return [{"name": "the program runs", "passed": False, "result": result}]
    checks: list[dict[str, object]] = json.loads((out / "checks.json").read_text("utf-8"))
    return checks


def run(name: str, cache: str) -> None:
    """Run a program in this process and write its checks and results."""
    report = Report(Path(cache, "out", name))
    import_module(f"tools.interop.{READERS[name]}").read(Files(Path(cache, "files")), report)
    report.write()


def _compare(out: Path, name: str) -> list[dict[str, object]]:
    """Return checks of a program's images and latents against those of diffusers."""
    checks: list[dict[str, object]] = []
    for kind, limit in MIN_CORRELATION.items():
        path = out / name / f"{kind}-image.npy"
        reference = out / "diffusers" / f"{'base' if kind == 'base' else 'patched'}-image.npy"
        if path.exists() and reference.exists():
            correlation = float(
                np.corrcoef(np.load(path).ravel(), np.load(reference).ravel())[0, 1]
            )
            entry = f"{kind}: image correlates with diffusers' by {limit} or more"
            passed = correlation >= limit
            checks.append({"name": entry, "passed": passed, "result": f"{correlation:.5f}"})
    for kind, limit in MAX_LATENT_GAP.items():
        path = out / name / f"{kind}-latents.npy"
        reference = out / "diffusers" / f"{'base' if kind == 'base' else 'patched'}-latents.npy"
        if path.exists() and reference.exists():
            ours, theirs = np.load(reference), np.load(path)
            gap = float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours))
            entry = f"{kind}: latents differ from diffusers' by {limit} or less"
            checks.append({"name": entry, "passed": gap <= limit, "result": f"{gap:.4f}"})
    return checks


if __name__ == "__main__":
    app()
