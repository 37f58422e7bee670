"""A negative prompt as a guard: the blank side of guidance is conditioned on what must not be drawn."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from safegen.core.concept import Concept
from safegen.guards.core.adapter import HookPoint, PipelineAdapter, Text
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook, GuardResult


class NegativePromptConfig(GuardConfig):
    """Settings of the negative prompt."""

    name: Literal["negative-prompt"] = "negative-prompt"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"uncond"})

    text: str
    """What every picture is pushed away from.

    Joined with a comma to a negative prompt that is there already. Blank is no guard.
    """

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's words as the text."""
        return {"text": ", ".join(concept.words)}

    def build(self, border: PipelineAdapter) -> Guard:
        """Return the guard at work; the text must fit the text encoder."""
        border.fits(self.text, "the text of the guard 'negative-prompt'")
        return NegativePromptGuard(self)


class NegativePromptGuard(Guard):
    guard: NegativePromptConfig

    def start(self, call: Call) -> GuardHook:
        """Write the text into the call's negative prompts, and encode the distinct ones."""
        call.negative[:] = [joined(one, self.guard.text) for one in call.negative]
        for text in dict.fromkeys(call.negative):
            call.border.fits(
                text,
                "a negative prompt together with that of the guard 'negative-prompt'",
                call.options,
            )
        return NegativePromptHook(call, acts=bool(self.guard.text))


class NegativePromptHook(GuardHook):
    def __init__(self, call: Call, *, acts: bool) -> None:
        self.call, self.acts = call, acts
        texts = list(dict.fromkeys(call.negative))
        found, at = (
            call.border.encode(texts, call.options),
            [texts.index(one) for one in call.negative],
        )
        self.text = Text(found.hidden[at], {k: v[at] for k, v in found.extra.items()})

    def edit_negative_embeds(self, text: Text) -> Text:
        return self.text if self.acts else text

    def results(self) -> list[GuardResult]:
        return [GuardResult("edit", "steered") if self.acts else GuardResult()] * len(
            self.call.prompts
        )


def joined(own: str, more: str) -> str:
    """Return two texts with a comma between, or the one that there is."""
    return ", ".join(part for part in (own, more) if part)
