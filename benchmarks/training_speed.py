"""Measure SafeGen's `paper` preset beside the published training step, at equal work.

    python benchmarks/training_speed.py --out training_speed.json    # about 4 minutes, one thread
    python benchmarks/training_speed.py --full-size --out training_speed.json    # 6 minutes, 9 GB

Equal work: the same model (`mini`), triplets, losses, optimizer, clipping and averaging, and
updates of five micro-steps with one triplet each. The published step is restated from
the script of the release (LetterLiGo/SafeGen_CCS2024 at 20f627b)
on the installed diffusers, torch and accelerate, with the attention that diffusers chooses. In a
micro-step it decodes three PNG files, encodes them (samples of the posterior), encodes the blank
text, calls the UNet three times with gradients (the result for the censored image is not used) and
goes back once; in an update it averages all weights of the UNet. Trackers, validation images and
checkpoints are left out of both. `safegen` is the library's own call, with its log. What it
computes before the first update is reported apart.

Each run is a process of its own, with one thread; the order is A B, B A, A B, and so on. Time is
CPU time. Memory is the peak of resident memory from the loaded model on, preparation included.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from safegen.data.triplets.triplets import ROLES, Triplets
from safegen.edits.safegen import SafeGen
from safegen.edits.training.samples import preprocess
from safegen.edits.training.trainer import Trainer
from safegen.models.loading import load
from safegen.models.model import Model

MICRO_STEPS = 5
"""Forward passes of an update, with one triplet each."""
WEIGHTS = {"mosaic": 0.1, "preserve": 0.9}
RUNS = ("published", "safegen")
FULL_SIZE = 512
"""Pixels of an image at full size."""
FULL_COLUMNS = ("precision", "CPU s per update", "encoding of a triplet, CPU s", "peak, GiB")
assert Trainer  # imported before the memory is measured


class TripletImages(Dataset[dict[str, Tensor]]):
    """Triplets as the published script reads them: decoded at each access."""

    def __init__(self, model: Model, triplets: Triplets) -> None:
        self.model, self.triplets = model, triplets

    def __len__(self) -> int:
        return len(self.triplets)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        images = zip(ROLES, self.triplets.images(i), strict=True)
        tokenizer = self.model.pipeline.tokenizer
        tokens = tokenizer(
            "", padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt"
        )
        pixels = {role: preprocess(image, self.model.size) for role, image in images}
        return pixels | {"tokens": tokens.input_ids[0]}


def run_published(
    model: Model, triplets: Triplets, precision: str, updates: int, done: Callable[[], None]
) -> None:
    """Train with the published step and call `done` after every update."""
    accelerator = Accelerator(
        gradient_accumulation_steps=MICRO_STEPS,
        mixed_precision="no" if precision == "fp32" else precision,
        cpu=True,
    )
    unet, pipe = model.denoiser, model.pipeline
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    vae, text_encoder = (part.requires_grad_(False) for part in (pipe.vae, pipe.text_encoder))
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_("attn1" in name)
    average = EMAModel(unet.parameters(), decay=0.9999)
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=1e-2)
    schedule = get_scheduler("constant", optimizer, num_warmup_steps=0)
    data = DataLoader(TripletImages(model, triplets), batch_size=1, shuffle=True)
    unet, optimizer, data, schedule = accelerator.prepare(unet, optimizer, data, schedule)
    vae.to(dtype=dtype)
    text_encoder.to(dtype=dtype)
    noising = DDPMScheduler.from_config(pipe.scheduler.config)
    count = 0
    while True:
        for batch in data:
            with accelerator.accumulate(unet):
                loss = published_loss(unet, vae, text_encoder, noising, batch, dtype)
                accelerator.gather(loss.repeat(1)).mean().item()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                average.step(unet.parameters())
                count += 1
                done()
                if count == updates:
                    return


def published_loss(
    unet: Any, vae: Any, text_encoder: Any, noising: Any, batch: dict[str, Tensor], dtype: Any
) -> Tensor:
    """Return the loss of one published micro-step."""
    z_u, z_c, z_b = (
        vae.encode(batch[role].to(dtype)).latent_dist.sample() * vae.config.scaling_factor
        for role in ROLES
    )
    eps, eps_b = torch.randn_like(z_u), torch.randn_like(z_b)
    t = torch.randint(0, noising.config.num_train_timesteps, (len(z_u),))
    noised = [noising.add_noise(z, e, t) for z, e in ((z_u, eps), (z_c, eps), (z_b, eps_b))]
    text = text_encoder(batch["tokens"])[0]
    unsafe, _, benign = [unet(x, t, text).sample for x in noised]
    mosaic = F.mse_loss(unsafe.float(), (z_u - z_c + eps).float())
    preserve = F.mse_loss(benign.float(), eps_b.float())
    return WEIGHTS["mosaic"] * mosaic + WEIGHTS["preserve"] * preserve


def run_safegen(
    model: Model, triplets: Triplets, precision: str, updates: int, done: Callable[[], None]
) -> None:
    """Train with the library's preset and call `done` after every update."""
    edit = SafeGen.preset("paper", training={"updates": updates, "precision": precision})
    edit.apply(model, triplets, callback=lambda *_: done())


