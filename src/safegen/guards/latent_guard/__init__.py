"""Latent Guard and its head."""
