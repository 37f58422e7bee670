"""What a patch, a guard, a batch size and an evaluation cost: docs/results/generation.json.

    python benchmarks/generation.py --rows patches,batches --out docs/results/generation.json
    python benchmarks/generation.py --rows guards,shares --out docs/results/generation.json
    python benchmarks/generation.py --rows evaluation --out docs/results/generation.json

Figures are CPU seconds of one thread, which other work on the machine changes less than the clock.
What is compared runs in turns in one process, after a short warm-up; a ratio is the median of the
rounds' ratios. The same file collects the rows of several calls.

The loop that an evaluation stands beside is plain diffusers: one prompt per call, a PNG file, the
same judge on that image, one line of JSON. Both get a loaded model and the same noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from common import concept_judge

from safegen.core.allocator import keep_freed_memory
from safegen.core.concept import load_concept, prompt_list
from safegen.core.files import encode_image
from safegen.core.generation import GenerationConfig, Sample, preferred_precision
from safegen.core.registry import GUARDS
from safegen.evaluation.run.folder import read_image
from safegen.guards import read_guard
from safegen.models.generation import autocast_for, generate, torch_seed
from safegen.models.loading import load
from safegen.models.model import Model
from safegen.patches.patch import Patch
from safegen.stack import Stack
from safegen.stack_loader import StackLoader
from safegen.workflows.evaluate import evaluate

MODELS = ("mini", "mini-flow")
CHOSEN = list(MODELS)
"""Models that are measured in this call."""
BATCHES = (1, 2, 4, 8, 16, 32)
IMAGES, STEPS, WARM_UP = 16, 25, 2
"""Images and steps of a measurement, and steps of its warm-up."""
SHORT_STEPS, SHORT_ROUNDS = 4, 5
"""Steps of a pair, and pairs in a round, where the smallest differences are measured."""
SLOW_GUARDS = ("crops", "pno")
"""Guards that draw probes; measured once."""
Job = tuple[Callable[[], AbstractContextManager[Any]], Callable[[Any, int], object]]
"""Context that is entered before the clock starts, and the job: it gets its value and the steps."""


def samples(n: int) -> list[Sample]:
    """Return samples that ask for the concept."""
    rows = prompt_list("mini:skulls", n)
    return [Sample(prompt=row.text, seed=1, index=i) for i, row in enumerate(rows)]


def cpu_seconds(jobs: Mapping[str, Job], rounds: int, steps: int = STEPS) -> dict[str, list[float]]:
    """Return the CPU seconds of each job in each round; every second round runs backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for number in range(-1, rounds):  # the first is the warm-up
        for name in list(jobs) if number % 2 == 0 else reversed(list(jobs)):
            context, run = jobs[name]
            with context() as target:
                start = time.process_time()
                run(target, WARM_UP if number < 0 else steps)
                spent = time.process_time() - start
            seconds[name] += [] if number < 0 else [spent]
    return seconds


def ratios(seconds: Mapping[str, list[float]], name: str, base: str = "base") -> dict[str, float]:
    """Return the median ratio of a job's seconds to the base's of its round, and the quartiles."""
    values = [a / b for a, b in zip(seconds[name], seconds[base], strict=True)]
    low, high = map(float, np.quantile(values, (0.25, 0.75)))
    return {"ratio": round(median(values), 3), "low": round(low, 3), "high": round(high, 3)}


def drawing(model: Model, n: int, **settings: Any) -> Callable[[Any, int], object]:
    """Return the function that generates `n` images of a model as it stands."""

    def run(_: Any, steps: int) -> None:
        generate(model, samples(n), GenerationConfig(num_inference_steps=steps, **settings))

    return run


