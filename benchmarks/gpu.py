"""Cost of a SafeGen update at the size of SD 1.4 on an accelerator, as a page of results.

    python benchmarks/gpu.py --out gpu.json            # SD 1.4 at 512 pixels, at most 9 minutes
    python benchmarks/gpu.py --tiny --out gpu.json     # seconds on a CPU: the script itself works

Weights are random, the preset is `paper` with accumulation 1. A row is the median of the updates
after `WARMUP`. `share` is the time of the update's matrix products at the rate of one large product
of the same type, measured here, by the time of the update; the products are counted by torch.
Rows: batch by precision; then, in bf16, kernels of attention, weights in bf16, channels_last,
gradient checkpointing and torch.compile. No row starts after `--minutes`; each is written at once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import safegen
from safegen.core.device import describe_device, resolve_device
from safegen.core.errors import SafegenError, first_line
from safegen.data.triplets.triplets import Triplets
from safegen.edits.safegen import SafeGen
from safegen.edits.training.latents import latent_storage
from safegen.edits.training.samples import encode_triplets
from safegen.models.model import DTYPES, Model

sys.path.insert(0, str(Path(__file__).parents[1]))
WARMUP, TIMED = 3, 5
"""Updates before the clock counts, and after."""
BATCHES = {"fp32": (1, 2, 4), "fp16": (1, 4), "bf16": (1, 2, 4, 8, 16, 32)}
CHOICE = 4
"""Batch of the rows on kernels and layouts."""
BUDGET_GB = 12.0
"""Memory of the cards that the table is for."""
COLUMNS = {
    "row": "row",
    "batch": "batch",
    "precision": "precision",
    "seconds": "update, s",
    "seconds_of_a_triplet": "a triplet, s",
    "share": "share",
    "peak_gb": "peak, GB",
    "fits": "fits",
    "first_update_seconds": "first update, s",
    "error": "why not",
}
"""Figure of a row: its column."""


@dataclass(frozen=True)
class Row:
    """One setting of a training that is timed."""

    name: str
    batch: int
    precision: str
    scope: Callable[[Model], AbstractContextManager[Any]] = lambda model: nullcontext()
    """What is around the training."""
    checkpointing: bool = False


@contextmanager
def channels_last(model: Model) -> Iterator[None]:
    """Lay the convolutions' weights out with channels last inside the block."""
    model.denoiser.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        model.denoiser.to(memory_format=torch.contiguous_format)


@contextmanager
def bf16_weights(model: Model) -> Iterator[None]:
    """Hold the weights that are not trained in bf16 inside the block."""
    model.denoiser.to(torch.bfloat16)
    try:
        yield
    finally:
        model.denoiser.to(torch.float32)


@contextmanager
def compiled(model: Model) -> Iterator[None]:
    """Compile the denoiser inside the block."""
    model.denoiser.compile()
    try:
        yield
    finally:
        model.denoiser._compiled_call_impl = None


def rows() -> list[Row]:
    """Return the rows, the most wanted first."""
    table = [Row(f"{p} x {b}", b, p) for p in ("bf16", "fp32", "fp16") for b in BATCHES[p]]
    for backend in ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH"):
        kernel = getattr(SDPBackend, backend)
        table.append(Row(backend.lower(), CHOICE, "bf16", lambda _, k=kernel: sdpa_kernel(k)))
    table += [Row(f"bf16 weights x {b}", b, "bf16", bf16_weights) for b in (1, CHOICE, 16)]
    table.append(Row("channels_last", CHOICE, "bf16", channels_last))
    table.append(Row("gradient checkpointing", CHOICE, "bf16", checkpointing=True))
    table.append(Row("torch.compile", CHOICE, "bf16", compiled))
    return table


def build(tiny: bool, device: str) -> tuple[Model, Triplets]:
    """Return a model of random weights on a device, in fp32, and a few triplets."""
    if tiny:
        from tests.tiny import build_model

        model = build_model("sd1")
    else:
        from tools.interop.files import random_model

        model = random_model()
    model.pipeline.to(device, torch.float32)
    bundled = Triplets.load("mini:skulls")
    return model, Triplets(bundled.folder, bundled.rows[: 4 if tiny else 32], bundled.files)


