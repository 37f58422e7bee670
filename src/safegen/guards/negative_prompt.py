"""Negative prompt as a guard: guidance steers every image away from a text."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from safegen.core.concept import Concept
from safegen.guards.core.adapter import HookPoint, PipelineAdapter
from safegen.guards.core.base import Call, Guard, GuardConfig, GuardHook
from safegen.guards.core.result import GuardResult
from safegen.models.families.conditioning import Conditioning


class NegativePromptConfig(GuardConfig):
    """Settings of the negative prompt."""

    name: Literal["negative-prompt"] = "negative-prompt"
    hook_points: ClassVar[frozenset[HookPoint]] = frozenset({"negative_prompt_embeds"})
    paper: ClassVar[str] = "common practice; compared with SLD in arXiv:2211.05105"
    parity: ClassVar[str] = (
        "Images equal those of the pipeline's own `negative_prompt`, in text-to-image, "
        "image-to-image and inpainting (0 grey levels on a tiny model)."
    )
    deviations: ClassVar[str] = "The text is appended to the call's negative prompt with a comma."

    text: str
    """Text to steer away from, appended to the call's negative prompt. Empty: off."""

    @classmethod
    def defaults_from(cls, concept: Concept) -> dict[str, Any]:
        """Return the concept's phrases as the text."""
        return {"text": ", ".join(concept.words)}

    def build(self, adapter: PipelineAdapter) -> Guard:
        """Return the guard. Its text must fit the text encoder."""
        adapter.check_length(self.text, "text of the guard 'negative-prompt'")
        return NegativePromptGuard(self)


class NegativePromptGuard(Guard):
    """Guard that replaces the negative prompts' embeddings."""

    config: NegativePromptConfig

    def start(self, call: Call) -> GuardHook:
        """Append the text to the call's negative prompts, and return the hook."""
        call.negative_prompts[:] = [
            join_texts(text, self.config.text) for text in call.negative_prompts
        ]
        for text in dict.fromkeys(call.negative_prompts):
            call.adapter.check_length(
                text,
                "a negative prompt together with that of the guard 'negative-prompt'",
                call.options,
            )
        return NegativePromptHook(call, active=bool(self.config.text))


class NegativePromptHook(GuardHook):
    """Embeddings of the negative prompts of one call."""

    def __init__(self, call: Call, *, active: bool) -> None:
        self.num_images, self.active = len(call.prompts), active
        texts = list(dict.fromkeys(call.negative_prompts))
        encoded = call.adapter.encode(texts, call.options)
        self.embeds = encoded[[texts.index(text) for text in call.negative_prompts]]

    def edit_negative_embeds(self, embeds: Conditioning) -> Conditioning:
        """Return the embeddings of the extended negative prompts."""
        return self.embeds if self.active else embeds

    def results(self) -> list[GuardResult]:
        """Return the same result for every image."""
        result = GuardResult("edit", "steered") if self.active else GuardResult()
        return [result] * self.num_images


def join_texts(first: str, second: str) -> str:
    """Return two texts joined by a comma, or the only one that is not empty."""
    return ", ".join(text for text in (first, second) if text)
