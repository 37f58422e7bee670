"""Tokens, limits, logs, metrics and health of the service."""
