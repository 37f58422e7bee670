"""A stack: a model with its patches, LoRAs, a negative prompt and guards.

The unit that is drawn with and measured.
"""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    field_validator,
    model_validator,
)

from safegen.active import LoraSpec, LoraSpecs, parse_lora_specs
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, UnknownNameError, UserError, explain
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.registry import MODELS
from safegen.guards import GeneratedImage, GuardConfig, GuardTrace, read_guard

if TYPE_CHECKING:
    from safegen.guards.core.pipeline import GuardedPipeline
    from safegen.models.model import Model

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Stacks name folders, so their names are plain."""


UNHASHED_CONFIG = {
    "vae": ("scaling_factor", "shift_factor"),
    "unet": ("attention_head_dim", "num_attention_heads", "sample_size"),
    "text_encoder": ("num_attention_heads", "hidden_act"),
}
"""Settings of a model's parts that decide a picture though no weight shows them."""


class Stack(BaseModel):
    """What draws.

    Built from a word, a recipe file, or in code; loading happens when it is opened.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=f"^{NAME}$")
    """The stack in one word of letters, digits, dots, dashes and underscores."""
    model: str
    """Model to load: a built-in name, a diffusers folder, a one-file checkpoint, or hub:owner/name."""
    config: Path | None = None
    """For a one-file checkpoint: a diffusers folder of its family, for the small files that it lacks."""
    patches: tuple[Path, ...] = ()
    """Patches to put on it, in order."""
    loras: LoraSpecs = ()
    """LoRAs active beside the weights, never fused into them: `FILE`, `FILE:SCALE`, or tables of both."""
    negative_prompt: str | None = None
    """Text that guidance pushes every picture away from."""
    guards: tuple[SerializeAsAny[GuardConfig], ...] = ()
    """Defences that act while drawing: `sld-max`, or a table with `name`, `preset`, `concept` and settings of the guard."""
    blank: bool = False
    """Draw nothing: every picture is black.

    The baseline that is perfectly safe and perfectly useless.
    """

    @field_validator("guards", mode="before")
    @classmethod
    def _read_guards(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not all(
            isinstance(one, str | Mapping | GuardConfig) for one in value
        ):
            return value
        try:
            return tuple(read_guard(one) for one in value)
        except UserError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _has_no_idle_setting(self) -> Self:
        if self.blank and (
            self.patches or self.loras or self.negative_prompt is not None or self.guards
        ):
            raise ValueError(
                "patches, LoRAs, guards and a negative prompt have no effect on a blank stack; leave them out"
            )
        return self

    @property
    def is_base(self) -> bool:
        """Whether this is a model as it comes."""
        return not (
            self.patches
            or self.loras
            or self.guards
            or self.blank
            or self.negative_prompt is not None
        )

    def hash(self, model: Model, *, weights: str | None = None) -> str:
        """Return a SHA-256 over everything of the stack that decides a picture: weights, patches, LoRAs, negative prompt, guards.

        Args:
            model: the stack's model, without patches on it.
            weights: its `pipeline_hash`, if known.

        Raises:
            FileError: a patch or a LoRA cannot be read.
            UserError: a guard's file cannot be.
        """
        if self.blank:
            return _digest({"blank": model.size})
        from safegen.patches.patch import Patch

        patches = [Patch.load(path).hash for path in self.patches]
        facts: dict[str, Any] = {
            "weights": weights or pipeline_hash(model),
            "patches": patches,
            "negative": self.negative_prompt,
        }
        facts |= (
            {
                "loras": [
                    (said["hash"], said["scale"])
                    for said in (lora.fingerprint() for lora in self.loras)
                ]
            }
            if self.loras
            else {}
        )
        return _digest(
            facts
            | ({"guards": [guard.fingerprint() for guard in self.guards]} if self.guards else {})
        )


def load_stack(spec: str | Path) -> Stack:
    """Return the stack that a word of the command line means.

    Args:
        spec: a built-in model's name; a TOML recipe, whose paths are relative to it; or
            `NAME=model+patch.safetensors+...`.

    Raises:
        UnknownNameError: neither.
        FileError: the recipe is missing or is not one.
        ConfigError: the name is not plain.
    """
    spec = str(spec)
    name, found, rest = spec.partition("=")
    if not found and spec.endswith(".toml"):
        return _read_recipe(Path(spec))
    if not found:
        if spec not in MODELS:
            raise UnknownNameError(
                "stack (nor is it a recipe.toml, nor NAME=model+patch.safetensors)", spec, MODELS
            )
        return Stack(name=spec, model=spec)
    if rest.endswith(".toml"):
        raise ConfigError(
            f"a recipe says its own name, so it is given without one: {rest}, got {spec!r}"
        )
    model, *patches = rest.split("+")
    if not re.fullmatch(NAME, name) or not model or not all(patches):
        raise ConfigError(
            f"a stack is written NAME=model+patch.safetensors, its name in letters, digits and '._-'; got {spec!r}"
        )
    return Stack(name=name, model=model, patches=tuple(Path(p) for p in patches))


def add_guards(stack: Stack, guards: Sequence[str], concept: str | None = None) -> Stack:
    """Return a stack with further guards, as words of the command line; a concept gives its words and its judge to all that can use them.

    Raises:
        UnknownNameError: no such guard, preset or concept.
        ConfigError: a guard lacks a setting, has no effect, or none has a use for the concept.
    """
    known = load_concept(concept) if concept is not None else None
    made = [read_guard(word, known) for word in guards]
    if known and not any(type(guard).defaults_from(known) for guard in made):
        raise ConfigError(
            f"the concept {known.name!r} has no effect here: no guard takes anything from it; leave it out"
        )
    if made and stack.blank:
        raise ConfigError(
            f"guards have no effect on the blank stack {stack.name!r}; leave them out"
        )
    return stack.model_copy(update={"guards": (*stack.guards, *made)})


def add_patches(stack: Stack, patches: Sequence[Path]) -> Stack:
    """Return a stack with further patches, put on after its own.

    Raises:
        ConfigError: it draws nothing.
    """
    if patches and stack.blank:
        raise ConfigError(
            f"patches have no effect on the blank stack {stack.name!r}; leave them out"
        )
    return stack.model_copy(update={"patches": (*stack.patches, *patches)})


def add_loras(stack: Stack, words: Sequence[str]) -> Stack:
    """Return a stack with further LoRAs beside it, each FILE or FILE:SCALE.

    Raises:
        ConfigError: a scale breaks its rule, or the stack draws nothing.
    """
    if words and stack.blank:
        raise ConfigError(f"LoRAs have no effect on the blank stack {stack.name!r}; leave them out")
    try:
        found = tuple(LoraSpec.model_validate(one) for one in parse_lora_specs(list(words)))
    except ValidationError as error:
        raise ConfigError(f"--lora: {explain(error, LoraSpec)}") from error
    return stack.model_copy(update={"loras": (*stack.loras, *found)})


def _read_recipe(path: Path) -> Stack:
    if not path.is_file():
        raise FileError(f"the stack file {str(path)!r} does not exist")
    try:
        facts = {"name": path.stem} | tomllib.loads(path.read_text(encoding="utf-8"))
        facts["guards"] = _beside(facts.get("guards", []), path.parent)
        stack = Stack.model_validate(facts)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FileError(f"{path} is not a stack file: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        raise FileError(f"{path} is not a stack file: {explain(error, Stack)}") from error
    beside = path.parent / stack.model
    model = stack.model if stack.model in MODELS or stack.model.startswith("hub:") else str(beside)
    patches, guards = (
        tuple(path.parent / p for p in stack.patches),
        tuple(guard.resolve_paths(path.parent) for guard in stack.guards),
    )
    loras = tuple(lora.model_copy(update={"file": path.parent / lora.file}) for lora in stack.loras)
    config = path.parent / stack.config if stack.config else None
    return stack.model_copy(
        update={
            "model": model,
            "config": config,
            "patches": patches,
            "loras": loras,
            "guards": guards,
        }
    )


def _beside(guards: Any, folder: Path) -> Any:
    """Return a recipe's guards with the files of their concepts looked for in `folder`."""

    def one(guard: Any) -> Any:
        concept = guard.get("concept") if isinstance(guard, dict) else None
        return (
            guard | {"concept": str(folder / concept)}
            if isinstance(concept, str) and concept.endswith(".toml")
            else guard
        )

    return [one(guard) for guard in guards] if isinstance(guards, list) else guards


