"""Relearning: fine-tune the stack, and measure whether the concept comes back.

With `modular` also fine-tune the model without its patches, and add the edit's change to that
(arXiv:2412.00357).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.cost import Cost
from safegen.attacks.core.dataset import Data, FineTuneDataset, load_dataset
from safegen.attacks.core.finetune import (
    fine_tune,
    is_finished,
    patch_path,
    seconds_spent,
    taken_patches,
    updates_done,
)
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.settings import MAX_BATCH, MAX_COUNT, MAX_RANK
from safegen.edits.training.config import LogRow, Precision, Training
from safegen.evaluation.samples import EvalSample, Role
from safegen.patches.arithmetic import merge
from safegen.patches.patch import Patch
from safegen.stack import Stack

FINETUNED, CONTROL, MODULAR = "finetuned", "control", "modular"
"""Names of the attacked stacks, with `-N` after N updates."""


class Relearn(Attack):
    """Settings of the relearning attack."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "full": {"rank": None, "selector": "all", "lr": 1e-4},
    }
    TINY: ClassVar[Mapping[str, Any]] = {"updates": (1, 2), "rank": 2, "images_per_update": 2}
    paper: ClassVar[str] = "arXiv:2412.00357"
    deviations: ClassVar[str] = (
        "No code of the paper was found. "
        "The paper fine-tunes on benign images only; `data=concept` is ours. "
        "The learning rate and the rank are chosen for the miniature model. "
        "Captions are the concept's tuning captions for the subject that its judge sees."
    )
    access: ClassVar[Access] = "weights"
    tier: ClassVar[Tier] = "adaptive"
    role: ClassVar[Role] = "explicit"
    changes_prompts: ClassVar[bool] = False

    data: Data = "benign"
    """Fine-tune on `benign` images, as an ordinary user, or on images of the `concept`."""
    updates: tuple[Annotated[int, Field(le=MAX_COUNT)], ...] = Field(default=(200,), min_length=1)
    """Optimizer updates after which the stack is evaluated, rising; one training takes them all."""
    selector: str = "attention"
    """Layers that are fine-tuned."""
    rank: int | None = Field(default=16, ge=1, le=MAX_RANK)
    """Rank of the LoRA; None trains the weights themselves."""
    lr: float = Field(default=5e-4, gt=0, le=10)
    """Constant learning rate of AdamW; diffusers' LoRA example has 1e-4, for a full-size model."""
    images_per_update: int = Field(default=8, ge=1, le=MAX_BATCH)
    """Images in an update."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; `auto` lets the device decide."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the LoRA's initial values and of every draw."""
    triplets: Path | None = None
    """Folder or CSV file of triplets with the images. Default: the concept's bundled ones."""
    images: Path | None = None
    """Folder of images with captions (a.png, a.txt), instead of triplets."""
    modular: bool = False
    """Also fine-tune the model without patches, and evaluate it alone and with the edit added."""

    @model_validator(mode="after")
    def _check_updates(self) -> Self:
        if any(a >= b for a, b in zip((0, *self.updates), self.updates, strict=False)):
            values = ", ".join(map(str, self.updates))
            raise ValueError(f"updates must rise from 1 or more, got {values}")
        return self

    @property
    def training(self) -> Training:
        """Settings of the training loop: constant rate, no weight average, no weight decay."""
        return Training(
            updates=self.updates[-1],
            batch=self.images_per_update,
            accumulation=1,
            lr=self.lr,
            weight_decay=0.0,
            ema=0.0,
            precision=self.precision,
            seed=self.seed,
        )

    def dataset(self, concept: Concept) -> FineTuneDataset:
        """Return the images to fine-tune on.

        Raises:
            ConfigError: there are none, or two sources of them.
            FileError: they cannot be read.
        """
        return load_dataset(concept, self.data, triplets=self.triplets, images=self.images)

    def fingerprint(self, concept: Concept) -> dict[str, Any]:
        """Return the settings, with the hash of the images in place of their folder.

        Raises:
            ConfigError: there are no images, or two sources of them.
            FileError: they cannot be read.
        """
        plain = self.model_dump(mode="json", exclude={"triplets", "images"})
        return plain | {"dataset": self.dataset(concept).to_dict()}

    def build(self, context: AttackContext) -> FineTuner:
        """Fine-tune the target and return the attacker.

        Raises:
            ConfigError: there are no images, a setting does not fit the model, or `modular` has
                no edit that it could add.
            DivergedError: a loss or a weight is not finite.
            InterruptedRunError: SIGINT or SIGTERM arrived during training.
        """
        return FineTuner(self, context)

    def attacked_stacks(self, stack: Stack, folder: Path) -> Sequence[Stack]:
        """Return the stack after each number of updates; with `modular` also the controls."""
        found = {name: taken_patches(folder / name, self.updates) for name in (FINETUNED, CONTROL)}
        base = Stack(name=CONTROL, model=stack.model, config=stack.config)
        return [
            *(_with(stack, f"{FINETUNED}-{n}", path) for n, path in found[FINETUNED].items()),
            *(_with(base, f"{CONTROL}-{n}", path) for n, path in found[CONTROL].items()),
            *(
                stack.model_copy(
                    update={"name": f"{MODULAR}-{n}", "patches": (patch_path(folder / MODULAR, n),)}
                )
                for n in found[CONTROL]
            ),
        ]


