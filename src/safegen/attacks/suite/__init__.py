"""Suites of attack prompts for any model and concept."""
