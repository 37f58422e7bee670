"""SafeGen-plus: SafeGen and a closed form that erases the concept's phrases, in one patch (ours).

TRCE (arXiv:2503.07389) trains visual layers after a text-side edit. Here the order is reversed: a
model without the phrases teaches SafeGen little, and learned embeddings bring the concept back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from safegen.core.concept import Concept, Phrases
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import TrainedEdit, join_quoted
from safegen.edits.functional.adversary import AdversarySetting
from safegen.edits.functional.targets import check_triplet_losses
from safegen.edits.rece import CAPTIONS_SCALE, RECE
from safegen.edits.safegen import SafeGen, SafeGenObjective
from safegen.edits.training.check import check_inputs, check_training
from safegen.edits.training.config import FULL_SIZE_TRAINING, Objective, Training, TrainingCallback
from safegen.edits.uce import UCE
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.models.selectors import select_parameters
from safegen.patches.patch import Patch


class SafeGenPlus(TrainedEdit):
    """Settings of the composed edit. SafeGen and the closed form use their defaults otherwise."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "mini": {},
        "mini-flow": {"selector": "noxattn", "timesteps": (150, 1000)},
        "full": {"training": FULL_SIZE_TRAINING},
    }
    """`mini`: tuned on the miniature model. `mini-flow`: as in SafeGen. `full`: with SafeGen's
    published schedule; not measured at full size."""
    paper: ClassVar[str] = "ours, after arXiv:2503.07389"
    parity: ClassVar[str] = (
        "The parts are the edits `safegen` and `rece` or `uce`; their pages have the comparison "
        "with the released code."
    )
    deviations: ClassVar[str] = (
        "This is not TRCE: it is `safegen` and a closed form (`rece` or `uce`) in one patch, "
        "with the images first. "
        "TRCE's losses, a margin toward the guided prediction of a safe prompt and the blank "
        "prediction of its first stage, are not used."
    )
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "both"
    has_validation: ClassVar[bool] = True

    text: Literal["rece", "uce", "none"] = "rece"
    """Closed form that erases the phrases; none is SafeGen alone."""
    first: Literal["images", "words"] = "images"
    """Part that is made first; the other one is made on the model with that part applied."""
    erase: Phrases = ()
    """Phrases that name the concept, for the closed form. Default: those of the concept."""
    captions: tuple[str, ...] = ()
    """Prompt lists (`source:list`) and text files: preserved by the closed form, and used to
    condition samples of SafeGen."""
    caption_share: float | None = Field(default=None, gt=0, le=1)
    """Share of SafeGen's samples conditioned on a random caption. Default: 0.6."""
    timesteps: tuple[int, int] = (150, 900)
    """Range of training timesteps, the last one excluded."""
    weight_mosaic: float = Field(default=0.25, gt=0)
    """Weight of L_m, the loss on unsafe images."""
    weight_preserve: float = Field(default=0.75, ge=0)
    """Weight of L_p, the loss on benign images."""
    adversary: AdversarySetting = 0.25
    """Adversary that moves the text embedding of unsafe samples: the relative size of one step
    (0 is none), a name, or a table with a name and settings."""
    adversary_moves: Literal["unsafe", "both"] | None = None
    """Samples that get the move. Default: `both` for additive adversaries, otherwise `unsafe`."""
    fade: float = Field(default=0.8, ge=0, lt=1)
    """Maximum share of the censored latent mixed into an unsafe one; 0 is none."""
    flip: bool = False
    """Whether triplets are mirrored at random."""
    selector: str = "attn1"
    """Which weights SafeGen trains. The closed form always changes the projections of text."""
    training: Training = SafeGen.model_fields["training"].default
    """Settings of the training loop."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_triplet_losses(self)
        return self

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Yield each setting that has no effect with the others, and why."""
        yield from self.build_safegen().unused_settings()
        if self.text == "none":
            for name in self.changed("erase", "first"):
                yield name, "with text none"

    @property
    def needs_phrases(self) -> bool:
        """Whether there is a closed form, which needs phrases to erase."""
        return self.text != "none"

    def describe(self) -> str:
        """Return one or two sentences for a report."""
        if self.text == "none":
            return self.build_safegen().describe()
        return (
            "The edit learns from images: an unsafe one, the same with the concept covered, and a "
            "benign one. An unsafe image must be predicted as its covered twin, a benign one as it "
            "is. It also erases the phrases that name the concept "
            f"({join_quoted(self.erase)}) in closed form."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the captions of a concept, and its phrases for a closed form."""
        captions = {"captions": concept.captions}
        if settings.get("text", cls.model_fields["text"].default) == "none":
            return captions
        return super().defaults_from(concept, settings) | captions

    def build_closed_form(self) -> RECE | UCE | None:
        """Return the settings of the closed form; None if there is none."""
        if self.text == "none":
            return None
        if self.text == "uce":
            return UCE(erase=self.erase, captions=self.captions)
        scale: dict[str, Any] = {"preserve_scale": CAPTIONS_SCALE} if self.captions else {}
        return RECE(erase=self.erase, captions=self.captions, **scale)

    def build_safegen(self) -> SafeGen:
        """Return the settings of SafeGen."""
        shared = SafeGen.model_fields.keys() & type(self).model_fields.keys()
        return SafeGen(**{name: getattr(self, name) for name in shared})

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses of SafeGen; see `TrainedEdit.build_objective`."""
        assert triplets is not None
        return SafeGenObjective(self.build_safegen(), model, triplets, names)

    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        checkpoint_dir: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Make both parts, the second on a model with the first, and return them as one patch.

        See `Edit.apply`.
        """
        check_inputs(self, triplets, checkpoint_dir, resume)
        _ = model.hash  # computed before a part is applied: the patch's base
        checkpoints: dict[str, Any] = {"checkpoint_dir": checkpoint_dir, "resume": resume}
        names = select_parameters(model.denoiser, self.selector)
        check_training(model.denoiser, names, self.training, **checkpoints)
        closed_form = self.build_closed_form()
        if closed_form is None:
            return super().apply(model, triplets, callback=callback, **checkpoints)
        # Solved before the training even if it comes second: an error must not cost a training.
        words = closed_form.apply(model)
        words_first = self.first == "words"
        with words.apply(model, hidden=True) if words_first else nullcontext():
            images = super().apply(model, triplets, callback=callback, **checkpoints)
        if not words_first:
            with images.apply(model, hidden=True):
                words = closed_form.apply(model)
        parts = (words, images) if words_first else (images, words)
        metadata, text = images.metadata.to_json(), words.metadata.to_json()
        metadata["text"] = {key: text[key] for key in ("method", "settings", "seconds", "moved")}
        metadata["seconds"] = round(metadata["seconds"] + text["seconds"], 2)
        return Patch({**parts[0].tensors, **parts[1].tensors}, PatchMetadata(**metadata))
