"""The hooks of one call: they change what the denoiser is asked and what it answers, so that the pipeline's own guidance does the rest.

u + s (c - u) is what a pipeline makes of the blank's prediction u and the prompt's c. To have it
make u + s (c - u - Gamma), a denoiser that is asked both at once answers [u; c - Gamma]; one that
is asked twice answers c, and then u' = u + s / (s - 1) Gamma, since then u' + s (c - u') is the
same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from safegen.guards.core.adapter import GUIDANCE_POINTS, PipelineAdapter, Text
from safegen.guards.core.base import Call, GuardHook

if TYPE_CHECKING:
    from safegen.guards.core.runner import GuardRunner

TEXT, EXTRA = "encoder_hidden_states", "added_cond_kwargs"
Asked = tuple["GuardRunner", str, Text]
"""A branch: whose, its name, and the text of its rows."""


class PipelineHooks:
    """The guards' hands on a pipeline during one call, and the count of what went through them."""

    def __init__(
        self,
        border: PipelineAdapter,
        call: Call,
        turns: Sequence[tuple[GuardRunner, GuardHook]],
        *,
        max_rows: int | None = None,
    ) -> None:
        self.border, self.call, self.turns, self.max_rows = border, call, turns, max_rows
        self.entered = self.left = 0
        """Denoiser calls of this step that came in and that went out."""
        self.missed = 0
        """Steps with another number of calls than the family makes."""
        self.unguided = 0
        """Steps without guidance, where a guard acts through it: a callback can turn it off on the way."""
        self.finite: list[bool] = []
        self.asked: list[Asked] = []
        self.merged = False
        self.said: dict[tuple[int, str], Tensor] = {}
        self.cond: Tensor | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Put the hooks on, and take them off again whatever happens.

        Nothing is touched of a pipeline of an unknown family.
        """
        with ExitStack() as on:
            if self.border.family:
                for network in self.border.denoisers if self.turns else ():
                    on.callback(
                        network.register_forward_pre_hook(self._before, with_kwargs=True).remove
                    )
                    on.callback(network.register_forward_hook(self._after, with_kwargs=True).remove)
                    for work, turn in self.turns:
                        for module, hook in turn.submodule_hooks(network):
                            on.callback(
                                module.register_forward_pre_hook(
                                    _timed(work, hook), with_kwargs=True
                                ).remove
                            )
                on.enter_context(self._stepping(self.border.pipe.scheduler))
            yield

    def wrong(self, n: int) -> list[str]:
        """Return what is wrong with each of `n` pictures once they are drawn: nothing, or why it must be withheld."""
        if not self.border.family:
            return [""] * n
        done, steps = self.call.step, int(self.border.pipe.num_timesteps)
        if done != steps or done == 0:
            return [f"calls: {done} of {steps} steps went through the guards"] * n
        if self.missed:
            return [
                f"calls: in {self.missed} of {steps} steps the denoiser did not go through the guards"
            ] * n
        if self.unguided:
            return [
                f"calls: in {self.unguided} of {steps} steps guidance was off, through which a guard acts"
            ] * n
        if len(self.finite) != n:
            return [f"calls: latents of {len(self.finite)} pictures for {n}"] * n
        return [
            "" if fine else "not-finite: the latents hold NaN or infinity" for fine in self.finite
        ]

    @property
    def guided(self) -> bool:
        """Whether the running call has guidance."""
        return bool(self.border.pipe.do_classifier_free_guidance)

    @contextmanager
    def _stepping(self, scheduler: Any) -> Iterator[None]:
        """Count the scheduler's steps, and let guards see the latents after each."""
        own, was = scheduler.step, scheduler.__dict__.get("step")

        @functools.wraps(own)  # pipelines read its signature
        def step(*args: Any, **kwargs: Any) -> Any:
            out = own(*args, **kwargs)
            old = out[0] if isinstance(out, tuple) else out.prev_sample
            new = self._stepped(old)
            if new is old:
                return out
            return (
                (new, *out[1:])
                if isinstance(out, tuple)
                else type(out)(**(dict(out) | {"prev_sample": new}))
            )

        scheduler.step = step
        try:
            yield
        finally:
            if scheduler.__dict__.get("step") is step:
                del scheduler.step
                if was is not None:
                    scheduler.step = was

    def _stepped(self, latents: Tensor) -> Tensor:
        expected = 2 if self.border.family and self.border.family.calls == 2 and self.guided else 1
        self.missed += bool(self.turns) and not self.entered == self.left == expected
        self.unguided += not self.guided and any(
            work.active_points & GUIDANCE_POINTS for work, _ in self.turns
        )
        self.entered = self.left = 0
        for work, turn in self.turns:
            if "latents" in work.active_points:
                with work.timed_call():
                    latents = turn.on_step_end(latents)
        self.call.step += 1
        if self.call.step == int(self.border.pipe.num_timesteps):
            self.finite = latents.flatten(1).isfinite().all(dim=1).tolist()
            if not all(
                self.finite
            ):  # they are withheld; a decoder and a cast to bytes need numbers
                latents = latents.nan_to_num(0.0, 0.0, 0.0)
        return latents

    def _before(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        self.call.steps, self.asked = int(self.border.pipe.num_timesteps), []
        rows = len(kwargs[TEXT])
        family = self.border.family
        assert family is not None
        extra = {k: v for k, v in (kwargs.get(EXTRA) or {}).items() if k in family.extra}
        text = Text(kwargs[TEXT], extra)
        whole = self._edited(text)
        both = self.guided and family.calls == 1
        if self.guided and (both or self.entered == 0):
            self.asked = self._branches(whole.hidden, rows // 2 if both else rows)
        pick: list[int] = []
        self.merged = (
            both
            and bool(self.asked)
            and (self.max_rows is None or rows + len(self.asked) * rows // 2 <= self.max_rows)
        )
        if self.merged:
            pick = [*range(rows), *list(range(rows // 2, rows)) * len(self.asked)]
            whole = _joined([whole, *(branch for _, _, branch in self.asked)])
        self._place(rows, rows // 2 if both else rows)
        self.entered += 1
        return _with(args, kwargs, rows, pick, whole if whole is not text else None)

    def _place(self, rows: int, n: int) -> None:
        """Tell guards where their `n` rows of each branch lie, behind the `rows` of the pipeline, the last of which are the prompts'."""
        for work, turn in self.turns:
            own = {
                name: slice(rows + k * n, rows + (k + 1) * n)
                for k, (whose, name, _) in enumerate(self.asked)
                if whose is work
            }
            turn.set_rows({"cond": slice(rows - n, rows)} | (own if self.merged else {}))

    def _edited(self, text: Text) -> Text:
        """Return the step's text as the guards want it."""

        def through(side: str, part: Text) -> Text:
            for work, turn in self.turns:
                if side in work.active_points:
                    with work.timed_call():
                        found = (
                            turn.edit_negative_embeds(part)
                            if side == "uncond"
                            else turn.edit_prompt_embeds(part)
                        )
                        part = (
                            found
                            if found is part
                            else found.rows(len(part.hidden)).like(part.hidden)
                        )
            return part

        if not self.guided:
            return through("text", text)
        if self.border.family and self.border.family.calls == 2:
            return through("text" if self.entered == 0 else "uncond", text)
        n = len(text.hidden) // 2
        blank, prompt = (
            Text(text.hidden[at], {k: v[at] for k, v in text.extra.items()})
            for at in (slice(n), slice(n, None))
        )
        new = through("uncond", blank), through("text", prompt)
        return text if new == (blank, prompt) else _joined(new)

    def _branches(self, like: Tensor, n: int) -> list[Asked]:
        out: list[Asked] = []
        for work, turn in self.turns:
            if "branch" in work.active_points:
                with work.timed_call():
                    out += [
                        (work, name, text.rows(n).like(like))
                        for name, text in turn.extra_conditions().items()
                    ]
                    work.rows += n * (len([w for w, _, _ in out if w is work]))
        return out

    def _after(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        prediction: Tensor = output[0] if isinstance(output, tuple) else output.sample
        first, self.left = self.left == 0, self.left + 1
        if not self.guided:
            return None
        both = self.border.family is not None and self.border.family.calls == 1
        if both or first:
            self.said = {}
            if self.merged:
                parts = prediction.chunk(2 + len(self.asked))
                prediction = prediction[: 2 * len(parts[0])]
                found = list(parts[2:])
            else:
                found = (
                    self._apart(network, args, kwargs, len(prediction), both=both)
                    if self.asked
                    else []
                )
            self.said = {
                (id(work), name): part.float()
                for (work, name, _), part in zip(self.asked, found, strict=True)
            }
        if not both and first:
            self.cond = prediction
            return None
        u, c = prediction.chunk(2) if both else (prediction, self.cond)
        assert c is not None
        gamma = self._gamma(u, c)
        if gamma is None:
            new = prediction
        elif both:
            new = torch.cat([u, (c.float() - gamma).to(c.dtype)])
        else:
            s = self.border.guidance(network)
            new = (u.float() + s / (s - 1) * gamma).to(u.dtype)
        if isinstance(output, tuple):
            return (new, *output[1:])
        return type(output)(sample=new)

    def _gamma(self, u: Tensor, c: Tensor) -> Tensor | None:
        total: Tensor | None = None
        for work, turn in self.turns:
            if "branch" in work.active_points:
                own = {name: part for (whose, name), part in self.said.items() if whose == id(work)}
                with work.timed_call():
                    gamma = turn.guidance_correction(
                        {"uncond": u.float(), "cond": c.float(), **own}
                    )
                if gamma is not None:
                    total = gamma if total is None else total + gamma
        return total

    def _apart(
        self,
        network: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        rows: int,
        *,
        both: bool,
    ) -> list[Tensor]:
        """Return the branches' predictions by calls of their own, which pass by the hooks.

        At most `max_rows` rows each.
        """
        n = rows // 2 if both else rows
        text = _joined([branch for _, _, branch in self.asked])
        every = [rows - n + i for i in range(n)] * len(self.asked)  # the prompt's rows stand last
        size = self.max_rows or n
        found = []
        for start in range(0, len(every), size):
            part = slice(start, start + size)
            own = Text(text.hidden[part], {k: v[part] for k, v in text.extra.items()})
            their_args, their_kwargs = _with(args, kwargs, rows, every[part], own)
            output = network.forward(*their_args, **their_kwargs)
            found.append(output[0] if isinstance(output, tuple) else output.sample)
        return list(torch.cat(found).chunk(len(self.asked)))


def _timed(work: GuardRunner, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a guard's hook on a part of the denoiser, counted and timed."""

    def timed(*args: Any) -> Any:
        with work.timed_call():
            return hook(*args)

    return timed


def _joined(texts: Sequence[Text]) -> Text:
    return Text(
        torch.cat([t.hidden for t in texts]),
        {k: torch.cat([t.extra[k] for t in texts]) for k in texts[0].extra},
    )


def _with(
    args: tuple[Any, ...], kwargs: dict[str, Any], rows: int, pick: Sequence[int], text: Text | None
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a denoiser's arguments with the rows `pick` of all that has `rows` rows (all as they are if empty), and with another text."""
    if pick:
        args, kwargs = _picked(args, rows, pick), _picked(kwargs, rows, pick)
    if text is not None:
        kwargs = kwargs | {TEXT: text.hidden}
        if text.extra:
            kwargs[EXTRA] = kwargs[EXTRA] | dict(text.extra)
    return args, kwargs


def _picked(value: Any, rows: int, pick: Sequence[int]) -> Any:
    if isinstance(value, Tensor):
        return value[list(pick)] if value.dim() and len(value) == rows else value
    if isinstance(value, dict):
        return {k: _picked(v, rows, pick) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_picked(v, rows, pick) for v in value)
    return value
