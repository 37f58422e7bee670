"""Edits: a model goes in, a patch comes out; the model is untouched. Called, this room is `safegen.api.edit`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safegen.models.patch import Patch


class _Room(ModuleType):
    """A package and a verb of one name: importing any of its files puts the package where `safegen.edit` is looked up."""

    def __call__(self, *args: Any, **settings: Any) -> Patch:  # noqa: ANN401
        from safegen.api import edit

        return edit(*args, **settings)


sys.modules[__name__].__class__ = _Room
