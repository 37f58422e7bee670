"""Image service: HTTP in front of guarded stacks, or of another image server. It fails closed."""
