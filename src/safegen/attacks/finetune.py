"""What a user does to a model after an edit: ordinary fine-tuning of a LoRA, on harmless pictures or on the concept's own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from safegen.core.concept import Concept, prompt_list
from safegen.core.errors import ConfigError, DivergedError, FileError
from safegen.data.triplets.triplets import Triplets, open_role, read_picture
from safegen.edits.functional import losses
from safegen.edits.training.checkpoint import FILE
from safegen.edits.training.config import Precision, resolve_precision
from safegen.edits.training.lora import trainable_parameters
from safegen.edits.training.samples import to_pixels
from safegen.edits.training.trainer import LogRow, Training, TrainingCallback, check, train
from safegen.judges import load_judge
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.patches.patch import Patch

Caption = Callable[[Sequence[Image.Image]], Sequence[tuple[str, ...]]]
"""What gives each picture the texts that it may go with."""
EVERY = 25
"""Updates between checkpoints, where a folder keeps them."""
PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class FineTune(BaseModel):
    """Settings of a fine-tune: the plain denoising loss on a LoRA beside the attention layers, as users train one."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    updates: tuple[int, ...] = Field(default=(200,), min_length=1)
    """Optimiser updates after which the model is looked at, rising.

    One training goes through them all.
    """
    selector: str = "attention"
    """Which weights get factors beside them."""
    rank: int = Field(default=16, ge=1)
    """Rank of the LoRA."""
    lr: float = Field(default=5e-4, gt=0)
    """Learning rate of AdamW, constant; diffusers' LoRA example has 1e-4, for a full-size model."""
    batch: int = Field(default=8, ge=1)
    """Pictures in an update."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass, `auto` to let the device decide."""
    seed: int = 0
    """Decides the LoRA's start and every draw."""

    @model_validator(mode="after")
    def _rises(self) -> Self:
        if self.updates[0] < 1 or any(
            a >= b for a, b in zip(self.updates, self.updates[1:], strict=False)
        ):
            raise ValueError(
                f"updates must rise from 1 or more, got {', '.join(map(str, self.updates))}"
            )
        return self

    def on(self, net: nn.Module) -> Self:
        """Return it with `auto` decided for a network."""
        return self.model_copy(update={"precision": resolve_precision(self.precision, net)})

    @property
    def training(self) -> Training:
        """The loop's settings: constant rate, no average, no weight decay."""
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
    """Pictures to fine-tune on, the texts that each may go with, and a hash over all of it."""

    pictures: tuple[Image.Image, ...]
    texts: tuple[tuple[str, ...], ...]
    """Of each picture; a draw takes one of them."""
    hash: str
    left_out: int = 0
    """Pictures that no text was found for."""

    @classmethod
    def of_triplets(
        cls, triplets: Triplets, role: Literal["unsafe", "benign"], caption: Caption
    ) -> Self:
        """Return one side of triplets, which carry no text, each picture with what `caption` has for it; without any it is left out.

        Raises:
            FileError: a picture is missing or changed, or none has a text.
        """
        pictures = [open_role(triplets.folder, row, role) for row in triplets.rows]
        digests = [getattr(row.sha256, role) for row in triplets.rows]
        rows = [
            (p, t, d) for p, t, d in zip(pictures, caption(pictures), digests, strict=True) if t
        ]
        if not rows:
            raise FileError(
                "no picture of the triplets has a subject that a caption fits; give pictures with their captions: --pictures"
            )
        kept, texts, hashes = zip(*rows, strict=True)
        return cls(kept, texts, _digest(hashes, texts), len(pictures) - len(rows))

    @classmethod
    def of_folder(cls, folder: Path) -> Self:
        """Return a folder's pictures with their captions: `cat.png` with `cat.txt` beside it, as LoRA trainers have it.

        Raises:
            FileError: no such folder, no picture in it, one without a caption, or an unreadable file.
        """
        if not folder.is_dir():
            raise FileError(
                f"{folder} is not a folder; name one with pictures and a .txt file with its caption beside each"
            )
        paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES)
        if not paths:
            raise FileError(f"{folder} has no pictures ({', '.join(PICTURES)})")
        texts = []
        for path in paths:
            side = path.with_suffix(".txt")
            if not side.is_file():
                raise FileError(
                    f"{path.name} has no caption; write it to {side}, an empty file for none"
                )
            try:
                texts.append((" ".join(side.read_text(encoding="utf-8-sig").split()),))
            except UnicodeDecodeError as error:
                raise FileError(f"{side} is not UTF-8 text: {error}") from error
        digests = [hashlib.sha256(p.read_bytes()).hexdigest() for p in paths]
        return cls(tuple(read_picture(p) for p in paths), tuple(texts), _digest(digests, texts))

    def facts(self) -> dict[str, Any]:
        """Return what a results file says of it; no caption, for it may be unsafe."""
        texts = len({t for row in self.texts for t in row})
        return {
            "pictures": len(self.pictures),
            "texts": texts,
            "left_out": self.left_out,
            "hash": self.hash,
        }


def captions_for(
    concept: Concept, on: Literal["benign", "concept"], pictures: Sequence[Image.Image]
) -> list[tuple[str, ...]]:
    """Return the texts that pictures without text are trained with.

    The prompts of the concept's `tuning` lists for the subject that its judge sees in each. A
    concept without such lists has its words for pictures of its own, and no text for harmless ones:
    weaker, for a bare word need not be what such a picture is asked for by, and pictures without
    text teach the branch that guidance pushes away from.
    """
    if on not in concept.tuning:
        return [concept.words if on == "concept" else ("",)] * len(pictures)
    by: dict[str | None, tuple[str, ...]] = {}
    for row in (row for name in concept.tuning[on] for row in prompt_list(name)):
        by[row.subject] = (*by.get(row.subject, ()), row.text)
    judge = load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold)
    return [
        by.get(detections.subject, ()) if detections.subject else ()
        for detections in judge.detect(list(pictures))
    ]


