"""Remove a concept from a model and measure what was removed, in one run directory."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pydantic import Field

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError
from safegen.core.files import atomic_write, display_name
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import MODELS
from safegen.core.settings import MAX_COUNT, BaseSettings, Seeds
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import Edit
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.report.model_card import CardSubject, card_path, model_card, with_metrics
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.card import check_directory
from safegen.evaluation.run.claim import claim_run
from safegen.evaluation.run.folder import PATCHES, Run
from safegen.evaluation.run.judge import load_evaluators
from safegen.evaluation.run.settings import claim_directory
from safegen.patches.patch import Patch
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

EDITED = "edited"
"""Name of the edited stack, of its patch and of the directory of its training log."""


class DemoConfig(BaseSettings):
    """What `run_demo` edits and how much it measures."""

    model: str = "mini"
    """Model to edit."""
    concept: str = "skulls"
    """Concept to remove: a built-in name or a TOML file."""
    prompts: int = Field(default=24, ge=1, le=MAX_COUNT)
    """Number of prompts from each list of the concept."""
    seeds: Seeds = Field(default=(1,), min_length=1)
    """Seeds for each prompt."""
    generation: GenerationConfig = Field(
        default_factory=lambda: GenerationConfig(precision=preferred_precision())
    )
    """How images are generated."""


def run_demo(
    config: DemoConfig,
    edit: Edit,
    output_dir: Path,
    *,
    loader: StackLoader | None = None,
    progress: ProgressCallback = no_progress,
) -> Run:
    """Edit a model, evaluate it beside its base and write the report; return the run.

    Calling it again with the same arguments resumes an interrupted run. The patch and its model
    card are in `output_dir/patches`.

    Args:
        config: what to edit and how much to measure.
        edit: how to edit it.
        output_dir: directory of the run, new or of an earlier call.
        loader: loads the model; on the accelerator or the CPU when not given.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the edit needs triplets and the concept bundles none, or it erases nothing.
        FileError: `output_dir` holds something else or another run, or cannot be written.
        InterruptedRunError: SIGINT or SIGTERM arrived during training.
    """
    if not edit.erases_concept:
        raise ConfigError(
            f"{edit.method()} removes nothing with these settings. "
            "Change them, or use `safegen edit` to make the patch alone."
        )
    concept, loader = load_concept(config.concept), loader or StackLoader()
    triplets = _bundled_triplets(edit, concept)
    protocol = Protocol.from_concept(
        concept, prompts=config.prompts, seeds=config.seeds, generation=config.generation
    )
    check_directory(output_dir)
    with claim_run(output_dir):
        load_evaluators(protocol)  # a judge that is not installed stops the demo before the edit
        claim_directory(
            output_dir,
            {
                "workflow": "demo",
                "model": display_name(config.model),
                "weights": loader.model(config.model)[1],
                "device": f"{loader.device}, {loader.dtype}",
                "protocol": protocol.decides(),
                "edit": {"method": edit.method()} | edit.export_settings(),
            },
        )
        path = output_dir / PATCHES / f"{EDITED}.safetensors"
        if not path.exists():
            _train(edit, config.model, triplets, path, loader, progress)
        base = Stack(name="base", model=config.model)
        edited = Stack(name=EDITED, model=config.model, patches=(path,))
        run = evaluate(
            protocol, [base, edited], output_dir, baselines="none", loader=loader, progress=progress
        )
        _write_card(path, output_dir)
        # bundled models generate harmless stand-ins only: nothing needs to be pixelated
        write_report(open_runs([output_dir]), output_dir, reveal=config.model in MODELS)
    return run


def _bundled_triplets(edit: Edit, concept: Concept) -> Triplets | None:
    if edit.inputs == "words":
        return None
    if concept.triplets is None:
        raise ConfigError(
            f"concept {concept.name!r} has no bundled triplets. Make some with "
            "`safegen triplets make` and use `safegen edit`."
        )
    return Triplets.load(concept.triplets)


def _train(
    edit: Edit,
    model: str,
    triplets: Triplets | None,
    path: Path,
    loader: StackLoader,
    progress: ProgressCallback,
) -> None:
    """Make the patch at `path`, from its checkpoint where there is one; keep only the log of it."""
    from safegen.edits.training.checkpoint import CHECKPOINT_FILE
    from safegen.edits.training.latents import LATENTS, latent_storage

    folder = path.with_suffix("")
    training: dict[str, Any] = (
        {"checkpoint_dir": folder, "resume": (folder / CHECKPOINT_FILE).is_file()}
        if edit.is_trained
        else {}
    )
    with latent_storage(progress=progress):
        patch = edit.apply(
            loader.model(model)[0],
            triplets,
            callback=lambda done, total, _: progress("editing", done, total),
            **training,
        )
    patch.save(path)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / LATENTS, ignore_errors=True)


def _write_card(path: Path, output_dir: Path) -> None:
    """Write the patch's model card beside it, and the figures of the run into its header."""
    patch = with_metrics(Patch.load(path), [output_dir])
    with atomic_write(path, replace=True) as tmp:
        patch.save(tmp)
    with atomic_write(card_path(path), replace=True) as tmp:
        tmp.write_text(
            model_card(CardSubject.of_patch(patch, path.name), [output_dir]), encoding="utf-8"
        )
