"""Engines that do the batches of a run, and the writer of its journals."""