def measure_patches(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of a patched model as a multiple of its base's, by model and batch."""
    for name in CHOSEN:
        model = load(name, device="cpu")
        weights = dict(model.denoiser.named_parameters())
        names = [n for n, value in weights.items() if ".attn" in n and value.ndim > 1]
        patch = Patch({n: (weights[n] * 1.01).detach().clone() for n in names})
        for batch in (1, IMAGES):
            run = drawing(model, batch, batch_size=batch)
            patched = partial(patch.apply, model)
            pair: dict[str, Job] = {"base": (nullcontext, run), "patched": (patched, run)}
            seconds = cpu_seconds(pair, SHORT_ROUNDS * rounds, SHORT_STEPS)
            yield {"model": name, "batch": batch} | ratios(seconds, "patched")


def measure_batches(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the CPU seconds of an image by model, precision and batch size."""
    for name in CHOSEN:
        model = load(name, device="cpu")
        for precision in ("fp32", "bf16"):
            jobs: dict[str, Job] = {
                str(size): (nullcontext, drawing(model, size, batch_size=size, precision=precision))
                for size in BATCHES
            }
            seconds = cpu_seconds(jobs, 1 if rounds < 3 else 2)
            each = {size: median(s) / int(size) for size, s in seconds.items()}
            yield {"model": name, "precision": precision} | {
                f"batch {size}": round(1000 * value) for size, value in each.items()
            }


def guard_specs(folder: Path) -> dict[str, dict[str, Any]]:
    """Return settings of every guard of the registry; learned weights are random."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from safegen.guards.latent_guard.head import LatentGuardHead, save_head

    torch.manual_seed(0)
    save_head(
        LatentGuardHead(load("mini", device="cpu").denoiser.config.cross_attention_dim),
        folder / "head",
    )
    checker = folder / "checker"  # of the published size: a ViT-L/14
    vision = {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    }
    net = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=768))
    net.concept_embeds_weights.data[:] = 2.0
    net.special_care_embeds_weights.data[:] = 2.0
    net.save_pretrained(checker)
    CLIPImageProcessorPil().save_pretrained(checker)
    return {name: {"name": name} for name in GUARDS} | {
        "latent-guard": {"name": "latent-guard", "weights": str(folder / "head"), "threshold": 1e9},
        "prompt-filter": {"name": "prompt-filter", "words": ["nothing of this kind"]},
        "safety-checker": {"name": "safety-checker", "weights": str(checker)},
        "crops": {"name": "crops", "limit": 1.0},
        "pno": {"name": "pno", "weights": "mini", "restarts": 4, "iterations": 5},
    }


