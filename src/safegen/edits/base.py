"""What every edit is: frozen settings and one verb."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, UnknownNameError
from safegen.core.files import display_name
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.config import HasMetadata
from safegen.edits.training.lora import check_alpha, trainable_parameters
from safegen.edits.training.trainer import Objective, Training, TrainingCallback, check, train
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.patches.patch import Patch


class Edit(BaseModel, ABC):
    """Settings of one edit. Build it, apply it, write it to JSON; never change it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]]
    """Named settings; `default` is among them, and `paper` where there is one."""
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "triplets"
    """What it is told the concept by: pictures, words that are among its settings and that a concept lends, or both."""
    is_trained: ClassVar[bool] = True
    """Whether it goes through the training loop.

    A closed form has nothing to checkpoint and nothing to resume.
    """

    @classmethod
    def method(cls) -> str:
        """Return its name in the table: that of its file, unless it says otherwise."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def defaults_from(cls, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a concept gives; a preset and what is said outright count before them.

        Args:
            concept: a concept.
            said: the preset's settings and those that are said outright.

        Raises:
            ConfigError: the concept lacks what the edit needs of it.
        """
        return {}

    @classmethod
    def preset(cls, name: str, *, concept: Concept | None = None, **changes: Any) -> Self:
        """Return the settings called `name`, over what a concept gives, some of them changed.

        A `training` given as a dict changes the preset's own training where it says something and
        leaves the rest.

        Raises:
            UnknownNameError: no such preset.
            ConfigError: the concept lacks what the edit needs of it.
        """
        if name not in cls.PRESETS:
            raise UnknownNameError(f"preset of {cls.method()}", name, cls.PRESETS)
        said = {**cls.PRESETS[name], **changes}
        if isinstance(changes.get("training"), Mapping):
            own = cls.PRESETS[name].get(
                "training",
                cls.model_fields["training"].default if "training" in cls.model_fields else None,
            )
            said["training"] = (own.model_dump() if own else {}) | changes["training"]
        return cls(**{**(cls.defaults_from(concept, said) if concept else {}), **said})

    def export_settings(self) -> dict[str, Any]:
        """Return the settings for what we write, which names no machine and no user: files of captions by their last name."""
        out = self.model_dump(mode="json")
        return out | (
            {"captions": [display_name(name) for name in out["captions"]]}
            if "captions" in out
            else {}
        )

    @property
    def erases_concept(self) -> bool:
        """Whether it takes the concept away at all, as its settings stand: to one that does not, what measures removal is of no use."""
        return True

    @abstractmethod
    def describe(self) -> str:
        """Return what it learns from and what it does, in a sentence or two for a reader of the report who knows no method."""

    @abstractmethod
    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        folder: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Return new values for some weights of `model`; `model` itself is not touched.

        Raises:
            ConfigError: triplets are wanted and not given, or given and not wanted; so with a folder
                and `resume`.
        """


class TrainedEdit(Edit):
    """An edit that goes through the training loop, on chosen weights or on a LoRA beside them."""

    has_validation: ClassVar[bool] = False
    """Whether its problem keeps samples for early stopping."""

    selector: str
    """Which weights change."""
    rank: int | None = Field(default=None, ge=1)
    """Train a LoRA of this rank beside the selected matrices and convolutions.

    None trains the selected weights themselves.
    """
    alpha: float | None = Field(default=None, gt=0)
    """Strength of the LoRA times its rank; the rank, so a strength of 1, when not given."""
    training: Training
    """How the loop trains."""

    @model_validator(mode="after")
    def _fits_the_loop(self) -> Self:
        check_alpha(self.rank, self.alpha)
        if self.training.validate_every and not self.has_validation:
            raise ValueError(
                f"training.validate_every has no effect on {self.method()}, which holds nothing out; set it to 0"
            )
        return self

    @abstractmethod
    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return its batches and losses, all that is made once made.

        Args:
            model: the model, factors hanging in it where a LoRA is trained.
            triplets: for edits that learn from pictures; never None for them.
            names: parameters that will be trained.

        Raises:
            ConfigError: something that it needs is missing.
        """

    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        folder: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Train the edit and return it as a patch; `model` is not touched.

        Raises:
            ConfigError: something is missing, or given has no effect.
            Stopped: the user stopped it; `resume` continues.
        """
        check_inputs(self, triplets, folder, resume)
        began = time.perf_counter()
        training = self.training.resolve(model.denoiser)
        edit = self.model_copy(update={"training": training})
        with trainable_parameters(
            model, self.selector, rank=self.rank, alpha=self.alpha, seed=training.seed
        ) as part:
            check(model.denoiser, part.names, training, folder=folder, resume=resume)
            problem = edit.build_objective(model, triplets, part.names)
            problem.fingerprint += f" on {model.pipeline_hash}"
            if model.parents:
                problem.fingerprint += f" with {model.parents}"
            ready = (
                time.perf_counter() - began
            )  # latents, rollouts, twins: all that is made before the first update
            found = train(
                model.denoiser,
                part.names,
                problem,
                training,
                folder=folder,
                resume=resume,
                callback=callback,
            )
        more = problem.facts if isinstance(problem, HasMetadata) else {}
        facts = provenance_of(edit, model, triplets) | found.facts(problem.weights)
        facts["seconds"] = round(facts["seconds"] + ready, 2)
        return Patch(part.weights(found.tensors), PatchMetadata(**facts, **more))


def join_quoted(words: Sequence[str]) -> str:
    """Return words for a sentence."""
    return ", ".join(f"“{text}”" for text in words) or "none"


def check_inputs(
    edit: Edit, triplets: object = None, folder: object = None, resume: bool = False
) -> None:
    """Refuse what an edit lacks, or has no use for.

    Raises:
        ConfigError: triplets are given to an edit that learns from words alone, or not to one that
            learns from them; a folder or `resume` is given to a closed form.
    """
    method = edit.method()
    if edit.inputs == "words" and triplets is not None:
        raise ConfigError(
            f"triplets have no effect on {method}, which learns from words; leave them out and give a concept"
        )
    if edit.inputs != "words" and triplets is None:
        raise ConfigError(
            f"{method} learns from pictures; give triplets: a folder made by `safegen triplets make`, a CSV, or bundled ones (mini:skulls)"
        )
    if not edit.is_trained and (folder is not None or resume):
        what = "resume" if resume else "a folder for checkpoints"
        raise ConfigError(
            f"{what} has no effect on {method}, which is solved in one go; leave it out"
        )


def check_phrases(erase: Sequence[str]) -> None:
    """Refuse a blank word.

    Raises:
        ValueError: there is one.
    """
    if not all(word.strip() for word in erase):
        raise ValueError("erase has a blank word, which every prompt begins with; leave it out")


def phrases_from(method: str, concept: Concept, said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words that a concept lends to an edit that needs some.

    Raises:
        ConfigError: it has none, and none are said outright.
    """
    if not concept.words and not said.get("erase"):
        raise ConfigError(
            f"the concept {concept.name!r} has no words, and {method} erases words; give it words, or set erase"
        )
    return {"erase": concept.words}


def require_phrases(method: str, erase: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words to erase.

    Raises:
        ConfigError: there are none.
    """
    if not erase:
        raise ConfigError(
            f"{method} has no words to erase; give a concept that has some, or set erase"
        )
    return erase


def provenance_of(
    edit: Edit, model: Model, triplets: Triplets | None = None, **more: Any
) -> dict[str, Any]:
    """Return a patch's provenance."""
    out: dict[str, Any] = {
        "method": edit.method(),
        "settings": edit.export_settings(),
        "description": edit.describe(),
        "base": model.hash,
        "family": model.family,
        "model": display_name(model.name),
    }
    out |= {"parents": model.parents} if model.parents else {}
    return out | ({"data": triplets.hash} if triplets is not None else {}) | more
