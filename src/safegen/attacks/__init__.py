"""Attacks that try to bring a removed concept back."""
