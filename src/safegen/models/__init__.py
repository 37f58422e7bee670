"""Diffusion models: loading, generation, parameter selection and checkpoint formats."""

from safegen.core.quiet import silence_libraries

with silence_libraries():  # its first import logs two lines about torchvision
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion  # noqa: F401