def pipeline_hash(model: Model) -> str:
    """Return a SHA-256 over all that a model draws with: every part's weights, schedule, vocabulary, and what the weights leave open.

    The latter: the latents' size, scale and shift, the number of heads, how prompts and the text
    tower are read, what stands for no text, and the scheduler's class.
    """
    from safegen.core.hashing import hash_tensors

    pipeline = model.pipeline
    facts = {"unet": hash_tensors(model.denoiser.state_dict()), "around": model.components_hash}
    facts["vocabulary"] = _digest(pipeline.tokenizer.get_vocab())
    more = (
        {"text_encoder_2": UNHASHED_CONFIG["text_encoder"]}
        if "text_encoder_2" in model.parts
        else {}
    )
    facts |= {"vocabulary_2": _digest(pipeline.tokenizer_2.get_vocab())} if more else {}
    readers = [pipeline.tokenizer, *([pipeline.tokenizer_2] if more else [])]
    facts["reading"] = str(
        [(reader.pad_token_id, reader.model_max_length, reader.padding_side) for reader in readers]
    )
    facts["blank"] = str(pipeline.config.get("force_zeros_for_empty_prompt"))
    for part, keys in (UNHASHED_CONFIG | more).items():
        config = getattr(pipeline, part).config
        facts |= {f"{part}.{key}": str(getattr(config, key, None)) for key in keys}
    return _digest(facts | {"scheduler": type(pipeline.scheduler).__name__})


