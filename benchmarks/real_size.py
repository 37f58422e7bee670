"""Which weights each edit changes at real size, on the meta device: docs/results/real_size.json.

    python benchmarks/real_size.py --out docs/results/real_size.json     # seconds, no weights

Models have the published settings and no values; nothing is generated or trained. A patch has four
bytes for each changed number. Memory is that of the weights in bf16, of all components, and of the
trained weights with their gradients, moments and averages; activations are not in it.
"""

from __future__ import annotations

import argparse
import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from safegen.core.concept import load_concept
from safegen.core.errors import SafegenError
from safegen.core.quiet import silence_libraries
from safegen.core.registry import EDITS, resolve
from safegen.edits.base import Edit, TrainedEdit
from safegen.edits.safegen_plus import SafeGenPlus
from safegen.models.families.text_outputs import text_outputs
from safegen.models.model import Model
from safegen.models.patched_weights import pipeline_weights
from safegen.models.selectors import SELECTORS, select_parameters
from safegen.workflows.plan.memory import model_bytes, training_bytes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "models"))
from real import build_denoiser

CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_H = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "projection_dim": 512,
}
CLIP_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
T5_XXL = {
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
PLAIN, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
FAMILIES: dict[str, tuple[str, str, tuple[tuple[str, dict[str, Any]], ...], int]] = {
    "SD 1.4": ("sd1", "StableDiffusionPipeline", ((PLAIN, CLIP_L),), 4),
    "SD 2.1": ("sd2", "StableDiffusionPipeline", ((PLAIN, CLIP_H),), 4),
    "SDXL": ("sdxl", "StableDiffusionXLPipeline", ((PLAIN, CLIP_L), (PROJECTED, CLIP_G)), 4),
    "SD 3.5 medium": (
        "sd35-medium",
        "StableDiffusion3Pipeline",
        ((PROJECTED, CLIP_L), (PROJECTED, CLIP_G), (T5, T5_XXL)),
        16,
    ),
    "FLUX.1-dev": ("flux-dev", "FluxPipeline", ((PLAIN, CLIP_L), (T5, T5_XXL)), 16),
}
"""Family: denoiser in tests/models/real.py, pipeline, text encoders, and channels of latents."""


def build(family: str) -> Model:
    """Return a model of real size on the meta device, in bf16."""
    name, kind, encoders, channels = FAMILIES[family]
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (128, 256, 512, 512),
        "layers_per_block": 2,
        "use_quant_conv": channels == 4,
        "use_post_quant_conv": channels == 4,
    }
    with torch.device("meta"):
        parts: dict[str, Any] = {"vae": diffusers.AutoencoderKL(latent_channels=channels, **blocks)}
        for i, (encoder, settings) in enumerate(encoders, 1):
            suffix = "" if i == 1 else f"_{i}"
            config = transformers.T5Config if encoder == T5 else transformers.CLIPTextConfig
            vocabulary = {"vocab_size": 32128} if encoder == T5 else {}
            network = getattr(transformers, encoder)(config(**settings, **vocabulary))
            parts |= {f"text_encoder{suffix}": network, f"tokenizer{suffix}": None}
        denoiser = build_denoiser(name)
    is_flow = channels == 16
    diffusion = {"steps_offset": 1, "clip_sample": False}
    scheduler = (
        diffusers.FlowMatchEulerDiscreteScheduler()
        if is_flow
        else diffusers.DDIMScheduler(**diffusion)
    )
    parts |= {"transformer" if is_flow else "unet": denoiser, "scheduler": scheduler}
    if kind == "StableDiffusionPipeline":
        parts |= {"safety_checker": None, "feature_extractor": None}
        parts["requires_safety_checker"] = False
    if kind == "StableDiffusionXLPipeline":
        parts["add_watermarker"] = False
    model = Model(family, getattr(diffusers, kind)(**parts))
    for component in model.components:
        getattr(model.pipeline, component).to(torch.bfloat16)
    return model


def changed(edit: Edit, model: Model) -> list[str]:
    """Return the names of the weights that an edit changes."""
    if isinstance(edit, SafeGenPlus):
        closed = edit.build_closed_form()
        names = changed(edit.build_safegen(), model)
        return names + (changed(closed, model) if closed else [])
    if isinstance(edit, TrainedEdit):
        names = select_parameters(edit.network(model), edit.selector)
        return [name for name in names if not _is_unread(name, model)]
    selector = "kv2" if model.denoiser_name == "unet" else "context"
    return [n for n in select_parameters(model.denoiser, selector) if n.endswith(".weight")]


