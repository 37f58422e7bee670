"""Tables of every name that a user can give. Importing them loads no heavy library."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import import_module
from typing import Any

from safegen.core.errors import UnknownNameError

MODELS = {
    "mini": "safegen.mini.bundle:pipeline_folder",
    "mini-flow": "safegen.mini.bundle:flow_folder",
}
"""Bundled models: functions that return a diffusers folder."""

EDITS = {
    "safegen": "safegen.edits.safegen:SafeGen",
    "concept_ablation": "safegen.edits.concept_ablation:ConceptAblation",
    "duo": "safegen.edits.duo:DUO",
    "esd": "safegen.edits.esd:ESD",
    "des": "safegen.edits.des:DES",
    "sdd": "safegen.edits.sdd:SDD",
    "shielddiff": "safegen.edits.shielddiff:ShieldDiff",
    "uce": "safegen.edits.uce:UCE",
    "rece": "safegen.edits.rece:RECE",
    "double_projections": "safegen.edits.double_projections:DoubleProjections",
    "safegen-plus": "safegen.edits.safegen_plus:SafeGenPlus",
}

ADVERSARIES = {
    "none": "safegen.edits.functional.adversary:NoAdversary",
    "one-step": "safegen.edits.functional.adversary:FastGradient",
    "adv-unlearn": "safegen.edits.functional.adversary:AdvUnlearn",
    "closed-form": "safegen.edits.functional.adversary:ReceAdversary",
    "inversion": "safegen.edits.functional.adversary:InversionAdversary",
}
"""Adversaries that move text embeddings to where an edit fails, while it trains."""

GUARDS = {
    "sld": "safegen.guards.sld:SldConfig",
    "negative-prompt": "safegen.guards.negative_prompt:NegativePromptConfig",
    "safety-checker": "safegen.guards.safety_checker:SafetyCheckerConfig",
    "judge-filter": "safegen.guards.judge_filter:JudgeFilterConfig",
    "prompt-filter": "safegen.guards.prompt_filter:PromptFilterConfig",
    "safree": "safegen.guards.safree.safree:SafreeConfig",
    "latent-guard": "safegen.guards.latent_guard.latent_guard:LatentGuardConfig",
    "crops": "safegen.guards.crops:CropsConfig",
    "pno": "safegen.guards.pno:PnoConfig",
    "dual-latent": "safegen.guards.dual_latent:DualLatentConfig",
}
"""Guards that act during generation. NAME-PRESET selects a preset, such as `sld-max`."""

ATTACKS = {
    "compression": "safegen.attacks.compression:Compression",
    "concept_inversion": "safegen.attacks.concept_inversion:ConceptInversion",
    "img2img": "safegen.attacks.img2img:Img2Img",
    "inpaint": "safegen.attacks.inpaint:Inpaint",
    "latent_inversion": "safegen.attacks.latent_inversion:LatentInversion",
    "mma": "safegen.attacks.mma:MMA",
    "p4d": "safegen.attacks.p4d:P4D",
    "relearn": "safegen.attacks.relearn:Relearn",
    "ring_a_bell": "safegen.attacks.ring_a_bell:RingABell",
    "seeds": "safegen.attacks.seeds:Seeds",
    "sneaky_prompt": "safegen.attacks.sneaky_prompt:SneakyPrompt",
    "tree_search": "safegen.attacks.tree_search:TreeSearch",
    "unlearn_diff": "safegen.attacks.unlearn_diff:UnlearnDiff",
}
"""Attacks that try to bring a removed concept back."""

CLIPS = {"mini": "safegen.mini.bundle:clip_folder"}
"""Bundled CLIP models: functions that return a folder in the format of transformers."""

JUDGES = {
    "mini": "safegen.judges.mini:MiniJudge",
    "mini-held-out": "safegen.judges.mini_held_out:MiniHeldOutJudge",
    "nudenet": "safegen.judges.nudenet:NudeNetJudge",
    "open-nsfw": "safegen.judges.open_nsfw:OpenNsfwJudge",
    "sd-safety-checker": "safegen.judges.safety_checker:SafetyCheckerJudge",
    "q16": "safegen.judges.q16:Q16Judge",
    "clip": "safegen.judges.clip:ClipJudge",
}

_GENITALS = (
    "ANUS_EXPOSED",
    "FEMALE_BREAST_EXPOSED",
    "FEMALE_GENITALIA_EXPOSED",
    "MALE_GENITALIA_EXPOSED",
)
LABEL_SETS = {
    "i2p5": ("BUTTOCKS_EXPOSED", *_GENITALS),
    "strict4": _GENITALS,
    "exposed9": (
        *(
            "ARMPITS_EXPOSED",
            "BELLY_EXPOSED",
            "BUTTOCKS_EXPOSED",
            "FEET_EXPOSED",
            "MALE_BREAST_EXPOSED",
        ),
        *_GENITALS,
    ),
}
"""Names for several labels of the judge `nudenet`, usable wherever labels are given.

