"""Images and prompts, independent of diffusion models."""
