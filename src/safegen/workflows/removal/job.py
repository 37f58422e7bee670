"""Job that removes a concept from a model: its stages, each done once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from safegen._version import __version__
from safegen.core.concept import Concept
from safegen.core.documents import read_json_object, validate
from safegen.core.errors import ConfigError
from safegen.core.files import atomic_write, display_name
from safegen.core.progress import ProgressCallback
from safegen.core.registry import EDITS, MODELS, resolve
from safegen.core.text import short_repr
from safegen.data.triplets.triplets import Triplets
from safegen.edits.base import Edit
from safegen.edits.training.checkpoint import CHECKPOINT_FILE
from safegen.edits.training.latents import latent_storage
from safegen.edits.training.presets import default_preset, default_presets
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.report.model_card import CardSubject, model_card, write_with_card
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.folder import SCORES, write_json
from safegen.evaluation.run.scores import read_scores
from safegen.evaluation.samples import canonical, sha
from safegen.judges import load_concept_judge
from safegen.models.model import Model
from safegen.patches.lora import extract_lora, save_lora
from safegen.patches.lora_spec import LoraSpec
from safegen.patches.patch import Patch
from safegen.stack import Stack
from safegen.stack_loader import StackLoader
from safegen.workflows.edit import apply_edit, keep_log, make_edit
from safegen.workflows.export import export
from safegen.workflows.plan import Plan
from safegen.workflows.removal.check import CheckConfig, CheckResult, check_scores, make_protocol
from safegen.workflows.removal.files import IMAGES, JobFiles
from safegen.workflows.removal.images import TrainingImages
from safegen.workflows.removal.plan import plan_job
from safegen.workflows.removal.prompts import harmless_prompts

EDITED, LORA = "edited", "lora"
"""Names of the stacks that are checked."""
SUMMARY = "make-safe.json"
"""Summary in the report's folder."""
LORA_RANK = 16
"""Rank of the LoRA."""

Notify = Callable[[str], None]
"""Called with a line for the user."""


class MakeSafeResult(BaseModel):
    """Files that a job wrote, and the outcome of its check."""

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, use_attribute_docstrings=True)

    model: Path
    """The edited model: `out`, or a model beside it that must not be shipped."""
    report: Path
    """Folder of the report, with a page and a summary."""
    check: CheckResult
    """Outcome of the model's check."""
    lora: Path | None = None
    """The LoRA, if one was wanted."""
    lora_check: CheckResult | None = None
    """Outcome of the LoRA's check."""

    def __repr__(self) -> str:
        """Return the file and the outcome of its check in one line."""
        return short_repr(
            MakeSafeResult, repr(str(self.model)), check=self.check.outcome, report=str(self.report)
        )

    def lines(self) -> list[str]:
        """Return the outcome for the user: which file is shipped, and why another is not."""
        lines = self.check.lines(self.model.name)
        if self.lora and self.lora_check:
            lines += self.lora_check.lines(self.lora.name)
        return lines

    @property
    def is_shipped(self) -> bool:
        """Whether the check found the concept removed by the model, and by the LoRA if wanted."""
        checks = [self.check, *([self.lora_check] if self.lora_check else [])]
        return all(check.outcome == "removed" for check in checks)


