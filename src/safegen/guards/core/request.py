"""A checked generation request, and the pipeline call for a part of its prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from safegen.core.errors import ConfigError
from safegen.guards.core.adapter import NUM_IMAGES_OPTIONS, PipelineAdapter, clone_generator
from safegen.guards.core.base import Call

UNSUPPORTED_OPTIONS = (
    "ip_adapter_image",
    "negative_ip_adapter_image",
    *NUM_IMAGES_OPTIONS,
    "return_dict",
)
"""Options of pipelines that bypass guards or change what a call returns."""


@dataclass(frozen=True)
class Request:
    """Prompts, options of the pipeline's call, and the number of images per prompt."""

    adapter: PipelineAdapter
    prompts: Sequence[str]
    options: Mapping[str, Any]
    copies: int = 1
    """Images per prompt."""

    @property
    def num_images(self) -> int:
        """Number of images in all."""
        return len(self.prompts) * self.copies

    @property
    def image_prompts(self) -> list[str]:
        """Prompt of each image."""
        return [p for p in self.prompts for _ in range(self.copies)]

    def images_of(self, prompts: Sequence[int]) -> list[int]:
        """Return the indices of the images of some prompts."""
        return [i * self.copies + k for i in prompts for k in range(self.copies)]

    def select_options(self, prompts: Sequence[int]) -> dict[str, Any]:
        """Return the options for some of the prompts: what has one entry per prompt is selected."""
        options, images = dict(self.options), self.images_of(prompts)
        for key in self.adapter.image_options(len(self.prompts)):
            if num_entries(value := options.get(key)) > 1:
                options[key] = _select(value, prompts)
        if isinstance(negative := options.get("negative_prompt"), list):
            options["negative_prompt"] = _select(negative, prompts)
        if isinstance(generators := options.get("generator"), list):
            options["generator"] = _select(generators, images)
        if isinstance(latents := options.get("latents"), Tensor):
            options["latents"] = latents[images]
        return options

    def build_call(
        self, prompts: Sequence[int], references: Sequence[int]
    ) -> tuple[Call, dict[str, Any]]:
        """Return the call for some prompts and the arguments of the pipeline.

        Args:
            prompts: indices of the prompts.
            references: positions in `prompts` that get a reference stream; these rows stand last.

        Raises:
            ConfigError: a reference stream without a list of generators.
        """
        n = len(prompts) * self.copies
        indices = [*prompts, *(prompts[k] for k in references)]
        arguments = self.select_options(indices)
        arguments["prompt"] = [self.prompts[i] for i in indices]
        if references:
            generators = arguments.get("generator")
            if not isinstance(generators, list):
                raise ConfigError(
                    "generator must be a list with one per prompt for a guard with a reference "
                    "stream. Both streams must start alike."
                )
            arguments["generator"] = [
                *generators[:n],
                *(clone_generator(g) for g in generators[n:]),
            ]
            if self.adapter.takes_image_per_row and num_entries(arguments["image"]) == 1:
                arguments["image"] = _repeat_image(arguments["image"], len(indices))
        if self.copies > 1 and (option := self.adapter.num_images_option):
            arguments[option] = self.copies
        negative = arguments.get("negative_prompt") or [""] * len(indices)
        call = Call(
            self.adapter,
            tuple(self.prompts[i] for i in indices for _ in range(self.copies)),
            [text for text in negative for _ in range(self.copies)],
            self.options,
            reference_rows={k: n + j for j, k in enumerate(references)},
        )
        return call, arguments


def check_request(
    adapter: PipelineAdapter, prompts: Sequence[str], copies: int, options: Mapping[str, Any]
) -> Request:
    """Return a request, its negative prompt repeated for each prompt.

    Raises:
        ConfigError: `prompts` is one text, an option bypasses guards, there are not as many
            entries as prompts, or the pipeline makes one image per prompt only.
    """
    if isinstance(prompts, str):
        raise ConfigError(
            f"prompts must be a list of texts, got the text {prompts[:60]!r}. Put it in a list."
        )
    for key, value in options.items():
        if _is_unsupported(key) and value is not None:
            raise ConfigError(
                f"{key} must not be given with guards, which do not see it. Leave it out."
            )
    if any("ip_adapter" in key for key in options.get("joint_attention_kwargs") or {}):
        raise ConfigError(
            "joint_attention_kwargs must have no image prompt with guards, which do not see it. "
            "Leave it out."
        )
    if copies < 1:
        raise ConfigError(f"num_images_per_prompt must be >= 1, got {copies}")
    if copies > 1 and not adapter.num_images_option:
        raise ConfigError(
            f"num_images_per_prompt must be 1 on a {adapter.pipeline_class}, got {copies}. "
            "Repeat the prompt."
        )
    n, checked = len(prompts), dict(options)
    negative, generators = options.get("negative_prompt"), options.get("generator")
    if isinstance(negative, str | list | tuple):
        checked["negative_prompt"] = [negative] * n if isinstance(negative, str) else list(negative)
        _check_length("negative_prompt", len(checked["negative_prompt"]), n, "prompt")
    if isinstance(generators, list | tuple):
        checked["generator"] = list(generators)
        _check_length("generator", len(generators), n * copies, "image")
    for key in adapter.image_options(n):
        if (entries := num_entries(options.get(key))) != 1:
            _check_length(key, entries, n, "prompt")
    if (latents := options.get("latents")) is not None and len(latents) != n * copies:
        raise ConfigError(f"latents must have one row per image, {n * copies}, got {len(latents)}")
    return Request(adapter, list(prompts), checked, copies)


def _check_length(key: str, entries: int, expected: int, noun: str) -> None:
    if entries != expected:
        raise ConfigError(f"{key} must be one value or one per {noun}, {expected}, got {entries}")


def num_entries(value: Any) -> int:
    """Return the length of a list or of a batch with four axes; 1 for anything else."""
    return len(value) if isinstance(value, list | tuple) or getattr(value, "ndim", 0) == 4 else 1


def _repeat_image(image: Any, n: int) -> list[Any]:
    """Return an image, a list with one or a batch of one, as a list of `n`."""
    is_batch = isinstance(image, list | tuple) or getattr(image, "ndim", 0) == 4
    return [image[0] if is_batch else image] * n


def _select(value: Any, indices: Sequence[int]) -> Any:
    """Return some entries of a list, or rows of a batch."""
    return [value[i] for i in indices] if isinstance(value, list | tuple) else value[list(indices)]


def _is_unsupported(key: str) -> bool:
    """Return whether an option is text that guards do not see, or changes the output."""
    text = key.startswith(("prompt", "negative_prompt")) and key != "negative_prompt"
    return text or "embeds" in key or key in UNSUPPORTED_OPTIONS
