"""Commands that write what other commands read."""
