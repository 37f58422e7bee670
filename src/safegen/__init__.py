"""Remove a visual concept from a text-to-image model, measure the result, and export it.

    import safegen
    model = safegen.load("mini")
    patch = safegen.edit(model, "safegen", triplets="mini:skulls")
    safegen.save_patch(patch, "patch.safetensors")

Importing safegen loads no heavy library. Each public name is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from safegen._version import __version__ as __version__
from safegen.core.quiet import disable_telemetry

if TYPE_CHECKING:
    from safegen.core.concept import Concept as Concept
    from safegen.core.concept import load_concept as load_concept
    from safegen.core.errors import SafegenError as SafegenError
    from safegen.core.errors import SafegenWarning as SafegenWarning
    from safegen.core.generation import GenerationConfig as GenerationConfig
    from safegen.core.generation import Sample as Sample
    from safegen.data.triplets.triplets import Triplets as Triplets
    from safegen.evaluation.protocol import Protocol as Protocol
    from safegen.evaluation.protocol_file import load_protocol as load_protocol
    from safegen.evaluation.run.folder import Run as Run
    from safegen.judges import Judge as Judge
    from safegen.judges import load_judge as load_judge
    from safegen.models.generation import generate as generate
    from safegen.models.loading import load as load
    from safegen.models.model import Model as Model
    from safegen.patches.patch import Patch as Patch
    from safegen.stack import Stack as Stack
    from safegen.workflows.attack import attack as attack
    from safegen.workflows.edit import edit as edit
    from safegen.workflows.evaluate import evaluate as evaluate
    from safegen.workflows.export import export as export
    from safegen.workflows.export import save_patch as save_patch
    from safegen.workflows.judge import judge as judge
    from safegen.workflows.make_safe import make_safe as make_safe
    from safegen.workflows.merge import merge as merge
    from safegen.workflows.patch_from_model import patch_from_model as patch_from_model
    from safegen.workflows.protect import protect as protect
    from safegen.workflows.protect import unprotect as unprotect

disable_telemetry()
_MODULES = {
    "Concept": "safegen.core.concept",
    "GenerationConfig": "safegen.core.generation",
    "Judge": "safegen.judges",
    "Model": "safegen.models.model",
    "Patch": "safegen.patches.patch",
    "Protocol": "safegen.evaluation.protocol",
    "Run": "safegen.evaluation.run.folder",
    "SafegenError": "safegen.core.errors",
    "SafegenWarning": "safegen.core.errors",
    "Sample": "safegen.core.generation",
    "Stack": "safegen.stack",
    "Triplets": "safegen.data.triplets.triplets",
    "attack": "safegen.workflows.attack",
    "edit": "safegen.workflows.edit",
    "evaluate": "safegen.workflows.evaluate",
    "export": "safegen.workflows.export",
    "generate": "safegen.models.generation",
    "judge": "safegen.workflows.judge",
    "load": "safegen.models.loading",
    "load_concept": "safegen.core.concept",
    "load_judge": "safegen.judges",
    "load_protocol": "safegen.evaluation.protocol_file",
    "make_safe": "safegen.workflows.make_safe",
    "merge": "safegen.workflows.merge",
    "patch_from_model": "safegen.workflows.patch_from_model",
    "protect": "safegen.workflows.protect",
    "save_patch": "safegen.workflows.export",
    "unprotect": "safegen.workflows.protect",
}
__all__ = [
    "Concept",
    "GenerationConfig",
    "Judge",
    "Model",
    "Patch",
    "Protocol",
    "Run",
    "SafegenError",
    "SafegenWarning",
    "Sample",
    "Stack",
    "Triplets",
    "attack",
    "edit",
    "evaluate",
    "export",
    "generate",
    "judge",
    "load",
    "load_concept",
    "load_judge",
    "load_protocol",
    "make_safe",
    "merge",
    "patch_from_model",
    "protect",
    "save_patch",
    "unprotect",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'safegen' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