def product_rate(device: str, dtype: torch.dtype, size: int) -> float:
    """Return the operations per second of a product of two square matrices of a type."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(6):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def wait(device: str) -> None:
    """Wait until the device has done its work."""
    if device != "cpu":
        torch.accelerator.synchronize()


class Bench:
    """Model, triplets with their latents, and what is known about the device."""

    def __init__(self, tiny: bool, device: str, folder: Path) -> None:
        """Build the model, and measure products of matrices and the encoding of images."""
        self.tiny, self.device, self.folder = tiny, device, folder
        self.model, self.triplets = build(tiny, device)
        size = 256 if tiny else 8192
        self.rates = {p: product_rate(device, DTYPES[p], size) for p in BATCHES}
        start = time.perf_counter()
        with latent_storage(folder):
            encode_triplets(self.model, self.triplets, flip=SafeGen.preset("paper").flip)
        wait(device)
        self.encoding = (time.perf_counter() - start) / (3 * len(self.triplets))
        self.operations = self._count()

    def describe(self) -> dict[str, Any]:
        """Return a page of results without rows."""
        rates = ", ".join(f"{p} {rate / 1e12:.1f}" for p, rate in self.rates.items())
        return {
            "title": "Training on an accelerator",
            "summary": "What an update of SafeGen (`paper`, accumulation 1) costs at real size.",
            "model": f"random weights; {self.model.describe()}",
            "date": date.today().isoformat(),
            "machine": f"{describe_device(self.device)}, torch {torch.__version__}, "
            f"safegen {safegen.__version__}, Python {platform.python_version()}",
            "command": "`python benchmarks/gpu.py --out FILE`",
            "n": f"the median of {TIMED} updates after {WARMUP}",
            "tables": [
                {
                    "title": "An update",
                    "text": f"A triplet takes {self.operations / 1e12:.3f} TFLOP of matrix "
                    f"products. One large product runs at {rates} TFLOP/s: `share` is the time at "
                    f"that rate by the real one. An image is encoded in {self.encoding:.3f} s. "
                    f"`fits` says whether {BUDGET_GB:g} GB are enough.",
                    "columns": list(COLUMNS.values()),
                    "rows": [],
                }
            ],
            "rows": [],
        }

    def train(self, row: Row, updates: int, callback: Callable[..., None]) -> None:
        """Run some updates of a row; latents are encoded once."""
        edit = SafeGen.preset(
            "paper",
            training={
                "updates": updates,
                "batch": row.batch,
                "accumulation": 1,
                "precision": row.precision,
                "gradient_checkpointing": row.checkpointing,
            },
        )
        with latent_storage(self.folder), warnings.catch_warnings(), row.scope(self.model):
            warnings.simplefilter("ignore")  # the model is not of the preset's size
            edit.apply(self.model, self.triplets, callback=callback)

    def _count(self) -> float:
        """Return the operations of the matrix products of an update, for one triplet."""
        counted: list[float] = []
        counter = FlopCounterMode(display=False)
        with counter:
            self.train(Row("", 1, "fp32"), 2, lambda *_: counted.append(counter.get_total_flops()))
        return counted[1] - counted[0]

    def measure(self, row: Row) -> dict[str, Any]:
        """Return the figures of a row, or why there are none."""
        times: list[float] = []
        result: dict[str, Any] = {"row": row.name, "batch": row.batch, "precision": row.precision}

        def clock(*_: object) -> None:
            wait(self.device)
            times.append(time.perf_counter())

        if self.device != "cpu":
            torch.accelerator.empty_cache()
            torch.accelerator.reset_peak_memory_stats()
        start = time.perf_counter()
        try:
            self.train(row, WARMUP + TIMED, clock)
        except (SafegenError, RuntimeError) as error:
            return result | {"error": first_line(error)[:200]}
        spans = [b - a for a, b in zip(times[WARMUP - 1 :], times[WARMUP:], strict=False)]
        seconds = statistics.median(spans)
        floor = self.operations * row.batch / self.rates[row.precision]
        result |= {
            "seconds": round(seconds, 5),
            "seconds_of_a_triplet": round(seconds / row.batch, 5),
            "share": round(floor / seconds, 3),
            "first_update_seconds": round(times[0] - start, 2),
        }
        if self.device != "cpu":
            peak = torch.accelerator.max_memory_allocated() / 1e9
            result |= {"peak_gb": round(peak, 2), "fits": peak <= BUDGET_GB}
        return result


def main() -> None:
    """Measure the rows until the time is over, and write what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on any device")
    parser.add_argument("--minutes", type=float, default=8.5, help="no row starts later")
    parser.add_argument("--rows", help="names of rows, separated by commas; default: all")
    arguments = parser.parse_args()
    start, device = time.perf_counter(), resolve_device()
    if device == "cpu" and not arguments.tiny:
        parser.error("there is no accelerator; use --tiny to try the script")
    bench = Bench(arguments.tiny, device, arguments.out.parent / f"{arguments.out.stem}-latents")
    result = bench.describe()
    wanted = arguments.rows.split(",") if arguments.rows else [row.name for row in rows()]
    for row in rows():
        if row.name not in wanted or time.perf_counter() - start > 60 * arguments.minutes:
            continue
        figures = bench.measure(row)
        print(json.dumps(figures), flush=True)
        result["rows"].append(figures)
        result["tables"][0]["rows"].append([figures.get(key) for key in COLUMNS])
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
