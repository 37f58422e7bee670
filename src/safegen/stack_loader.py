"""Loading of stacks: their model, with patches, LoRAs and guards active, generates images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from safegen.core.device import AUTO, resolve_device, resolve_dtype
from safegen.core.errors import ConfigError
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.progress import StepCallback
from safegen.core.text import short_repr
from safegen.guards import GeneratedImage, GuardTrace
from safegen.stack import Stack

if TYPE_CHECKING:
    import torch

    from safegen.guards.core.pipeline import GuardedPipeline
    from safegen.models.generation import PipelineKind
    from safegen.models.model import Model
    from safegen.models.text_cache import TextCache


@dataclass(frozen=True)
class LoadedStack:
    """A stack with its model loaded and its patches, LoRAs and guards active."""

    stack: Stack
    model: Model
    hash: str
    """Hash of the stack (`Stack.hash`)."""
    guarded: GuardedPipeline | None = None
    """The model's pipeline with the stack's guards; None without guards."""
    text_cache: TextCache | None = field(default=None, repr=False)
    """Outputs of the text encoders that calls share, also those for other stacks on the model."""
    _guarded: dict[str, GuardedPipeline] = field(default_factory=dict, repr=False)
    """Guarded pipelines that start from an image, by kind."""

    def __repr__(self) -> str:
        """Return the stack's name, its model and its hash in one line."""
        return short_repr(
            LoadedStack, repr(self.stack.name), model=self.stack.model, hash=self.hash[:12]
        )

    def generate_images(
        self, samples: Sequence[Sample], generation_config: GenerationConfig
    ) -> list[Image.Image]:
        """Return the images of samples, in order; a black one where a guard withheld it.

        Raises:
            ConfigError: see `generate`.
        """
        return [
            self.display_image(image, generation_config)
            for image in self.generate(samples, generation_config)
        ]

    def generate(
        self,
        samples: Sequence[Sample],
        generation_config: GenerationConfig,
        *,
        callback: StepCallback | None = None,
    ) -> list[GeneratedImage]:
        """Return the images of samples with the guards' traces, in order; None if withheld.

        Images of one sample are adjacent. A sample's negative prompt is added to the stack's, and
        changes no guard. Calls on one model wait for each other.

        Args:
            samples: what to generate.
            generation_config: steps, guidance, size, scheduler ...
            callback: called after each step with the part that is done; it may raise to stop.

        Raises:
            ConfigError: there is a negative prompt or a guard and no guidance, or the model has no
                images of that size, scheduler or number of steps.
        """
        if self.stack.blank:
            n, black = sum(s.num_images_per_prompt for s in samples), self.black(generation_config)
            return [GeneratedImage(black.copy(), GuardTrace("none", "")) for _ in range(n)]
        from safegen.models.schedulers import pipeline_lock

        pipe, cache = self.model.pipeline, self.text_cache
        with pipeline_lock(pipe), cache.attached(pipe) if cache else nullcontext():
            return self._generate(samples, generation_config, callback)

    def _generate(
        self,
        samples: Sequence[Sample],
        generation_config: GenerationConfig,
        callback: StepCallback | None,
    ) -> list[GeneratedImage]:
        """Return the images of a stack that is not blank."""
        from safegen.models.generation import autocast_for, batches, generate
        from safegen.models.schedulers import replaced_scheduler

        negative = self.stack.negative_prompt
        if self.guarded is None:
            images = generate(
                self.model, samples, generation_config, negative_prompt=negative, callback=callback
            )
            return [GeneratedImage(image, GuardTrace("none", "")) for image in images]
        generated: list[GeneratedImage] = []
        with replaced_scheduler(self.model.pipeline, generation_config.scheduler):
            for kind, prompts, options in batches(
                self.model, samples, generation_config, negative=negative, callback=callback
            ):
                guarded = self._guarded_for(kind)
                guarded.pipe.scheduler = self.model.pipeline.scheduler
                with autocast_for(self.model, generation_config):
                    generated += guarded.generate(prompts, **options)
        return generated

    def check_kind(self, kind: PipelineKind) -> None:
        """Check that the stack's guards run on a kind of pipeline.

        Raises:
            ConfigError: one does not.
        """
        if self.guarded is not None:
            self._guarded_for(kind)

    def _guarded_for(self, kind: PipelineKind) -> GuardedPipeline:
        """Return the guarded pipeline of a kind."""
        assert self.guarded is not None
        if kind == "text":
            return self.guarded
        if kind not in self._guarded:
            from safegen.guards.core.pipeline import GuardedPipeline
            from safegen.models.generation import pipeline_for

            negative = self.stack.negative_prompt or ""
            self._guarded[kind] = GuardedPipeline(
                pipeline_for(self.model, kind), self.stack.guards, negative_prompt=negative
            )
        return self._guarded[kind]

    def display_image(
        self, generated: GeneratedImage, generation_config: GenerationConfig
    ) -> Image.Image:
        """Return the image, or a black one of the requested size if it was withheld."""
        return generated.image or self.black(generation_config)

    def black(self, generation_config: GenerationConfig) -> Image.Image:
        """Return a black image of the requested size."""
        from safegen.models.generation import image_size

        return Image.new("RGB", image_size(self.model, generation_config))

    def free(self) -> None:
        """Release kept outputs of text encoders, and the accelerator's unused memory."""
        if self.text_cache is not None:
            self.text_cache.clear()
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


