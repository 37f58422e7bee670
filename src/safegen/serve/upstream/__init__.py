"""Clients of the image servers that the proxy guards."""
