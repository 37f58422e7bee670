"""The main job from end to end: draw, edit, draw again, judge, score, report."""

from __future__ import annotations

import json
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from safegen.core.concept import Concept, load_concept
from safegen.core.errors import ConfigError
from safegen.core.files import atomic_write, staged_directory
from safegen.core.generation import GenerationConfig, Sample, preferred_precision
from safegen.core.progress import ProgressCallback, no_progress
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import Edit
from safegen.edits.training.trainer import LogRow
from safegen.evaluation.plan import Item, make_plan
from safegen.evaluation.report.contact_sheet import save_sheet, sheet
from safegen.evaluation.report.model_card import CardSubject, beside, card, with_metrics
from safegen.evaluation.report.page import PAGE
from safegen.evaluation.scoring.score import Scores, refuse_unjudged, removal, score
from safegen.judges import Detections, load_judge
from safegen.metrics.bootstrap import Mean
from safegen.metrics.image import mean_change
from safegen.models.generation import generate
from safegen.models.loading import load
from safegen.models.model import Model
from safegen.patches.patch import Patch
from safegen.workflows import demo_report as report


class DemoSettings(BaseModel):
    """What the demo does and how much of it."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model: str = "mini"
    """Model to edit."""
    concept: str = "skulls"
    """Concept to remove."""
    prompts: int = Field(default=24, ge=1)
    """Prompts of each list."""
    seeds: tuple[int, ...] = (1,)
    """Seeds for each prompt."""
    generation: GenerationConfig = Field(
        default_factory=lambda: GenerationConfig(precision=preferred_precision())
    )
    """How pictures are made."""


@dataclass(frozen=True)
class Outcome:
    """Everything the demo found: what the report and summary.json are written from."""

    settings: DemoSettings
    concept: Concept
    edit: Edit
    items: Sequence[Item]
    pictures: dict[str, list[Image.Image]]
    detections: dict[str, list[Detections]]
    patch: Patch
    log: Sequence[LogRow]
    seconds: dict[str, float]
    judge_id: str
    base_hash: str

    @property
    def lists(self) -> dict[str, list[int]]:
        """Positions of each list's items, lists in order."""
        out: dict[str, list[int]] = {}
        for i, item in enumerate(self.items):
            out.setdefault(item.list_name, []).append(i)
        return out

    def scores(self, side: str, rows: Sequence[int]) -> Scores:
        """Return one list's rates for `base` or `edited`."""
        return score(
            [self.items[i] for i in rows], [self.detections[side][i] for i in rows], self.concept
        )

    def change(self, rows: Sequence[int]) -> Mean:
        """Return how far one list's edited pictures are from the base model's."""
        base, edited = ([self.pictures[side][i] for i in rows] for side in ("base", "edited"))
        return mean_change(base, edited, [self.items[i].prompt for i in rows])

    def summary(self) -> dict[str, Any]:
        """Return every figure with its n and interval, as plain values."""
        lists = {}
        for name, rows in self.lists.items():
            items = [self.items[i] for i in rows]
            base, edited = ([self.detections[side][i] for i in rows] for side in ("base", "edited"))
            entry: dict[str, Any] = {
                "role": items[0].role,
                "shows": items[0].shows,
                "prompts": len({i.prompt for i in items}),
            }
            entry |= {
                "base": self.scores("base", rows).to_json(),
                "edited": self.scores("edited", rows).to_json(),
            }
            entry["change"] = self.change(rows).to_json()
            if items[0].role in ("explicit", "innocent"):
                try:
                    entry["removal"] = removal(items, base, edited, self.concept).to_json()
                    entry["removal_images"] = removal(
                        items, base, edited, self.concept, images=True
                    ).to_json()
                except ValueError as error:
                    entry["removal"] = entry["removal_images"] = None
                    entry["removal_undefined"] = str(error)
            lists[name] = entry
        return {
            "settings": self.settings.model_dump(mode="json"),
            "edit": dict(self.patch.metadata.settings),
            "concept": self.concept.model_dump(mode="json"),
            "judge": self.judge_id,
            "base_hash": self.base_hash,
            "patch_hash": self.patch.hash,
            "patch": self.patch.metadata.to_json(),
            "lists": lists,
            "seconds": {k: round(v, 2) for k, v in self.seconds.items()},
            "pictures": 2 * len(self.items),
        }


def run_demo(
    settings: DemoSettings, edit: Edit, out: Path, *, progress: ProgressCallback = no_progress
) -> Outcome:
    """Do the main job and write it to the new folder `out`: report.html, summary.json, grid.png, the patch with its card, pictures/.

    Nothing is written outside `out`, which is finished once it holds the report; only a kill leaves
    it behind unfinished.

    Raises:
        FileError: `out` exists or cannot be written.
        ConfigError: the edit learns from pictures, and the concept has no bundled triplets; or it
            removes nothing.
    """
    with staged_directory(out, last=PAGE) as folder:
        found = do_demo(settings, edit, progress=progress)
        write_demo(found, folder)
    return found


