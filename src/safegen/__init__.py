"""safegen makes a text-to-image model unable to draw a chosen visual concept, proves it, and ships it.

    import safegen
    model = safegen.load("mini")
    patch = safegen.edit(model, "safegen", triplets="my-triplets")
    safegen.save_patch(patch, "patch.safetensors")  # with its model card; patch.save alone writes none

Importing this loads nothing heavy: the names below arrive when they are first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safegen.api import edit as edit
    from safegen.api import export as export
    from safegen.api import export_folder as export_folder
    from safegen.api import save_patch as save_patch
    from safegen.data.triplets import Triplets as Triplets
    from safegen.judge import load_judge as load_judge
    from safegen.models import Ask as Ask
    from safegen.models import Model as Model
    from safegen.models import Patch as Patch
    from safegen.models import Sampler as Sampler
    from safegen.models import generate as generate
    from safegen.models import load as load
    from safegen.models import save_folder as save_folder

__version__ = "0.1.0"

_WHERE = {
    **dict.fromkeys(("edit", "export", "export_folder", "save_patch"), "safegen.api"),
    "Triplets": "safegen.data.triplets",
    "load_judge": "safegen.judge",
    **dict.fromkeys(("Ask", "Model", "Patch", "Sampler", "generate", "load", "save_folder"), "safegen.models"),
}
__all__ = [
    "Ask", "Model", "Patch", "Sampler", "Triplets", "edit", "export", "export_folder", "generate", "load", "load_judge", "save_folder",
    "save_patch",
]  # fmt: skip


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _WHERE:
        raise AttributeError(f"module 'safegen' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


class _Room(ModuleType):
    """The package `safegen.edit` is a verb too: called, it is `safegen.api.edit`."""

    def __call__(self, *args: Any, **settings: Any) -> Patch:  # noqa: ANN401
        from safegen.api import edit

        return edit(*args, **settings)


class _House(ModuleType):
    """Importing any file of `safegen.edit` puts that package where the verb is looked up; then the package becomes the verb."""

    def __setattr__(self, name: str, value: object) -> None:
        if name == "edit" and isinstance(value, ModuleType):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _House
