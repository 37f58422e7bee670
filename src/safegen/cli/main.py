"""The commands: generate, edit, apply, demo.

Patch, export, evaluate, attack ... have their own files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from safegen.cli import attack, demo, evaluate, triplets
from safegen.cli import patch as patch_cli
from safegen.cli import prompts as prompts_cli
from safegen.cli.options import (
    Config,
    Device,
    Dtype,
    Metrics,
    ModelArg,
    NoCard,
    Pickle,
    Threads,
    load_model,
    one_line_warnings,
    quiet,
    read_settings,
    refuse_idle_metrics,
    set_threads,
    show_progress,
)
from safegen.core.errors import ConfigError, FileError

if TYPE_CHECKING:  # what these need is opened within commands, so that --help answers at once
    from safegen.core.generation import GenerationConfig
    from safegen.models.model import Model
    from safegen.stack import Stack

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Make a text-to-image model unable to draw a chosen visual concept, prove it, and ship it.",
)
app.add_typer(
    triplets.app, name="triplets", help="Make and check <unsafe, censored, benign> triplets."
)
app.add_typer(prompts_cli.app, name="prompts", help="Look into files and lists of prompts.")
app.add_typer(
    patch_cli.app,
    name="patch",
    help="Look into patches, compare and merge them, turn them into LoRAs.",
)
app.add_typer(attack.app, name="attack", help="Test whether a removed concept can be brought back.")
for command in (
    patch_cli.export,
    evaluate.evaluate,
    evaluate.score,
    evaluate.report,
    evaluate.verify,
    demo.demo,
):
    app.command()(command)

SHEET = "sheet.png"
"""Contact sheet of the pictures that `generate` drew, which comes last."""


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from safegen._version import __version__

        typer.echo(__version__)
        raise typer.Exit
    quiet()


@app.command()
def generate(
    out: Annotated[Path, typer.Option(help="New folder for the pictures.")],
    model: Annotated[
        str | None,
        typer.Argument(
            help="'mini', a diffusers folder, a one-file checkpoint, or hub:owner/name.",
            metavar="[MODEL]",
        ),
    ] = None,
    stack: Annotated[
        Path | None,
        typer.Option(help="A recipe.toml (model, config, patches, guards) in the place of MODEL."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(help="A prompt; may be given more than once.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt a line.")] = None,
    patch: Annotated[
        list[Path] | None,
        typer.Option(help="A patch to put on the model; may be given more than once."),
    ] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            help="A LoRA, FILE or FILE:SCALE, active beside the weights; may be given more than once."
        ),
    ] = None,
    guard: Annotated[
        list[str] | None,
        typer.Option(help="A guard, NAME or NAME-PRESET as sld-max; may be given more than once."),
    ] = None,
    concept: Annotated[
        str | None, typer.Option(help="Concept whose words and judge the guards take.")
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Picture i of a run gets its noise from (seed, i).")
    ] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Denoising steps.")] = 25,
    guidance: Annotated[
        float, typer.Option(min=1, max=50, help="Scale of classifier-free guidance.")
    ] = 5.0,
    batch: Annotated[int, typer.Option(min=1, help="Pictures made at once.")] = 16,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Draw pictures: one PNG a prompt, with its facts inside, and a contact sheet.

    With guards, trace.jsonl says what they did.
    """
    texts = _read_prompts(prompt, prompts)
    if (model is None) == (stack is None):
        raise ConfigError(
            "generate draws with a MODEL or with a --stack recipe.toml; give one of them"
        )
    from safegen.core.files import display_name, staged_directory
    from safegen.core.generation import GenerationConfig, Sample
    from safegen.evaluation.report.contact_sheet import contact_sheet, save_sheet
    from safegen.models.generation import save_image
    from safegen.stack import Stack, add_guards, add_loras, add_patches, load_stack
    from safegen.stack_loader import StackLoader

    set_threads(threads)
    recipe = load_stack(str(stack)) if stack else Stack(name="model", model=model or "")
    if config and recipe.config:
        raise ConfigError(f"{stack} names a config, so --config has no effect; leave it out")
    recipe = recipe.model_copy(update={"config": config}) if config else recipe
    recipe = add_guards(
        add_loras(add_patches(recipe, patch or []), lora or []), guard or [], concept
    )
    generation_config, shelf = (
        GenerationConfig(num_inference_steps=steps, guidance_scale=guidance, batch_size=batch),
        StackLoader(device=device, dtype=dtype, allow_pickle=allow_pickle),
    )
    said = _said(recipe, generation_config, display_name(model or recipe.model))
    asks = [Sample(prompt=text, seed=seed, index=i) for i, text in enumerate(texts)]
    with (
        staged_directory(out, last=SHEET) as folder,
        one_line_warnings(),
        shelf.open(recipe) as ready,
        show_progress() as progress,
    ):
        _warn_of_length(ready.model, texts)
        pictures, lines = [], []
        for start in range(0, len(asks), batch):
            for ask, drawn in zip(
                asks[start : start + batch],
                ready.generate(asks[start : start + batch], generation_config),
                strict=True,
            ):
                facts = ask.model_dump() | said | {"base": ready.model.hash, "stack": ready.hash}
                facts |= {"guards": drawn.trace.to_json()} if recipe.guards else {}
                pictures.append(ready.display_image(drawn))
                if not drawn.trace.withheld:
                    save_image(pictures[-1], folder / f"{ask.index:04d}.png", facts)
                lines.append(
                    json.dumps(
                        {"index": ask.index, "seed": seed} | drawn.trace.to_json(), sort_keys=True
                    )
                    + "\n"
                )
                progress("drawing", len(pictures), len(asks))
        save_sheet(
            contact_sheet(pictures, cell=max(96, min(256, ready.model.size))), folder / SHEET
        )
        if recipe.guards:
            (folder / "trace.jsonl").write_text("".join(lines), encoding="utf-8")
    withheld = sum(not (out / f"{ask.index:04d}.png").exists() for ask in asks)
    gone = f", {withheld} withheld (trace.jsonl says why)" if withheld else ""
    typer.echo(f"{len(texts) - withheld} pictures and {SHEET} in {out}{gone}")