def measure_guards(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the time of each guard alone as a multiple of the base's."""
    concept = load_concept("skulls")
    model = load("mini", device="cpu")
    loader = StackLoader(model=model)
    config = {"batch_size": IMAGES // 2, "precision": preferred_precision("cpu")}

    def run(loaded: Any, steps: int) -> None:
        loaded.generate(samples(IMAGES // 2), GenerationConfig(num_inference_steps=steps, **config))

    with tempfile.TemporaryDirectory() as place:
        for name, spec in guard_specs(Path(place)).items():
            guard = read_guard(spec, concept)
            stacks = {
                "base": Stack(name="base", model="mini"),
                name: Stack(name=name, model="mini", guards=(guard,)),
            }
            jobs: dict[str, Job] = {
                key: (partial(loader.open, stack), run) for key, stack in stacks.items()
            }
            seconds = cpu_seconds(jobs, 1 if name in SLOW_GUARDS else rounds)
            yield {"guard": name} | ratios(seconds, name)


def measure_shares(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the share of each part of a pipeline in the CPU time of a batch."""
    for name in CHOSEN:
        model = load(name, device="cpu")
        for precision in ("fp32", "bf16"):
            parts = dict.fromkeys(("text encoders", "denoiser", "VAE"), 0.0)
            settings = {"batch_size": IMAGES, "precision": precision}
            drawing(model, IMAGES, **settings)(None, WARM_UP)
            with ExitStack() as stack:
                for component in model.components:
                    part = {model.denoiser_name: "denoiser", "vae": "VAE"}
                    method = "decode" if component == "vae" else "forward"
                    network = getattr(model.pipeline, component)
                    watch(network, method, parts, part.get(component, "text encoders"), stack)
                start = time.process_time()
                images = generate(
                    model, samples(IMAGES), GenerationConfig(num_inference_steps=STEPS, **settings)
                )
                total = time.process_time() - start
            start = time.process_time()
            for image in images:
                encode_image(image, {"a": "b"})
            png = time.process_time() - start
            shares = {part: round(100 * value / (total + png), 2) for part, value in parts.items()}
            shares["PNG"] = round(100 * png / (total + png), 2)
            shares["the rest"] = round(100 - sum(shares.values()), 2)
            yield {"model": name, "precision": precision} | shares
    yield full_size_shares()


def watch(network: Any, method: str, parts: dict[str, float], part: str, stack: ExitStack) -> None:
    """Add the CPU seconds of a network's method to a part until the stack is closed."""
    original = getattr(network, method)

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return original(*args, **kwargs)
        finally:
            parts[part] += time.process_time() - start

    setattr(network, method, timed)
    stack.callback(delattr, network, method)


def full_size_shares() -> dict[str, Any]:
    """Return the shares of an image of Stable Diffusion 1.x at 512 pixels, by operations."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import CLIPTextConfig, CLIPTextModel

    def operations(run: Callable[[], object]) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            run()
        return int(counter.get_total_flops())

    with torch.device("meta"):
        text = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
        )
        unet = UNet2DConditionModel(cross_attention_dim=768)
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
        )
        latents, ids = torch.empty(1, 4, 64, 64), torch.zeros(1, 77, dtype=torch.long)
        states, t = torch.empty(1, 77, 768), torch.tensor(1)
        counts = {
            "text encoders": 2 * operations(lambda: text(ids)),
            "denoiser": 2
            * STEPS
            * operations(lambda: unet(latents, t, encoder_hidden_states=states)),
            "VAE": operations(lambda: vae.decode(latents)),
        }
    total = sum(counts.values())
    shares = {part: round(100 * count / total, 2) for part, count in counts.items()}
    return {"model": "SD 1.x at 512 pixels, by operations", "precision": ""} | shares


def plain_loop(model: Model, chosen: list[Sample], folder: Path, config: GenerationConfig) -> None:
    """Draw, save and judge one prompt after the other, as a script with diffusers does."""
    judge = concept_judge(load_concept("skulls"))
    folder.mkdir()
    with (folder / "verdicts.jsonl").open("w") as lines:
        for i, sample in enumerate(chosen):
            seed = torch_seed(sample.seed, sample.index)
            with autocast_for(model, config):
                image = model.pipeline(
                    sample.prompt,
                    num_inference_steps=config.num_inference_steps,
                    guidance_scale=config.guidance_scale,
                    generator=torch.Generator("cpu").manual_seed(seed),
                ).images[0]
            image.save(folder / f"{i}.png")
            (results,) = judge.detect([image])
            verdict = results.verdict(judge.labels, judge.threshold)
            lines.write(json.dumps({"prompt": sample.prompt, "verdict": verdict}) + "\n")


def compare_with_loop(model: Model, precision: str, rounds: int) -> dict[str, Any]:
    """Return the CPU seconds of a whole evaluation and of a loop over its prompts."""
    loader, images = StackLoader(model=model), dict[str, list[Any]]()
    options: dict[str, Any] = {"concept": "skulls", "limit": 4, "baselines": "none"}
    options |= {"loader": loader, "precision": precision}

    def evaluation(place: str, steps: int) -> None:
        run = evaluate(model.name, out=Path(place) / "run", num_inference_steps=steps, **options)
        images["samples"] = list(run.protocol.samples())
        images["evaluation"] = [read_image(run.folder / r.file) for r in run.sample_records()]

    def loop(place: str, steps: int) -> None:
        config = GenerationConfig(num_inference_steps=steps, precision=precision)
        plain_loop(model, images["samples"], Path(place) / "loop", config)
        paths = (Path(place) / "loop" / f"{i}.png" for i in range(len(images["samples"])))
        images["loop"] = [read_image(path) for path in paths]

    with tempfile.TemporaryDirectory() as place:
        evaluation(place, 1)
    jobs: dict[str, Job] = {
        "evaluation": (tempfile.TemporaryDirectory, evaluation),
        "loop": (tempfile.TemporaryDirectory, loop),
    }
    seconds = cpu_seconds(jobs, 1 if rounds < 3 else 2)
    pairs = zip(images["evaluation"], images["loop"], strict=True)
    changes = [np.abs(np.asarray(a, float) - np.asarray(b, float)).mean() for a, b in pairs]
    return {
        "model": model.name,
        "precision": precision,
        "images": len(images["loop"]),
        **{f"{name}, s": round(median(seconds[name]), 1) for name in ("loop", "evaluation")},
        **ratios(seconds, "loop", "evaluation"),
        "difference": round(float(np.median(changes)), 2),
    }


def measure_evaluation(rounds: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of both precisions, and the loop in fp32 beside the default evaluation."""
    for name in CHOSEN:
        model, results = load(name, device="cpu"), dict[str, dict[str, Any]]()
        for precision in ("fp32", "bf16"):
            results[precision] = compare_with_loop(model, precision, rounds)
            yield results[precision]
        seconds = results["fp32"]["loop, s"], results[preferred_precision("cpu")]["evaluation, s"]
        mixed = {"model": name, "precision": "loop in fp32, evaluation in the default"}
        yield mixed | {"ratio": round(seconds[0] / seconds[1], 2)}


SECTIONS: dict[str, tuple[str, str, Callable[[int], Iterator[dict[str, Any]]]]] = {
    "patches": (
        "Patched model beside its base",
        "CPU time of the same images, in pairs of 4 steps: 1 is equal, goal 0.98 to 1.02. The "
        "patch changes every attention matrix.",
        measure_patches,
    ),
    "guards": (
        "Each guard alone",
        "Times the base, in batches of 8 images, with the guards' defaults for the concept. The "
        "heads of `latent-guard` and `safety-checker` have random weights of their size; the "
        "checker's network is 40 times as large as the model that it checks here.",
        measure_guards,
    ),
    "batches": (
        "Batch sizes",
        "CPU milliseconds per image. The default precision is what the device computes natively.",
        measure_batches,
    ),
    "evaluation": (
        "A whole evaluation beside a loop over its prompts",
        "CPU seconds: generate, judge, score, write and report against one prompt per call. "
        "`difference` is the median over images of the mean difference in grey levels of 255, "
        "which is rounding.",
        measure_evaluation,
    ),
    "shares": (
        "Where the time goes",
        "Percent of the CPU time of a batch of 16, or of the operations of one image.",
        measure_shares,
    ),
}


def write(path: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """Write the rows of all sections and their tables."""
    tables = []
    for name, (title, text, _) in SECTIONS.items():
        if rows := results.get(name):
            columns = list(dict.fromkeys(key for row in rows for key in row))
            cells = [[row.get(column, "") for column in columns] for row in rows]
            tables.append({"title": title, "text": text, "columns": columns, "rows": cells})
    page = {
        "title": "Generation",
        "summary": "What a patch, a guard, a batch size and a whole evaluation cost in CPU time.",
        "date": date.today().isoformat(),
        "machine": f"CPU, 1 thread; native precision {preferred_precision('cpu')}",
        "command": "`python benchmarks/generation.py`",
        "n": f"{IMAGES} images and {STEPS} steps if nothing else is said; guidance 5",
        "tables": tables,
        "limits": [
            "One CPU. Batches gain more on an accelerator, where a batch of one leaves it idle.",
            "Ratios are of CPU seconds while other jobs ran; `low` and `high` are quartiles over "
            "rounds, equal to the ratio after one round.",
        ],
        "rows": results,
    }
    path.write_text(json.dumps(page, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default=",".join(SECTIONS), help="sections, commas between")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("docs/results/generation.json"))
    parser.add_argument("--models", default=",".join(MODELS), help="models, commas between")
    args = parser.parse_args()
    CHOSEN[:] = args.models.split(",")
    torch.set_num_threads(1)
    keep_freed_memory()
    results = json.loads(args.out.read_text(encoding="utf-8"))["rows"] if args.out.exists() else {}
    for name in args.rows.split(","):
        results[name] = []
        for row in SECTIONS[name][2](args.rounds):
            print(row, flush=True)
            results[name].append(row)
            write(args.out, results)


if __name__ == "__main__":
    main()
