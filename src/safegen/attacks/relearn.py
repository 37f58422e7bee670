"""Whether an edit lasts: fine-tune the edited model, on harmless pictures or on the concept's own, and judge it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from safegen._version import __version__
from safegen.attacks.finetune import (
    FineTune,
    FineTuneDataset,
    FineTuneResult,
    captions_for,
    fine_tune,
)
from safegen.attacks.kept import RESULTS, Kept
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError
from safegen.core.files import display_name
from safegen.core.generation import GenerationConfig, preferred_precision
from safegen.core.progress import ProgressCallback, no_progress
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.trainer import TrainingCallback
from safegen.evaluation.plan import Item, Role, make_plan
from safegen.evaluation.report.contact_sheet import save_sheet, sheet
from safegen.evaluation.samples import canonical, sha
from safegen.evaluation.scoring.score import ASKED, refuse_unjudged, removal, score
from safegen.judges import Detections, Judge, load_judge
from safegen.metrics.image import mean_change
from safegen.metrics.paired import mcnemar
from safegen.models.generation import generate
from safegen.models.model import Model
from safegen.patches.arithmetic import merge, warn_of_overlap
from safegen.patches.patch import Patch

FORMAT = "safegen-resilience/1"


class Resilience(BaseModel):
    """What is fine-tuned and how it is judged."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    on: Literal["benign", "concept"] = "benign"
    """Whether the fine-tune is an ordinary user's, on harmless pictures, or an attacker's, on pictures of the concept."""
    finetune: FineTune = FineTune()
    """How it trains."""
    apart: bool = False
    """Also fine-tune the untouched model: judged alone, and with the patches' changes added to it (modular, arXiv:2412.00357)."""
    prompts: int = Field(default=24, ge=1)
    """Prompts of each list."""
    seeds: tuple[int, ...] = Field(default=(1,), min_length=1)
    """Seeds for each prompt."""
    roles: tuple[Role, ...] = ("explicit", "innocent", "benign")
    """Which of the concept's prompt lists are drawn."""
    generation: GenerationConfig = Field(
        default_factory=lambda: GenerationConfig(precision=preferred_precision())
    )
    """How pictures are made."""


@dataclass
class Findings:
    """Everything that was found."""

    settings: Resilience
    concept: Concept
    model: Model
    patches: Sequence[Patch]
    material: FineTuneDataset
    items: Sequence[Item]
    judge_id: str
    known: tuple[str, ...]
    """Every label of the judge; what is not among them has no rate."""
    pictures: dict[str, list[Image.Image]] = field(default_factory=dict)
    detections: dict[str, list[Detections]] = field(default_factory=dict)
    tuned: dict[str, FineTuneResult] = field(default_factory=dict)
    """By what was fine-tuned: `edited`, and `base` where that was too."""

    def summary(self) -> dict[str, Any]:
        """Return every figure with its n and interval, as plain values."""
        return {
            "format": FORMAT,
            "made_by": f"safegen {__version__}",
            "settings": self.settings.model_dump(mode="json"),
            "model": display_name(self.model.name),
            "base_hash": self.model.hash,
            "patches": [{"hash": p.hash, "metadata": p.metadata.to_json()} for p in self.patches],
            "concept": self.concept.model_dump(mode="json"),
            "judge": self.judge_id,
            "data": self.material.facts(),
            "loss": {
                name: _course(found, self.settings.finetune.updates)
                for name, found in self.tuned.items()
            },
            "sides": list(self.detections),
            "lists": {name: self._list(rows) for name, rows in self._lists().items()},
        }

    def _lists(self) -> dict[str, list[int]]:
        out: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            out.setdefault(item.list_name, []).append(i)
        return out

    def _list(self, at: Sequence[int]) -> dict[str, Any]:
        items = [self.items[i] for i in at]
        return {
            "role": items[0].role,
            "shows": items[0].shows,
            "prompts": len({i.prompt for i in items}),
            "sides": {side: self._side(side, items, at) for side in self.detections},
        }

    def _side(self, side: str, items: Sequence[Item], at: Sequence[int]) -> dict[str, Any]:
        own, base, edited = (
            [self.detections[name][i] for i in at] for name in (side, "base", "edited")
        )
        out = score(items, own, self.concept, self.known).to_json()
        if side == "base":
            return out
        before, after = ([self.pictures[name][i] for i in at] for name in ("base", side))
        out["change"] = mean_change(before, after, [i.prompt for i in items]).to_json()
        if items[0].role in ASKED:
            try:
                out["removal"] = removal(items, base, own, self.concept).to_json()
            except ValueError as error:  # the base model shows the concept nowhere
                out["removal"], out["removal_undefined"] = None, str(error)
        if side != "edited":
            try:
                out["against_edited"] = mcnemar(
                    *([self._seen(v) for v in part] for part in (edited, own))
                ).to_json()
            except ValueError as error:  # no pair was judged
                out["against_edited"], out["against_edited_undefined"] = None, str(error)
        return out

    def _seen(self, detections: Detections) -> bool | None:
        return detections.contains(self.concept.labels, self.concept.threshold)

    def lines(self) -> Iterable[str]:
        """Return every verdict as a line of JSON; prompts by list and number only."""
        for side, results in self.detections.items():
            for item, detections in zip(self.items, results, strict=True):
                verdict = detections.verdict(self.concept.labels, self.concept.threshold)
                found = [{"label": d.label, "score": round(d.score, 4)} for d in detections.items]
                place = {
                    "side": side,
                    "list": item.list_name,
                    "index": item.index,
                    "seed": item.seed,
                }
                yield json.dumps(
                    place
                    | {"outcome": verdict, "subject": detections.subject, "detections": found},
                    sort_keys=True,
                )


