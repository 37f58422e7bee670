"""SafeGen and a closed form that erases the concept's words, in one patch (ours).

A text-side edit followed by a short training of visual layers is reported to do better than either
alone (TRCE, arXiv:2503.07389). Here the other order does: a model whose words are gone teaches
SafeGen little, and learnt words bring the concept back (docs/edits.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from safegen.core.concept import Concept
from safegen.core.errors import explain
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import (
    TrainedEdit,
    check_inputs,
    check_phrases,
    join_quoted,
    phrases_from,
    require_phrases,
)
from safegen.edits.functional.adversary import AdversarySetting
from safegen.edits.rece import KEPT, RECE
from safegen.edits.safegen import SafeGen, SafeGenObjective
from safegen.edits.training.config import Objective, Training, TrainingCallback
from safegen.edits.training.trainer import check
from safegen.edits.uce import UCE
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.models.selectors import select_parameters
from safegen.patches.patch import Patch


class SafeGenPlus(TrainedEdit):
    """Settings of the composed edit.

    What SafeGen and the closed forms have besides is as in their own defaults.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "both"
    has_validation: ClassVar[bool] = True

    text: Literal["rece", "uce", "none"] = "rece"
    """Closed form that erases the words; none is SafeGen alone."""
    first: Literal["pictures", "words"] = "pictures"
    """Which part is made first; the other is made on the model that has it."""
    erase: tuple[str, ...] = ()
    """Words that ask for the concept, for the closed form; a concept lends its own."""
    captions: tuple[str, ...] = ()
    """Benign prompt lists (`source:list`) and text files: what the closed form keeps, and what SafeGen's samples are conditioned on."""
    caption_share: float | None = Field(default=None, gt=0, le=1)
    """Part of SafeGen's samples that is conditioned on a random benign caption.

    0.6 when there are captions.
    """
    timesteps: tuple[int, int] = (150, 900)
    """First and one-past-last training timestep that is drawn."""
    weight_mosaic: float = Field(default=0.25, gt=0)
    """Weight of L_m, the loss on unsafe pictures: less than SafeGen's, for the closed form takes its share (docs/ablation.md)."""
    weight_preserve: float = Field(default=0.75, ge=0)
    """Weight of L_p, the loss on benign pictures: to be answered as by the model that SafeGen begins with."""
    adversary: AdversarySetting = 0.25
    """Who moves an unsafe sample's text embedding to where the edit fails: the size of one step (a part of its norm; 0 is none), a
    name, or a table with a name and settings (docs/edits.md)."""
    adversary_moves: Literal["unsafe", "both"] | None = None
    """Whose texts it moves: the unsafe samples', or by the same moves the benign ones' too.

    As in SafeGen, unless told.
    """
    fade: float = Field(default=0.8, ge=0, lt=1)
    """Largest part by which an unsafe sample is faded toward its censored twin; 0 is none."""
    flip: bool = False
    """Whether a sample may be mirrored; unsafe, censored and benign together."""
    selector: str = "attn1"
    """Which weights SafeGen trains.

    The closed form changes keys and values of `attn2` whatever is said here.
    """
    training: Training = SafeGen.model_fields["training"].default
    """How the loop trains: as SafeGen does."""

    @classmethod
    def method(cls) -> str:
        """Return its name in the table."""
        return "safegen-plus"

    @model_validator(mode="after")
    def _no_idle_setting(self) -> Self:
        if self.text == "none" and self.erase:
            raise ValueError(
                "erase has no effect with text none, which erases no words; leave it out"
            )
        if self.text == "none" and self.first != type(self).model_fields["first"].default:
            raise ValueError(
                "first has no effect with text none, which leaves one part; leave it out"
            )
        check_phrases(self.erase)
        try:
            object.__setattr__(
                self, "adversary_moves", self.visual().adversary_moves
            )  # decided, so that patch and checkpoint say it
        except ValidationError as error:
            raise ValueError(explain(error)) from error
        return self

    def describe(self) -> str:
        """Return it."""
        return (
            self.visual().describe()
            if self.text == "none"
            else "It learns from pictures: an unsafe one, the same with the concept covered, and a harmless one. An unsafe picture "
            "must be predicted as its covered twin, a harmless one as it is. It also erases the words that ask for the concept "
            f"({join_quoted(self.erase)}) in closed form."
        )

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return its captions, and its words to settings that erase some."""
        words = said.get("text", cls.model_fields["text"].default) != "none"
        return {"captions": concept.captions} | (
            phrases_from(cls.method(), concept, said) if words else {}
        )

    def words(self) -> RECE | UCE | None:
        """Return the settings of the closed form, with its default weights; None without one."""
        if self.text == "none":
            return None
        erase = require_phrases(self.method(), self.erase)
        if self.text == "uce":
            return UCE(erase=erase, captions=self.captions)
        if not self.captions:
            return RECE(erase=erase)
        return RECE(erase=erase, captions=self.captions, preserve_scale=KEPT)

    def visual(self) -> SafeGen:
        """Return the settings of SafeGen."""
        shared = SafeGen.model_fields.keys() & type(self).model_fields.keys()
        return SafeGen(
            **{name: getattr(self, name) for name in shared}, teacher=self.weight_preserve > 0
        )

    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return SafeGen's batches and losses, for the model as it stands."""
        assert triplets is not None
        problem = SafeGenObjective(self.visual(), model, triplets, names)
        problem.fingerprint = f"{self.model_dump_json(exclude={'training'})} {problem.fingerprint}"
        return problem

    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        folder: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Make both parts, the second on the model that has the first, and return them as one patch; `model` is not touched.

        Raises:
            ConfigError: something is missing, or given has no effect.
            DivergedError: a solved weight, a loss or a trained weight is not finite.
            Stopped: the user stopped it; `resume` continues.
        """
        check_inputs(self, triplets, folder, resume)
        words = self.words()
        _ = model.hash  # taken before a weight changes: what the patch refers to
        check(
            model.denoiser,
            select_parameters(model.denoiser, self.selector),
            self.training,
            folder=folder,
            resume=resume,
        )
        if words is None:
            return super().apply(model, triplets, folder=folder, resume=resume, callback=callback)
        text = words.apply(
            model
        )  # also where it comes second: words that cannot be solved stop it before it trains
        before = self.first == "words"
        with text.apply(model, hidden=True) if before else nullcontext():
            seen = super().apply(model, triplets, folder=folder, resume=resume, callback=callback)
        if not before:
            with seen.apply(model, hidden=True):
                text = words.apply(model)
        made = (text, seen) if before else (seen, text)
        seen_metadata, text_metadata = seen.metadata.to_json(), text.metadata.to_json()
        spent = round(seen_metadata["seconds"] + text_metadata["seconds"], 2)
        said = {key: text_metadata[key] for key in ("method", "settings", "seconds", "moved")}
        return Patch(
            {**made[0].tensors, **made[1].tensors},
            PatchMetadata(**seen_metadata | {"text": said, "seconds": spent}),
        )
