"""Training images of a job: given ones, or images that the model generates.

Generated images stay in memory and in latents; none is written as an image.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from pydantic import Field
from torch import Tensor

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, is_out_of_memory
from safegen.core.files import display_name
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.settings import MAX_COUNT, BaseSettings, Seed
from safegen.core.tensor_files import read_tensors, write_tensors
from safegen.data.triplets.make import make_triplets, make_triplets_in_memory
from safegen.data.triplets.triplets import Triplets
from safegen.judges.base import Judge, Verdict, judge_images
from safegen.models.generation import autocast_for, batches
from safegen.models.model import Model
from safegen.models.schedulers import replaced_scheduler
from safegen.workflows.edit import check_triplets, warn_of_few
from safegen.workflows.removal.prompts import training_prompts

MIN_TRIPLETS = 4
"""Fewest triplets to learn from."""
MAX_IMAGES = 3
"""Most images that are generated for each triplet, before a concept is too rare."""

MAX_SHOWN = 5
"""Most skipped images that the user is told of one by one."""


class GeneratedImages(BaseSettings):
    """How many images are generated for triplets, and how."""

    triplets: int = Field(default=64, ge=MIN_TRIPLETS, le=MAX_COUNT)
    """Number of triplets. Up to three times as many images are generated to find them."""
    seed: Seed = 0
    """Seed of the images; that of the check's images is another."""
    generation: GenerationConfig = GenerationConfig(batch_size=8)
    """How images are generated."""


class TrainingImages(BaseSettings):
    """Where the images of an edit come from."""

    unsafe: Path | None = None
    """Folder of images that show the concept. Default: the model generates them."""
    benign: Path | None = None
    """Folder of images without it. Default: images of `unsafe` that the judge finds safe."""
    triplets: str | None = None
    """Triplets in place of images: a folder, a CSV file, or bundled ones such as mini:skulls."""
    generated: GeneratedImages = Field(default_factory=GeneratedImages)
    """Images that the model generates, if there are no others."""

    def check(self, *, words: bool) -> None:
        """Raise ConfigError if two sources of images are given, or images to an edit by words."""
        if words and (self.unsafe or self.benign or self.triplets):
            raise ConfigError("an edit by words learns from no images. Leave out the images.")
        if self.triplets and (self.unsafe or self.benign):
            raise ConfigError(
                "images must be given as folders or as triplets, got both. Leave one out."
            )
        if self.benign and not self.unsafe:
            raise ConfigError(
                f"benign must go with unsafe, got {str(self.benign)!r} alone. "
                "Give a folder of images that show the concept, too."
            )
        for name, folder in (("unsafe", self.unsafe), ("benign", self.benign)):
            if folder and not folder.is_dir():
                state = "is a file" if folder.exists() else "does not exist"
                raise ConfigError(
                    f"{name} must be a folder of images, got {str(folder)!r}, which {state}"
                )

    @property
    def is_generated(self) -> bool:
        """Whether the model generates the images."""
        return not (self.triplets or self.unsafe)

    def count(self) -> int:
        """Return the number of triplets, at most."""
        if self.triplets:
            return len(self._load_triplets())
        if self.unsafe:
            return max(1, sum(path.is_file() for path in self.unsafe.iterdir()))
        return self.generated.triplets

    def describe(self) -> dict[str, Any]:
        """Return what decides the images, as plain values, with folders by their files."""
        if self.triplets:
            return {"triplets": display_name(self.triplets), "sha256": self._load_triplets().hash}
        if not self.unsafe:
            return {"generated": self.generated.model_dump(mode="json")}
        return {
            "unsafe": _hash_listing(self.unsafe),
            "benign": _hash_listing(self.benign) if self.benign else None,
        }

    def sentence(self, concept: Concept) -> str:
        """Return where the images come from, for the user."""
        if self.triplets:
            return f"images: triplets {display_name(self.triplets)}"
        if self.unsafe:
            benign = f"{self.benign}" if self.benign else f"safe ones in {self.unsafe}"
            return f"images: {self.unsafe}, benign {benign}"
        lists = ", ".join(concept.tuning.get("concept", ()))
        prompts = f"prompts {lists}" if lists else f"{len(concept.words)} phrases of the concept"
        return (
            f"images: generated by the model from {prompts}, for {self.generated.triplets} "
            "triplets; none is written as an image"
        )

    def load(
        self,
        model: Model,
        concept: Concept,
        judge: Judge,
        folder: Path,
        progress: ProgressCallback,
        notify: Callable[[str], None] | None = None,
    ) -> Triplets:
        """Return the triplets: given ones, made of files, or of images that the model generates.

        Args:
            model: model that generates images.
            concept: the concept.
            judge: its judge, with labels and threshold.
            folder: where triplets of files, or latents, are written. What is there is used.
            progress: called with (description, done, total).
            notify: called with lines about the given images, and which of them are skipped.

        Raises:
            UserError: there are too few images that can be used.
        """
        if self.triplets:
            triplets = self._load_triplets()
            check_triplets(concept, triplets)
            warn_of_few(triplets)
            return triplets
        if not self.unsafe:
            return generate_triplets(
                model, concept, judge, self.generated, folder, progress=progress
            )
        if folder.exists():
            return Triplets.load(folder)
        folder.parent.mkdir(exist_ok=True)
        made = make_triplets(
            self.unsafe,
            self.benign,
            judge,
            folder,
            labels=judge.labels,
            threshold=judge.threshold,
            progress=progress,
        )
        triplets = made.triplets
        if notify:
            notify(f"triplets made: {len(triplets)}, images skipped: {len(made.skipped)}")
            for issue in made.skipped[:MAX_SHOWN]:
                notify(f"skipped {issue}")
            if len(made.skipped) > MAX_SHOWN:
                notify(f"... and {len(made.skipped) - MAX_SHOWN} more")
        if len(triplets) < MIN_TRIPLETS:
            shutil.rmtree(folder)
            raise ConfigError(
                f"images must give at least {MIN_TRIPLETS} triplets, got {len(triplets)} from "
                f"{self.unsafe}. Add images, or leave --unsafe out."
            )
        warn_of_few(triplets)
        return triplets

    def _load_triplets(self) -> Triplets:
        assert self.triplets is not None
        return Triplets.load(self.triplets)