class StackLoader:
    """Loads stacks, and keeps the last model for the next stack on it."""

    def __init__(
        self,
        *,
        device: str | torch.device = AUTO,
        dtype: str | torch.dtype = "fp32",
        allow_pickle: bool = False,
        on_load: Callable[[Model], None] | None = None,
        model: Model | None = None,
    ) -> None:
        """Store how models are loaded.

        Args:
            device: a torch device; `auto` is the accelerator if there is one, else the CPU.
            dtype: type of the weights; see `load`.
            allow_pickle: also open weights stored as pickles, which can run code.
            on_load: called with each model after it is loaded.
            model: a model without patches that is loaded already, for the stacks on its name.

        Raises:
            ConfigError: `model` has patches on it.
        """
        self._device = device
        self.dtype: str = resolve_dtype(dtype)
        self.allow_pickle = allow_pickle
        self._on_load = on_load
        self._cached: tuple[tuple[str, Path | None], Model, str] | None = None
        self._texts: TextCache | None = None
        self._is_open, self._is_given = False, model is not None
        if model is not None:
            if model.patches:
                raise ConfigError(
                    f"model must have no patches on it, got {len(model.patches)} on "
                    f"{model.name!r}. Undo them, and name the patches in the stacks"
                )
            self._device, self.dtype = str(model.device), model.dtype
            self._cached = ((model.name, None), model, model.pipeline_hash)

    @property
    def device(self) -> str:
        """Name of the torch device."""
        return resolve_device(self._device)

    def __repr__(self) -> str:
        """Return device, type of the weights and the model in memory in one line."""
        cached = self._cached and self._cached[0][0]
        return short_repr(StackLoader, device=self._device, dtype=self.dtype, loaded=cached)

    def model(self, name: str, config: Path | None = None) -> tuple[Model, str]:
        """Return a model without patches, and its `Model.pipeline_hash`.

        Args:
            name: `Stack.model`.
            config: `Stack.config`.

        Raises:
            UserError: it cannot be loaded.
        """
        if self._cached is None or self._cached[0] != (name, config):
            from safegen.models.loading import load

            self._cached = self._texts = None  # two models need not fit in memory
            self._is_given = False
            model = load(
                name,
                dtype=self.dtype,
                device=self.device,
                allow_pickle=self.allow_pickle,
                config=config,
            )
            if self._on_load:
                self._on_load(model)
            self._cached = ((name, config), model, model.pipeline_hash)
        return self._cached[1:]

    def release(self) -> None:
        """Forget the model in memory; the next stack loads it again. One that was given stays."""
        if not self._is_given:
            self._cached = None

    def hash(self, stack: Stack) -> str:
        """Return a stack's hash without opening it."""
        model, weights = self.model(stack.model, stack.config)
        return stack.hash(model, weights=weights)

    @contextmanager
    def open(self, stack: Stack) -> Iterator[LoadedStack]:
        """Yield a loaded stack, and restore the model's weights afterwards. One is open at a time.

        Raises:
            UserError: the model, a patch, a LoRA or a guard cannot be loaded or does not fit.

        Warns:
            PatchOverlapWarning: several patches change the same weights.
            AdapterWarning: several LoRAs do, or a part of one is left out.
        """
        from safegen.models.text_cache import TextCache
        from safegen.models.textual_inversion import learned_words
        from safegen.patches.active_lora import active_loras
        from safegen.patches.arithmetic import warn_of_overlap
        from safegen.patches.lora_reader import read_lora
        from safegen.patches.patch import Patch

        assert not self._is_open, "another stack is open"
        model, weights = self.model(stack.model, stack.config)
        digest = stack.hash(model, weights=weights)
        with ExitStack() as resources:
            self._is_open = True
            resources.callback(setattr, self, "_is_open", False)
            patches = [Patch.load(path) for path in stack.patches]
            warn_of_overlap(patches)
            for patch in patches:
                resources.enter_context(patch.apply(model))
            loras = [(read_lora(lora.file, model), lora.scale) for lora in stack.loras]
            resources.enter_context(active_loras(model, loras))
            resources.enter_context(learned_words(model, stack.embeddings))
            texts = self._texts = self._texts or TextCache()
            guarded = _guarded_pipeline(stack, model)
            yield LoadedStack(stack, model, digest, guarded, text_cache=texts)


def _guarded_pipeline(stack: Stack, model: Model) -> GuardedPipeline | None:
    """Return a model's pipeline with a stack's guards; None without any."""
    if not stack.guards:
        return None
    from safegen.guards.core.pipeline import GuardedPipeline

    return GuardedPipeline(
        model.pipeline, stack.guards, negative_prompt=stack.negative_prompt or ""
    )
