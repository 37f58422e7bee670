"""Checks of our files by programs that others wrote."""
