"""The `generate` command."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from safegen.cli.console import echo
from safegen.cli.options import (
    Config,
    Device,
    Dtype,
    Patches,
    Pickle,
    Threads,
    prepare_generation,
    print_model,
)
from safegen.cli.progress import show_progress
from safegen.core.errors import ConfigError, FileError
from safegen.core.settings import MAX_BATCH, MAX_SEED, MAX_SIDE, MAX_STEPS

if TYPE_CHECKING:
    from PIL.Image import Image

    from safegen.core.generation import GenerationConfig, Sample
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
    true_cfg: Annotated[
        float, typer.Option(min=1, max=50, help="FLUX: scale of classifier-free guidance.")
    ] = 1.0,
    negative_prompt: Annotated[
        str | None, typer.Option(help="Prompt to steer every image away from.")
    ] = None,
    images_per_prompt: Annotated[
        int, typer.Option(min=1, max=MAX_BATCH, help="Images per prompt.")
    ] = 1,
    width: Annotated[
        int | None, typer.Option(min=8, max=MAX_SIDE, help="Width in pixels [default: the model's]")
    ] = None,
    height: Annotated[
        int | None,
        typer.Option(min=8, max=MAX_SIDE, help="Height in pixels [default: the model's]"),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(help="DDIMScheduler, 'Euler a', 'DPM++ 2M Karras' ... [default: the model's]"),
    ] = None,
    seed_mode: Annotated[
        Literal["safegen", "torch"],
        typer.Option(help="torch: the images that diffusers gives for --seed, equal per prompt."),
    ] = "safegen",
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

    prepare_generation(threads)
    recipe = add_loras(add_patches(recipe, patch or []), lora or [])
    recipe = add_guards(recipe, guard or [], concept)
    generation_config = GenerationConfig(
        num_inference_steps=steps,
        guidance_scale=guidance,
        true_cfg_scale=true_cfg,
        batch_size=batch,
        width=width,
        height=height,
        scheduler=scheduler,
        seed_mode=seed_mode,
    )
    loader = StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle, on_load=print_model)
    samples = _samples(texts, seed, negative_prompt, images_per_prompt)
    withheld = _generate(loader, recipe, samples, generation_config, out)
    note = f", {withheld} withheld ({TRACES} gives the reasons)" if withheld else ""
    shown = len(texts) * images_per_prompt - withheld
    echo(f"{shown} image{'s' * (shown != 1)} and {SHEET} in {out}{note}")


def _samples(texts: Sequence[str], seed: int, negative: str | None, copies: int) -> list[Sample]:
    """Return a sample per prompt; image k of prompt i has the index i * copies + k."""
    from safegen.core.generation import Sample

    return [
        Sample(
            prompt=text,
            seed=seed,
            index=i * copies,
            negative_prompt=negative,
            num_images_per_prompt=copies,
        )
        for i, text in enumerate(texts)
    ]


def _generate(
    loader: StackLoader,
    recipe: Stack,
    samples: Sequence[Sample],
    generation_config: GenerationConfig,
    out: Path,
) -> int:
    """Write the images, the traces and the sheet; return how many images were withheld."""
    from safegen.core.files import staged_directory
    from safegen.evaluation.report.contact_sheet import contact_sheet, save_sheet

    images: list[Image] = []
    metadata, traces, withheld = _metadata(recipe, generation_config), [], 0
    copies = samples[0].num_images_per_prompt
    total, size = len(samples) * copies, max(1, generation_config.batch_size // copies)
    with (
        staged_directory(out) as folder,
        loader.open(recipe) as loaded,
        show_progress() as progress,
    ):
        _warn_of_truncation(loaded, samples)
        for start in range(0, len(samples), size):
            part, done = samples[start : start + size], len(images)

            def report(share: float, done: int = done, part: Sequence[Sample] = part) -> None:
                progress("generating", done + int(share * len(part) * copies), total)

            results = loaded.generate(part, generation_config, callback=report)
            singles = [sample for sample in part for _ in range(copies)]
            for sample, result in zip(singles, results, strict=True):
                single = sample.model_copy(update={"index": len(images)})
                images.append(loaded.display_image(result, generation_config))
                trace = result.trace.to_json()
                traces.append({"index": single.index, "seed": single.seed} | trace)
                withheld += bool(result.trace.withheld)
                if not result.trace.withheld:
                    record = metadata | ({"guards": trace} if recipe.guards else {})
                    path = folder / f"{single.index:04d}.png"
                    _save(images[-1], path, single, loaded, generation_config, record)
        cell = max(96, min(256, loaded.model.size))
        save_sheet(contact_sheet(images, cell=cell), folder / SHEET)
        if recipe.guards:
            lines = "".join(json.dumps(trace, sort_keys=True) + "\n" for trace in traces)
            (folder / TRACES).write_text(lines, encoding="utf-8")
    return withheld


def _save(
    image: Image,
    path: Path,
    sample: Sample,
    loaded: LoadedStack,
    generation_config: GenerationConfig,
    metadata: Mapping[str, Any],
) -> None:
    """Write an image with its settings."""
    from safegen.models.generation import join_negative
    from safegen.models.image_files import parameters_text, save_image

    negative = loaded.stack.negative_prompt
    record = sample.model_dump() | dict(metadata)
    record["negative_prompt"] = join_negative(negative, sample.negative_prompt)
    record |= {"base": loaded.model.hash, "stack": loaded.hash}
    text = parameters_text(
        sample, generation_config, loaded.model, negative=negative, model_name=record["model"]
    )
    save_image(image, path, record, text)


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
    }
    metadata |= generation_config.request_settings
    if recipe.loras:
        metadata["loras"] = [lora.fingerprint() for lora in recipe.loras]
    return metadata


def _warn_of_truncation(loaded: LoadedStack, samples: Sequence[Sample]) -> None:
    """Print which prompts are longer than the model reads, and whether the negative prompt is."""
    from safegen.models.generation import join_negative, truncated_prompts

    length = loaded.model.pipeline.tokenizer.model_max_length
    negative = join_negative(loaded.stack.negative_prompt, samples[0].negative_prompt)
    if truncated_prompts(loaded.model, [negative or ""]):
        echo(
            f"warning: the negative prompt is longer than {length} tokens and was truncated",
            err=True,
        )
    if truncated := truncated_prompts(loaded.model, [sample.prompt for sample in samples]):
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