def material_for(
    concept: Concept,
    on: Literal["benign", "concept"],
    *,
    triplets: Path | None = None,
    pictures: Path | None = None,
) -> FineTuneDataset:
    """Return what is fine-tuned on: a folder of captioned pictures, or a side of triplets, the concept's bundled ones when none are named.

    Raises:
        ConfigError: both are given, or neither and the concept brings none.
        FileError: they cannot be read.
    """
    if triplets and pictures:
        raise ConfigError(
            "pictures and triplets are both given; one of them is what is fine-tuned on"
        )
    if pictures:
        return FineTuneDataset.of_folder(pictures)
    if not (found := triplets or concept.triplets):
        raise ConfigError(
            f"the concept {concept.name!r} has no bundled triplets; name some with --triplets, or captioned --pictures"
        )
    return FineTuneDataset.of_triplets(
        Triplets.load(found),
        "benign" if on == "benign" else "unsafe",
        lambda p: captions_for(concept, on, p),
    )


def resilience(
    model: Model,
    patches: Sequence[Patch],
    concept: Concept,
    material: FineTuneDataset,
    settings: Resilience,
    *,
    out: Path | None = None,
    progress: ProgressCallback = no_progress,
) -> Findings:
    """Draw, fine-tune, draw again and judge; the model is given back as it came.

    Args:
        model: the base model, without patches on it.
        patches: the edit, put on in order.
        concept: says which prompts are drawn and what the judge must see.
        material: what is fine-tuned on.
        settings: how, and how much of it.
        out: new folder for resilience.json, verdicts.jsonl, grid.png and the fine-tuned patches, or
            that of a stopped test, which goes on: on a CPU to the same figures, verdicts and
            weights. Nothing is written when None.
        progress: called with (description, done, total).

    Raises:
        FileError: `out` exists and is no unfinished test of the same settings, data, weights and
            patches, or cannot be written.
        ConfigError: there is no patch, or a setting does not go with the model.
        PatchError: a patch does not fit.

    Warns:
        PatchOverlapWarning: two patches change the same weights.
    """
    if not patches:
        raise ConfigError("there is no edit whose resilience could be tested; name a patch")
    warn_of_overlap(patches)
    if settings.apart and (
        below := _as_one(patches).metadata.parents
    ):  # or adding up would fail after all the fine-tuning
        raise ConfigError(
            f"apart adds a fine-tune of the base to the edit, which was made on a model with another patch on it ({below[0].method}, "
            f"hash {below[0].hash[:12]}); name that one too"
        )
    settings = settings.model_copy(update={"finetune": settings.finetune.on(model.denoiser)})
    items = make_plan(concept, prompts=settings.prompts, seeds=settings.seeds, roles=settings.roles)
    judge = load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold)
    found = Findings(
        settings, concept, model, patches, material, items, judge.id, tuple(judge.label_space)
    )
    if out is None:
        return _run(found, judge, None, progress)
    with Kept(out, _decides(found)) as kept:
        _run(found, judge, kept, progress)
        kept.finish(lambda folder: _write(found, folder))
    return found


