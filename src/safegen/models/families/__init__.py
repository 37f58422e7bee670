"""What tells families of models apart: text, noise, calls of denoisers and pipelines."""
