"""The bundled miniature model: its world, its captions, its networks and their weights."""
