"""Fine-tuning of a model with the denoising loss, as patches after several numbers of updates.

Files of a fine-tune in FOLDER: its log and, until it is finished, a checkpoint. The patches are
beside it, as `FOLDER-N.safetensors` after N updates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safegen.attacks.core.dataset import FineTuneDataset
from safegen.core.documents import read_json_lines
from safegen.core.errors import DivergedError
from safegen.edits.functional import losses
from safegen.edits.training.check import check_training
from safegen.edits.training.checkpoint import CHECKPOINT_FILE, LOG_FILE
from safegen.edits.training.config import LogRow, Training
from safegen.edits.training.lora import Trainable, trainable_parameters
from safegen.edits.training.samples import preprocess
from safegen.edits.training.trainer import train
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.model import Model
from safegen.patches.patch import Patch

CHECKPOINT_EVERY = 25
"""Updates between two checkpoints."""
Stopper = Callable[[int, int, LogRow], bool]
"""Called after every update with (done, total, row of the log); True ends the fine-tune."""


class DenoisingObjective:
    """The plain loss |prediction(x_t, t, c) - target|^2 (Ho et al. 2020, arXiv:2006.11239, eq. 14).

    The target is that of the model: noise, v, or the velocity of flow matching. Timesteps are drawn
    uniformly from those of the model's schedule; SD 3's own training favors its middle.
    """

    def __init__(self, model: Model, dataset: FineTuneDataset, *, batch: int) -> None:
        """Encode every image and caption once."""
        self.batch, self.schedule = batch, model.noise_schedule
        self.weights = {"L": 1.0}
        pixels = torch.stack([preprocess(image, model.size) for image in dataset.images])
        self.latents = model.encode_images(pixels).float()
        texts = list(dict.fromkeys(text for row in dataset.captions for text in row))
        chunks = [texts[i : i + 64] for i in range(0, len(texts), 64)]
        self.text = Conditioning.concat([model.encode_text(chunk).float() for chunk in chunks])
        self.captions = [[texts.index(text) for text in row] for row in dataset.captions]

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Return the loss of one random batch, (b,)."""
        b, g = self.batch, generator
        rows = torch.randint(len(self.latents), (b,), generator=g)
        picks = torch.randint(2**31, (b,), generator=g)
        t = self.schedule.sample_timesteps(b, g)
        eps = torch.randn(b, *self.latents.shape[1:], generator=g)
        mine = torch.arange(b)[share[0] :: share[1]]
        choices = [self.captions[int(row)] for row in rows]
        captions = torch.tensor(
            [choice[int(pick) % len(choice)] for choice, pick in zip(choices, picks, strict=True)]
        )
        device = self.latents.device
        z, noise = self.latents[rows[mine].to(device)], eps[mine].to(device)
        steps = t[mine].to(device)
        x_t, text = self.schedule.add_noise(z, noise, steps), self.text[captions[mine].to(device)]
        target = self.schedule.target(z, noise, steps)
        return {"L": losses.squared_error(predict(denoiser, x_t, steps, text), target)}


