"""Searches that attacks share."""
