"""Verbs that combine the rooms below: edit, export and demo."""
