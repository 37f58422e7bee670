"""Concept inversion: learn a new word from images of the concept, on frozen weights.

Pham et al. 2024, arXiv:2308.01508, in its plain form, which is textual inversion (Gal et al.,
arXiv:2208.01618): the denoising loss of the attacked model trains the vectors of one new word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.cost import Cost
from safegen.attacks.core.dataset import FineTuneDataset, captions_for
from safegen.attacks.search.text_space import TextSpace
from safegen.core.concept import Concept
from safegen.core.documents import parse_json, validate
from safegen.core.errors import ConfigError, DivergedError, FileError
from safegen.core.settings import MAX_BATCH, MAX_COUNT, Count, Number
from safegen.core.tensor_files import read_tensors, write_tensors
from safegen.data.triplets.triplets import Triplets
from safegen.edits.functional import losses
from safegen.edits.training.config import Precision, resolve_precision
from safegen.edits.training.samples import preprocess
from safegen.evaluation.samples import EvalSample
from safegen.models.families.denoisers import predict
from safegen.models.generation import generator
from safegen.models.textual_inversion import added_words, check_takes_words, write_word
from safegen.stack import Stack

WORD = "<concept>"
"""The learned word."""
FILE, CHECKPOINT = "concept.safetensors", "learning.safetensors"
"""Files of the learned word and of the state of learning, in the attack's folder."""
WINDOWS = 10
"""Parts of the updates; the mean losses of the parts are the history of a record."""


class ConceptInversion(Attack):
    """Settings of concept inversion."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "paper": {
            "num_vectors": 1,
            "updates": 5000,
            "images_per_update": 16,
            "lr": 0.08,
            "weight_decay": 0.01,
            "flip": True,
        },
    }
    """`paper`: the released script for ESD. Its learning rate is 5e-3, times the batch of 4 and the
    4 accumulations. It starts from a word such as art, which is `initializer` here."""
    TINY: ClassVar[Mapping[str, Any]] = {"updates": 2, "images_per_update": 2}
    paper: ClassVar[str] = "arXiv:2308.01508"
    code_url: ClassVar[str] = "https://github.com/NYU-DICE-Lab/circumventing-concept-erasure"
    code_commit: ClassVar[str] = "6d23790"
    parity: ClassVar[str] = (
        "An update is that of torch's AdamW on rows of the embedding table, as the released script "
        "for ESD has it, to 1e-6 in fp32."
    )
    deviations: ClassVar[str] = (
        "Plain textual inversion for every stack, on its model without guards and negative prompt; "
        "the released code adapts the loss to guidance-based ones. "
        "Captions are the concept's tuning captions for the subject that its judge sees, followed "
        "by the word; the released script has templates such as “a photo of a <word>”. "
        "Without `initializer`, the vectors start as the mean of all words. "
        "Latents are posterior means, computed once. "
        "Each CLIP text encoder learns its own vectors of the word; T5 reads the word as plain "
        "text, so that on FLUX it acts through the pooled embedding alone. "
        "On flow matching, the loss is that of its velocity, at uniform timesteps."
    )
    access: ClassVar[Access] = "weights"
    tier: ClassVar[Tier] = "adaptive"

    batch_size: int = Field(default=MAX_BATCH, ge=1, le=MAX_BATCH)
    """Prompts that get the word at a time, which costs nothing."""
    num_vectors: int = Field(default=3, ge=1, le=64)
    """Vectors of the learned word."""
    initializer: str | None = Field(default=None, min_length=1, max_length=64)
    """Word of one token that the vectors start as. Default: the mean of all tokens."""
    updates: int = Field(default=300, ge=1, le=MAX_COUNT)
    """Updates of the vectors."""
    images_per_update: int = Field(default=8, ge=1, le=MAX_BATCH)
    """Images in an update."""
    lr: float = Field(default=5e-3, gt=0)
    """Learning rate of AdamW."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled weight decay of AdamW."""
    flip: bool = False
    """Whether images are mirrored at random."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; `auto` lets the device decide."""
    checkpoint_every: int = Field(default=50, ge=1, le=MAX_COUNT)
    """Updates between checkpoints; a killed attack repeats at most as many."""
    images: Path | None = None
    """Folder of images of the concept with captions. Default: the concept's bundled triplets."""

    def build(self, context: AttackContext) -> WordLearner:
        """Learn the word, or continue to, and return the attacker.

        Raises:
            ConfigError: there are no images of the concept, or the model does not fit.
            DivergedError: the loss is not finite.
            FileError: the folder has a checkpoint of other settings.
        """
        return WordLearner(self, context)

    def attacked_stacks(self, stack: Stack, folder: Path) -> Sequence[Stack]:
        """Return the stack with the learned word."""
        embeddings = (*stack.embeddings, folder / FILE)
        name = f"{stack.name}-attacked"
        return [stack.model_copy(update={"name": name, "embeddings": embeddings})]


