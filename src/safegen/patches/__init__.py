"""Patches: changed weights as one file, their arithmetic and LoRA conversion."""
