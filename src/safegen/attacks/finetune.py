"""Fine-tuning of a LoRA with the plain denoising loss, as users do it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from PIL import Image
from pydantic import Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept, prompt_list
from safegen.core.errors import ConfigError, DivergedError, FileError
from safegen.core.settings import MAX_BATCH, MAX_COUNT, MAX_RANK, BaseSettings
from safegen.data.images import read_image
from safegen.data.triplets.triplets import Triplets, read_role
from safegen.edits.functional import losses
from safegen.edits.training.checkpoint import CHECKPOINT_FILE
from safegen.edits.training.config import (
    LogRow,
    Precision,
    Training,
    TrainingCallback,
    resolve_precision,
)
from safegen.edits.training.lora import trainable_parameters
from safegen.edits.training.samples import preprocess
from safegen.edits.training.trainer import check_training, train
from safegen.judges import load_judge
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.patches.patch import Patch

Data = Literal["benign", "concept"]
"""What a fine-tune learns: harmless images, as an ordinary user's, or images of the concept."""
Captioner = Callable[[Sequence[Image.Image]], Sequence[tuple[str, ...]]]
"""Returns the captions that each image may be trained with."""
CHECKPOINT_EVERY = 25
"""Updates between two checkpoints."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class FineTuneConfig(BaseSettings):
    """Settings of a fine-tune: the plain denoising loss on a LoRA of the attention layers."""

    updates: tuple[Annotated[int, Field(le=MAX_COUNT)], ...] = Field(default=(200,), min_length=1)
    """Optimizer updates after which a patch is taken, rising; one training takes them all."""
    selector: str = "attention"
    """Layers that get a LoRA."""
    rank: int = Field(default=16, ge=1, le=MAX_RANK)
    """Rank of the LoRA."""
    lr: float = Field(default=5e-4, gt=0, le=10)
    """Constant learning rate of AdamW; diffusers' LoRA example has 1e-4, for a full-size model."""
    batch: int = Field(default=8, ge=1, le=MAX_BATCH)
    """Images in an update."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; `auto` lets the device decide."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the LoRA's initial values and of every draw."""

    @model_validator(mode="after")
    def _check_updates(self) -> Self:
        if any(a >= b for a, b in zip((0, *self.updates), self.updates, strict=False)):
            values = ", ".join(map(str, self.updates))
            raise ValueError(f"updates must rise from 1 or more, got {values}")
        return self

    def resolve(self, net: nn.Module) -> Self:
        """Return the settings with `auto` precision decided for a network."""
        return self.model_copy(update={"precision": resolve_precision(self.precision, net)})

    @property
    def training(self) -> Training:
        """Settings of the training loop: constant rate, no weight average, no weight decay."""
        return Training(
            updates=self.updates[-1],
            batch=self.batch,
            accumulation=1,
            lr=self.lr,
            weight_decay=0.0,
            ema=0.0,
            precision=self.precision,
            seed=self.seed,
        )


@dataclass(frozen=True)
class FineTuneDataset:
    """Images to fine-tune on with the captions that each may be trained with."""

    images: tuple[Image.Image, ...]
    captions: tuple[tuple[str, ...], ...]
    """Captions of each image; a draw takes one of them."""
    hash: str
    """SHA-256 over images and captions."""
    skipped: int = 0
    """Number of images without a caption, which are left out."""

    @classmethod
    def from_triplets(
        cls, triplets: Triplets, role: Literal["unsafe", "benign"], caption: Captioner
    ) -> Self:
        """Return one role of the triplets as a dataset.

        Args:
            triplets: the triplets, which carry no text.
            role: which of their images.
            caption: returns captions for the images; one without any is skipped.

        Raises:
            FileError: an image is missing or changed, or none has a caption.
        """
        images = [read_role(triplets.folder, row, role) for row in triplets.rows]
        digests = [getattr(row.sha256, role) for row in triplets.rows]
        rows = [row for row in zip(images, caption(images), digests, strict=True) if row[1]]
        if not rows:
            raise FileError(
                "no image of the triplets shows a subject that a caption fits. "
                "Give images with captions: --images."
            )
        used, captions, hashes = zip(*rows, strict=True)
        return cls(used, captions, _digest(hashes, captions), len(images) - len(rows))

    @classmethod
    def from_folder(cls, folder: Path) -> Self:
        """Return the images of a folder with their captions, `cat.png` beside `cat.txt`.

        Raises:
            FileError: there is no such folder or no image in it, a caption is missing, or a file
                cannot be read.
        """
        if not folder.is_dir():
            raise FileError(
                f"{folder} is not a folder. Name one with images and a .txt file with the caption "
                "beside each."
            )
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)
        if not paths:
            raise FileError(f"{folder} has no images ({', '.join(IMAGE_SUFFIXES)})")
        captions = []
        for path in paths:
            file = path.with_suffix(".txt")
            if not file.is_file():
                raise FileError(
                    f"{path.name} has no caption. Write it to {file}; an empty file means none."
                )
            try:
                captions.append((" ".join(file.read_text(encoding="utf-8-sig").split()),))
            except UnicodeDecodeError as error:
                raise FileError(f"{file} is not UTF-8 text: {error}") from error
        hashes = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
        images = tuple(read_image(p) for p in paths)
        return cls(images, tuple(captions), _digest(hashes, captions))

    def to_dict(self) -> dict[str, Any]:
        """Return the dataset's sizes and hash; no caption, which may be unsafe."""
        return {
            "images": len(self.images),
            "captions": len({text for row in self.captions for text in row}),
            "skipped": self.skipped,
            "hash": self.hash,
        }


