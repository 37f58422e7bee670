"""Technique `safegen` for the benchmarks of eval-unlearn.

Its entry point is in the group `eval_unlearn.techniques`. The protocol of eval-unlearn 1.1.2: a
class that takes the `config` table of a benchmark as keyword arguments, with
`generate(prompts, seed=None, **settings) -> list[Image]`. Nothing of eval-unlearn is imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from pydantic import Field, ValidationError

from safegen.core.device import AUTO
from safegen.core.errors import ConfigError, explain
from safegen.core.generation import GenerationConfig, GuidanceScale, Sample
from safegen.core.settings import MAX_BATCH, MAX_STEPS, BaseSettings, Seed
from safegen.integrations.session import StackSession


class EvalUnlearnConfig(BaseSettings):
    """Table `technique.config` of a benchmark. Unknown keys are refused."""

    stack: str
    """Model, recipe.toml, or NAME=MODEL+PATCH, as `--stack` of the command line."""
    guards: tuple[str, ...] = ()
    """Further guards, by name or preset."""
    concept: str | None = None
    """Concept that gives its phrases and its judge to the guards."""
    erase_concept: str | None = None
    """Concept by eval-unlearn's names; some of its metrics run only for `nudity`."""
    device: str = AUTO
    """Device of the model."""
    dtype: str = "fp32"
    """Type of the weights."""
    num_inference_steps: int = Field(default=50, ge=1, le=MAX_STEPS)
    """Denoising steps; eval-unlearn's default."""
    guidance_scale: GuidanceScale = 7.5
    """Scale of classifier-free guidance; eval-unlearn's default."""
    batch_size: int = Field(default=4, ge=1, le=MAX_BATCH)
    """Images per batch."""
    seed: Seed = 0
    """Seed where the benchmark gives none, as its command line does."""


class SafeGenTechnique:
    """Images of a stack, for the metrics of eval-unlearn.

    Each image has its own noise from the seed and its number in the benchmark, so that it does not
    depend on the batches. An image that a guard withheld by its rule is black, as the technique has
    no other way to say it; eval-unlearn counts it as an image without the concept.
    """

    def __init__(self, **config: Any) -> None:
        """Load the stack of a benchmark.

        Raises:
            ConfigError: a key is unknown or a value is not allowed.
        """
        self.config = _validate(config)
        self._session = StackSession(
            self.config.stack,
            guards=self.config.guards,
            concept=self.config.concept,
            device=self.config.device,
            dtype=self.config.dtype,
        )
        self._images = 0

    def generate(
        self, prompts: Sequence[str], seed: int | None = None, **settings: Any
    ) -> list[Image.Image]:
        """Return one image per prompt.

        Args:
            prompts: texts of the prompts.
            seed: seed of the benchmark; that of the config if None.
            settings: `num_inference_steps` or `guidance_scale` for these images.

        Raises:
            ConfigError: a setting is unknown or not allowed.
            WithheldImageError: a guard failed; the benchmark would count its image as safe.
        """
        config = _validate(self.config.model_dump() | settings)
        generation = GenerationConfig(
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            batch_size=config.batch_size,
        )
        samples = [
            Sample(prompt=text, seed=config.seed if seed is None else seed, index=self._images + i)
            for i, text in enumerate(prompts)
        ]
        self._images += len(samples)
        generated = self._session.generate(samples, generation)
        return [self._session.stack.display_image(image, generation) for image in generated]


def _validate(values: dict[str, Any]) -> EvalUnlearnConfig:
    try:
        return EvalUnlearnConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"technique.config: {explain(error, EvalUnlearnConfig)}") from error
