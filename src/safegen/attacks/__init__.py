"""Attacks that try to bring back a removed concept."""