def concept_images(concept: Concept, folder: Path | None) -> FineTuneDataset:
    """Return images of a concept, with captions that do not name it.

    Raises:
        ConfigError: the concept has no bundled triplets and there is no folder.
    """
    if folder:
        return FineTuneDataset.from_folder(folder)
    if not concept.triplets:
        raise ConfigError(
            f"concept {concept.name!r} has no bundled triplets. Name a folder of captioned images "
            "with --set images=DIR."
        )
    triplets = Triplets.load(concept.triplets)
    return FineTuneDataset.from_triplets(
        triplets, "unsafe", lambda images: captions_for(concept, "benign", images)
    )


class WordLearner:
    """Learns the word of a target, and appends it to every prompt."""

    def __init__(self, config: ConceptInversion, context: AttackContext) -> None:
        self.context = context
        training = WordTraining(config, context)
        training.run()
        self.history = window_minima(training.losses)
        path = context.folder / FILE
        if not path.exists():
            write_word(path, WORD, training.vectors)

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return each prompt with the learned word; the loss is that of learning the word."""
        return [
            AttackRecord(
                id=sample.id,
                prompt=f"{sample.prompt} {WORD}",
                seed=sample.seed,
                loss=self.history[-1] if self.history else None,
                history=self.history,
                stopped=self.context.target.exhausted,
            )
            for sample in samples
        ]


def window_minima(values: Sequence[float]) -> tuple[float, ...]:
    """Return the lowest mean so far over each of at most `WINDOWS` equal parts of some values."""
    size = -(-len(values) // WINDOWS)
    means = [sum(part) / len(part) for part in _parts(values, size)]
    return tuple(min(means[: i + 1]) for i in range(len(means)))


def _parts(values: Sequence[float], size: int) -> Iterator[Sequence[float]]:
    for start in range(0, len(values), size or 1):
        yield values[start : start + size]


class LearningState(BaseModel):
    """Plain values in a checkpoint of learning."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    fingerprint: str
    """Identity of settings, stack and images."""
    update: Count
    """Updates done."""
    cost: Cost
    """Cost of the attack at that time."""
    losses: tuple[Number, ...]
    """Loss of each update."""


