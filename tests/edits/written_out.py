"""Equation 7 of UCE for one projection at a time, and rounds of RECE with it: oracles of tests."""

from __future__ import annotations

import torch

from safegen.edits.functional.closed_form import adversarial_embeddings


def solve_projection(w, keys, values, preserved, *, erase_scale, preserve_scale, lamb):
    """Return the W' with W' (l I + a K'K + b C'C) = l W + a V'K + b W C'C, float64."""
    w, keys, values, preserved = (x.double() for x in (w, keys, values, preserved))
    still = lamb * torch.eye(w.shape[1], dtype=torch.float64)
    still = still + preserve_scale * preserved.T @ preserved
    gram = still + erase_scale * keys.T @ keys
    return torch.linalg.solve(gram, w @ still + erase_scale * values.T @ keys, left=False)


def erase_rounds(original, keys, targets, preserved, *, rounds, ridge=0.1, start=None, **scales):
    """Return the projections after an erasure, or `start`, and rounds of RECE, each by itself."""

    def erase(weights, rows):
        return {
            name: solve_projection(w, rows, targets @ w.T, preserved, **scales)
            for name, w in weights.items()
        }

    weights = start or erase(original, keys)
    for _ in range(rounds):
        pair = list(weights.values()), list(original.values())
        weights = erase(weights, adversarial_embeddings(*pair, keys, ridge=ridge))
    return weights


def relative_distance(edited, want):
    """Return the largest relative distance of two sets of weights."""
    assert edited.keys() == want.keys()
    return max(float((edited[n] - want[n]).norm() / want[n].norm()) for n in want)