`i2p5` is what the I2P benchmark counts; `strict4` leaves out buttocks; `exposed9` is every label
that ends in EXPOSED, so that bare feet, arms and bellies count too, as several papers have it.
"""

EXTRACTORS = {
    "mini-clip": "safegen.features.mini_clip:MiniClip",
    "clip": "safegen.features.clip:Clip",
    "inception": "safegen.features.inception:Inception",
    "inception-torch": "safegen.features.inception:inception_torch",
    "inception-clean": "safegen.features.inception:inception_clean",
}
"""Feature extractors for distances and the CLIP score.

All but the first need weights that the user has.
"""

PROMPT_LISTS = {"mini": "safegen.mini.bundle:prompt_list"}
"""Prompt sources, named `source:list`: functions of a list name and a length or None."""

TRIPLETS = {"mini": "safegen.mini.bundle:triplets_folder"}
"""Bundled triplets, named `source:concept`: a function from a concept's name to a folder."""

CONCEPTS = ("skulls", "fire", "nudity", "violence")
"""Built-in concepts.

Each is a file in `concepts/`. The last two are published phrases and a judge: no triplets or
prompts of them are in the package.
"""

PROTOCOLS = (
    "mini-smoke",
    "mini-smoke-fire",
    "mini-full",
    "mini-full-fire",
    "mini-ladder",
    "mini-ladder-fire",
    "mini-composition",
    "mini-composition-fire",
    "safegen-four",
    "i2p-931",
    "esd-i2p-4703",
    "uda-static-142-exposed9",
    "rab-nudity-k16-eta3",
    "rab-nudity-k38-eta3",
    "rab-nudity-k77-eta3",
    "coco-10k",
    "coco-30k",
)
"""Built-in protocols.

Each is a file in `protocols/`. All but the mini ones need a file of prompts that the user has.
"""


def expand_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the labels with every name of a label set spelt out, each label once, in order."""
    labels = tuple(labels)
    if not LABEL_SETS.keys().isdisjoint(labels):
        labels = tuple(one for label in labels for one in LABEL_SETS.get(label, (label,)))
    return tuple(dict.fromkeys(labels))


def collapse_labels(labels: Iterable[str]) -> tuple[str, ...]:
    """Return the name of the label set with these labels, or the labels if there is none."""
    labels = tuple(labels)
    sets = (name for name, members in LABEL_SETS.items() if set(members) == set(labels))
    name = next(sets, None)
    return labels if name is None else (name,)


def resolve(table: Mapping[str, str], name: str, noun: str) -> Any:
    """Return the object that `name` stands for.

    Raises:
        UnknownNameError: the table has no such name; the message lists them and the nearest.
    """
    if name not in table:
        raise UnknownNameError(noun, name, table)
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)


def registered_name(table: Mapping[str, str], kind: type) -> str:
    """Return the name of a class in a table, or that of its module if it has none."""
    target = f"{kind.__module__}:{kind.__name__}"
    names = (name for name, value in table.items() if value == target)
    return next(names, kind.__module__.rpartition(".")[2])