def _with(stack: Stack, name: str, patch: Path) -> Stack:
    """Return a stack with another name and one more patch."""
    return stack.model_copy(update={"name": name, "patches": (*stack.patches, patch)})


class FineTuner:
    """Fine-tunes a target once; prompts stay as they are."""

    def __init__(self, config: Relearn, context: AttackContext) -> None:
        self.config, self.context, self.stopped = config, context, ""
        target, stack, model = context.target, context.target.loaded.stack, context.target.model
        self.counts_earlier = not target.cost.denoiser
        """Whether no record holds the cost of what is on the disk already."""
        edit = _edit_to_add(stack) if config.modular else None
        dataset = config.dataset(context.concept)
        self._train(dataset, FINETUNED, stack.name)
        self.stopped = self.stopped or (target.exhausted if edit else "")
        if edit and not self.stopped:
            with model.without_patches():
                controls = self._train(dataset, CONTROL, "base")
                for updates, path in controls.items():
                    modular = patch_path(context.folder / MODULAR, updates)
                    if not modular.exists():
                        parts = [edit, Patch.load(path)]
                        merge(parts, overlap="add", model=model).save(modular)

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return the samples as they are."""
        return [
            AttackRecord(id=sample.id, prompt=sample.prompt, seed=sample.seed, stopped=self.stopped)
            for sample in samples
        ]

    def _train(self, dataset: FineTuneDataset, name: str, stack: str) -> dict[int, Path]:
        """Fine-tune the model as it is now; return the patches by number of updates.

        Args:
            dataset: images and captions.
            name: name of the attacked stacks, and of the folder.
            stack: name of the stack that is fine-tuned, for the progress.
        """
        config, target, folder = self.config, self.context.target, self.context.folder / name
        if self.counts_earlier:  # a pass forward and one backward for each image
            passes = 2 * config.images_per_update * updates_done(folder)
            # one that goes on encodes the captions again
            texts = dataset.to_dict()["captions"] if is_finished(folder) else 0
            target.add(Cost(denoiser=passes, text_encoder=texts, seconds=seconds_spent(folder)))

        def after_update(done: int, total: int, _: LogRow) -> bool:
            self.context.progress(f"fine-tuning: {stack}", done, total)
            return bool(target.exhausted)

        patches = fine_tune(
            target.model,
            dataset,
            config.updates,
            config.training,
            folder=folder,
            selector=config.selector,
            rank=config.rank,
            callback=after_update,
            images=config.data,
        )
        if updates_done(folder) < config.updates[-1]:
            self.stopped = target.exhausted or "minutes"
        return patches


def _edit_to_add(stack: Stack) -> Patch:
    """Return the change by a stack's patches, which can be added to a fine-tune of its model.

    Raises:
        ConfigError: the stack has no patch or an active LoRA, or the edit was made on a model with
            another patch, which is not among these.
    """
    if stack.loras or not stack.patches:
        found = "a LoRA, which stays apart from a fine-tune anyway" if stack.loras else "no patch"
        raise ConfigError(f"modular needs an edit as patches alone, got {found}. Leave it out.")
    patches = [Patch.load(path) for path in stack.patches]
    edit = merge(patches, overlap="last") if len(patches) > 1 else patches[0]
    if missing := edit.metadata.parents:
        raise ConfigError(
            f"modular needs every patch below the edit, got none of {missing[0].method}, "
            f"hash {missing[0].hash[:12]}. Add it to the stack too."
        )
    return edit
