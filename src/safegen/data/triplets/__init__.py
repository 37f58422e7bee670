"""Image triplets: load, make, check and censor."""
