"""Networks that map images and texts to feature vectors."""
