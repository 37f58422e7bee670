"""Memory and CPU time of models of real size with random weights: docs/results/full-size.json.

    python benchmarks/full_size.py --folder /tmp/full-size --out docs/results/full-size.json
    python benchmarks/full_size.py --folder F --rows load-fp16-as-fp32,export-patch  # some rows

Each row runs in a process of its own. `peak` is the largest resident set of the process, `added`
what it is above the imports, and `times` that by the size of the weights, as the row holds them.
`hashed` is by how much SHA-256 was fed, in sizes of the denoiser in fp32. Pages of files that are
mapped count; the kernel takes them back when memory is short, so `anonymous` leaves them out.
The first run writes the base models (4.3 GB for SD 1.4; 14 GB for SDXL with `--sdxl`).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
SELF = Path(__file__).resolve()
GB = 1e9
TEXT = (
    "`export` writes one fp16 file of a folder with fp16 weights, `export-patch` with a patch of "
    "attn1 on it, `export-folder-patch` a diffusers folder, `export-fp32` one fp32 file. The "
    "weights are those that the row has in memory: in fp16, or in fp32 where its name says so. A "
    "hash is one over all weights of the denoiser in fp32."
)


class Watch:
    """CPU seconds, peak memory and hashed bytes of this process from the start of a block."""

    def __init__(self) -> None:
        self.hashed = 0
        self.anonymous = 0
        self._ended = threading.Event()

    def __enter__(self) -> Watch:
        self.before, self.anonymous_before = memory("VmRSS"), memory("RssAnon")
        self.cpu, self.start = cpu_seconds(), time.perf_counter()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.05):
            self.anonymous = max(self.anonymous, memory("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.cpu, self.wall = cpu_seconds() - self.cpu, time.perf_counter() - self.start
        self.peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def count_hashes(self) -> None:
        """Count the bytes that `safegen.core.hashing` feeds to SHA-256 from now on."""
        from safegen.core import hashing

        watch = self

        class Digest:
            def __init__(self) -> None:
                self._inner = hashlib.sha256()
                self.hexdigest = self._inner.hexdigest

            def update(self, data: Any) -> None:
                watch.hashed += memoryview(data).nbytes
                self._inner.update(data)

        def sha256(data: bytes | None = None) -> Any:
            return Digest() if data is None else hashlib.sha256(data)  # the latter are of checksums

        hashing.hashlib = SimpleNamespace(sha256=sha256)  # type: ignore[attr-defined]


def cpu_seconds() -> float:
    """Return the user and system time of this process."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def memory(key: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{key}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(key)


def _load(source: Path, out: Path, **options: Any) -> Any:
    from safegen.models.loading import load

    return load(source, device="cpu", **options)


def _command(*arguments: str) -> None:
    from safegen.cli.main import app

    app([str(a) for a in arguments], standalone_mode=False)


def _export(
    source: Path, out: Path, *, form: str = "single-file", patch: str = "", dtype: str = "fp16"
) -> None:
    target = out.with_suffix(".safetensors") if form == "single-file" else out
    patches = ("--patch", source.parent / patch) if patch else ()
    _command(
        "export", source, "--out", target, "--format", form, "--dtype", dtype, "--no-card", *patches
    )


def _extract_lora(source: Path, out: Path) -> None:
    patch = source.parent / "patch.safetensors"
    target = out.with_suffix(".safetensors")
    options = ("--rank", "16", "--skip-quality", "--no-card", "--out", target)
    _command("patch", "extract-lora", source, patch, *options)


ROWS: dict[str, Callable[[Path, Path], Any]] = {
    "load-fp16-as-fp32": lambda source, out: _load(source, out, dtype="fp32"),
    "load-fp16-as-fp16": lambda source, out: _load(source, out, dtype="fp16"),
    "load-file-as-fp16": lambda source, out: _load(
        source.parent / "base.safetensors", out, dtype="fp16"
    ),
    "load-file-as-fp32": lambda source, out: _load(
        source.parent / "base.safetensors", out, dtype="fp32"
    ),
    "export": _export,
    "export-fp32": lambda source, out: _export(source, out, dtype="fp32"),
    "export-patch": lambda source, out: _export(source, out, patch="patch.safetensors"),
    "export-folder-patch": lambda source, out: _export(
        source, out, form="diffusers", patch="patch.safetensors"
    ),
    "extract-lora": _extract_lora,
}
"""Row: what it runs on the base folder, with a path for its output."""


def make_base(folder: Path, architecture: str) -> None:
    """Write a folder and a file of random fp16 weights, and a patch of attn1, where missing."""
    from safegen.models.checkpoint.diffusers_folder import save_folder
    from safegen.models.checkpoint.metadata import PatchMetadata
    from safegen.models.checkpoint.single_file_writer import save_single_file
    from safegen.models.selectors import select_parameters
    from safegen.patches.patch import Patch
    from tools.interop.files import random_model

    if (folder / "patch.safetensors").exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = random_model(architecture=architecture)
    save_folder(model, folder / "base")
    save_single_file(model, folder / "base.safetensors")
    weights = dict(model.denoiser.named_parameters())
    names = [n for n in select_parameters(model.denoiser, "attn1") if n.endswith(".weight")]
    metadata = PatchMetadata(method="random", base=model.hash, family=model.family)
    change = {name: 1.01 * weights[name].detach().float() for name in names}
    Patch(change, metadata).save(folder / "patch.safetensors")


