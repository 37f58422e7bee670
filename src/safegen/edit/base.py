"""What every edit is: frozen settings and one verb."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict

from safegen.concept import Concept
from safegen.data.triplets import Triplets
from safegen.edit.loop import Report
from safegen.errors import BadSetting, UnknownName
from safegen.models.model import Model
from safegen.models.patch import Patch


class Edit(BaseModel, ABC):
    """Settings of one edit. Build it, apply it, write it to JSON; never change it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    learns_from: ClassVar[Literal["triplets", "words"]] = "triplets"
    """What it is told the concept by: pictures, or words that are among its settings and that a concept lends."""
    trains: ClassVar[bool] = True
    """Whether it goes through the training loop; a closed form has nothing to checkpoint and nothing to resume."""

    @classmethod
    @abstractmethod
    def preset(cls, name: str, *, concept: Concept | None = None, **changes: Any) -> Edit:  # noqa: ANN401 - any setting
        """Return the named settings, with what a concept says of itself, and with some of them changed."""

    @abstractmethod
    def apply(
        self,
        model: Model,
        triplets: Triplets | None = None,
        *,
        folder: Path | None = None,
        resume: bool = False,
        report: Report | None = None,
    ) -> Patch:
        """Return new values for some weights of `model`; `model` itself is not touched.

        Raises:
            BadSetting: triplets are wanted and not given, or given and not wanted; so with a folder and `resume`.
        """

    @classmethod
    def from_preset(
        cls,
        presets: Mapping[str, Mapping[str, Any]],
        name: str,
        lent: Mapping[str, Any],
        changes: Mapping[str, Any],
    ) -> Self:
        """Return the settings called `name` over what a concept lends, with changes over both.

        A `training` given as a dict changes the preset's own training where it says something and leaves the rest.

        Raises:
            UnknownName: no such preset.
        """
        if name not in presets:
            method = cls.__module__.rpartition(".")[2]
            raise UnknownName(f"preset of {method}", name, presets)
        settings = {**lent, **presets[name], **changes}
        if isinstance(changes.get("training"), Mapping):
            own = presets[name].get("training", cls.model_fields["training"].default if "training" in cls.model_fields else None)
            settings["training"] = (own.model_dump() if own else {}) | changes["training"]
        return cls(**settings)


def wanted(method: str, triplets: Triplets | None) -> Triplets:
    """Return the triplets of an edit that learns from pictures.

    Raises:
        BadSetting: there are none.
    """
    if triplets is None:
        raise BadSetting(f"{method} learns from pictures; give triplets: a folder made by `safegen triplets make`, or a CSV")
    return triplets


def refuse_idle(edit: Edit, method: str, triplets: object = None, folder: object = None, resume: bool = False) -> None:
    """Refuse what an edit has no use for.

    Raises:
        BadSetting: triplets are given to an edit that learns from words, a folder or `resume` to a closed form.
    """
    if edit.learns_from == "words" and triplets is not None:
        raise BadSetting(f"triplets have no effect on {method}, which learns from words; leave them out and give a concept")
    if not edit.trains and (folder is not None or resume):
        what = "resume" if resume else "a folder for checkpoints"
        raise BadSetting(f"{what} has no effect on {method}, which is solved in one go; leave it out")


def words_of(method: str, concept: Concept | None, erase: object = None) -> dict[str, tuple[str, ...]]:
    """Return what a concept lends to an edit that learns from words: those that ask for it, and its harmless captions of every kind.

    Raises:
        BadSetting: the concept has no words, and `erase` names none either.
    """
    if concept is None:
        return {}
    if not concept.words and not erase:
        raise BadSetting(f"the concept {concept.name!r} has no words, and {method} erases words; give it words, or set erase")
    return {"erase": concept.words, "captions": concept.captions}


def words_needed(method: str, erase: tuple[str, ...]) -> tuple[str, ...]:
    """Return the words to erase.

    Raises:
        BadSetting: there are none.
    """
    if not erase:
        raise BadSetting(f"{method} has no words to erase; give a concept that has some, or set erase")
    return erase


def facts_of(edit: Edit, method: str, model: Model, triplets: Triplets | None = None, **more: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a patch's provenance."""
    out = {"method": method, "settings": edit.model_dump(mode="json"), "base": model.hash, "family": model.family, "model": model.name}
    return out | ({"data": triplets.hash} if triplets is not None else {}) | more