def _decides(found: Findings) -> dict[str, Any]:
    """Return what decides the results, as plain values."""
    model = found.model
    return {
        "format": FORMAT,
        "made_by": f"safegen {__version__}",
        "settings": found.settings.model_dump(mode="json"),
        "base": model.hash,
        "pipeline": model.pipeline_hash,
        "computes": f"{model.denoiser.dtype} on {model.device.type}",
        "patches": [p.hash for p in found.patches],
        "concept": found.concept.model_dump(mode="json"),
        "data": found.material.hash,
        "judge": found.judge_id,
        "plan": sha(canonical([item.model_dump() for item in found.items])),
    }


def _run(found: Findings, judge: Judge, kept: Kept | None, progress: ProgressCallback) -> Findings:
    model, patches, settings, items = found.model, found.patches, found.settings, found.items

    def look(side: str, *more: Patch) -> None:
        row = kept.row(side) if kept else None
        if row is None:
            drawn = []
            progress(f"drawing: {side}", 0, len(items))
            with ExitStack() as on:
                for patch in more:
                    on.enter_context(patch.apply(model))
                for picture in generate(model, [i.ask for i in items], settings.generation):
                    drawn.append(picture)
                    progress(f"drawing: {side}", len(drawn), len(items))
            row = drawn, judge.detect(drawn)
            refuse_unjudged(items, row[1])
            if kept:
                kept.add(side, *row)
        found.pictures[side], found.detections[side] = row

    def tune(side: str) -> FineTuneResult:
        callback: TrainingCallback = lambda done, of, _: progress(f"fine-tuning: {side}", done, of)
        folder = kept.tuning(side) if kept else None
        return fine_tune(
            model,
            found.material,
            settings.finetune,
            folder=folder,
            callback=callback,
            pictures=settings.on,
        )

    look("base")
    look("edited", *patches)
    with ExitStack() as on:
        for patch in patches:
            on.enter_context(patch.apply(model))
        found.tuned["edited"] = tune("edited")
    for n, tuned in found.tuned["edited"].patches.items():
        look(f"edited+{n}", *patches, tuned)
    if settings.apart:
        found.tuned["base"] = tune("base")
        one = _as_one(patches)
        for n, tuned in found.tuned["base"].patches.items():
            look(f"base+{n}", tuned)
            look(f"modular+{n}", merge([one, tuned], overlap="add", model=model))
    return found


def _as_one(patches: Sequence[Patch]) -> Patch:
    return merge(patches, overlap="last") if len(patches) > 1 else patches[0]


def _write(found: Findings, folder: Path) -> None:
    """Write every file of the results."""
    for side, tuned in found.tuned.items():
        for n, patch in tuned.patches.items():
            patch.save(folder / f"{side}+{n}.safetensors")
    save_sheet(_overview(found), folder / "grid.png")
    (folder / "verdicts.jsonl").write_text(
        "".join(f"{line}\n" for line in found.lines()), encoding="utf-8"
    )
    (folder / RESULTS).write_text(json.dumps(found.summary(), indent=1) + "\n", encoding="utf-8")


def _course(tuned: FineTuneResult, updates: Sequence[int]) -> dict[str, float]:
    """Return the mean loss of the first ten updates, and of the last ten before each look: whether the fine-tune learnt anything."""
    rows = [row["L"] for row in tuned.log]
    return {"first": fmean(rows[:10])} | {str(n): fmean(rows[max(0, n - 10) : n]) for n in updates}


def _overview(found: Findings, columns: int = 8) -> Image.Image:
    """Return every side, row under row, for the first list of each role, at equal prompts and seeds."""
    rows: list[tuple[str, list[Image.Image]]] = []
    firsts: Mapping[str, list[int]] = {
        role: [i for i, item in enumerate(found.items) if item.role == role]
        for role in found.settings.roles
    }
    for role, at in firsts.items():
        picks = at[:: max(len(at) // columns, 1)][:columns]
        rows += [
            (f"{role}\n{side}", [pictures[i] for i in picks])
            for side, pictures in found.pictures.items()
            if picks
        ]
    return sheet(rows)
