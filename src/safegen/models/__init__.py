"""The border to diffusion models: loading, sampling, choosing weights, patches."""

from safegen.models.folder import save_folder
from safegen.models.model import Model, OtherWeights, load
from safegen.models.patch import Applied, OtherBase, Patch
from safegen.models.sampling import Ask, Sampler, generate, save_picture
from safegen.models.select import select

__all__ = [
    "Applied",
    "Ask",
    "Model",
    "OtherBase",
    "OtherWeights",
    "Patch",
    "Sampler",
    "generate",
    "load",
    "save_folder",
    "save_picture",
    "select",
]