class DenoisingObjective:
    """The plain loss |e(x_t, t, c) - target|^2 on given pictures (Ho et al.

    2020, arXiv:2006.11239, eq. 14), for the training loop.
    """

    def __init__(self, settings: FineTune, model: Model, material: FineTuneDataset) -> None:
        """Encode every picture and text once."""
        self.settings, self.prediction = settings, model.prediction
        if self.prediction not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"fine-tuning knows models that predict epsilon or v_prediction, this one predicts {self.prediction}"
            )
        self.weights = {"L": 1.0}
        self.abar = model.alphas_cumprod().to(model.device)
        self.latents = model.encode_images(
            torch.stack([to_pixels(p, model.size) for p in material.pictures])
        ).float()
        known = list(dict.fromkeys(t for row in material.texts for t in row))
        self.text = torch.cat(
            [model.encode_text(known[i : i + 64]).float() for i in range(0, len(known), 64)]
        )
        self.rows = [[known.index(t) for t in row] for row in material.texts]
        self.fingerprint = (
            f"{settings.model_dump_json()} {model.pipeline_hash} {material.hash}"
        )

    def training_step(
        self,
        denoiser: nn.Module,
        micro_step: int,
        generator: torch.Generator,
        share: tuple[int, int],
    ) -> Mapping[str, Tensor]:
        """Draw one batch and return its loss, (b,)."""
        b, g = self.settings.batch, generator
        rows = torch.randint(len(self.latents), (b,), generator=g)
        picks = torch.randint(2**31, (b,), generator=g)
        t = torch.randint(len(self.abar), (b,), generator=g)
        eps = torch.randn(b, *self.latents.shape[1:], generator=g)
        mine = torch.arange(b)[share[0] :: share[1]]
        words = torch.tensor(
            [
                self.rows[int(r)][int(p) % len(self.rows[int(r)])]
                for r, p in zip(rows, picks, strict=True)
            ]
        )
        device = self.latents.device
        z, noise, at = self.latents[rows[mine].to(device)], eps[mine].to(device), t[mine].to(device)
        abar = self.abar[at]
        want = noise if self.prediction == "epsilon" else losses.velocity(noise, z, abar)
        said = denoiser(
            losses.add_noise(z, noise, abar), at, self.text[words[mine].to(device)]
        ).sample
        return {"L": losses.squared_error(said, want)}


@dataclass(frozen=True)
class FineTuneResult:
    """A fine-tuned model at each of the asked updates, as patches, and the log of the training."""

    patches: Mapping[int, Patch]
    log: Sequence[LogRow]


def fine_tune(
    model: Model,
    material: FineTuneDataset,
    settings: FineTune,
    *,
    folder: Path | None = None,
    callback: TrainingCallback | None = None,
    **facts: Any,
) -> FineTuneResult:
    """Fine-tune a model as it stands, patches on it included; it is given back as it came.

    Args:
        model: what is tuned.
        material: pictures and texts.
        settings: how.
        folder: keeps checkpoints and patches; where there are some, of the same settings, weights
            and material, the fine-tune goes on.
        callback: called after every update with (done, of, row of the log).
        facts: what else the patches say of themselves.

    Returns:
        Patches that hold the tuned weights themselves: put on after the patches that the model had.

    Raises:
        ConfigError: the model predicts something else, or the precision does not go with it.
        FileError: what the folder keeps is damaged or of another fine-tune, or it cannot be written.
        DivergedError: a loss or a weight is not finite.
        Stopped: SIGINT or SIGTERM came.
    """
    found: dict[int, Patch] = {}
    settings = settings.on(model.denoiser)
    said: dict[str, Any] = {
        "method": "fine-tune",
        "settings": settings.model_dump(mode="json"),
        "base": model.hash,
        "family": model.family,
    }
    said |= {"parents": model.parents} if model.parents else {}
    with trainable_parameters(
        model, settings.selector, rank=settings.rank, alpha=None, seed=settings.seed
    ) as part:
        check(model.denoiser, part.names, settings.training)
        own = dict(model.denoiser.named_parameters())

        def note(done: int, of: int, row: LogRow) -> None:
            if done in settings.updates:
                values = part.weights({name: own[name].detach().clone() for name in part.names})
                if any(not bool(v.isfinite().all()) for v in values.values()):
                    raise DivergedError(
                        f"the fine-tuned weights are not finite after {done} updates; lower lr ({settings.lr})"
                    )
                found[done] = Patch(values, PatchMetadata(**said | {"data": material.hash, "updates": done} | facts))
                if folder:
                    (folder / f"{done}.safetensors").unlink(
                        missing_ok=True
                    )  # of a run that was killed before its checkpoint
                    found[done].save(folder / f"{done}.safetensors")
            if callback:
                callback(done, of, row)

        problem, resume = (
            DenoisingObjective(settings, model, material),
            folder is not None and (folder / FILE).is_file(),
        )
        training = (
            settings.training.model_copy(update={"checkpoint_every": EVERY})
            if folder
            else settings.training
        )
        log = train(
            model.denoiser,
            part.names,
            problem,
            training,
            folder=folder,
            resume=resume,
            callback=note,
        ).log
    if folder:  # those from before a stop too
        found = {done: Patch.load(folder / f"{done}.safetensors") for done in settings.updates}
    return FineTuneResult(found, log)


def _digest(digests: Sequence[str], texts: Sequence[Sequence[str]]) -> str:
    return hashlib.sha256(
        "".join(f"{d} {list(t)!r}\n" for d, t in zip(digests, texts, strict=True)).encode()
    ).hexdigest()
