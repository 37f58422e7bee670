"""SAFREE: training-free projection of prompt embeddings (arXiv:2410.12761)."""
