"""Prompt files and lists."""
