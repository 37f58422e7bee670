"""Check that edited models and the base that they are compared with belong together."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from safegen.core.errors import SafegenWarning
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

if TYPE_CHECKING:
    from safegen.models.fingerprint import ModelFingerprint


class BaseDifferenceWarning(SafegenWarning):
    """An edited model has the denoiser of its base, or differs from it in more than that."""


class BaseCheck:
    """Compares stacks on model files of their own with the base that the user stated."""

    def __init__(self, pairs: Iterable[tuple[Stack, str]]) -> None:
        """Note which base models have stacks on other model files.

        Args:
            pairs: each stack of a run, base models included, and the name of its base.
        """
        pairs = list(pairs)
        models = {stack.name: (stack.model, stack.config) for stack, _ in pairs}
        self._stated = {
            base for stack, base in pairs if models[base] != (stack.model, stack.config)
        }
        self._models = models
        self._bases: dict[str, ModelFingerprint] = {}

    def check(self, stack: Stack, base: str, loader: StackLoader) -> None:
        """Check a stack against its base, which must have been checked before.

        Raises:
            ConfigError: the base has another architecture or image size.

        Warns:
            BaseDifferenceWarning: the denoisers are equal, or other parts differ too.
        """
        if base not in self._stated:
            return
        from safegen.models.fingerprint import ModelFingerprint

        if stack.name == base:
            self._bases[base] = ModelFingerprint.of(loader.model(stack.model, stack.config)[0])
        if stack.blank or self._models[base] == (stack.model, stack.config):
            return
        own = ModelFingerprint.of(loader.model(stack.model, stack.config)[0])
        other = self._bases[base]
        own.check_architecture(other)
        parts = own.differing_parts(other)
        if own.hash == other.hash:
            warnings.warn(
                f"the denoiser of {stack.name!r} has the weights of its base {base!r}. "
                f"They differ in {', '.join(parts)} alone",
                BaseDifferenceWarning,
                stacklevel=2,
            )
        elif parts:
            warnings.warn(
                f"{stack.name!r} differs from its base {base!r} in more than the denoiser: "
                f"{', '.join(parts)}. The figures are of all these differences",
                BaseDifferenceWarning,
                stacklevel=2,
            )
