"""Stages of `make_safe`: training images, edit, check and files."""