def do_demo(
    settings: DemoSettings,
    edit: Edit,
    *,
    drawn: MutableMapping[Sample, Image.Image] | None = None,
    progress: ProgressCallback = no_progress,
) -> Outcome:
    """Draw, edit, draw again and judge; nothing is written.

    Args:
        settings: what to do and how much of it.
        edit: the edit.
        drawn: pictures that this base model has drawn with this sampler; used and added to, so that
            several calls draw them once.
        progress: called with (description, done, total).

    Raises:
        ConfigError: the edit learns from pictures, and the concept has no bundled triplets; or it
            removes nothing.
    """
    if not edit.erases_concept:
        raise ConfigError(
            f"a demo shows what is removed, and {edit.method()} removes nothing as it is set; change that, or use `safegen edit`"
        )
    drawn = {} if drawn is None else drawn
    concept = load_concept(settings.concept)
    pictured = edit.inputs != "words"
    if pictured and concept.triplets is None:
        raise ConfigError(
            f"the concept {concept.name!r} has no bundled triplets; make some with `safegen triplets make` and use `safegen edit`"
        )
    items = make_plan(concept, prompts=settings.prompts, seeds=settings.seeds)
    judge = load_judge(concept.judge, labels=concept.labels, threshold=concept.threshold)
    began = time.perf_counter()
    model = load(settings.model)
    triplets = Triplets.load(concept.triplets) if pictured and concept.triplets else None
    seconds, pictures, log = {"load": time.perf_counter() - began}, {}, []

    missing = [i.ask for i in items if i.ask not in drawn]
    fresh, seconds["base pictures"] = _draw(
        model, missing, settings.generation, "drawing with the base model", progress
    )
    drawn.update(zip(missing, fresh, strict=True))
    pictures["base"] = [drawn[i.ask] for i in items]

    def note(done: int, of: int, row: LogRow) -> None:
        log.append(row)
        progress("editing", done, of)

    asks = [i.ask for i in items]
    began = time.perf_counter()
    patch = edit.apply(model, triplets, callback=note)
    seconds["edit"] = time.perf_counter() - began
    base_hash = model.hash
    with patch.apply(model):
        pictures["edited"], seconds["edited pictures"] = _draw(
            model, asks, settings.generation, "drawing with the edited model", progress
        )
    began = time.perf_counter()
    progress("judging", 0, 2)
    detections = {side: judge.detect(images) for side, images in pictures.items()}
    for side in detections.values():
        refuse_unjudged(items, side)
    progress("judging", 2, 2)
    seconds["judge"] = time.perf_counter() - began
    return Outcome(
        settings,
        concept,
        edit,
        items,
        pictures,
        detections,
        patch,
        log,
        seconds,
        judge.id,
        base_hash,
    )


def _draw(
    model: Model,
    asks: Sequence[Sample],
    generation_config: GenerationConfig,
    what: str,
    progress: ProgressCallback,
) -> tuple[list[Image.Image], float]:
    began, out = time.perf_counter(), []
    progress(what, 0, len(asks))
    for picture in generate(model, asks, generation_config):
        out.append(picture)
        progress(what, len(out), len(asks))
    return out, time.perf_counter() - began


def write_demo(found: Outcome, folder: Path) -> None:
    """Write everything the demo found into an existing folder."""
    save_sheet(overview(found), folder / "grid.png")
    for side, images in found.pictures.items():
        for name, rows in found.lists.items():
            sub = folder / "pictures" / side / name.replace(":", "-")
            sub.mkdir(parents=True)
            for i in rows:
                images[i].save(sub / f"{found.items[i].index:03d}-seed{found.items[i].seed}.png")
    with atomic_write(folder / "summary.json") as tmp:
        tmp.write_text(json.dumps(found.summary(), indent=1), encoding="utf-8")
    with_metrics(found.patch, [folder]).save(folder / "patch.safetensors")
    with atomic_write(beside(folder / "patch.safetensors")) as tmp:
        tmp.write_text(
            card(CardSubject.of_patch(found.patch, "patch.safetensors"), [folder]), encoding="utf-8"
        )
    with atomic_write(folder / PAGE) as tmp:
        tmp.write_text(report.render(found), encoding="utf-8")


def overview(found: Outcome, columns: int = 8) -> Image.Image:
    """Return base over edited for the first list of each role, at equal prompts and seeds."""
    rows: list[tuple[str, list[Image.Image]]] = []
    done = set()
    for positions in found.lists.values():
        role = found.items[positions[0]].role
        if role in done:
            continue
        done.add(role)
        picks = positions[:: max(len(positions) // columns, 1)][:columns]
        rows += [
            (f"{role}\n{side}", [found.pictures[side][i] for i in picks])
            for side in ("base", "edited")
        ]
    return sheet(rows, label=96)