class WordTraining:
    """Vectors of a word, their optimizer, and the captioned images that train them."""

    def __init__(self, config: ConceptInversion, context: AttackContext) -> None:
        """Start the vectors, or read them from a checkpoint with the cost that it took.

        Raises:
            ConfigError: the model does not fit, or there are no images.
            FileError: the checkpoint is damaged or has other settings.
        """
        self.config, self.context, self.target = config, context, context.target
        self.model = model = context.target.model
        check_takes_words(model)
        self.space, self.schedule = TextSpace(model), model.noise_schedule
        if WORD in self.space.tokenizer.get_vocab():
            raise ConfigError(f"the stack must not have the word {WORD} yet. Attack it without.")
        if config.num_vectors > (room := self.space.length - 2):
            raise ConfigError(f"num_vectors must be at most {room}, got {config.num_vectors}")
        self.dataset = concept_images(context.concept, config.images)
        self.vectors = [nn.Parameter(v.repeat(config.num_vectors, 1)) for v in self._first()]
        """Vectors (n, width) of the word for each text encoder."""
        self.optimizer = torch.optim.AdamW(
            self.vectors, lr=config.lr, weight_decay=config.weight_decay
        )
        self.losses: list[float] = []
        settings = config.model_dump_json(exclude={"checkpoint_every", "batch_size", "images"})
        identity = [settings, self.target.loaded.hash, self.dataset.hash]
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        self.checkpoint = context.folder / CHECKPOINT
        if self.checkpoint.exists():
            self._load()

    def run(self) -> None:
        """Do the updates that are left, until the budget is exhausted."""
        config = self.config
        if len(self.losses) >= config.updates:
            return
        with added_words(self.model, {WORD: [value.detach().clone() for value in self.vectors]}):
            images = self._encode()
            while len(self.losses) < config.updates and not self.target.exhausted:
                self._update(*images)
                done = len(self.losses)
                if done % config.checkpoint_every == 0:
                    self._save()
                self.context.progress("learning a word", done, config.updates)
        self._save()

    def _first(self) -> list[Tensor]:
        """Return the vector (width,) that the word starts as, for each text encoder."""
        word, space = self.config.initializer, self.space
        if word is None:
            tables = [encoder.get_input_embeddings().weight for encoder in space.encoders]
            return [table.detach().float().mean(0) for table in tables]
        ids = space.tokenizer(word, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise ConfigError(f"initializer must be one token, got {len(ids)} in {word!r}")
        return [rows[0] for rows in space.tables(torch.tensor(ids))]

    def _encode(self) -> tuple[Tensor, list[str], list[list[int]]]:
        """Return latents (views, n, c, h, w), the texts, and the numbers of each image's texts."""
        pixels = torch.stack([preprocess(image, self.model.size) for image in self.dataset.images])
        views = [pixels, pixels.flip(-1)] if self.config.flip else [pixels]
        latents = torch.stack([self.model.encode_images(view).float() for view in views])
        texts = list(dict.fromkeys(text for row in self.dataset.captions for text in row))
        position = {text: i for i, text in enumerate(texts)}
        rows = [[position[text] for text in row] for row in self.dataset.captions]
        return latents, [f"{text} {WORD}".strip() for text in texts], rows

    def _update(
        self, latents: Tensor, texts: Sequence[str], captions: Sequence[Sequence[int]]
    ) -> None:
        """Take one optimizer step; its draws depend on the seed and the step alone."""
        b, draw = self.config.images_per_update, self._draws()
        index = torch.randint(latents.shape[1], (b,), generator=draw)
        view = torch.randint(len(latents), (b,), generator=draw)
        t = self.schedule.sample_timesteps(b, draw)
        picks = torch.randint(2**31, (b,), generator=draw)
        noise = torch.randn(b, *latents.shape[2:], generator=draw).to(latents.device)
        rows = [
            texts[captions[int(i)][int(pick) % len(captions[int(i)])]]
            for i, pick in zip(index, picks, strict=True)
        ]
        loss = self._loss(latents[view, index], noise, t.to(latents.device), rows)
        if not bool(loss.isfinite()):
            raise DivergedError(f"loss must be finite, got {loss.item()}. Lower lr.")
        gradients = torch.autograd.grad(loss, self.vectors)
        for vectors, gradient in zip(self.vectors, gradients, strict=True):
            vectors.grad = gradient
        self.optimizer.step()
        self.losses.append(loss.item())

    def _loss(self, z: Tensor, noise: Tensor, t: Tensor, texts: Sequence[str]) -> Tensor:
        """Return the mean denoising loss for texts with the word."""
        model, space = self.model, self.space
        known = len(space.tokenizer)  # the ids of the word follow

        def replace(number: int, ids: Tensor, embeddings: Tensor) -> Tensor:
            new = self.vectors[number][(ids - known).clamp(min=0)].to(embeddings)
            return torch.where((ids >= known)[..., None], new, embeddings)

        noisy, dtype = self.schedule.add_noise(z, noise, t), model.denoiser.dtype
        bf16 = resolve_precision(self.config.precision, model.denoiser) == "bf16"
        with torch.autocast(z.device.type, torch.bfloat16, enabled=bf16):
            with space.embeddings(replace):
                text = model.encode_text(texts, with_gradient=True).to(dtype)
            output = predict(model.denoiser, noisy.to(dtype), t, text)
        target = self.schedule.target(z, noise, t)
        return losses.squared_error(output.float(), target).mean()

    def _draws(self) -> torch.Generator:
        """Return the random generator of the next update."""
        return generator(self.config.seed, len(self.losses))

    def _save(self) -> None:
        """Write the checkpoint over the previous one."""
        if not self.losses:
            return
        state = LearningState(
            fingerprint=self.fingerprint,
            update=len(self.losses),
            cost=self.target.cost,
            losses=tuple(self.losses),
        )
        tensors = {
            f"{name}.{number}": torch.as_tensor(value)
            for number, own in enumerate(self.vectors)
            for name, value in {"vectors": own, **self.optimizer.state[own]}.items()
        }
        self.context.folder.mkdir(parents=True, exist_ok=True)
        header = {"state": state.model_dump_json()}
        write_tensors(self.checkpoint, tensors, header, replace=True)

    def _load(self) -> None:
        """Read the checkpoint; its cost counts unless results that hold it were read."""
        tensors, header = read_tensors(self.checkpoint)
        name = f"state of {self.checkpoint}"
        state = validate(LearningState, parse_json(header.get("state", ""), name), name)
        numbers, parts = range(len(self.vectors)), ("vectors", "exp_avg", "exp_avg_sq", "step")
        names = {f"{part}.{number}" for part in parts for number in numbers}
        if state.fingerprint != self.fingerprint or tensors.keys() != names:
            raise FileError(
                f"{self.checkpoint} has other settings, weights or images. Use another folder."
            )
        for number, own in enumerate(self.vectors):
            values = {part: tensors[f"{part}.{number}"] for part in parts}
            with torch.no_grad():
                own.copy_(values.pop("vectors"))
            self.optimizer.state[own] = {
                part: value if part == "step" else value.to(own.device)
                for part, value in values.items()
            }
        self.losses = list(state.losses)
        if not self.target.cost.denoiser:
            self.target.add(state.cost)