def measure(row: str, folder: Path) -> dict[str, Any]:
    """Run one row in this process and return its figures."""
    from safegen.core.quiet import silence_libraries
    from safegen.models import loading  # noqa: F401
    from safegen.models.checkpoint import single_file_writer  # noqa: F401
    from safegen.workflows import export  # noqa: F401

    with silence_libraries():
        import diffusers
        from transformers import CLIPTextModel  # noqa: F401

        _ = (diffusers.StableDiffusionPipeline, diffusers.UNet2DConditionModel)
    torch.set_num_threads(1)
    watch, out = Watch(), folder / f"out-{row}"
    _remove(out)
    watch.count_hashes()
    try:
        with watch:
            ROWS[row](folder / "base", out)
        size = sum(
            p.stat().st_size
            for p in [*out.rglob("*"), out.with_suffix(".safetensors")]
            if p.is_file()
        )
    finally:
        _remove(out)
    denoiser, weights = weight_counts(folder / "base")
    added = watch.peak - watch.before
    return {
        "row": row,
        "cpu_seconds": round(watch.cpu, 1),
        "wall_seconds": round(watch.wall, 1),
        "imports_gb": round(watch.before / GB, 2),
        "peak_gb": round(watch.peak / GB, 2),
        "added_gb": round(added / GB, 2),
        "times_weights": round(added / ((4 if "fp32" in row else 2) * weights), 2),
        "anonymous_gb": round((watch.anonymous - watch.anonymous_before) / GB, 2),
        "hashed_denoisers": round(watch.hashed / (4 * denoiser), 2),
        "written_gb": round(size / GB, 2),
    }


def weight_counts(base: Path) -> tuple[int, int]:
    """Return the number of weights of the denoiser, and of all components, from the headers."""
    from safegen.core.tensor_files import read_header

    counts = {}
    for path in base.glob("*/*.safetensors"):
        entries = read_header(path).items()
        sizes = [v["data_offsets"] for k, v in entries if k != "__metadata__"]
        counts[path.parent.name] = sum(b - a for a, b in sizes) // 2
    return counts["unet"], sum(counts.values())


def _remove(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".safetensors").unlink(missing_ok=True)


def main() -> None:
    """Run the rows, each in a process of its own, and write their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="folder for the models")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"some of {', '.join(ROWS)}")
    parser.add_argument("--sdxl", action="store_true", help="SDXL instead of SD 1.4")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder / ("sdxl" if arguments.sdxl else "sd1")
    if arguments.row == "base":
        make_base(folder, "sdxl" if arguments.sdxl else "sd1")
        return
    if arguments.row:
        print(json.dumps(measure(arguments.row, folder)))
        return
    command = [sys.executable, str(SELF), "--folder", str(arguments.folder)]
    command += ["--sdxl"] * arguments.sdxl
    subprocess.run([*command, "--row", "base"], check=True)
    rows, name = [], "SDXL" if arguments.sdxl else "SD 1.4"
    for row in arguments.rows.split(","):
        done = subprocess.run(
            [*command, "--row", row], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append({"model": name, **json.loads(done.stdout.splitlines()[-1])})
        print(json.dumps(rows[-1]), flush=True)
        if arguments.out:
            write_page(arguments.out, rows)


def write_page(out: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows to a page of results, in place of those of the same model and name."""
    known = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    merged = {(row["model"], row["row"]): row for row in [*known, *rows]}
    columns = {
        "model": "model",
        "row": "row",
        "cpu_seconds": "CPU, s",
        "added_gb": "memory above the imports, GB",
        "times_weights": "times the weights",
        "anonymous_gb": "of it not mapped, GB",
        "hashed_denoisers": "hashes of the denoiser",
        "written_gb": "written, GB",
    }
    table = {
        "title": "Loading and writing",
        "text": TEXT,
        "columns": list(columns.values()),
        "rows": [[row[key] for key in columns] for row in merged.values()],
    }
    page = {
        "title": "Models of real size",
        "summary": "What loading and exporting cost in memory and CPU time.",
        "model": "random fp16 weights of the size of SD 1.4 and, where named, of SDXL",
        "date": date.today().isoformat(),
        "machine": "CPU, 1 thread",
        "command": "`python benchmarks/full_size.py --folder FOLDER --out FILE`, and with `--sdxl`",
        "n": "one run of each row, in a process of its own",
        "tables": [table],
        "limits": [
            "No image is generated and nothing is trained here.",
            "Other work on the machine changes the times, and not the other figures.",
        ],
        "rows": list(merged.values()),
    }
    out.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
