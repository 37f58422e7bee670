"""Checkpoint formats: diffusers folders and single files."""
