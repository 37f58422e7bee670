"""The `generate` command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli.console import echo
from safegen.cli.options import (
    Config,
    Device,
    Dtype,
    Patches,
    Pickle,
    Threads,
    print_model,
    set_threads,
)
from safegen.cli.progress import show_progress
from safegen.core.errors import ConfigError, FileError
from safegen.core.settings import MAX_BATCH, MAX_SEED, MAX_STEPS

if TYPE_CHECKING:
    from safegen.core.generation import GenerationConfig
    from safegen.models.model import Model
    from safegen.stack import Stack
    from safegen.stack_loader import LoadedStack, StackLoader

SHEET = "sheet.png"
"""Contact sheet of the images."""
TRACES = "trace.jsonl"
"""What the guards did, one line per image."""


def generate(
    out: Annotated[Path, typer.Option(help="New folder for the images.")],
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="mini, a diffusers folder, a single-file checkpoint, or hub:owner/name.",
        ),
    ] = None,
    stack: Annotated[
        Path | None,
        typer.Option(help="Recipe in TOML (model, patches, guards ...) instead of MODEL."),
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="Prompt. Repeatable.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    patch: Patches = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA to activate: FILE or FILE:SCALE. Repeatable.")
    ] = None,
    guard: Annotated[
        list[str] | None, typer.Option(help="Guard: NAME or NAME-PRESET (sld-max). Repeatable.")
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Concept that supplies the guards' phrases and judge.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Image i starts from noise (seed, i).")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, max=MAX_STEPS, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float, typer.Option(min=1, max=50, help="Scale of classifier-free guidance.")
    ] = 5.0,
    batch: Annotated[int, typer.Option(min=1, max=MAX_BATCH, help="Images per batch.")] = 16,
    device: Device = "auto",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Generate one PNG per prompt with its settings inside, and a contact sheet.

    With guards, trace.jsonl records what they did to each image.
    """
    texts = _read_prompts(prompt or [], prompts)
    recipe = _build_stack(model, stack, config)
    from safegen.core.generation import GenerationConfig
    from safegen.stack import add_guards, add_loras, add_patches
    from safegen.stack_loader import StackLoader

    set_threads(threads)
    recipe = add_loras(add_patches(recipe, patch or []), lora or [])
    recipe = add_guards(recipe, guard or [], concept)
    generation_config = GenerationConfig(
        num_inference_steps=steps, guidance_scale=guidance, batch_size=batch
    )
    loader = StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle, on_load=print_model)
    withheld = _generate(loader, recipe, texts, seed, generation_config, out)
    note = f", {withheld} withheld ({TRACES} gives the reasons)" if withheld else ""
    shown = len(texts) - withheld
    echo(f"{shown} image{'s' * (shown != 1)} and {SHEET} in {out}{note}")


def _generate(
    loader: StackLoader,
    recipe: Stack,
    texts: Sequence[str],
    seed: int,
    generation_config: GenerationConfig,
    out: Path,
) -> int:
    """Write the images, the traces and the sheet; return how many images were withheld."""
    from safegen.core.files import staged_directory
    from safegen.core.generation import Sample
    from safegen.evaluation.report.contact_sheet import contact_sheet, save_sheet
    from safegen.models.generation import save_image

    metadata = _metadata(recipe, generation_config)
    samples = [Sample(prompt=text, seed=seed, index=i) for i, text in enumerate(texts)]
    batch, images, traces, withheld = generation_config.batch_size, [], [], 0
    with (
        staged_directory(out) as folder,
        loader.open(recipe) as loaded,
        show_progress() as progress,
    ):
        _warn_of_truncation(loaded.model, texts)
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            for sample, result in zip(part, loaded.generate(part, generation_config), strict=True):
                images.append(loaded.display_image(result))
                trace = result.trace.to_json()
                traces.append({"index": sample.index, "seed": seed} | trace)
                withheld += bool(result.trace.withheld)
                if not result.trace.withheld:
                    record = sample.model_dump() | metadata | _identity(loaded)
                    record |= {"guards": trace} if recipe.guards else {}
                    save_image(images[-1], folder / f"{sample.index:04d}.png", record)
                progress("generating", len(images), len(samples))
        cell = max(96, min(256, loaded.model.size))
        save_sheet(contact_sheet(images, cell=cell), folder / SHEET)
        if recipe.guards:
            lines = "".join(json.dumps(trace, sort_keys=True) + "\n" for trace in traces)
            (folder / TRACES).write_text(lines, encoding="utf-8")
    return withheld


def _build_stack(model: str | None, stack: Path | None, config: Path | None) -> Stack:
    from safegen.stack import Stack, load_stack

    if (model is None) == (stack is None):
        raise ConfigError("MODEL or --stack must be given, and not both")
    recipe = load_stack(str(stack)) if stack else Stack(name="model", model=model or "")
    if config and recipe.config:
        raise ConfigError(f"{stack} already sets a config. Leave out --config.")
    return recipe.model_copy(update={"config": config}) if config else recipe


def _metadata(recipe: Stack, generation_config: GenerationConfig) -> dict[str, Any]:
    """Return the settings that each image records."""
    from safegen.core.files import display_name
    from safegen.patches.patch import Patch

    metadata = {
        "steps": generation_config.num_inference_steps,
        "guidance": generation_config.guidance_scale,
        "model": display_name(recipe.model),
        "patches": [Patch.load(path).hash for path in recipe.patches],
        "negative_prompt": recipe.negative_prompt,
    }
    if recipe.loras:
        metadata["loras"] = [lora.fingerprint() for lora in recipe.loras]
    return metadata


def _identity(loaded: LoadedStack) -> dict[str, str]:
    return {"base": loaded.model.hash, "stack": loaded.hash}


def _warn_of_truncation(model: Model, texts: Sequence[str]) -> None:
    """Print which prompts are longer than the model reads."""
    from safegen.models.generation import truncated_prompts

    if truncated := truncated_prompts(model, texts):
        length = model.pipeline.tokenizer.model_max_length
        echo(
            f"warning: {len(truncated)} prompts are longer than {length} tokens and were "
            f"truncated, prompt {truncated[0] + 1} first",
            err=True,
        )


def _read_prompts(prompts: Sequence[str], file: Path | None) -> list[str]:
    texts = list(prompts)
    if file is not None:
        from safegen.core.files import exists, read_lines

        if not exists(file, file=True):
            raise FileError(f"prompt file {str(file)!r} does not exist")
        texts += read_lines(file)
    if not texts:
        raise ConfigError("no prompt is given. Use --prompt TEXT or --prompts FILE.")
    return texts