def _is_unread(name: str, model: Model) -> bool:
    """Return whether a weight of a text encoder lies behind the layer that the denoiser reads."""
    component = name.partition(".")[0]
    if text_outputs(model.pipeline).get(component) != ("penultimate",):
        return False
    last = getattr(model.pipeline, component).config.num_hidden_layers - 1
    return f".layers.{last}." in name or ".final_layer_norm." in name


def _size(names: list[str], model: Model) -> tuple[int, float, float]:
    """Return tensors, millions of numbers and megabytes of a patch."""
    weights = pipeline_weights(model.pipeline)
    numbers = sum(weights[name].numel() for name in names)
    return len(names), round(numbers / 1e6, 1), round(4 * numbers / 1e6, 1)


def edit_rows(model: Model) -> list[list[Any]]:
    """Return a row for each edit with its preset for full-size models."""
    concept, rows = load_concept("nudity"), []
    for name in sorted(EDITS):
        edit = resolve(EDITS, name, "edit").preset("full", concept=concept)
        try:
            tensors, millions, megabytes = _size(changed(edit, model), model)
        except SafegenError as error:
            print(f"{model.name}, {name}: {error}", file=sys.stderr)
            rows.append([model.name, f"`{name}`", None, None, None, None])
            continue
        trained = edit.build_safegen() if isinstance(edit, SafeGenPlus) else edit
        state = training_bytes(trained, model) if isinstance(trained, TrainedEdit) else 0
        memory = round((model_bytes(model) + state) / 2**30, 1)
        rows.append([model.name, f"`{name}`", tensors, millions, megabytes, memory])
    return rows


def selector_rows(model: Model) -> list[list[Any]]:
    """Return a row for each selector of a model's denoiser."""
    kind, rows = type(model.denoiser).__name__, []
    for selector in SELECTORS[kind]:
        names = select_parameters(model.denoiser, selector)
        rows.append([model.name, f"`{selector}`", *_size(names, model)])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("real_size.json"))
    args = parser.parse_args()
    with silence_libraries():
        models = [build(family) for family in FAMILIES]
    edits = [row for model in models for row in edit_rows(model)]
    selectors = [row for model in models for row in selector_rows(model)]
    sizes = [
        [
            model.name,
            type(model.denoiser).__name__,
            round(model.num_parameters / 1e6, 1),
            ", ".join(name for name in model.components if name.startswith("text_encoder")),
            round(model_bytes(model) / 2**30, 1),
        ]
        for model in models
    ]
    columns = ["tensors", "million numbers", "patch, MB"]
    report = {
        "title": "Edits at real size",
        "summary": "Which weights each edit would change in models of real size, how large the "
        "patch is, and how much memory a training needs at least. Models have the published "
        "settings and no weights: **nothing was trained or generated**.",
        "model": "Stable Diffusion 1.4 and 2.1, SDXL, SD 3.5 medium and FLUX.1-dev, on the meta "
        "device",
        "date": str(date.today()),
        "machine": "any CPU",
        "n": "all weights, counted",
        "command": "`python benchmarks/real_size.py --out docs/results/real_size.json`",
        "tables": [
            {
                "title": "Models",
                "text": "Memory is that of all weights in bf16.",
                "columns": ["model", "denoiser", "million weights", "text encoders", "GiB"],
                "rows": sizes,
            },
            {
                "title": "Edits",
                "text": "Preset `full`. Memory: all weights in bf16, and of each trained weight an "
                "fp32 copy, its gradient, two moments and, where there is one, its average. "
                "Activations are not in it: `--plan` measures them on your machine. An empty row "
                "is an edit with a selector that matches nothing there.",
                "columns": ["model", "edit", *columns, "memory, GiB"],
                "rows": edits,
            },
            {
                "title": "Selectors",
                "text": "Weights of the denoiser by selector.",
                "columns": ["model", "selector", *columns],
                "rows": selectors,
            },
        ],
        "limits": [
            "Figures are counts of numbers, not measurements. A training needs more memory, by the "
            "activations of its batch.",
            "`des` trains all text encoders. `--set 'encoders=[\"text_encoder\"]'` trains one.",
        ],
    }
    args.out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in edits:
        print(*row, sep="\t")


if __name__ == "__main__":
    main()