def fine_tune(
    model: Model,
    dataset: FineTuneDataset,
    updates: Sequence[int],
    training: Training,
    *,
    folder: Path,
    selector: str = "attention",
    rank: int | None = 16,
    callback: Stopper | None = None,
    **metadata: Any,
) -> dict[int, Path]:
    """Fine-tune a model with its patches on it, and write the changed weights as patches.

    A call with the same arguments resumes; a finished fine-tune is not repeated.

    Args:
        model: the model; it is not changed.
        dataset: images and captions.
        updates: numbers of updates after which a patch is taken, rising; one training takes all.
        training: settings of the loop; its own number of updates is not used.
        folder: folder of the fine-tune.
        selector: which weights change.
        rank: rank of the LoRAs; None trains the weights themselves.
        callback: called after every update. Where it ends the fine-tune, the last patch is that of
            this update.
        metadata: more metadata for the patches.

    Returns:
        Files of the patches by number of updates, to apply after the patches that the model had.

    Raises:
        ConfigError: the model predicts something else than noise or a velocity, or the precision
            does not fit.
        FileError: the folder is of another fine-tune or damaged, or cannot be written.
        DivergedError: a loss or a weight is not finite.
        InterruptedRunError: SIGINT or SIGTERM arrived.
    """
    if is_finished(folder):
        return taken_patches(folder, updates)
    training = training.model_copy(
        update={"updates": updates[-1], "checkpoint_every": CHECKPOINT_EVERY}
    ).resolve(model.denoiser)
    objective = DenoisingObjective(model, dataset, batch=training.batch)
    settings = {"updates": list(updates), "selector": selector, "rank": rank, "lr": training.lr}
    settings |= training.model_dump(mode="json", include={"batch", "precision", "seed"})
    common = _metadata(model, dataset) | {"settings": settings} | metadata
    with trainable_parameters(
        model, selector, rank=rank, alpha=None, seed=training.seed
    ) as trainable:
        check_training(model.denoiser, trainable.names, training)
        parameters = dict(model.denoiser.named_parameters())

        def after_update(done: int, total: int, row: LogRow) -> bool:
            ends = bool(callback and callback(done, total, row))
            if ends or done in updates:
                last = {"updates": done, "losses": {"L": row["L"]}}
                patch = _patch(trainable, parameters, common | last)
                _check_finite(patch, done, training.lr)
                path = patch_path(folder, done)
                path.unlink(missing_ok=True)  # of a run that was killed before its checkpoint
                patch.save(path)
            return ends

        train(
            model.denoiser,
            trainable.names,
            objective,
            training,
            fingerprint=f"{selector} {rank} {model.pipeline_hash} {dataset.hash}",
            checkpoint_dir=folder,
            resume=(folder / CHECKPOINT_FILE).is_file(),
            callback=after_update,
        )
    (folder / CHECKPOINT_FILE).unlink()  # last: the fine-tune is finished without it
    return taken_patches(folder, updates)


def is_finished(folder: Path) -> bool:
    """Return whether a fine-tune ended: its log is there and its checkpoint is removed."""
    return (folder / LOG_FILE).is_file() and not (folder / CHECKPOINT_FILE).exists()


def updates_done(folder: Path) -> int:
    """Return the number of updates in the log of a fine-tune; 0 if there is none."""
    path = folder / LOG_FILE
    return sum(1 for _ in read_json_lines(path)) if path.is_file() else 0


def seconds_spent(folder: Path) -> float:
    """Return the seconds of training in the log of a fine-tune; 0 if there is none."""
    path = folder / LOG_FILE
    rows = [row for _, row in read_json_lines(path)] if path.is_file() else []
    return float(rows[-1]["seconds"]) if rows else 0.0


def taken_patches(folder: Path, updates: Sequence[int]) -> dict[int, Path]:
    """Return the files of the patches of a finished fine-tune, by number of updates.

    Args:
        folder: folder of the fine-tune.
        updates: numbers of updates asked for. A fine-tune that was ended early has those before its
            end, and the one at its end.
    """
    done = updates_done(folder)
    numbers = [*(n for n in updates if n < done), *([done] if done else [])]
    return {n: patch_path(folder, n) for n in numbers}


def patch_path(folder: Path, updates: int) -> Path:
    """Return the path of the patch that `fine_tune` takes after a number of updates."""
    return folder.with_name(f"{folder.name}-{updates}.safetensors")


def _metadata(model: Model, dataset: FineTuneDataset) -> dict[str, Any]:
    """Return the metadata that all patches of a fine-tune share."""
    metadata: dict[str, Any] = {
        "method": "fine-tune",
        "description": f"Fine-tuned on {len(dataset.images)} images with the denoising loss.",
        "base": model.hash,
        "family": model.family,
        "data": dataset.hash,
    }
    return metadata | ({"parents": model.parents} if model.parents else {})


def _patch(
    trainable: Trainable, parameters: Mapping[str, nn.Parameter], metadata: Mapping[str, Any]
) -> Patch:
    """Return the weights as they are now."""
    values = {name: parameters[name].detach().clone() for name in trainable.names}
    return Patch(trainable.merge(values), PatchMetadata(**metadata))


def _check_finite(patch: Patch, updates: int, lr: float) -> None:
    if any(not bool(value.isfinite().all()) for value in patch.tensors.values()):
        raise DivergedError(
            f"fine-tuned weights must be finite, got NaN or infinity after {updates} updates. "
            f"Lower lr ({lr})."
        )