def measure(name: str, precision: str, updates: int, warm_up: int) -> dict[str, Any]:
    """Return the CPU seconds of each update of one run in this process, and the memory it adds."""
    torch.set_num_threads(1)
    model, triplets = load("mini"), Triplets.load("mini:skulls")
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before, started, times = resident("VmRSS"), time.process_time(), [time.process_time()]
    run = {"published": run_published, "safegen": run_safegen}[name]
    run(model, triplets, precision, updates, lambda: times.append(time.process_time()))
    seconds = [b - a for a, b in pairwise(times)]
    typical = statistics.median(seconds[warm_up:])
    return {
        "run": name,
        "precision": precision,
        "update_seconds": round(typical, 4),
        "preparation_seconds": round(times[1] - started - typical, 2),
        "mib": round(resident("VmHWM") - before, 1),
        "n": updates - warm_up,
    }


def measure_full_size(precision: str) -> list[Any]:
    """Return the row of one update of one triplet with random weights of the size of SD 1.4."""
    from plan import full_size

    torch.set_num_threads(1)
    model, triplets = full_size(torch.float32), Triplets.load("mini:skulls")
    model.denoiser.register_to_config(sample_size=FULL_SIZE // 8)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    started, times = time.process_time(), list[float]()
    edit = SafeGen.preset(
        "paper", training={"updates": 2, "accumulation": 1} | {"precision": precision}
    )
    one = Triplets(triplets.folder, triplets.rows[:1])
    edit.apply(model, one, callback=lambda *_: times.append(time.process_time()))
    update, first = times[1] - times[0], times[0] - started
    peak = round(resident("VmHWM") / 1024, 1)
    return [precision, round(update, 1), round(first - update, 1), peak]


def resident(field: str) -> float:
    """Return a figure of this process's memory in MiB: `VmRSS` now, or `VmHWM` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def compare(precision: str, rounds: int, updates: int, warm_up: int) -> list[dict[str, Any]]:
    """Return the measurements of both runs, each in processes of its own, in alternating order."""
    runs = []
    for i in range(rounds):
        for name in RUNS if i % 2 == 0 else RUNS[::-1]:
            command = [sys.executable, __file__, "--run", name, "--precision", precision]
            command += ["--updates", str(updates), "--warm-up", str(warm_up)]
            environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
            output = subprocess.run(command, check=True, capture_output=True, env=environment)
            runs.append(json.loads(output.stdout.splitlines()[-1]))
            print(json.dumps(runs[-1]), flush=True)
    return runs


def summarize(precision: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the medians of both runs and their ratios."""
    row: dict[str, Any] = {"precision": precision}
    for name in RUNS:
        each = [run for run in runs if run["run"] == name]
        for field in ("update_seconds", "preparation_seconds", "mib"):
            row[f"{name}_{field}"] = statistics.median(run[field] for run in each)
        row["n"] = sum(run["n"] for run in each)
    row["speed"] = round(row["published_update_seconds"] / row["safegen_update_seconds"], 2)
    row["memory"] = round(row["safegen_mib"] / row["published_mib"], 2)
    return row


def describe(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measurements as a page of results."""
    columns = {
        "precision": "precision",
        "published_update_seconds": "published, CPU s per update",
        "safegen_update_seconds": "safegen, CPU s per update",
        "speed": "times faster",
        "published_mib": "published, MiB added",
        "safegen_mib": "safegen, MiB added",
        "memory": "memory ratio",
        "safegen_preparation_seconds": "safegen before the first update, CPU s",
    }
    return {
        "title": "Training speed",
        "summary": "SafeGen's `paper` preset beside the published training step at equal work: the "
        f"miniature, {MICRO_STEPS} micro-steps of one triplet per update, one thread.",
        "date": date.today().isoformat(),
        "machine": "CPU, one thread",
        "command": "`python benchmarks/training_speed.py --out FILE`, and with `--full-size`",
        "n": f"{rows[0]['n']} updates per run",
        "tables": [
            {
                "title": "Medians",
                "text": "An update of the published step decodes and encodes 15 images and the "
                "blank text 5 times, and calls the UNet 15 times. Memory is the peak from the "
                "loaded model on.",
                "columns": list(columns.values()),
                "rows": [[row[name] for name in columns] for row in rows],
            }
        ],
    }


def in_own_process(precision: str) -> list[Any]:
    """Return the row of an update at full size, which has all of the memory to itself."""
    command = [sys.executable, __file__, "--run", "full-size", "--precision", precision]
    output = subprocess.run(command, check=True, capture_output=True)
    row: list[Any] = json.loads(output.stdout.splitlines()[-1])
    print(row, flush=True)
    return row


def write(out: Path | None, page: dict[str, Any], table: dict[str, Any], place: int) -> None:
    """Write a page of results with a table at its place."""
    if out:
        tables = [*page.get("tables", [])]
        page["tables"] = [*tables[:place], table, *tables[place + 1 :]]
        out.write_text(json.dumps(page, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument(
        "--run", choices=(*RUNS, "full-size"), help="measure one run in this process"
    )
    parser.add_argument("--full-size", action="store_true", help="measure SD 1.4's sizes instead")
    parser.add_argument("--precision", default="fp32,bf16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=2)
    arguments = parser.parse_args()
    size = {"updates": arguments.updates, "warm_up": arguments.warm_up}
    if arguments.run == "full-size":
        print(json.dumps(measure_full_size(arguments.precision)))
        return
    if arguments.run:
        print(json.dumps(measure(arguments.run, arguments.precision, **size)))
        return
    page = json.loads(arguments.out.read_text()) if arguments.out and arguments.out.exists() else {}
    if arguments.full_size:
        table = {
            "title": "At full size",
            "text": "One update of one triplet, 512 x 512 pixels, random weights held in fp32. The "
            "peak is of the whole process, the encoding of three images included.",
            "columns": FULL_COLUMNS,
            "rows": [in_own_process(each) for each in arguments.precision.split(",")],
        }
        write(arguments.out, page, table, 1)
        return
    rows = []
    for precision in arguments.precision.split(","):
        rows.append(summarize(precision, compare(precision, arguments.rounds, **size)))
        print(json.dumps(rows[-1]), flush=True)
    made = describe(rows)
    write(arguments.out, page | made | {"tables": page.get("tables", [])}, made["tables"][0], 0)


if __name__ == "__main__":
    main()
