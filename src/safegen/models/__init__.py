"""Diffusion models: loading, generation, parameter selection and checkpoint formats."""
