"""Protocols, runs, scores and reports."""
