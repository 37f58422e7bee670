"""Concept inversion: learn new words from images of the concept, on frozen weights.

Pham et al. 2024, arXiv:2308.01508, in its plain form, which is textual inversion (Gal et al.,
arXiv:2208.01618): the denoising loss of the attacked model trains the vectors of a few new words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from safegen.attacks.core.base import Access, Attack, AttackContext, AttackRecord, Tier
from safegen.attacks.core.dataset import FineTuneDataset, captions_for
from safegen.attacks.core.target import TextSpace
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, DivergedError
from safegen.core.tensor_files import write_tensors
from safegen.data.triplets.triplets import Triplets
from safegen.edits.functional import losses
from safegen.edits.training.config import Precision, resolve_precision
from safegen.edits.training.samples import preprocess
from safegen.evaluation.samples import EvalSample
from safegen.models.textual_inversion import added_words
from safegen.stack import Stack

WORD = "<concept>"
"""The learned word."""
FILE = "concept.safetensors"
"""File of the learned word in the attack's folder."""


class ConceptInversion(Attack):
    """Settings of concept inversion."""

    TINY: ClassVar[Mapping[str, Any]] = {"updates": 2, "images_per_update": 2}
    paper: ClassVar[str] = "arXiv:2308.01508"
    code_url: ClassVar[str] = "https://github.com/NYU-DICE-Lab/circumventing-concept-erasure"
    deviations: ClassVar[str] = (
        "Plain textual inversion for every edit; the paper adapts the loss to some of them. "
        "The word has several vectors, which start as the mean of all words. "
        "Captions are the concept's tuning captions for the subject that its judge sees."
    )
    access: ClassVar[Access] = "weights"
    tier: ClassVar[Tier] = "adaptive"

    num_vectors: int = Field(default=3, ge=1)
    """Vectors of the learned word."""
    updates: int = Field(default=300, ge=1)
    """Updates of the vectors."""
    images_per_update: int = Field(default=8, ge=1)
    """Images in an update."""
    lr: float = Field(default=5e-3, gt=0)
    """Learning rate of Adam."""
    precision: Precision = "auto"
    """Arithmetic of the forward pass; `auto` lets the device decide."""
    images: Path | None = None
    """Folder of images of the concept with captions. Default: the concept's bundled triplets."""

    def build(self, context: AttackContext) -> WordLearner:
        """Learn the word and return the attacker.

        Raises:
            ConfigError: there are no images of the concept, or the model does not fit.
            DivergedError: the loss is not finite.
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
        self.config, self.context, model = config, context, context.target.model
        if model.prediction not in ("epsilon", "v_prediction"):
            raise ConfigError(
                f"prediction type must be epsilon or v_prediction, got {model.prediction}"
            )
        path = context.folder / FILE
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_tensors(path, {WORD: self._learn()}, {})

    def attack(self, samples: Sequence[EvalSample]) -> list[AttackRecord]:
        """Return each prompt with the learned word."""
        return [
            AttackRecord(
                id=sample.id,
                prompt=f"{sample.prompt} {WORD}",
                seed=sample.seed,
                stopped=self.context.target.exhausted,
            )
            for sample in samples
        ]

    def _learn(self) -> Tensor:
        """Return the vectors (num_vectors, width)."""
        config, model, target = self.config, self.context.target.model, self.context.target
        dataset = concept_images(target.concept, config.images)
        pixels = torch.stack([preprocess(image, model.size) for image in dataset.images])
        latents, abar = model.encode_images(pixels).float(), model.alphas_cumprod()
        texts = list(dict.fromkeys(text for row in dataset.captions for text in row))
        rows = [[texts.index(text) for text in row] for row in dataset.captions]
        draw = torch.Generator().manual_seed(config.seed)
        table = model.pipeline.text_encoder.get_input_embeddings().weight
        start, known = table.detach().float().mean(0), len(model.pipeline.tokenizer)
        vectors = nn.Parameter(start.repeat(config.num_vectors, 1))
        optimizer = torch.optim.Adam([vectors], lr=config.lr)
        bf16 = resolve_precision(config.precision, model.denoiser) == "bf16"
        networks = (model.denoiser, model.pipeline.text_encoder)
        trained = [p for network in networks for p in network.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)

        def replace(ids: Tensor, embeddings: Tensor) -> Tensor:
            new = vectors[(ids - known).clamp(min=0)].to(embeddings)
            return torch.where((ids >= known)[..., None], new, embeddings)

        try:
            with added_words(model, {WORD: vectors.detach().clone()}):
                space = TextSpace(model)
                convert = model.pipeline.maybe_convert_prompt
                ids = space.tokenize(
                    [convert(f"{text} {WORD}", space.tokenizer) for text in texts]
                ).to(model.device)
                for update in range(config.updates):
                    if target.exhausted:
                        break
                    b = config.images_per_update
                    index = torch.randint(len(latents), (b,), generator=draw)
                    t = torch.randint(len(abar), (b,), generator=draw)
                    noise = torch.randn(b, *latents.shape[1:], generator=draw).to(model.device)
                    picks = torch.randint(2**31, (b,), generator=draw)
                    captions = [
                        rows[int(i)][int(pick) % len(rows[int(i)])]
                        for i, pick in zip(index, picks, strict=True)
                    ]
                    z, steps = latents[index.to(model.device)], t.to(model.device)
                    signal = abar.to(model.device)[steps]
                    goal = (
                        noise
                        if model.prediction == "epsilon"
                        else losses.velocity(noise, z, signal)
                    )
                    with (
                        torch.autocast(model.device.type, torch.bfloat16, enabled=bf16),
                        space.embeddings(replace),
                    ):
                        text = space.encoder(ids[captions])[0]
                        noisy = losses.add_noise(z, noise, signal)
                        output = model.denoiser(noisy, steps, text).sample
                    loss = losses.squared_error(output.float(), goal).mean()
                    if not bool(loss.isfinite()):
                        raise DivergedError(f"loss must be finite, got {loss.item()}. Lower lr.")
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    self.context.progress("learning a word", update + 1, config.updates)
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
        return vectors.detach().float().cpu()
