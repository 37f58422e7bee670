"""The guarded pipeline: the pipeline's own call with hooks on its denoiser, counted; what was not guarded is withheld."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from safegen.errors import BadSetting, UserError
from safegen.guard.base import GONE, Action, Call, Drawn, Finding, Guard, Note, Ready, Trail, Turn
from safegen.guard.hooks import Hooks
from safegen.models.seams import FAMILIES, Border
from safegen.tables import GUARDS, resolve

T = TypeVar("T")
NO_MEMORY = ("out of memory", "not enough memory", "can't allocate memory")


class Failed(Exception):
    """A guard raised, or answered with nonsense."""

    def __init__(self, guard: str, error: Exception) -> None:
        super().__init__(f"{guard}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")


@dataclass
class Work:
    """A guard of the pipeline, and what is known of it in this batch: one entry a picture."""

    ready: Ready
    n: int
    calls: int = 0
    rows: int = 0
    seconds: float = 0.0
    findings: list[Finding] = field(default_factory=list)

    @property
    def guard(self) -> Guard:
        """Its settings."""
        return self.ready.guard

    def note(self, at: int) -> Note:
        """Return what it did for picture `at`."""
        found = self.findings[at]
        scores = {k: round(float(v), 6) for k, v in found.scores.items()}
        limits = {k: float(v) for k, v in found.thresholds.items()}
        ms = round(1000 * self.seconds / self.n, 3)
        return Note(self.guard.name, found.action, found.reason, scores, limits, self.calls, self.rows // self.n, ms)

    @contextmanager
    def asked(self) -> Iterator[None]:
        """Count and time what the guard does; what it raises is its failure, but for what the caller can mend.

        Raises:
            Failed: the guard raised something else than a `UserError` or a want of memory.
        """
        self.calls, began = self.calls + 1, time.perf_counter()
        try:
            yield
        except (UserError, MemoryError, Failed):
            raise
        except Exception as error:
            if any(word in str(error).lower() for word in NO_MEMORY):
                raise
            raise Failed(self.guard.name, error) from error
        finally:
            self.seconds += time.perf_counter() - began

    def keep(self, findings: Sequence[Finding], at: Sequence[int]) -> None:
        """Take in a finding for each of the pictures `at`; one that says nothing new leaves the old one.

        Raises:
            Failed: there are more or fewer.
        """
        if len(findings) != len(at):
            raise Failed(self.guard.name, ValueError(f"{len(findings)} answers for {len(at)} pictures"))
        for i, found in zip(at, findings, strict=True):
            self.findings[i] = found if found != Finding() else self.findings[i]


class Guarded:
    """A diffusers pipeline with guards. It draws as the pipeline does, and is the pipeline bit for bit where no guard acts."""

    def __init__(self, pipe: Any, guards: Sequence[Guard], *, max_rows: int | None = None) -> None:  # noqa: ANN401
        """Load the guards' files and see that the pipeline gives every guard what it needs.

        Args:
            pipe: any diffusers pipeline; guards that act on its denoiser know the families in `models.seams.FAMILIES`.
            guards: in the order in which they act where they meet.
            max_rows: most rows of one denoiser call; the guards' own are asked apart, in parts, where they would not fit. None: no limit.

        Raises:
            BadSetting: a guard cannot run on this pipeline, or one is there twice that may not be.
            UserError: a guard's file cannot be used.
        """
        if max_rows is not None and max_rows < 1:
            raise BadSetting(f"max_rows must be >= 1, got {max_rows}")
        self.pipe, self.guards, self.max_rows, self.border = pipe, tuple(guards), max_rows, Border(pipe)
        for guard in guards:
            if guard.seams - self.border.seams:
                able = [name for name in sorted(GUARDS) if resolve(GUARDS, name, "guard").seams <= self.border.seams]
                raise BadSetting(
                    f"the guard {guard.name!r} acts inside the denoiser, which is known of {', '.join(sorted(FAMILIES))} and not of a "
                    f"{self.border.kind}; guards that can run on it: {', '.join(able)}"
                )
            if guard.once and sum(g.name == guard.name for g in guards) > 1:
                raise BadSetting(f"the guard {guard.name!r} is there twice, and the second would undo the first; leave one out")
        self.ready = [guard.ready(self.border) for guard in guards]

    def draw(self, prompts: Sequence[str], *, copies: int = 1, **options: Any) -> list[Drawn]:  # noqa: ANN401
        """Return `copies` pictures a prompt, side by side, each with its trail.

        Args:
            prompts: what to draw.
            copies: pictures a prompt.
            options: whatever else the pipeline takes (not embeddings in the place of texts); lists as long as `prompts` go with them.

        Raises:
            BadSetting: a guard would have no effect with these options.
            UserError: a guard refuses what is asked.
        """
        for key in ("prompt_embeds", "negative_prompt_embeds", "num_images_per_prompt", "num_videos_per_prompt", "return_dict"):
            if key in options:
                raise BadSetting(f"a guarded pipeline takes texts and `copies`, got {key}; leave it out")
        inside = [g.name for g in self.guards if g.seams - {"prompt", "image"}]
        self.border.refuse(options, guided=[g.name for g in self.guards if g.seams & {"uncond", "branch"}], inside=inside)
        if any("image" in g.seams for g in self.guards) and options.get("output_type", "pil") != "pil":
            raise BadSetting(f"guards that look at pictures need output_type='pil', got {options['output_type']!r}")
        n = len(prompts) * copies
        works = [Work(ready, n, findings=[Finding()] * n) for ready in self.ready]
        images: list[Any] = [None] * n
        faults = [""] * n
        try:
            at = self._checked(works, prompts, copies)
            if at:
                rows = sorted({i // copies for i in at})
                drawn, wrong = self._drawn(works, prompts, rows, copies, options)
                for i, image, fault in zip(at, drawn, wrong, strict=True):
                    images[i], faults[i] = image, fault
                self._looked(works, images, [p for p in prompts for _ in range(copies)], [i for i in at if not faults[i]])
        except Failed as error:
            faults = [f"error: {error}"] * n
        return [_drawn_of(images[i], works, i, faults[i]) for i in range(n)]

    def _checked(self, works: Sequence[Work], prompts: Sequence[str], copies: int) -> list[int]:
        """Ask the prompt guards, and return the pictures that may be drawn."""
        for work in works:
            if "prompt" in work.guard.seams:
                with work.asked():
                    found = [f for f in work.ready.check(prompts) for _ in range(copies)]
                    work.keep(found, range(len(prompts) * copies))
        return [i for i in range(len(prompts) * copies) if not any(w.findings[i].action in GONE for w in works)]

    def _drawn(
        self, works: Sequence[Work], prompts: Sequence[str], rows: Sequence[int], copies: int, options: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Sequence[str]]:
        """Call the pipeline for some of the prompts, and return its pictures and what was wrong with each."""

        def own(value: T) -> T | list[Any]:
            return [value[i] for i in rows] if isinstance(value, list | tuple) and len(value) == len(prompts) else value

        asked: dict[str, Any] = {k: own(v) for k, v in options.items()} | {"prompt": own(list(prompts))}
        if isinstance(latents := options.get("latents"), Tensor) and len(latents) == len(prompts) * copies:
            asked["latents"] = latents[[i * copies + k for i in rows for k in range(copies)]]
        if copies > 1:
            asked["num_images_per_prompt"] = copies
        at = [i * copies + k for i in rows for k in range(copies)]
        texts = tuple(prompts[i // copies] for i in at)
        negative = asked.get("negative_prompt") or ""
        against = [negative if isinstance(negative, str) else negative[k // copies] for k in range(len(at))]
        call = Call(self.border, texts, against, options)
        turns: list[tuple[Work, Turn]] = []
        for work in works:
            if work.guard.seams - {"prompt", "image"}:
                with work.asked():
                    turns.append((work, work.ready.begin(call)))
        hooks = Hooks(self.border, call, turns, max_rows=self.max_rows)
        with hooks.attached():
            out = self.pipe(**asked)
        for work, turn in turns:
            with work.asked():
                found = turn.findings()
                work.keep(found or [Finding()] * len(at), at)
        pictures: Sequence[Any] = out.images if hasattr(out, "images") else out.frames
        if len(pictures) != len(at):
            return [None] * len(at), [f"calls: {len(pictures)} pictures came for {len(at)} that were asked for"] * len(at)
        return pictures, hooks.wrong(len(at))

    def _looked(self, works: Sequence[Work], images: list[Any], prompts: Sequence[str], at: Sequence[int]) -> None:
        """Show the pictures to the guards that look at them, each what the one before left of it."""
        for work in works:
            if "image" not in work.guard.seams:
                continue
            seen = [(i, images[i]) for i in at if not any(w.findings[i].action in GONE for w in works)]
            if not seen:
                continue
            with work.asked():
                found = work.ready.look([image for _, image in seen], [prompts[i] for i, _ in seen])
                work.keep(found, [i for i, _ in seen])
            for (i, image), one in zip(seen, found, strict=True):
                images[i] = one.image if one.image is not None else image


def _drawn_of(image: Any, works: Sequence[Work], at: int, fault: str) -> Drawn:  # noqa: ANN401
    notes = tuple(work.note(at) for work in works)
    if fault:
        return Drawn(None, Trail("withhold", fault, notes))
    acted = [n for n in notes if n.action not in ("none", "edit")] or [n for n in notes if n.action == "edit"]
    gone = [n for n in acted if n.action in GONE]
    action: Action = (gone or acted)[-1].action if acted else "none"
    reason = f"{(gone or acted)[-1].guard}: {(gone or acted)[-1].reason}" if acted else ""
    if image is None and not gone:  # no picture, and nobody who took it: ours to explain, and not to show
        return Drawn(None, Trail("withhold", "error: no picture came", notes))
    return Drawn(None if gone else image, Trail(action, reason, notes))
