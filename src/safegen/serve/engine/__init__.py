"""Engines of the service: worker processes with loaded stacks, a queue and dynamic batches."""
