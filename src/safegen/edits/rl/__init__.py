"""Reinforcement learning of a denoiser with judges as reward."""