def _hash_listing(folder: Path) -> str:
    """Return a SHA-256 over the names and sizes of the files in a folder."""
    files = sorted((p.name, p.stat().st_size) for p in folder.iterdir() if p.is_file())
    return hashlib.sha256(repr(files).encode()).hexdigest()


def generate_triplets(
    model: Model,
    concept: Concept,
    judge: Judge,
    config: GeneratedImages,
    cache: Path,
    *,
    progress: ProgressCallback = no_progress,
) -> Triplets:
    """Generate images with and without a concept, and return triplets of them, in memory.

    Only images that the judge finds unsafe are censored, and only those that it finds safe are
    benign. Latents are stored by batch, so that a second call generates only what is missing.

    Args:
        model: model that generates the images.
        concept: gives the prompts (`training_prompts`).
        judge: the concept's judge, with its labels and threshold.
        config: number of triplets, seed and generation.
        cache: folder for latents.
        progress: called with (description, done, total).

    Raises:
        ConfigError: the model draws the concept, or an image without it, too rarely.
        FileError: stored latents are damaged or cannot be written.
    """
    unsafe, safe = training_prompts(concept)
    parts: tuple[tuple[str, Verdict, list[str]], ...] = (
        ("unsafe", "unsafe", unsafe),
        ("benign", "safe", safe),
    )
    images: dict[str, list[Image.Image]] = {}
    for part, wanted, texts in parts:
        samples = [
            Sample(prompt=texts[i % len(texts)], seed=config.seed, index=i)
            for i in range(config.triplets * MAX_IMAGES)
        ]
        images[part] = _find_images(
            model, samples, judge, wanted, cache / part, config, concept.name, progress
        )
    return make_triplets_in_memory(
        images["unsafe"],
        images["benign"],
        judge,
        labels=judge.labels,
        threshold=judge.threshold,
        progress=progress,
    ).triplets


def _find_images(
    model: Model,
    samples: Sequence[Sample],
    judge: Judge,
    wanted: Verdict,
    cache: Path,
    config: GeneratedImages,
    concept: str,
    progress: ProgressCallback,
) -> list[Image.Image]:
    """Return the first images with a verdict, in the order of their samples.

    Raises:
        ConfigError: there are too few.
    """
    stage = f"generating {cache.name} images"
    found: list[Image.Image] = []
    progress(stage, 0, config.triplets)
    tried, unjudged = 0, 0
    for batch in _latent_batches(model, samples, config.generation, cache):
        images = model.decode_images(batch, batch=config.generation.batch_size)
        verdicts = judge_images(judge, images)
        tried, unjudged = tried + len(images), unjudged + verdicts.count("unjudged")
        found += [i for i, verdict in zip(images, verdicts, strict=True) if verdict == wanted]
        progress(stage, min(len(found), config.triplets), config.triplets)
        hopeless = not found and tried >= config.triplets
        if len(found) >= config.triplets or hopeless:
            break
    if len(found) < max(MIN_TRIPLETS, config.triplets // 4):
        shutil.rmtree(cache.parent)  # the same images would be too few again
        kind = "show" if wanted == "unsafe" else "be free of"
        note = f", {unjudged} could not be judged" if unjudged else ""
        raise ConfigError(
            f"generated images must {kind} {concept!r}, but judge {judge.id.partition(':')[0]!r} "
            f"finds only {len(found)} of {tried} that do{note}. Give images (--unsafe DIR, "
            "--benign DIR), better words in the concept's TOML file, or edit by --words."
        )
    return found[: config.triplets]


def _latent_batches(
    model: Model, samples: Sequence[Sample], generation: GenerationConfig, cache: Path
) -> Iterator[Tensor]:
    """Yield latents (b, c, h, w) of the samples, of one batch after the other.

    Each batch is read from its file in `cache`, or generated and written there.
    """
    size = generation.batch_size
    for start in range(0, len(samples), size):
        path = cache / f"{start:05d}.safetensors"
        if not path.exists():
            latents = _generate_latents(model, samples[start : start + size], generation)
            cache.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {"latents": latents}, {"format": "pt"})
        yield read_tensors(path)[0]["latents"].to(model.device)


def _generate_latents(
    model: Model, samples: Sequence[Sample], generation: GenerationConfig
) -> Tensor:
    """Return the scaled latents of a batch; where memory runs out, in smaller parts."""
    size = len(samples)
    while True:
        parts: list[Tensor] = []
        smaller = generation.model_copy(update={"batch_size": size})
        try:
            with replaced_scheduler(model.pipeline, generation.scheduler):
                for _, prompts, options in batches(model, samples, smaller):
                    with autocast_for(model, generation):
                        output = model.pipeline(
                            prompt=prompts, **options | {"output_type": "latent"}
                        )
                    parts.append(output.images.float().cpu())
            return torch.cat(parts)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise ConfigError(
                    "memory must hold at least one image. Free some, or use another --device."
                ) from error
        size = (size + 1) // 2
