"""The guarded pipeline: the pipeline's own call with hooks on its denoiser, counted.

What was not guarded is withheld.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from inspect import signature
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.core.registry import GUARDS, resolve
from safegen.guards.core.adapter import GUIDANCE_POINTS, HookPoint, PipelineAdapter, copied
from safegen.guards.core.base import (
    BLOCKING_ACTIONS,
    Action,
    Call,
    GeneratedImage,
    GuardConfig,
    GuardHook,
    GuardResult,
    GuardTrace,
)
from safegen.guards.core.hooks import PipelineHooks
from safegen.guards.core.runner import EmbeddingOffset, GuardError, GuardRunner

PER_PROMPT = ("negative_prompt", "generator")
"""Options that are lists with an entry a prompt."""
PICTURES = ("image", "mask_image", "control_image")
"""Options that may be lists, or batches (n, c, h, w), with a picture a prompt."""
UNSEEN = ("ip_adapter_image", "num_images_per_prompt", "num_videos_per_prompt", "return_dict")
"""Options of pipelines by which something would go past the guards, or come back otherwise than they expect; see `_unseen`."""
COPIES = ("num_images_per_prompt", "num_videos_per_prompt")
"""Names that pipelines have for how often a prompt is drawn."""
CALLBACKS = ("callback", "callback_on_step_end")
"""Options by which a pipeline calls back; probes are no steps of what was asked for."""
PIPELINE_LOCKS: WeakKeyDictionary[Any, RLock] = WeakKeyDictionary()
"""Pipelines and who draws with them: a scheduler, and so the count of its steps, is good for one call at a time."""
EXTERNAL_POINTS: frozenset[HookPoint] = frozenset({"prompt", "start", "image"})
"""Seams at which a guard does nothing inside a call of the pipeline."""


class GuardedPipeline:
    """A diffusers pipeline with guards.

    It draws as the pipeline does, and is the pipeline bit for bit where no guard acts.
    """

    def __init__(
        self,
        pipe: Any,
        guards: Sequence[GuardConfig],
        *,
        max_rows: int | None = None,
        negative: str = "",
    ) -> None:
        """Load the guards' files and see that the pipeline gives every guard what it needs.

        Args:
            pipe: any diffusers pipeline; guards that act on its denoiser know the families in
                `models.seams.FAMILIES`.
            guards: in the order in which they act where they meet.
            negative: what every call will bring as its negative prompt, so that a guard that it
                would leave idle is refused at once.
            max_rows: most rows of one denoiser call; the guards' own are asked apart, in parts,
                where they would not fit. None: no limit.

        Raises:
            ConfigError: a guard cannot run on this pipeline, or one is there twice that may not be.
            UserError: a guard's file cannot be used.
        """
        if max_rows is not None and max_rows < 1:
            raise ConfigError(f"max_rows must be >= 1, got {max_rows}")
        self.pipe, self.guards, self.max_rows, self.border = (
            pipe,
            tuple(guards),
            max_rows,
            PipelineAdapter(pipe),
        )
        for guard in guards:
            if not guard.takes:
                raise ConfigError(
                    f"the guard {guard.name!r} takes hold nowhere, so it would never be asked; name its seams"
                )
            if why := guard.unsupported_reason(self.border):
                able = [
                    name
                    for name in sorted(GUARDS)
                    if not resolve(GUARDS, name, "guard").unsupported_reason(self.border)
                ]
                raise ConfigError(
                    f"the guard {guard.name!r} cannot run on a {self.border.pipeline_class}: it {why}; guards that can: {', '.join(able) or 'none'}"
                )
            if guard.exclusive and sum(g.name == guard.name for g in guards) > 1:
                raise ConfigError(
                    f"the guard {guard.name!r} is there twice, and the second would undo the first; leave one out"
                )
            if why := guard.conflict([other for other in guards if other is not guard], negative):
                raise ConfigError(
                    f"the guard {guard.name!r} has no effect beside the others: it {why}; give another text, or leave one out"
                )
        self.ready = [guard.build(self.border) for guard in guards]
        self._busy = PIPELINE_LOCKS.setdefault(pipe, RLock())

    def draw(
        self, prompts: Sequence[str], *, copies: int = 1, **options: Any
    ) -> list[GeneratedImage]:
        """Return `copies` pictures a prompt, side by side, each with its trail. Calls on one pipeline wait for each other.

        Args:
            prompts: what to draw.
            copies: pictures a prompt.
            options: whatever else the pipeline takes (not embeddings or pictures in the place of
                texts); a list of negative prompts or of generators goes with the prompts, one each
                (generators: or one a picture).

        Raises:
            ConfigError: a guard would have no effect with these options.
            UserError: a guard refuses what is asked.
        """
        if isinstance(prompts, str):
            raise ConfigError(
                f"prompts must be a list of texts, got the text {prompts[:60]!r}; put it in a list"
            )
        for key, value in options.items():
            if _unseen(key) and value is not None:
                raise ConfigError(
                    f"a guarded pipeline takes one text a prompt, and `copies`: guards do not see {key}; leave it out"
                )
        if copies > 1 and any(g.takes & {"start", "latents"} for g in self.guards):
            names = ", ".join(g.name for g in self.guards if g.takes & {"start", "latents"})
            raise ConfigError(
                f"{names} draws each prompt with a start of its own, so copies must be 1, got {copies}; repeat the prompt"
            )
        inside = [g.name for g in self.guards if g.takes - EXTERNAL_POINTS]
        self.border.refuse(
            options,
            guided=[g.name for g in self.guards if g.takes & GUIDANCE_POINTS],
            inside=inside,
        )
        if (
            any("image" in g.takes for g in self.guards)
            and options.get("output_type", "pil") != "pil"
        ):
            raise ConfigError(
                f"guards that look at pictures need output_type='pil', got {options['output_type']!r}"
            )
        options, n = self._fitted(options, len(prompts), copies), len(prompts) * copies
        if (start := options.get("latents")) is not None and len(start) != n:
            raise ConfigError(
                f"latents must be one a picture, {n} in all, got {len(start)}; leave them out to have them drawn"
            )
        with self._busy:
            return self._each(prompts, copies, n, options)

    def _fitted(self, options: Mapping[str, Any], n: int, copies: int) -> dict[str, Any]:
        """Return the options of a call, one negative prompt spelt out for each of its `n` prompts.

        Raises:
            ConfigError: there are not as many of something as there are prompts, or the pipeline
                draws no copies.
        """
        if copies < 1:
            raise ConfigError(f"copies must be >= 1, got {copies}")
        if copies > 1 and not self._copies:
            raise ConfigError(
                f"a {self.border.pipeline_class} draws each prompt once, so copies must be 1, got {copies}; repeat the prompt"
            )
        against, own, out = options.get("negative_prompt"), options.get("generator"), dict(options)
        if isinstance(against, str | list | tuple):
            out["negative_prompt"] = [against] * n if isinstance(against, str) else list(against)
            if len(out["negative_prompt"]) != n:
                raise ConfigError(
                    f"negative_prompt must be one text, or one a prompt, {n} in all, got {len(against)}"
                )
        if isinstance(own, list | tuple):
            out["generator"] = list(own)
            if len(own) != n * copies:
                raise ConfigError(
                    f"generator must be one, or a list with one a picture, {n * copies} in all, got {len(own)}"
                )
        for key in self._pictures(n):
            if (k := _several(options.get(key))) not in (1, n):
                raise ConfigError(
                    f"{key} must be one picture, or one a prompt, {n} in all, got {k}"
                )
        return out

    def _pictures(self, n: int) -> tuple[str, ...]:
        """Options that may bring a picture to each of `n` prompts.

        Several to one prompt, or to several ControlNets, stay as they are.
        """
        return () if n == 1 or hasattr(getattr(self.pipe, "controlnet", None), "nets") else PICTURES

    @property
    def _copies(self) -> str | None:
        """The pipeline's name for how often a prompt is drawn, if it has one."""
        known = signature(type(self.pipe).__call__).parameters
        return next((key for key in COPIES if key in known), None)

    def _each(
        self, prompts: Sequence[str], copies: int, n: int, options: Mapping[str, Any]
    ) -> list[GeneratedImage]:
        """Return the pictures of a call that has been checked."""
        works = [
            GuardRunner(ready, n, self._device, results=[GuardResult()] * n) for ready in self.ready
        ]
        images: list[Any] = [None] * n
        faults = [""] * n
        try:
            at, starts = self._probed(
                works, prompts, self._checked(works, prompts, copies), options
            )
            if at:
                rows = sorted({i // copies for i in at})
                drawn, wrong = self._drawn(
                    works, prompts, rows, copies, self._moved(options, starts)
                )
                for i, image, fault in zip(at, drawn, wrong, strict=True):
                    images[i], faults[i] = image, fault
                self._looked(
                    works,
                    images,
                    [p for p in prompts for _ in range(copies)],
                    [i for i in at if not faults[i]],
                )
        except GuardError as error:
            faults = [f"error: {error}"] * n
        return [_drawn_of(images[i], works, i, faults[i]) for i in range(n)]

    @property
    def _device(self) -> str:
        return str(self.pipe._execution_device.type)

    def _checked(
        self, works: Sequence[GuardRunner], prompts: Sequence[str], copies: int
    ) -> list[int]:
        """Sample the prompt guards, and return the pictures that may be drawn."""
        for work in works:
            if "prompt" in work.active_points:
                with work.timed_call():
                    found = [f for f in work.guard_impl.check(prompts) for _ in range(copies)]
                    work.merge_results(found, range(len(prompts) * copies))
        return [
            i
            for i in range(len(prompts) * copies)
            if not any(w.results[i].action in BLOCKING_ACTIONS for w in works)
        ]

    def _probed(
        self,
        works: Sequence[GuardRunner],
        prompts: Sequence[str],
        at: Sequence[int],
        options: Mapping[str, Any],
    ) -> tuple[list[int], dict[int, Tensor]]:
        """Let guards draw probes by all guards but those of pictures.

        Return what may still be drawn, and from which starts instead.
        """
        coarse, dtype = (
            torch.is_autocast_enabled(self._device),
            torch.get_autocast_dtype(self._device),
        )
        left, starts = list(at), dict[int, Tensor]()

        def probe(
            work: GuardRunner,
            asked: Mapping[str, Any],
            texts: Sequence[str],
            changed: Mapping[str, Any],
            *,
            grad: bool = False,
            shift: Tensor | None = None,
        ) -> list[Any]:
            first = [] if shift is None else [EmbeddingOffset(work.guard, shift)]
            others = [w.guard_impl for w in works if not w.active_points & {"image", "start"}]
            inner = [
                GuardRunner(ready, len(texts), self._device, results=[GuardResult()] * len(texts))
                for ready in (*first, *others)
            ]
            with torch.autocast(self._device, dtype, enabled=coarse):
                images, wrong = self._drawn(
                    inner, texts, range(len(texts)), 1, {**asked, **changed}, grad=grad
                )
            if any(wrong):
                raise ValueError(f"a probe was not guarded: {next(filter(None, wrong))}")
            return list(images)

        for work in works:
            if "start" in work.active_points and left:
                moved = self._moved(options, starts)
                asked = {
                    k: _picked(k, v, left, self._pictures(len(prompts)))
                    for k, v in moved.items()
                    if k not in CALLBACKS
                }
                with work.timed_call():
                    found = work.guard_impl.probe(
                        partial(probe, work, asked), [prompts[i] for i in left], asked
                    )
                    work.merge_results(found, left)
                starts |= {
                    i: one.start
                    for i, one in zip(left, found, strict=True)
                    if one.start is not None
                }
                left = [i for i in left if work.results[i].action not in BLOCKING_ACTIONS]
        return left, starts

    def _moved(self, options: Mapping[str, Any], starts: Mapping[int, Tensor]) -> Mapping[str, Any]:
        """Return the arguments of the call with the starts that guards moved in the place of their own."""
        if not starts:
            return options
        own, after = self.border.starts(options, "a guard that moves starts")
        return {
            **options,
            "latents": torch.stack([starts.get(i, x).to(own) for i, x in enumerate(own)]),
            "generator": after,
        }

    def _drawn(
        self,
        works: Sequence[GuardRunner],
        prompts: Sequence[str],
        rows: Sequence[int],
        copies: int,
        options: Mapping[str, Any],
        *,
        grad: bool = False,
    ) -> tuple[Sequence[Any], Sequence[str]]:
        """Call the pipeline for some of the prompts, and return its pictures and what was wrong with each."""
        at = [i * copies + k for i in rows for k in range(copies)]
        twins = self._twins(works, [prompts[i] for i in rows])
        every = [*rows, *(rows[k] for k in twins)]  # the second streams stand behind all first ones
        asked: dict[str, Any] = {**options, "prompt": [prompts[i] for i in every]}
        if isinstance(against := options.get("negative_prompt"), list):
            asked["negative_prompt"] = [against[i] for i in every]
        for key in self._pictures(len(prompts)):
            if _several(given := options.get(key)) > 1:
                asked[key] = _rows(given, every)
        if isinstance(own := options.get("generator"), list):
            picked = [own[k] for k in at]
            asked["generator"] = [*picked, *(copied(picked[k]) for k in twins)]
        elif twins:
            raise ConfigError(
                "a guard that draws a second stream needs a list of generators, one a prompt, so that both start alike"
            )
        if isinstance(start := options.get("latents"), Tensor):
            asked["latents"] = start[[i * copies + k for i in every for k in range(copies)]]
        if copies > 1 and self._copies:
            asked[self._copies] = copies
        texts = tuple(prompts[i] for i in every for _ in range(copies))
        negative = asked.get("negative_prompt") or [""] * len(every)
        away = [negative[k // copies] for k in range(len(texts))]
        call = Call(
            self.border,
            texts,
            away,
            options,
            reference_rows={k: len(at) + j for j, k in enumerate(twins)},
        )
        turns: list[tuple[GuardRunner, GuardHook]] = []
        for work in works:
            work.drawn = (*at, *(at[k] for k in twins))
            if work.active_points - EXTERNAL_POINTS:
                with work.timed_call(as_drawn=True):
                    turns.append((work, work.guard_impl.start(call)))
        hooks = PipelineHooks(self.border, call, turns, max_rows=self.max_rows)
        with hooks.attached():
            plain: Any = type(self.pipe).__call__
            out = (
                plain.__wrapped__(self.pipe, **asked) if grad else self.pipe(**asked)
            )  # the former without its no_grad
        for work, turn in turns:
            with work.timed_call():
                found = list(turn.results()) or [GuardResult()] * len(texts)
                work.merge_results(found[: len(at)] if len(found) == len(texts) else found, at)
        pictures: Sequence[Any] = out.images if hasattr(out, "images") else out.frames
        if len(pictures) != len(texts):
            return [None] * len(at), [
                f"calls: {len(pictures)} pictures came for {len(texts)} that were asked for"
            ] * len(at)
        return pictures[: len(at)], hooks.wrong(len(texts))[: len(at)]

    def _twins(self, works: Sequence[GuardRunner], prompts: Sequence[str]) -> list[int]:
        """Return which prompts a guard wants to draw a second time beside the first."""
        wanted = [False] * len(prompts)
        for work in works:
            if "latents" in work.active_points:
                with work.timed_call():
                    wanted = [
                        a or b
                        for a, b in zip(
                            wanted, work.guard_impl.wants_reference_stream(prompts), strict=True
                        )
                    ]
        return [k for k, want in enumerate(wanted) if want]

    def _looked(
        self,
        works: Sequence[GuardRunner],
        images: list[Any],
        prompts: Sequence[str],
        at: Sequence[int],
    ) -> None:
        """Show the pictures to the guards that look at them, each what the one before left of it."""
        for work in works:
            if "image" not in work.active_points:
                continue
            seen = [
                (i, images[i])
                for i in at
                if not any(w.results[i].action in BLOCKING_ACTIONS for w in works)
            ]
            if not seen:
                continue
            with work.timed_call():
                found = work.guard_impl.look(
                    [image for _, image in seen], [prompts[i] for i, _ in seen]
                )
                work.merge_results(found, [i for i, _ in seen], seen=True)
            for (i, image), one in zip(seen, found, strict=True):
                images[i] = one.image if one.image is not None else image


def _picked(key: str, value: Any, at: Sequence[int], pictures: Sequence[str]) -> Any:
    """Return an argument of a call for some of its prompts only."""
    if key in pictures:
        return _rows(value, at) if _several(value) > 1 else value
    listed = (
        isinstance(value, Tensor)
        if key == "latents"
        else key in PER_PROMPT and isinstance(value, list)
    )
    return _rows(value, at) if listed else value


def _several(value: Any) -> int:
    """Return how many pictures an argument brings.

    1 of what is no list and no batch (n, ...) of four axes.
    """
    return len(value) if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4 else 1


def _rows(value: Any, at: Sequence[int]) -> Any:
    """Return some entries of a list, or rows of a batch."""
    return [value[i] for i in at] if isinstance(value, list | tuple) else value[list(at)]


def _unseen(key: str) -> bool:
    """Return whether an option is a text or an embedding that guards do not see, or changes what comes back."""
    text = key.startswith(("prompt", "negative_prompt")) and key != "negative_prompt"
    return text or "embeds" in key or key in UNSEEN


def _drawn_of(image: Any, works: Sequence[GuardRunner], at: int, fault: str) -> GeneratedImage:
    notes = tuple(work.note(at) for work in works)
    if fault:
        return GeneratedImage(None, GuardTrace("withhold", fault, notes))
    acted = [n for n in notes if n.action not in ("none", "edit")] or [
        n for n in notes if n.action == "edit"
    ]
    gone = [n for n in acted if n.action in BLOCKING_ACTIONS]
    action: Action = (gone or acted)[-1].action if acted else "none"
    reason = f"{(gone or acted)[-1].guard}: {(gone or acted)[-1].reason}" if acted else ""
    if (
        image is None and not gone
    ):  # no picture, and nobody who took it: ours to explain, and not to show
        return GeneratedImage(None, GuardTrace("withhold", "error: no picture came", notes))
    return GeneratedImage(None if gone else image, GuardTrace(action, reason, notes))
