"""Machinery of attacks: the attacked stack, its cost, and the engine."""
