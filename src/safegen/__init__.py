"""Make a text-to-image model unable to draw a chosen visual concept, prove it, and ship it.

    import safegen
    model = safegen.load("mini")
    patch = safegen.edit(model, "safegen", triplets="my-triplets")
    safegen.save_patch(patch, "patch.safetensors")  # writes the model card too

Importing safegen loads no heavy library: each name below is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safegen._version import __version__ as __version__

if TYPE_CHECKING:
    from safegen.core.generation import GenerationConfig as GenerationConfig
    from safegen.core.generation import Sample as Sample
    from safegen.data.triplets.triplets import Triplets as Triplets
    from safegen.judges import load_judge as load_judge
    from safegen.models.checkpoint.diffusers_folder import save_folder as save_folder
    from safegen.models.generation import generate as generate
    from safegen.models.loading import load as load
    from safegen.models.model import Model as Model
    from safegen.patches.patch import Patch as Patch
    from safegen.workflows.edit import edit as edit
    from safegen.workflows.edit import export as export
    from safegen.workflows.edit import export_folder as export_folder
    from safegen.workflows.edit import save_patch as save_patch

_MODULES = {
    "Sample": "safegen.core.generation",
    "Model": "safegen.models.model",
    "Patch": "safegen.patches.patch",
    "GenerationConfig": "safegen.core.generation",
    "Triplets": "safegen.data.triplets.triplets",
    "edit": "safegen.workflows.edit",
    "export": "safegen.workflows.edit",
    "export_folder": "safegen.workflows.edit",
    "generate": "safegen.models.generation",
    "load": "safegen.models.loading",
    "load_judge": "safegen.judges",
    "save_folder": "safegen.models.checkpoint.diffusers_folder",
    "save_patch": "safegen.workflows.edit",
}
__all__ = [
    "Sample",
    "Model",
    "Patch",
    "GenerationConfig",
    "Triplets",
    "edit",
    "export",
    "export_folder",
    "generate",
    "load",
    "load_judge",
    "save_folder",
    "save_patch",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'safegen' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
