"""Pictures to edit with: censored, paired and written down. Knows images and numbers, not diffusion models."""
