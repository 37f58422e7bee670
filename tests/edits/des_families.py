"""Families that `des` edits, or the reason why it cannot."""

FAMILIES = {
    family: {"des": ""}
    for family in ("sd1", "sd2-v", "sdxl", "sdxl-v", "sd3", "sd35", "flux", "flux-schnell")
}
"""Family of `tests/tiny.py`, edit: a reason, or nothing where it works."""