@dataclass(frozen=True)
class RemovalJob:
    """Arguments of a job, and its stages."""

    model: str
    config: Path | None
    concept: Concept
    method: str
    preset: str | None
    changes: Mapping[str, Any]
    files: JobFiles
    images: TrainingImages
    check: CheckConfig
    loader: StackLoader
    notify: Notify | None
    progress: ProgressCallback

    def preflight(self) -> None:
        """Raise what can be known before the model is loaded.

        Raises:
            UserError: a setting or an output cannot be used, or the judge cannot be loaded.
        """
        self.files.check_outputs()
        presets = default_presets(resolve(EDITS, self.method, "edit").PRESETS)
        for name in (self.preset,) if self.preset else presets:
            edit = make_edit(self.method, name, concept=self.concept, **self.changes)
            self.images.check(words=edit.inputs == "words")
            if not edit.erases_concept:
                raise ConfigError(f"{self.method} removes nothing with these settings. Change them")
        with TemporaryDirectory() as folder:
            make_protocol(self.concept, self.check, Path(folder)).samples()
        load_concept_judge(self.concept)

    def plan(self) -> Plan:
        """Return what the job will cost, from a probe; nothing is written."""
        model, _ = self.loader.model(self.model, self.config)
        with TemporaryDirectory() as folder:
            concept = self._write_captions(Path(folder) / "captions.txt")
            return plan_job(
                self._make_edit(model, concept),
                model,
                Stack(name="base", model=self.model, config=self.config),
                concept,
                self.images,
                self.check,
                edited=1 + self.files.lora,
                loader=self.loader,
            )

    def run(self) -> MakeSafeResult:
        """Do what is missing of the job, and return its result."""
        model, weights = self.loader.model(self.model, self.config)
        captions = self.files.work / "prompts" / "captions.txt"
        concept = self._with_captions(captions)
        edit = self._make_edit(model, concept)
        self.files.check_edit(edit, model)
        self._show_plan(model, edit)
        settings = {
            "workflow": "make-safe",
            "model": display_name(self.model),
            "weights": weights,
            "device": f"{self.loader.device}, {self.loader.dtype}",
            "concept": concept.model_dump(mode="json", exclude={"captions", "judge_options"}),
            "images": {} if edit.inputs == "words" else self.images.describe(),
        }
        images = self.files.work / IMAGES / sha(canonical(settings))[:16]
        self.files.claim_settings(
            settings
            | {
                "edit": {"method": self.method} | edit.export_settings(),
                "check": self.check.model_dump(mode="json"),
                "lora": self.files.lora,
            }
        )
        if not self.files.result.exists():
            self._write_captions(captions)
            if not self.files.patch.exists():
                triplets = None if edit.inputs == "words" else self._load_triplets(model, images)
                self._train(edit, model, triplets)
            self._finish(model, self._check(model, concept))
        result = validate(
            MakeSafeResult, read_json_object(self.files.result), str(self.files.result)
        )
        self.files.publish()
        return result

    def _preset(self, model: Model) -> str:
        return self.preset or default_preset(model, resolve(EDITS, self.method, "edit").PRESETS)

    def _make_edit(self, model: Model, concept: Concept) -> Edit:
        return make_edit(self.method, self._preset(model), concept=concept, **self.changes)

    def _show_plan(self, model: Model, edit: Edit) -> None:
        """Pass what will be done to `notify`, before anything takes time."""
        if self.notify is None:
            return
        self.notify(f"{edit.method()}, preset {self._preset(model)}; {model.describe()}")
        if edit.inputs != "words":
            self.notify(self.images.sentence(self.concept))
        if self.files.is_begun:
            self.notify(f"resuming from {self.files.work}")
            return
        lines = self.plan().lines()
        for line in (lines[0], *lines[2:]):  # the second is the model
            self.notify(line)

    def _with_captions(self, path: Path) -> Concept:
        """Return the concept with captions to learn from: those of a file, if it names none."""
        captions = self.concept.captions or (str(path),)
        return self.concept.model_copy(update={"captions": captions})

    def _write_captions(self, path: Path) -> Concept:
        """Write harmless captions, if the concept names none, and return it with captions."""
        if not self.concept.captions:
            texts = harmless_prompts(self.concept)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path, replace=True) as temporary:
                temporary.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
        return self._with_captions(path)

    def _train(self, edit: Edit, model: Model, triplets: Triplets | None) -> None:
        """Make the patch, from its checkpoint if there is one."""
        path = self.files.patch
        folder = path.with_name(path.name + ".checkpoints")
        training: dict[str, Any] = (
            {"checkpoint_dir": folder, "resume": (folder / CHECKPOINT_FILE).is_file()}
            if edit.is_trained
            else {}
        )

        def follow(done: int, total: int, _: object) -> None:
            self.progress("editing", done, total)

        with latent_storage(progress=self.progress):
            patch = apply_edit(edit, model, triplets, callback=follow, **training)
        path.parent.mkdir(exist_ok=True)
        patch.save(path)
        if edit.is_trained:
            keep_log(folder, path, keep_checkpoints=False)

    def _check(self, model: Model, concept: Concept) -> dict[str, CheckResult]:
        """Return the outcome of the check for each edited stack, by name."""
        common: dict[str, Any] = {"model": self.model, "config": self.config}
        stacks = [Stack(name="base", **common)]
        stacks += [Stack(name=EDITED, patches=(self.files.patch,), **common)]
        if self.files.lora:
            self._extract_lora(model)
            lora = LoraSpec(file=self.files.lora_file)
            stacks += [Stack(name=LORA, loras=(lora,), **common)]
        run = evaluate(
            make_protocol(concept, self.check, self.files.work / "prompts"),
            stacks,
            self.files.run,
            baselines="none",
            loader=self.loader,
            progress=self.progress,
        )
        scores = read_scores(run.folder / SCORES)
        return {stack.name: check_scores(scores, stack.name, self.check) for stack in stacks[1:]}

    def _extract_lora(self, model: Model) -> None:
        if not self.files.lora_file.exists():
            patch = Patch.load(self.files.patch)
            save_lora(
                extract_lora(patch, model, LORA_RANK),
                model,
                self.files.lora_file,
                base=model.hash,
                patch=patch.hash,
                metadata=patch.metadata.to_json(),
            )

    def _finish(self, model: Model, checks: Mapping[str, CheckResult]) -> None:
        """Write the model, its LoRA and the report into the job's folder, and then the result."""
        files, patch = self.files, Patch.load(self.files.patch)
        if files.finished.exists():
            shutil.rmtree(files.finished)
        files.finished.mkdir()
        shipped = {name: check.outcome == "removed" for name, check in checks.items()}
        self.progress("writing", 0, 1)
        name = files.model_name(shipped=shipped[EDITED])
        report = files.report_name(shipped=shipped[EDITED])
        (files.finished / report).mkdir()
        result = MakeSafeResult(
            model=files.out.with_name(name),
            report=files.out.with_name(report),
            check=checks[EDITED],
            lora=files.out.with_name(files.lora_name(shipped=all(shipped.values())))
            if files.lora
            else None,
            lora_check=checks.get(LORA),
        )
        # bundled models generate harmless stand-ins only: nothing needs to be pixelated
        write_report(
            open_runs([files.run]),
            files.finished / report,
            reveal=self.model in MODELS,
            outcome=result.lines(),
        )
        write_json(files.finished / report / SUMMARY, self._summary(patch, result))
        if result.lora and result.lora_check:
            self._write_lora(patch, model, files.finished / result.lora.name, result.lora_check)
        export(
            model,
            files.finished / name,
            format="single-file" if files.is_file else "diffusers",
            patches=[patch],
            metrics=[files.run],
            notes=result.check.lines(name),
        )
        write_json(files.result, result.model_dump(mode="json"))
        self.progress("writing", 1, 1)

    def _load_triplets(self, model: Model, folder: Path) -> Triplets:
        judge = load_concept_judge(self.concept)
        return self.images.load(model, self.concept, judge, folder, self.progress, self.notify)

    def _write_lora(self, patch: Patch, model: Model, out: Path, check: CheckResult) -> None:
        """Write the checked LoRA with its card."""
        lora = self.files.lora_file
        note = f"Rank {LORA_RANK}, kohya keys. The report beside it has its check."
        card = CardSubject(
            "lora",
            out.name,
            display_name(self.model),
            model.hash,
            [(patch.hash, patch.metadata.to_json())],
            [*check.lines(out.name), note],
        )
        write_with_card(out, model_card(card), partial(shutil.copyfile, lora, out))

    def _summary(self, patch: Patch, result: MakeSafeResult) -> dict[str, Any]:
        """Return the summary of the job as plain values, without folders."""
        return {
            "safegen": __version__,
            "shipped": result.is_shipped,
            "model": display_name(self.model),
            "concept": self.concept.name,
            "judge": self.concept.judge,
            "edit": {
                "method": patch.metadata.method,
                "seconds": patch.metadata.seconds,
                "patch": patch.hash,
                "triplets": patch.metadata.data,
            },
            "files": {
                "model": result.model.name,
                "lora": result.lora.name if result.lora else None,
            },
            "rule": self.check.model_dump(mode="json", include={"images", "max_share", "max_harm"}),
            "check": result.check.model_dump(mode="json"),
            "lora_check": result.lora_check and result.lora_check.model_dump(mode="json"),
        }
