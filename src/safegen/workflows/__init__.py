"""Workflows that combine the packages below: edit, export and demo."""
