"""The OpenAI Images interface."""
