"""Reading and generating with stable-diffusion.cpp, through cyllama."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from tools.interop.files import Files
from tools.interop.scene import GUIDANCE, NEGATIVE, PROMPT, SEED, SIZE, STEPS, Report

COMPLAINTS = re.compile(r"unknown tensor|not in model|missing|failed|error", re.IGNORECASE)
"""Words of the program's log on tensors that it cannot place."""


def read(files: Files, report: Report) -> None:
    """Read our checkpoints and LoRAs, and generate with each."""
    sd: Any = import_module("cyllama.sd")
    log: list[str] = []
    sd.set_log_callback(lambda _level, message: log.append(str(message)))
    for name, path in (("base", files.base), ("patched", files.patched)):
        log.clear()
        loras = [files.kohya, files.diffusers] if name == "base" else []
        context = _open(sd, path)
        _check_loading(name, path, log, report)
        report.save(f"{name}-image", _generate(sd, context))
        context.close()
        for lora in loras:
            log.clear()
            context = _open(sd, path)
            report.save(f"{lora.stem}-image", _generate(sd, context, lora))
            _check_lora(lora, log, report)
            context.close()


def _open(sd: Any, path: Path) -> Any:
    params = sd.SDContextParams(model_path=str(path), n_threads=1)
    params.rng_type = params.sampler_rng_type = sd.RngType.CPU
    return sd.SDContext(params)


def _generate(sd: Any, context: Any, lora: Path | None = None) -> np.ndarray:
    """Return an image, (h, w, 3), in [0, 1]."""
    params = sd.SDImageGenParams(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        width=SIZE,
        height=SIZE,
        seed=SEED,
        sample_steps=STEPS,
        cfg_scale=GUIDANCE,
        sample_method=sd.SampleMethod.EULER,
        scheduler=sd.Scheduler.DISCRETE,
    )
    if lora is not None:
        params.set_loras([{"path": str(lora), "multiplier": 1.0}])
    (image,) = context.generate_with_params(params)
    return np.asarray(image.to_numpy(), dtype=np.float32) / 255


def _check_loading(name: str, path: Path, log: list[str], report: Report) -> None:
    version = next((line.strip() for line in log if "Version:" in line), "no version in the log")
    report.check(f"{name}: family", version, passed="SD 1.x" in version)
    complaints = [line.strip() for line in log if COMPLAINTS.search(line)]
    report.check(f"{name}: no unknown and no missing tensor", complaints[:3], passed=not complaints)
    done = any("loading tensors completed" in line for line in log)
    with safe_open(path, framework="np") as file:
        count = len(file.keys())
    report.check(f"{name}: loading of {count} tensors completed", done, passed=done)


def _check_lora(lora: Path, log: list[str], report: Report) -> None:
    with safe_open(lora, framework="np") as file:
        count = len(file.keys())
    pattern = re.compile(r"\((\d+) / (\d+)\) LoRA tensors have been applied")
    applied = next((m for line in log if (m := pattern.search(line))), None)
    result = applied[0] if applied else "no count in the log"
    # factors of zeros that tell the family are for a layer that no check needs to tell apart
    passed = applied is not None and applied[1] == applied[2] == str(count)
    report.check(f"{lora.stem}: all of {count} LoRA tensors applied", result, passed=passed)
