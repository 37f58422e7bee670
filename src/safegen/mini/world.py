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

BACKGROUND_COLORS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "in a meadow": ((178, 222, 245), (118, 176, 84)),
    "in the desert": ((250, 224, 170), (222, 176, 110)),
    "by the sea": ((196, 236, 250), (44, 120, 178)),
    "in the forest": ((116, 164, 128), (52, 92, 62)),
    "in the city": ((196, 202, 212), (112, 116, 126)),
    "at dusk": ((120, 78, 140), (74, 52, 96)),
    "in the moonlight": ((30, 40, 84), (22, 26, 52)),
    "in a rose garden": ((252, 222, 228), (226, 142, 160)),
}
"""Sky and ground color of each background in RGB; a scene darkens by 12 % from top to bottom."""
