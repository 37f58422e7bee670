"""Pictures to edit with and prompts to measure with.

Knows pictures, prompts and numbers, not diffusion models.
"""
