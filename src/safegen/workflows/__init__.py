"""Workflows that combine the packages below: edit, attack, export and demo."""