def _guarded(stack: Stack, model: Model) -> GuardedPipeline | None:
    """Return a model's pipeline with a stack's guards; None without any."""
    if not stack.guards:
        return None
    from safegen.guards.core.pipeline import GuardedPipeline

    return GuardedPipeline(model.pipeline, stack.guards, negative=stack.negative_prompt or "")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class LoadedStack:
    """A stack that is ready to draw."""

    stack: Stack
    model: Model
    hash: str
    guarded: GuardedPipeline | None = None
    """The model's pipeline with the stack's guards on it."""

    def generate_images(
        self, asks: Sequence[Sample], generation_config: GenerationConfig
    ) -> list[Image.Image]:
        """Return one picture per ask, in order; a black one where a guard withheld it.

        Raises:
            ConfigError: a negative prompt or a guard without guidance.
        """
        return [self.display_image(drawn) for drawn in self.generate(asks, generation_config)]

    def generate(
        self, asks: Sequence[Sample], generation_config: GenerationConfig
    ) -> list[GeneratedImage]:
        """Return one picture per ask, in order, each with the trail of the guards; None where it was withheld.

        Raises:
            ConfigError: a negative prompt or a guard without guidance.
        """
        if self.stack.blank:
            return [GeneratedImage(self.black(), GuardTrace("none", "")) for _ in asks]
        from safegen.models.generation import autocast_for, batches, check_num_steps, generate

        if self.guarded is None:
            return [
                GeneratedImage(image, GuardTrace("none", ""))
                for image in generate(
                    self.model, asks, generation_config, negative=self.stack.negative_prompt
                )
            ]
        out: list[GeneratedImage] = []
        check_num_steps(self.model, generation_config.num_inference_steps)
        for prompts, options in batches(
            asks, generation_config, negative=self.stack.negative_prompt
        ):
            with autocast_for(self.model, generation_config):
                out += self.guarded.draw(prompts, **options)
        return out

    def display_image(self, drawn: GeneratedImage) -> Image.Image:
        """Return what stands for a picture where one must be: black for one that was withheld."""
        return drawn.image or self.black()

    def black(self) -> Image.Image:
        """Return a black picture of the model's size."""
        return Image.new("RGB", (self.model.size, self.model.size))

    def free(self) -> None:
        """Give back the accelerator's memory that nothing holds any more."""
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


class StackLoader:
    """Opens stacks.

    It keeps the model that it loaded last, so that stacks on one model in a row share it.
    """

    def __init__(
        self, *, device: str = "cpu", dtype: str = "fp32", allow_pickle: bool = False
    ) -> None:
        self.device, self.dtype, self.allow_pickle = device, dtype, allow_pickle
        self._kept: tuple[tuple[str, Path | None], Model, str] | None = None
        self._open = False

    def model(self, name: str, config: Path | None = None) -> tuple[Model, str]:
        """Return a model without patches, and its `pipeline_hash`.

        Args:
            name: as in a stack.
            config: as in a stack.

        Raises:
            UserError: it cannot be loaded.
        """
        if self._kept is None or self._kept[0] != (name, config):
            from safegen.models.model import load

            self._kept = None  # two models need not fit in memory
            model = load(
                name,
                dtype=self.dtype,
                device=self.device,
                allow_pickle=self.allow_pickle,
                config=config,
            )
            self._kept = ((name, config), model, pipeline_hash(model))
        return self._kept[1:]

    def hash(self, stack: Stack) -> str:
        """Return a stack's hash without opening it."""
        model, weights = self.model(stack.model, stack.config)
        return stack.hash(model, weights=weights)

    @contextmanager
    def open(self, stack: Stack) -> Iterator[LoadedStack]:
        """Yield a stack ready to draw; afterwards its patches are taken off exactly. One is open at a time.

        Raises:
            UserError: the model, a patch or a guard cannot be loaded, or does not fit.

        Warns:
            PatchOverlapWarning: several patches change the same weights.
            AdapterWarning: several LoRAs do, or one has a part that is left out.
        """
        from safegen.patches.active_lora import active_loras
        from safegen.patches.arithmetic import warn_of_overlap
        from safegen.patches.lora import read_factors
        from safegen.patches.patch import Patch

        assert not self._open, "another stack is open"
        model, weights = self.model(stack.model, stack.config)
        _ = model.hash  # of the untouched weights: what patches refer to
        digest = stack.hash(model, weights=weights)
        with ExitStack() as on:
            self._open = True
            on.callback(setattr, self, "_open", False)
            patches = [Patch.load(path) for path in stack.patches]
            warn_of_overlap(patches)
            for patch in patches:
                on.enter_context(patch.apply(model))
            on.enter_context(
                active_loras(
                    model, [(read_factors(lora.file, model), lora.scale) for lora in stack.loras]
                )
            )
            yield LoadedStack(stack, model, digest, _guarded(stack, model))
