"""The training loop shared by all gradient-based edits."""
