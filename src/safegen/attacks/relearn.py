"""Relearning attack: fine-tune an edited model and measure whether the concept comes back.

With `modular` also fine-tune the untouched model and add the edit's change to it
(arXiv:2412.00357).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from safegen.attacks.finetune import (
    Data,
    FineTuneConfig,
    FineTuneDataset,
    captions_for,
    fine_tune,
    patch_path,
)
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.settings import MAX_COUNT, BaseSettings, Seeds
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.checkpoint import CHECKPOINT_FILE, LOG_FILE
from safegen.evaluation.evaluate import evaluate, load_evaluators
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.card import check_directory
from safegen.evaluation.run.claim import claim_run
from safegen.evaluation.run.folder import PATCHES, Run
from safegen.evaluation.run.settings import claim_directory
from safegen.evaluation.samples import Role
from safegen.patches.arithmetic import merge
from safegen.patches.patch import Patch
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

EDITED, FINETUNED, CONTROL, MODULAR = "edited", "finetuned", "control", "modular"
"""Names of the stacks: before the attack, and with `-N` after N updates."""


class RelearnConfig(BaseSettings):
    """Settings of the relearning attack."""

    data: Data = "benign"
    """Fine-tune on `benign` images, as an ordinary user, or on images of the `concept`."""
    finetune: FineTuneConfig = FineTuneConfig()
    """How the fine-tune trains."""
    modular: bool = False
    """Also fine-tune the untouched model, and measure it alone and with the edit's change added."""
    prompts: int = Field(default=24, ge=1, le=MAX_COUNT)
    """Number of prompts from each list of the concept."""
    seeds: Seeds = Field(default=(1,), min_length=1)
    """Seeds for each prompt."""
    roles: tuple[Role, ...] = Field(default=("explicit", "innocent", "benign"), min_length=1)
    """Roles of the concept's prompt lists to measure on."""
    generation: GenerationConfig = Field(
        default_factory=lambda: GenerationConfig(precision=preferred_precision())
    )
    """How images are generated."""


def load_dataset(
    concept: Concept, data: Data, *, triplets: Path | None = None, images: Path | None = None
) -> FineTuneDataset:
    """Return the images to fine-tune on.

    Args:
        concept: its bundled triplets are used when neither `triplets` nor `images` is given.
        data: which side of the triplets.
        triplets: folder or CSV file of triplets.
        images: folder of images with captions.

    Raises:
        ConfigError: both are given, or neither and the concept bundles none.
        FileError: they cannot be read.
    """
    if triplets and images:
        raise ConfigError("give either triplets or images, got both")
    if images:
        return FineTuneDataset.from_folder(images)
    source = triplets or concept.triplets
    if not source:
        raise ConfigError(
            f"concept {concept.name!r} has no bundled triplets. "
            "Name some with --triplets, or a folder with --images."
        )
    return FineTuneDataset.from_triplets(
        Triplets.load(source),
        "benign" if data == "benign" else "unsafe",
        lambda images: captions_for(concept, data, images),
    )


