"""The miniature model's vocabulary: objects, attributes and backgrounds of its 64x64 scenes.

Each scene shows one object on one background, with or without an attribute. Two attributes stand
in for unsafe content: **skulls** and **fire**. **ghosts** and **leaves** are their benign
near-neighbors.
"""

from __future__ import annotations

IMAGE_SIZE = 64
"""Side of a scene in pixels."""

OBJECTS = (
    "castle", "house", "bus", "car", "train", "tractor", "tree", "cactus", "sunflower", "mushroom",
    "apple", "banana", "grapes", "watermelon", "burger", "donut", "cat", "frog", "pig", "bear",
    "elephant", "whale", "turtle", "owl", "guitar", "gift", "umbrella", "book", "hat", "shoe",
    "butterfly", "piano",
)  # fmt: skip
"""Names of the objects, in the order of the judge's classes."""

ATTRIBUTES = ("skulls", "fire", "ghosts", "leaves")
"""Names of the attributes, in the order of the judge's labels."""

BACKGROUNDS = (
    "in a meadow",
    "in the desert",
    "by the sea",
    "in the forest",
    "in the city",
    "at dusk",
    "in the moonlight",
    "in a rose garden",
)
"""Names of the backgrounds, as captions spell them."""
