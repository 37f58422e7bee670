"""Training of the bundled miniature model: run `python -m tools.mini --help` in the checkout."""
