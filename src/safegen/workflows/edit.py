"""The library calls that take names: what the command line does, in one function each."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError, FileError, MissingExtraError, SafegenWarning, explain
from safegen.core.files import display_name
from safegen.core.registry import EDITS, resolve
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import Edit, check_inputs
from safegen.edits.training.trainer import TrainingCallback
from safegen.evaluation.report import model_card as cards
from safegen.judges import judge_images, load_judge
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.model import Model
from safegen.patches.arithmetic import warn_of_overlap
from safegen.patches.patch import Patch


def make_edit(
    method: str, preset: str = "default", *, concept: Concept | str | None = None, **settings: Any
) -> Edit:
    """Return a method's settings: a preset, what a concept says of itself (its words, or its captions), some of it changed.

    Raises:
        UnknownNameError: no such method or preset.
        ConfigError: a setting is unknown, breaks its rule, or would have no effect.
    """
    try:
        edit: Edit = resolve(EDITS, method, "edit").preset(
            preset,
            concept=load_concept(concept) if isinstance(concept, str) else concept,
            **settings,
        )
    except ValidationError as error:
        raise ConfigError(explain(error, resolve(EDITS, method, "edit"))) from error
    return edit


def refuse_idle_concept(method: str, preset: str, concept: Concept | str, **settings: Any) -> None:
    """Refuse a concept that changes none of an edit's settings.

    For callers to whom a concept is nothing but a lender of settings. The demo is not one of them:
    it measures by its concept too.

    Raises:
        ConfigError: the settings are the same without it.
    """
    known = load_concept(concept) if isinstance(concept, str) else concept
    if make_edit(method, preset, concept=known, **settings) == make_edit(
        method, preset, **settings
    ):
        lends = (
            "words and captions"
            if "erase" in resolve(EDITS, method, "edit").model_fields
            else "captions"
        )
        raise ConfigError(
            f"concept has no effect here: it lends {lends}, and {method} with preset {preset!r} takes none from {known.name!r}; "
            "leave it out"
        )


LOOKED_AT = 16
"""Unsafe pictures that are judged at once, until one shows the concept."""


class UncheckedTripletsWarning(SafegenWarning):
    """NoAdversary could look whether triplets show the concept that they are said to show."""


def refuse_other_pictures(concept: Concept | str, triplets: Triplets) -> None:
    """Refuse triplets on whose unsafe side the concept's judge sees it nowhere: they would take out something else.

    The judge looks until it has seen the concept once.

    Raises:
        ConfigError: it is in none of the pictures that could be judged.
        FileError: a picture is missing or changed.

    Warns:
        UncheckedTripletsWarning: the judge cannot be opened here (a library or weights that only its user can
            name), or could judge no picture.
    """
    known = load_concept(concept) if isinstance(concept, str) else concept
    try:
        judge = load_judge(known.judge, labels=known.labels, threshold=known.threshold)
    except (MissingExtraError, FileError, ConfigError) as error:
        warnings.warn(
            f"nobody looked whether the triplets show {known.name!r}: {error}",
            UncheckedTripletsWarning,
            stacklevel=2,
        )
        return
    judged = 0
    for start in range(0, len(triplets), LOOKED_AT):
        part = range(start, min(start + LOOKED_AT, len(triplets)))
        verdicts = judge_images(judge, [triplets.images(i)[0] for i in part])
        if "unsafe" in verdicts:
            return
        judged += len(verdicts) - verdicts.count("unjudged")
    if not judged:
        warnings.warn(
            f"nobody could see whether the triplets show {known.name!r}: all of them are unjudged",
            UncheckedTripletsWarning,
            stacklevel=2,
        )
        return
    raise ConfigError(
        f"the triplets' unsafe pictures must show the concept {known.name!r}, and judge {known.judge} sees it in none of {judged}; "
        "name the concept that they show, or make triplets of this one"
    )


def edit(
    model: Model,
    method: str = "safegen",
    *,
    triplets: Triplets | str | Path | None = None,
    preset: str = "default",
    concept: Concept | str | Path | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    callback: TrainingCallback | None = None,
    **settings: Any,
) -> Patch:
    """Remove a visual concept from a model and return the change as a patch; the model is not touched.

    Args:
        model: from `safegen.load`.
        method: name of an edit.
        triplets: <unsafe, censored, benign> pictures for a method that learns from them: loaded,
            their folder or CSV file, or the name of bundled ones such as `mini:skulls`.
        preset: name of the method's settings to start from; `paper` is the published run.
        concept: lends its words to methods that erase words, its captions to presets that train
            with some, and its judge, which looks whether triplets show it; refused where all three
            are of no use. A name, a TOML file, or loaded.
        folder: keeps checkpoints and a log, for `resume`; for methods that train.
        resume: continue a stopped run.
        callback: called after every update with (done, of, row of the log).
        settings: settings of the method to change.

    Raises:
        UserError: something given cannot be used; the message says what and the way out.
        DivergedError: a loss became NaN.
        Stopped: SIGINT or SIGTERM came.
    """
    concept = str(concept) if isinstance(concept, Path) else concept
    if concept is not None and triplets is None:  # of triplets its judge sees whether they show it
        refuse_idle_concept(method, preset, concept, **settings)
    recipe = make_edit(method, preset, concept=concept, **settings)
    check_inputs(recipe, triplets, folder, resume)
    rows = Triplets.load(Path(triplets)) if isinstance(triplets, str | Path) else triplets
    if concept is not None and rows is not None:
        refuse_other_pictures(concept, rows)
    return recipe.apply(
        model,
        rows,
        folder=None if folder is None else Path(folder),
        resume=resume,
        callback=callback,
    )


def save_patch(
    patch: Patch, out: str | Path, *, card: bool = True, metrics: Sequence[str | Path] = ()
) -> None:
    """Write a patch to a new file, figures in its header too, and its model card beside it (`OUT.md`).

    `Patch.save` alone writes no card.

    Args:
        patch: the patch.
        out: the new .safetensors file.
        card: whether to write the card.
        metrics: figures for it: folders of a demo, a run or a resilience test of this very patch.

    Raises:
        FileError: the file or the card exists or cannot be written, or figures cannot be read;
            nothing is left then.
        ConfigError: figures of another patch, or figures and no card.
    """
    out, measured = Path(out), [Path(path) for path in metrics]
    text = _card(cards.CardSubject.of_patch(patch, out.name), card, measured)
    cards.write_with_card(out, text, lambda: cards.with_metrics(patch, measured).save(out))


def export(
    model: Model,
    out: str | Path,
    *,
    patches: Sequence[Patch] = (),
    dtype: str = "fp16",
    card: bool = True,
    metrics: Sequence[str | Path] = (),
) -> None:
    """Write a model as one file in the original layout, provenance and figures in its header, its model card beside it (`OUT.md`).

    Args:
        model: with or without patches on it; it is given back as it came.
        out: the new .safetensors file.
        patches: put on in this order, after those.
        dtype: type of the weights in the file: fp16, bf16 or fp32.
        card: whether to write the card.
        metrics: figures for it, of exactly these patches.

    Raises:
        ConfigError: `out` has another ending, weights do not fit the type, figures are of other
            patches, or are given and no card is.
        FileError: the file or the card exists or cannot be written, or figures cannot be read;
            nothing is left then.
        PatchError: a patch does not fit the model.

    Warns:
        BaseMismatchWarning: a patch was made on other weights.
        PatchOverlapWarning: two patches change the same weights.
        MetadataMismatchWarning: the model's file or folder says what is in it, of weights that it has no more;
            that is not passed on.
    """
    from safegen.models.checkpoint.single_file import save_single_file

    out, measured = Path(out), [Path(path) for path in metrics]
    if out.suffix != ".safetensors":
        raise ConfigError(
            f"out must end in .safetensors, which is what is written, got {str(out)!r}"
        )
    notes = [
        f"Weights are {dtype}; figures, where there are some, were taken before they were rounded to it."
    ]
    subject = _subject("file", out, model, patches, notes)
    text, facts = _card(subject, card, measured), _facts(subject, model, measured)
    with _with(model, patches):
        cards.write_with_card(
            out, text, lambda: save_single_file(model, out, dtype=dtype, facts=facts)
        )


def export_folder(
    model: Model,
    out: str | Path,
    *,
    patches: Sequence[Patch] = (),
    card: bool = True,
    metrics: Sequence[str | Path] = (),
) -> None:
    """Write a model as a plain diffusers folder; arguments and errors as `export` has them.

    Provenance and figures are in its safegen.json, the model card is its README.md.
    """
    out, measured = Path(out), [Path(path) for path in metrics]
    subject = _subject("folder", out, model, patches)
    text, facts = _card(subject, card, measured), _facts(subject, model, measured)
    with _with(model, patches):
        save_folder(model, out, card=text, facts=facts)


def _facts(subject: cards.CardSubject, model: Model, metrics: Sequence[Path]) -> dict[str, Any]:
    """Return what a whole model says of itself in the place that programs read."""
    out: dict[str, Any] = {"model": subject.model, "base": subject.base}
    out["patches"] = [
        {"hash": digest, "provenance": dict(said)} for digest, said in subject.patches
    ]
    out |= {"made_from": dict(model.verified_metadata)} if model.verified_metadata else {}
    return out | (
        {"metrics": [subject.figures(path).facts() for path in metrics]} if metrics else {}
    )


def _subject(
    kind: str, out: Path, model: Model, patches: Sequence[Patch], notes: Sequence[str] = ()
) -> cards.CardSubject:
    held, rounded = (
        [(p.hash, p.provenance) for p in (*model.patches, *patches)],
        tuple(model.cast_hashes.values()),
    )
    return cards.CardSubject(
        kind,
        out.name,
        display_name(model.name),
        model.hash,
        held,
        notes,
        rounded,
        _within(model.verified_metadata),
        bool(model.provenance),
    )


def _within(said: Mapping[str, Any]) -> list[str]:
    """Return the hashes of the patches that are in a model's weights, the oldest first."""
    earlier = _within(said["made_from"]) if said.get("made_from") else []
    return [*earlier, *(patch["hash"] for patch in said.get("patches", ()))]


def _card(subject: cards.CardSubject, wanted: bool, metrics: Sequence[Path]) -> str | None:
    if metrics and not wanted:
        raise ConfigError(
            "metrics have no effect without a card: they go into it; leave one of the two out"
        )
    return cards.card(subject, metrics) if wanted else None


@contextmanager
def _with(model: Model, patches: Sequence[Patch]) -> Iterator[None]:
    """Keep patches on a model for a while."""
    warn_of_overlap([*model.patches, *patches])
    with ExitStack() as on:
        for patch in patches:
            on.enter_context(patch.apply(model))
        yield
