"""Edits: a model goes in, a patch comes out; the model is untouched."""
