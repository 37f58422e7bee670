"""Which attack runs on which family; a cell is empty, or has the reason of the refusal."""

from __future__ import annotations

from tests.tiny import FAMILIES

ATTACKS = (
    "compression",
    "concept_inversion",
    "img2img",
    "inpaint",
    "latent_inversion",
    "mma",
    "p4d",
    "relearn",
    "ring_a_bell",
    "seeds",
    "sneaky_prompt",
    "tree_search",
    "unlearn_diff",
)
NO_LEARNED_WORDS = (
    "learned words need a pipeline of diffusers with textual inversion, "
    "got StableDiffusion3Pipeline"
)
ATTACKS_ON_FAMILIES: dict[str, dict[str, str]] = {
    family: dict.fromkeys(ATTACKS, "")
    | ({"concept_inversion": NO_LEARNED_WORDS} if family in ("sd3", "sd35") else {})
    for family in FAMILIES
}
"""Family: attack: reason why it is refused, part of its message; empty where it runs."""
