"""Losses, closed forms, rollouts and adversaries as functions of tensors."""
