"""Base classes of the edits: frozen settings with one verb, `apply`."""

from __future__ import annotations

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field
from torch import Tensor, nn

from safegen.core.concept import Concept, Phrases
from safegen.core.errors import ConfigError, DivergedError, UnknownNameError
from safegen.core.files import display_name
from safegen.core.processes import is_main_process
from safegen.core.registry import EDITS, registered_name
from safegen.core.settings import MAX_RANK, MethodSettings
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.check import check_inputs, check_training
from safegen.edits.training.config import (
    HasMetadata,
    Objective,
    Training,
    TrainingCallback,
    warn_unused,
)
from safegen.edits.training.latents import latent_storage
from safegen.edits.training.lora import trainable_parameters
from safegen.edits.training.presets import warn_of_size
from safegen.edits.training.samples import read_captions
from safegen.edits.training.trainer import train
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.model import Model
from safegen.models.patched_weights import hash_components
from safegen.models.text_cache import TextCache
from safegen.patches.patch import Patch

TEXTS = frozenset({"captions", "counterparts", "prompts"})
"""Settings of edits that name prompt lists and text files."""


class Edit(MethodSettings, ABC):
    """Settings of one edit. Build it, apply it, write it to JSON; it is immutable."""

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {"mini": {}, "full": {}}
    """Settings by preset: `mini` for the miniature model, `full` for full-size ones, and `paper` if
    there is a published run. A closed form has the same settings for both sizes."""
    TINY: ClassVar[Mapping[str, Any]] = {}
    """Smallest settings, for tests and smoke runs."""
    inputs: ClassVar[Literal["triplets", "words", "both"]] = "triplets"
    """Inputs the edit learns from: triplets, phrases of the concept, or both.

    An edit with `words` or `both` has a setting `erase`.
    """
    is_trained: ClassVar[bool] = True
    """Whether the edit is trained. A closed form has no checkpoints."""

    @classmethod
    def method(cls) -> str:
        """Return the name of the edit in the registry, or that of its module if it has none."""
        return registered_name(EDITS, cls)

    @classmethod
    def defaults_from(cls, concept: Concept, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings that a concept provides; presets and explicit settings win over them.

        Args:
            concept: the concept.
            settings: settings of the preset and explicit ones.

        Raises:
            ConfigError: the edit needs phrases, and the concept has none.
        """
        if cls.inputs == "triplets":
            return {}
        if not concept.words and not settings.get("erase"):
            raise ConfigError(
                f"{cls.method()} needs phrases to erase, and concept {concept.name!r} has none. "
                "Add words to it, or set erase."
            )
        return {"erase": concept.words}

    @classmethod
    def preset(cls, name: str, *, concept: Concept | None = None, **changes: Any) -> Self:
        """Return the settings of a preset, completed from a concept and changed.

        A `training` given as a dict changes single values of the preset's training.

        Raises:
            UnknownNameError: no such preset.
            ConfigError: the concept lacks something that the edit needs.
        """
        if name not in cls.PRESETS:
            raise UnknownNameError(f"preset of {cls.method()}", name, cls.PRESETS)
        settings = {**cls.PRESETS[name], **changes}
        if isinstance(changes.get("training"), Mapping) and "training" in cls.model_fields:
            training = cls.PRESETS[name].get("training", cls.model_fields["training"].default)
            settings["training"] = training.model_dump() | changes["training"]
        return cls(**{**(cls.defaults_from(concept, settings) if concept else {}), **settings})

    def export_settings(self) -> dict[str, Any]:
        """Return the settings for export, with text files reduced to their names."""
        settings = self.model_dump(mode="json")
        for name in TEXTS & settings.keys():
            settings[name] = [display_name(file) for file in settings[name]]
        return settings

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Return each setting that has no effect with the others, and why."""
        return ()

    def changed(self, *names: str) -> list[str]:
        """Return those of some settings that differ from their default."""
        fields = type(self).model_fields
        return [name for name in names if getattr(self, name) != fields[name].default]

    @property
    def erases_concept(self) -> bool:
        """Whether the edit removes something with these settings."""
        return True

    @property
    def needs_phrases(self) -> bool:
        """Whether the edit needs phrases to erase with these settings."""
        return self.inputs != "triplets"

    @abstractmethod
    def describe(self) -> str:
        """Return one or two sentences for a report: what the edit learns from and what it does."""

    @abstractmethod
    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        checkpoint_dir: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Return new values for some weights of `model`, which is not changed.

        Args:
            model: the model.
            triplets: training images, for an edit that learns from them.
            checkpoint_dir: directory for checkpoint and log, for a trained edit.
            resume: continue from the checkpoint.
            callback: called after every update; a closed form calls it once.

        Raises:
            ConfigError: see `check_inputs`, or the model does not suit the edit.
            DivergedError: a loss or a new weight is not finite.
            InterruptedRunError: SIGINT or SIGTERM arrived; `resume` continues.

        Warns:
            UnusedSettingWarning: a setting has no effect.
        """


class ClosedFormEdit(Edit):
    """An edit by phrases that is solved, not trained."""

    inputs: ClassVar[Literal["triplets", "words", "both"]] = "words"
    is_trained: ClassVar[bool] = False

    erase: Phrases = ()
    """Phrases that name the concept. Default: those of the concept."""

    @abstractmethod
    def solve(self, model: Model) -> dict[str, Tensor]:
        """Return the new weights by name, float64, on the CPU."""

    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        checkpoint_dir: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Solve for the new weights and return them as a patch; see `Edit.apply`."""
        check_inputs(self, triplets, checkpoint_dir, resume)
        warn_unused(self.unused_settings())
        start = time.perf_counter()
        with TextCache().attached(model.pipeline):  # phrases are encoded for each part and start
            weights = self.solve(model)
        for name, value in weights.items():
            if not bool(value.isfinite().all()):
                raise DivergedError(
                    f"{self.method()} found no finite weight for {name}. "
                    "Raise lamb, or lower erase_scale."
                )
        values = model.denoiser.named_parameters()
        before = {name: w.detach().cpu().double() for name, w in values if name in weights}
        distance = sum(float((weights[n] - w).norm() ** 2) for n, w in before.items()) ** 0.5
        change = distance / sum(float(w.norm() ** 2) for w in before.values()) ** 0.5
        if callback:
            callback(1, 1, {"update": 1, "moved": change})
        seconds = round(time.perf_counter() - start, 2)
        metadata = metadata_of(self, model, seconds=seconds, moved=round(change, 6))
        return Patch({name: value.float() for name, value in weights.items()}, metadata)


class TrainedEdit(Edit):
    """An edit that trains the selected weights, or a LoRA for each of them."""

    prepares: ClassVar[str | None] = None
    """Setting with the number of images that the model generates before the training, if any."""
    selector: str
    """Which weights change."""
    rank: int | None = Field(default=None, ge=1, le=MAX_RANK)
    """Rank of a LoRA for each selected weight. None trains the weights themselves."""
    alpha: float | None = Field(default=None, gt=0)
    """Scale of the LoRA times its rank. Default: the rank, a scale of 1."""
    training: Training
    """Settings of the training loop."""
    TUNED_ON_MINI: ClassVar[tuple[str, ...]] = ("mini",)
    """Presets with a training that was tuned on the miniature model."""

    def probe(self, batch: int) -> tuple[Self, float]:
        """Return settings with cheap updates, and how many of them cost as much as one of these.

        Args:
            batch: samples of a forward pass.
        """
        training = self.training.model_copy(update={"batch": batch, "accumulation": 1})
        factor = self.training.batch * self.training.accumulation / batch
        return self.model_copy(update={"training": training}), factor

    def unused_settings(self) -> Iterable[tuple[str, str]]:
        """Return each setting that has no effect with the others, and why."""
        return [("alpha", "without rank")] if self.alpha and self.rank is None else []

    def network(self, model: Model) -> nn.Module:
        """Return the network that is trained: the denoiser, unless an edit trains another one.

        Its parameters have the names that patches have for them.
        """
        denoiser: nn.Module = model.denoiser
        return denoiser

    def keep_tensors(self, model: Model, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the new weights that the patch has: all of them, unless an edit says otherwise.

        Args:
            model: the model, unchanged.
            tensors: the new weights, by the names that patches have for them.
        """
        return tensors

    @abstractmethod
    def build_objective(
        self, model: Model, triplets: Triplets | None, names: Sequence[str]
    ) -> Objective:
        """Return batches and losses, with everything that is computed once.

        Args:
            model: the model, with LoRAs attached if they are trained.
            triplets: training images; never None for an edit that learns from them.
            names: names of the trained parameters in the network. With a LoRA these are its
                factors, and their values before the training stand for the original model.

        Raises:
            ConfigError: something is missing that the edit needs.
        """

    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        checkpoint_dir: Path | None = None,
        resume: bool = False,
        callback: TrainingCallback | None = None,
    ) -> Patch:
        """Train the edit and return the new weights as a patch; see `Edit.apply`."""
        check_inputs(self, triplets, checkpoint_dir, resume)
        warn_unused(self.unused_settings())
        default = type(self).model_fields["training"].default
        warn_of_size(self.training, default, self.PRESETS, self.TUNED_ON_MINI, model)
        start = time.perf_counter()
        network = self.network(model)
        training = self.training.resolve(network)
        edit = self.model_copy(update={"training": training})
        lora: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "seed": training.seed}
        with trainable_parameters(model, self.selector, network=network, **lora) as trainable:
            checkpoints: dict[str, Any] = {"checkpoint_dir": checkpoint_dir, "resume": resume}
            check_training(network, trainable.names, training, **checkpoints)
            with latent_storage(checkpoint_dir, writes=is_main_process()):
                objective = edit.build_objective(model, triplets, trainable.names)
            metadata = dict(objective.metadata) if isinstance(objective, HasMetadata) else {}
            preparation = time.perf_counter() - start
            result = train(
                network,
                trainable.names,
                objective,
                training,
                fingerprint=fingerprint_of(edit, model, triplets, metadata),
                callback=callback,
                **checkpoints,
            )
        metadata |= result.to_metadata(objective.weights)
        metadata["seconds"] = round(metadata["seconds"] + preparation, 2)
        tensors = self.keep_tensors(model, trainable.merge(result.tensors))
        metadata["components"] = hash_components(model, tensors)
        return Patch(tensors, metadata_of(edit, model, triplets, **metadata))


def join_quoted(words: Sequence[str]) -> str:
    """Return words for a sentence, quoted and joined by commas."""
    return ", ".join(f"“{text}”" for text in words) or "none"


def metadata_of(
    edit: Edit, model: Model, triplets: Triplets | None = None, **more: Any
) -> PatchMetadata:
    """Return the metadata of a patch: method, settings, model, data and more."""
    return PatchMetadata(
        method=edit.method(),
        model=display_name(model.name),
        base=model.hash,
        family=model.family,
        settings=edit.export_settings(),
        description=edit.describe(),
        parents=tuple(model.parents),
        data=triplets.hash if triplets is not None else None,
        **more,
    )


def fingerprint_of(
    edit: Edit, model: Model, triplets: Triplets | None, metadata: Mapping[str, Any]
) -> str:
    """Return the identity of a training, without the settings of its loop."""
    captions = read_captions(getattr(edit, "captions", ()))
    inputs = [
        edit.model_dump(mode="json", exclude={"training"}),
        hashlib.sha256(repr(captions).encode()).hexdigest(),
        triplets.hash if triplets is not None else None,
        model.hash,
        model.pipeline_hash,
        [parent.model_dump() for parent in model.parents],
        metadata,
    ]
    return json.dumps(inputs, sort_keys=True)
