"""Compare the plans of jobs with what the jobs then cost: time, peak memory and passes.

    python benchmarks/plan.py --out plan.json            # about 10 minutes on one thread
    python benchmarks/plan.py --only full --out plan.json  # adds the rows to those that are there

Jobs: SafeGen, UCE and an evaluation on the miniature, and SafeGen on a UNet of the size of
Stable Diffusion 1.x with random weights at 256 pixels. Each job runs right after its plan, in the
same process, so that other work on the machine slows both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from transformers import CLIPTextConfig, CLIPTextModel

import safegen
from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol import Protocol
from safegen.models.model import Model
from safegen.stack import load_stack
from safegen.stack_loader import StackLoader
from safegen.workflows.edit import prepare_edit
from safegen.workflows.plan import Plan, plan_edit, plan_evaluation
from safegen.workflows.plan.probe import Measurement, measured

SIZE = 256
"""Side of the images of the full-size model, in pixels."""


def full_size(dtype: torch.dtype) -> Model:
    """Return a model of the sizes of Stable Diffusion 1.x with random weights."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        cross_attention_dim=768,
        attention_head_dim=8,
        block_out_channels=(320, 640, 1280, 1280),
    )
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
    }
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=SIZE, **blocks
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
        )
    )
    tokenizer = safegen.load("mini", device="cpu").pipeline.tokenizer
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.to(dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    for part in (unet, vae, text):
        part.eval().requires_grad_(False)
    return Model("full size", pipe)


def compare(name: str, model: Model, plan: Callable[[], Plan], run: Callable[[], object]) -> dict:
    """Return the planned and the real cost of a job."""
    with measured(model) as probe:
        planned = plan()
    with measured(model) as cost:
        run()
    return row(name, planned, cost, probe.seconds)


def row(name: str, planned: Plan, cost: Measurement, probe: float) -> dict:
    """Return the row of one job, and print it."""
    values = {
        "job": name,
        "probe_seconds": round(probe, 1),
        "planned_seconds": round(planned.seconds, 1),
        "seconds": round(cost.seconds, 1),
        "ratio": round(planned.seconds / cost.seconds, 2),
        "planned_gib": round(planned.memory / 2**30, 2),
        "gib": round(cost.memory / 2**30, 2),
        "memory_ratio": round(planned.memory / cost.memory, 2),
        "planned_passes": planned.passes,
        "passes": cost.passes,
        "notes": list(planned.notes),
    }
    print(json.dumps(values), flush=True)
    return values


def edit_job(
    model: Model, method: str, preset: str, updates: int | None = None, **settings: Any
) -> dict:
    """Return the row of an edit."""
    if updates is not None:
        settings["training"] = settings.get("training", {}) | {"updates": updates, "warmup": 0}
    prepared = prepare_edit(method, preset, **settings)
    config, rows = prepared.by_preset[preset], prepared.triplets
    if updates is not None and rows is not None:
        rows = replace(rows, rows=rows.rows[:8])
    _ = model.hash
    return compare(
        f"{method}, preset {preset}, {model.name}",
        model,
        lambda: plan_edit(config, model, rows),
        lambda: config.apply(model, rows),
    )


def evaluation_job(folder: Path) -> dict:
    """Return the row of an evaluation of two stacks."""
    protocol = Protocol.from_concept(
        load_concept("skulls"), prompts=24, seeds=[1], generation=GenerationConfig(batch_size=16)
    )
    stacks, loader = [load_stack("mini")], StackLoader(device="cpu")
    model = loader.model("mini")[0]
    return compare(
        "evaluation, mini",
        model,
        lambda: plan_evaluation(protocol, stacks, loader=loader),
        lambda: evaluate(protocol, stacks, folder / "run", loader=loader),
    )


def write_page(path: Path, rows: list[dict]) -> None:
    """Write the page of results, with the rows of other jobs that it has already."""
    known = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    rows = [one for one in known if one["job"] not in {new["job"] for new in rows}] + rows
    table = [
        [
            one["job"],
            one["probe_seconds"],
            one["planned_seconds"],
            one["seconds"],
            one["ratio"],
            one["planned_gib"],
            one["gib"],
            one["planned_passes"],
            one["passes"],
        ]
        for one in rows
    ]
    page = {
        "title": "Plans",
        "summary": "What `--plan` says before a job, and what the job then costs. Each job runs "
        "right after its plan, in one process.",
        "date": date.today().isoformat(),
        "machine": f"CPU, {torch.get_num_threads()} thread, fp32 (full size: bf16)",
        "command": "`python benchmarks/plan.py`",
        "n": "one run of each job",
        "tables": [
            {
                "title": "Planned and real cost",
                "text": "Ratios are planned to real time. `full size` is a UNet of the size of "
                f"Stable Diffusion 1.x with random weights, at {SIZE} pixels.",
                "columns": [
                    "job",
                    "probe, s",
                    "planned, s",
                    "real, s",
                    "ratio",
                    "planned, GiB",
                    "real, GiB",
                    "planned passes",
                    "passes",
                ],
                "rows": table,
            }
        ],
        "limits": [
            "Not checked: GPUs, attacks, guards inside the denoiser, SDXL, closed forms at full "
            "size, and images of 512 pixels.",
            "Other work on the machine changes the time of a job after its plan.",
        ],
        "rows": rows,
    }
    path.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run the jobs and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", choices=["mini", "full"], help="Jobs of one model.")
    parser.add_argument("--updates", type=int, default=6, help="Updates at full size.")
    args = parser.parse_args()
    rows = []
    if args.only != "full":
        mini = safegen.load("mini", device="cpu")
        rows.append(edit_job(mini, "uce", "mini", concept="skulls"))
        with TemporaryDirectory() as folder:
            rows.append(evaluation_job(Path(folder)))
        rows.append(edit_job(mini, "safegen", "mini", triplets="mini:skulls", concept="skulls"))
    if args.only != "mini":
        model = full_size(torch.bfloat16)
        training = {"batch": 1, "accumulation": 2}
        common = {"updates": args.updates, "triplets": "mini:skulls", "training": training}
        rows.append(edit_job(model, "safegen", "full", **common))
    write_page(args.out, rows)


if __name__ == "__main__":
    main()
