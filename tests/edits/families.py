"""Which edits work on which family of models: a part of the contract table."""

from __future__ import annotations

FAMILIES = ("sd1", "sd2-v", "sdxl", "sdxl-v", "sd3", "sd35", "flux", "flux-schnell")
EDITS = (
    "safegen",
    "safegen-plus",
    "concept_ablation",
    "duo",
    "esd",
    "sdd",
    "des",
    "shielddiff",
    "uce",
    "rece",
    "double_projections",
)
EDITS_ON_FAMILIES: dict[str, dict[str, str]] = {
    family: dict.fromkeys(EDITS, "") for family in FAMILIES
}
"""Family, edit: why the edit refuses models of the family, in the words of its error; empty if it
works. `test_edit_families.py` checks every cell."""
