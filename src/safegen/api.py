"""The library calls that take names: what the command line does, in one function each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from safegen.concept import Concept, load_concept
from safegen.data.triplets import Triplets
from safegen.edit.base import Edit, refuse_idle
from safegen.edit.loop import Report
from safegen.errors import BadSetting, UnknownName
from safegen.models.model import Model
from safegen.models.patch import Patch
from safegen.tables import EDITS, resolve


def make_edit(
    method: str,
    preset: str = "default",
    *,
    concept: Concept | str | None = None,
    **settings: Any,  # noqa: ANN401 - any setting
) -> Edit:
    """Return a method's settings: a preset, what a concept says of itself (its words, or its captions), some of it changed.

    Raises:
        UnknownName: no such method or preset.
        BadSetting: a setting is unknown, breaks its rule, or would have no effect.
    """
    try:
        edit: Edit = resolve(EDITS, method, "edit").preset(
            preset, concept=load_concept(concept) if isinstance(concept, str) else concept, **settings
        )
    except ValidationError as error:
        raise BadSetting(describe(error, settings_of(resolve(EDITS, method, "edit")))) from error
    return edit


def refuse_idle_concept(
    method: str,
    preset: str,
    concept: Concept | str,
    **settings: Any,  # noqa: ANN401
) -> None:
    """Refuse a concept that changes none of an edit's settings.

    For callers to whom a concept is nothing but a lender of settings. The demo is not one of them: it measures by its concept too.

    Raises:
        BadSetting: the settings are the same without it.
    """
    known = load_concept(concept) if isinstance(concept, str) else concept
    if make_edit(method, preset, concept=known, **settings) == make_edit(method, preset, **settings):
        lends = "words and captions" if "erase" in resolve(EDITS, method, "edit").model_fields else "captions"
        raise BadSetting(
            f"concept has no effect here: it lends {lends}, and {method} with preset {preset!r} takes none from {known.name!r}; "
            "leave it out"
        )


def edit(
    model: Model,
    method: str = "safegen",
    *,
    triplets: Triplets | str | Path | None = None,
    preset: str = "default",
    concept: Concept | str | None = None,
    folder: Path | None = None,
    resume: bool = False,
    report: Report | None = None,
    **settings: Any,  # noqa: ANN401
) -> Patch:
    """Remove a visual concept from a model and return the change as a patch; the model is not touched.

    Args:
        model: from `safegen.load`.
        method: name of an edit.
        triplets: <unsafe, censored, benign> pictures for a method that learns from them: loaded, their folder or CSV file, or the name of
            bundled ones such as `mini:skulls`.
        preset: name of the method's settings to start from; `paper` is the published run.
        concept: lends its words to methods that erase words and its captions to presets that train with some, and is refused by
            others; a name, a TOML file, or loaded.
        folder: keeps checkpoints and a log, for `resume`; for methods that train.
        resume: continue a stopped run.
        report: called after every update with (done, of, row of the log).
        settings: settings of the method to change.

    Raises:
        UserError: something given cannot be used; the message says what and the way out.
        Diverged: a loss became NaN.
        Stopped: SIGINT or SIGTERM came.
    """
    if concept is not None:
        refuse_idle_concept(method, preset, concept, **settings)
    recipe = make_edit(method, preset, concept=concept, **settings)
    refuse_idle(recipe, triplets, folder, resume)
    rows = Triplets.load(Path(triplets)) if isinstance(triplets, str | Path) else triplets
    return recipe.apply(model, rows, folder=folder, resume=resume, report=report)


def settings_of(kind: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the names of all settings, nested ones with dots."""
    out = []
    for name, field in kind.model_fields.items():
        out.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            out += settings_of(field.annotation, f"{prefix}{name}.")
    return out


def describe(error: ValidationError, known: Sequence[str] = ()) -> str:
    """Return pydantic's complaints in one line: setting, rule, value; the nearest of `known` for a name that there is not."""
    parts = []
    for e in error.errors():
        place = ".".join(str(v) for v in e["loc"]) or "settings"
        if e["type"] == "extra_forbidden":
            parts.append(str(UnknownName("setting", place, known)))
            continue
        value = "" if e["type"] in ("missing", "value_error") else f", got {e['input']!r}"
        parts.append(f"{place}: {e['msg'].removeprefix('Value error, ')}{value}")
    return "; ".join(parts)