def _said(recipe: Stack, generation_config: GenerationConfig, name: str) -> dict[str, Any]:
    """Return what every picture says of the model and how it is drawn."""
    from safegen.patches.patch import Patch

    loras = {"loras": [one.fingerprint() for one in recipe.loras]} if recipe.loras else {}
    patches = [Patch.load(path).hash for path in recipe.patches]
    drawn = {
        "steps": generation_config.num_inference_steps,
        "guidance": generation_config.guidance_scale,
        "model": name,
    }
    return drawn | {"patches": patches, "negative_prompt": recipe.negative_prompt} | loras


def _warn_of_length(model: Model, texts: list[str]) -> None:
    """Say which prompts the model does not read to their end."""
    from safegen.models.generation import truncated_prompts

    if cut := truncated_prompts(model, texts):
        length = model.pipeline.tokenizer.model_max_length
        typer.echo(
            f"warning: {len(cut)} prompts, number {cut[0] + 1} first, have more than the {length} tokens that are read",
            err=True,
        )


@app.command()
def edit(
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="New .safetensors file for the patch.")],
    triplets: Annotated[
        Path | None,
        typer.Option(
            help="For edits that learn from pictures: folder made by `safegen triplets make`, the official CSV, or mini:skulls."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="Name of the edit.")] = "safegen",
    preset: Annotated[
        str, typer.Option(help="Settings to start from: default, or paper (the published run).")
    ] = "default",
    concept: Annotated[
        str | None,
        typer.Option(
            help="A built-in concept or a TOML file: lends words to erase, harmless captions, and a judge that looks at triplets."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting: name=value, training.lr=1e-4, ..."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Folder for checkpoints and the log; OUT.work when not given."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue a stopped run.")] = False,
    no_card: NoCard = False,
    device: Device = "cpu",
    dtype: Dtype = "fp32",
    threads: Threads = None,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Remove a visual concept and write the change as a patch: from triplets, or (uce, rece ...) from a concept's words."""
    if out.exists():
        raise FileError(f"{out} exists already; name another file or remove it")
    from safegen.core.files import check_writable

    check_writable(out)
    if work is not None:
        check_writable(work / "log")
    from safegen.data.triplets.triplets import Triplets
    from safegen.edits.base import check_inputs
    from safegen.evaluation.report.model_card import check_card_path
    from safegen.workflows.edit import (
        make_edit,
        refuse_idle_concept,
        refuse_other_pictures,
        save_patch,
    )

    if not no_card:
        check_card_path(out)
    changes = read_settings(method, preset, set_ or [])
    if concept is not None and triplets is None:  # of triplets its judge sees whether they show it
        refuse_idle_concept(method, preset, concept, **changes)
    recipe = make_edit(method, preset, concept=concept, **changes)
    check_inputs(recipe, triplets, work, resume)
    rows = Triplets.load(triplets) if triplets else None
    if concept is not None and rows is not None:
        with one_line_warnings():
            refuse_other_pictures(concept, rows)
    if recipe.is_trained:
        work = work or out.with_name(out.name + ".work")
        if not resume and (work / "checkpoint.safetensors").exists():
            raise FileError(
                f"{work} holds an earlier run; --resume goes on with one that was stopped; else remove that folder"
            )
    loaded = load_model(
        model,
        [],
        device=device,
        dtype=dtype,
        threads=threads,
        allow_pickle=allow_pickle,
        config=config,
    )
    with show_progress() as progress:
        patch = recipe.apply(
            loaded,
            rows,
            checkpoint_dir=work,
            resume=resume,
            callback=lambda done, of, _: progress("editing", done, of),
        )
    save_patch(patch, out, card=not no_card)
    facts = patch.metadata.to_json()
    how = (
        f"in {facts['updates']} updates, {facts['seconds']:.0f} s; log in {work}"
        if recipe.is_trained
        else f"in {facts['seconds']:.1f} s"
    )
    typer.echo(f"{out}: {len(patch.tensors)} tensors changed {how}")


@app.command()
def apply(
    patch: Annotated[Path, typer.Argument(help="A patch file.")],
    model: ModelArg,
    out: Annotated[Path, typer.Option(help="New diffusers folder.")],
    metrics: Metrics = None,
    no_card: NoCard = False,
    allow_pickle: Pickle = False,
    config: Config = None,
) -> None:
    """Put a patch on a model and write a plain diffusers folder."""
    if out.exists():
        raise FileError(f"{out} exists already; name another folder or remove it")
    refuse_idle_metrics(metrics, no_card)
    from safegen.patches.patch import Patch
    from safegen.workflows.edit import export_folder

    loaded = load_model(
        model,
        [],
        device="cpu",
        dtype="fp32",
        threads=None,
        allow_pickle=allow_pickle,
        config=config,
    )
    read = Patch.load(patch)
    with one_line_warnings():
        export_folder(loaded, out, patches=[read], card=not no_card, metrics=metrics or ())
    typer.echo(f"{out}: {model}; the patch {read.describe_change(loaded)}")
    typer.echo(f"open it with {type(loaded.pipeline).__name__}.from_pretrained({str(out)!r})")


def _read_prompts(prompt: list[str] | None, prompts: Path | None) -> list[str]:
    texts = list(prompt or [])
    if prompts is not None:
        from safegen.core.files import exists, read_lines

        if not exists(prompts, file=True):
            raise FileError(f"the prompt file {str(prompts)!r} does not exist")
        try:
            texts += read_lines(prompts)
        except FileError as error:
            raise FileError(f"the prompt file {error}") from error
    if not texts:
        raise ConfigError(
            "there is nothing to draw; give --prompt TEXT or --prompts FILE with a prompt a line"
        )
    return texts