def captions_for(
    concept: Concept, data: Data, images: Sequence[Image.Image]
) -> list[tuple[str, ...]]:
    """Return captions for images that have none.

    The captions of an image are the prompts of the concept's `tuning` lists for the subject that
    its judge sees. A concept without such lists gives its words to its own images and the blank
    caption to harmless ones. That is a weaker attack: a bare word need not be how a user asks for
    such an image, and blank captions train the unconditional branch of guidance.
    """
    if data not in concept.tuning:
        return [concept.words if data == "concept" else ("",)] * len(images)
    prompts: dict[str | None, tuple[str, ...]] = {}
    for row in (row for name in concept.tuning[data] for row in prompt_list(name)):
        prompts[row.subject] = (*prompts.get(row.subject, ()), row.text)
    judge = load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold)
    subjects = [detections.subject for detections in judge.detect(list(images))]
    return [prompts.get(subject, ()) if subject else () for subject in subjects]


class DenoisingObjective:
    """The plain loss |e(x_t, t, c) - target|^2 (Ho et al. 2020, arXiv:2006.11239, eq. 14)."""

    def __init__(self, config: FineTuneConfig, model: Model, dataset: FineTuneDataset) -> None:
        """Encode every image and caption once."""
        self.config, self.prediction = config, model.prediction
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"prediction type must be epsilon or v_prediction, got {self.prediction}. "
                "Fine-tuning supports no other."
            )
        self.weights = {"L": 1.0}
        self.abar = model.alphas_cumprod().to(model.device)
        pixels = torch.stack([preprocess(image, model.size) for image in dataset.images])
        self.latents = model.encode_images(pixels).float()
        texts = list(dict.fromkeys(text for row in dataset.captions for text in row))
        chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        self.text = torch.cat([model.encode_text(chunk).float() for chunk in chunks])
        self.captions = [[texts.index(text) for text in row] for row in dataset.captions]
        self.fingerprint = f"{config.model_dump_json()} {model.pipeline_hash} {dataset.hash}"

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return the loss of one random batch, (b,)."""
        b, g = self.config.batch, generator
        rows = torch.randint(len(self.latents), (b,), generator=g)
        picks = torch.randint(2**31, (b,), generator=g)
        t = torch.randint(len(self.abar), (b,), generator=g)
        eps = torch.randn(b, *self.latents.shape[1:], generator=g)
        mine = torch.arange(b)[share[0] :: share[1]]
        choices = [self.captions[int(row)] for row in rows]
        captions = torch.tensor(
            [choice[int(pick) % len(choice)] for choice, pick in zip(choices, picks, strict=True)]
        )
        device = self.latents.device
        z, noise = self.latents[rows[mine].to(device)], eps[mine].to(device)
        steps = t[mine].to(device)
        abar = self.abar[steps]
        target = noise if self.prediction == "epsilon" else losses.velocity(noise, z, abar)
        x_t, text = losses.add_noise(z, noise, abar), self.text[captions[mine].to(device)]
        return {"L": losses.squared_error(denoiser(x_t, steps, text).sample, target)}


@dataclass(frozen=True)
class FineTuneResult:
    """Patch of the fine-tuned model after each number of updates, and the training log."""

    patches: Mapping[int, Patch]
    log: Sequence[LogRow]


def fine_tune(
    model: Model,
    dataset: FineTuneDataset,
    config: FineTuneConfig,
    *,
    folder: Path | None = None,
    callback: TrainingCallback | None = None,
    **metadata: Any,
) -> FineTuneResult:
    """Fine-tune a model with its patches applied and return the changes as patches.

    Args:
        model: the model; it is not changed.
        dataset: images and captions.
        config: settings of the fine-tune.
        folder: keeps a checkpoint and the log, and each patch beside it as `FOLDER-N.safetensors`.
            A call with the same arguments resumes.
        callback: called after every update with (done, total, row of the log).
        metadata: more metadata for the patches.

    Returns:
        Patches with the tuned weights, to apply after the patches that the model had.

    Raises:
        ConfigError: the model predicts neither noise nor velocity, or the precision does not fit.
        FileError: the folder is of another fine-tune or damaged, or cannot be written.
        DivergedError: a loss or a weight is not finite.
        InterruptedRunError: SIGINT or SIGTERM arrived.
    """
    config = config.resolve(model.denoiser)
    patches: dict[int, Patch] = {}
    common = _metadata(model, dataset, config)
    with trainable_parameters(
        model, config.selector, rank=config.rank, alpha=None, seed=config.seed
    ) as trainable:
        training = config.training
        check_training(model.denoiser, trainable.names, training)
        parameters = dict(model.denoiser.named_parameters())

        def take_patch(done: int, total: int, row: LogRow) -> None:
            if done in config.updates:
                values = {name: parameters[name].detach().clone() for name in trainable.names}
                last = {"updates": done, "losses": {"L": row["L"]}}
                patches[done] = Patch(
                    trainable.merge(values), PatchMetadata(**common | last | metadata)
                )
                _check_finite(patches[done], done, config.lr)
                if folder:
                    path = patch_path(folder, done)
                    path.unlink(missing_ok=True)  # of a run that was killed before its checkpoint
                    patches[done].save(path)
            if callback:
                callback(done, total, row)

        objective = DenoisingObjective(config, model, dataset)
        resume = folder is not None and (folder / CHECKPOINT_FILE).is_file()
        if folder:
            training = training.model_copy(update={"checkpoint_every": CHECKPOINT_EVERY})
        result = train(
            model.denoiser,
            trainable.names,
            objective,
            training,
            fingerprint=objective.fingerprint,
            checkpoint_dir=folder,
            resume=resume,
            callback=take_patch,
        )
    if folder:  # with those of earlier calls
        patches = {n: Patch.load(patch_path(folder, n)) for n in config.updates}
        (folder / CHECKPOINT_FILE).unlink(missing_ok=True)
    return FineTuneResult(patches, result.log)


def patch_path(folder: Path, updates: int) -> Path:
    """Return the path of the patch that `fine_tune` takes after a number of updates."""
    return folder.with_name(f"{folder.name}-{updates}.safetensors")


def _metadata(model: Model, dataset: FineTuneDataset, config: FineTuneConfig) -> dict[str, Any]:
    """Return the metadata that all patches of a fine-tune share."""
    metadata: dict[str, Any] = {
        "method": "fine-tune",
        "settings": config.model_dump(mode="json"),
        "description": f"Fine-tuned on {len(dataset.images)} images with the denoising loss.",
        "base": model.hash,
        "family": model.family,
        "data": dataset.hash,
    }
    return metadata | ({"parents": model.parents} if model.parents else {})


def _check_finite(patch: Patch, updates: int, lr: float) -> None:
    if any(not bool(value.isfinite().all()) for value in patch.tensors.values()):
        raise DivergedError(
            f"fine-tuned weights must be finite, got NaN or infinity after {updates} updates. "
            f"Lower lr ({lr})."
        )


def _digest(hashes: Sequence[str], captions: Sequence[Sequence[str]]) -> str:
    rows = zip(hashes, captions, strict=True)
    return hashlib.sha256("".join(f"{h} {list(c)!r}\n" for h, c in rows).encode()).hexdigest()
