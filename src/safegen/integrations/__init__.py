"""Plug-ins for other toolkits; each is an entry point, and is imported by its toolkit alone."""
