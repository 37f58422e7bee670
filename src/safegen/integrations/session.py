"""Stack that stays loaded while another toolkit asks for images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from safegen.core.device import AUTO
from safegen.core.errors import SafegenError
from safegen.core.generation import GenerationConfig, Sample
from safegen.stack import add_guards, load_stack

if TYPE_CHECKING:
    from safegen.guards import GeneratedImage
    from safegen.stack_loader import LoadedStack


class WithheldImageError(SafegenError):
    """Image that a guard withheld because it failed: it must not enter a rate as safe."""


class StackSession:
    """Loaded stack between calls of `generate`; `close` restores the model's weights."""

    def __init__(
        self,
        stack: str | Path,
        *,
        guards: Sequence[str] = (),
        concept: str | None = None,
        device: str = AUTO,
        dtype: str = "fp32",
    ) -> None:
        """Load a stack.

        Args:
            stack: model, recipe.toml, or NAME=MODEL+PATCH, as `--stack` of the command line.
            guards: further guards, by name or preset.
            concept: gives its phrases and its judge to the guards.
            device: device of the model.
            dtype: type of the weights.

        Raises:
            UserError: the stack cannot be loaded.
        """
        from safegen.stack_loader import StackLoader

        self._resources = ExitStack()
        loaded = add_guards(load_stack(stack), guards, concept)
        loader = StackLoader(device=device, dtype=dtype)
        self.stack: LoadedStack = self._resources.enter_context(loader.open(loaded))

    def generate(
        self, samples: Sequence[Sample], generation_config: GenerationConfig
    ) -> list[GeneratedImage]:
        """Return one image per sample with its trace; None in place of one that a rule withheld.

        Raises:
            WithheldImageError: a guard failed, or could not judge, and withheld an image.
            ConfigError: the stack does not take the settings.
        """
        generated = self.stack.generate(samples, generation_config)
        for image in generated:
            if image.trace.action == "withhold":
                raise WithheldImageError(
                    f"a guard must run to measure it, got a failure: {image.trace.reason}. "
                    "Mend the guard, or leave it out."
                )
        return generated

    def close(self) -> None:
        """Restore the model's weights."""
        self._resources.close()