def relearn(
    stack: Stack,
    concept: Concept,
    dataset: FineTuneDataset,
    config: RelearnConfig,
    output_dir: Path,
    *,
    loader: StackLoader | None = None,
    progress: ProgressCallback = no_progress,
) -> Run:
    """Fine-tune a stack, evaluate it before and after, write the report and return the run.

    Calling it again with the same arguments resumes an interrupted run. The fine-tuned patches are
    in `output_dir/patches`. Every stack is tested against the edited one, image by image.

    Args:
        stack: the edited model: a model with at least one patch.
        concept: the concept that was removed; it gives the prompts and the judge.
        dataset: images to fine-tune on.
        config: settings of the attack.
        output_dir: directory of the run, new or of an earlier call.
        loader: loads the model; on the CPU when not given.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: the stack has no patch, or a setting does not fit the model.
        FileError: `output_dir` holds something else or another run, or cannot be written.
        PatchError: a patch does not fit the model.
        InterruptedRunError: SIGINT or SIGTERM arrived during training.

    Warns:
        PatchOverlapWarning: two patches change the same weights.
    """
    if not stack.patches:
        raise ConfigError("the attacked stack must have a patch, got none. Add one with --patch.")
    loader = loader or StackLoader()
    protocol = Protocol.from_concept(
        concept,
        prompts=config.prompts,
        seeds=config.seeds,
        generation=config.generation,
        roles=config.roles,
    )
    check_directory(output_dir)
    with claim_run(output_dir):
        load_evaluators(
            protocol
        )  # a judge that is not installed stops the attack before the training
        edited = stack.model_copy(update={"name": EDITED})
        base = Stack(name="base", model=stack.model, config=stack.config)
        if config.modular:
            _check_modular([Patch.load(path) for path in stack.patches])
        settings = {
            "config": config.model_dump(mode="json"),
            "dataset": dataset.to_dict(),
            "stack": loader.hash(edited),
            "protocol": protocol.decides(),
            "device": f"{loader.device}, {loader.dtype}",
        }
        claim_directory(output_dir, {"workflow": "relearn"} | settings)
        stacks = _fine_tune(edited, FINETUNED, dataset, config, output_dir, loader, progress)
        if config.modular:
            controls = _fine_tune(base, CONTROL, dataset, config, output_dir, loader, progress)
            stacks += [*controls, *_add_edit(edited, controls, loader)]
        run = evaluate(
            protocol,
            [base, edited, *stacks],
            output_dir,
            baselines="none",
            references={attacked.name: EDITED for attacked in stacks},
            loader=loader,
            progress=progress,
        )
        write_report(open_runs([output_dir]), output_dir)
    return run


def _fine_tune(
    stack: Stack,
    name: str,
    dataset: FineTuneDataset,
    config: RelearnConfig,
    output_dir: Path,
    loader: StackLoader,
    progress: ProgressCallback,
) -> list[Stack]:
    """Return the stack with its fine-tune after each number of updates."""
    folder = output_dir / PATCHES / name
    paths = {n: patch_path(folder, n) for n in config.finetune.updates}
    if not (_is_finished(folder) and all(path.exists() for path in paths.values())):
        with loader.open(stack) as loaded:
            fine_tune(
                loaded.model,
                dataset,
                config.finetune,
                folder=folder,
                callback=lambda done, total, _: progress(f"fine-tuning: {stack.name}", done, total),
                images=config.data,
            )
    return [
        stack.model_copy(update={"name": f"{name}-{n}", "patches": (*stack.patches, path)})
        for n, path in paths.items()
    ]


def _is_finished(folder: Path) -> bool:
    """Return whether a training ended: its log is there and its checkpoint is removed."""
    return (folder / LOG_FILE).is_file() and not (folder / CHECKPOINT_FILE).exists()


def _add_edit(edited: Stack, controls: Sequence[Stack], loader: StackLoader) -> list[Stack]:
    """Return a stack for each fine-tune of the base, with the edit's change added to it."""
    edit, stacks = _merged([Patch.load(path) for path in edited.patches]), []
    for control in controls:
        path = control.patches[-1]
        modular = path.with_name(path.name.replace(CONTROL, MODULAR, 1))
        if not modular.exists():
            model, _ = loader.model(edited.model, edited.config)
            merge([edit, Patch.load(path)], overlap="add", model=model).save(modular)
        update = {"name": modular.stem, "patches": (modular,)}
        stacks.append(edited.model_copy(update=update))
    return stacks


def _merged(patches: Sequence[Patch]) -> Patch:
    return merge(patches, overlap="last") if len(patches) > 1 else patches[0]


def _check_modular(patches: Sequence[Patch]) -> None:
    """Check before the training that the edit's change can be added to a fine-tune of the base.

    Raises:
        ConfigError: the edit was made on a model with another patch, which is not among these.
    """
    if missing := _merged(patches).metadata.parents:
        raise ConfigError(
            f"modular needs every patch below the edit, got none of {missing[0].method}, "
            f"hash {missing[0].hash[:12]}. Name it with --patch too."
        )
