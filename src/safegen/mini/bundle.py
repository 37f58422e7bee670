"""Bundled files of the miniature model; the registry refers to these functions."""

from __future__ import annotations

from pathlib import Path

from safegen.core.errors import UnknownNameError
from safegen.mini import captions

HERE = Path(__file__).parent
ENDINGS = ("", "-train", "-counterpart", "-train-counterpart", "-composition")
"""Endings of the names of prompt lists."""


def pipeline_folder() -> Path:
    """Return the diffusers folder of the miniature model."""
    return HERE / "weights" / "pipeline"


def flow_folder() -> Path:
    """Return the diffusers folder of mini-flow: an MMDiT with flow matching on the same world."""
    return HERE / "weights" / "flow"


def clip_folder() -> Path:
    """Return the folder of the miniature CLIP model, its tokenizer and image processor."""
    return HERE / "weights" / "clip"


def judge_file() -> Path:
    """Return the weights file of the miniature judge."""
    return HERE / "weights" / "judge.safetensors"


def held_out_judge_file() -> Path:
    """Return the weights file of the held-out judge."""
    return HERE / "weights" / "held_out_judge.safetensors"


def triplets_folder(concept: str) -> Path:
    """Return the folder of the bundled triplets of a concept.

    Raises:
        UnknownNameError: no triplets are bundled for it.
    """
    known = [p.name for p in (HERE / "triplets").iterdir() if p.is_dir()]
    if concept not in known:
        raise UnknownNameError("bundled triplets", concept, known)
    return HERE / "triplets" / concept


def prompt_list(
    kind: str, n: int | None = None
) -> list[tuple[str, str]] | list[tuple[str, str, str]]:
    """Return the first `n` (prompt, object) pairs of a list; None for all.

    `skulls` combines templates and objects that are held out from training, for evaluation.
    `skulls-train` has the combinations of training; the two lists share no prompt.
    `skulls-counterpart` and `skulls-train-counterpart` have the benign prompt with the same object
    and background for each prompt of the list. `skulls-composition` has the prompts of `skulls`
    that name a background, with it. `skulls-ladder-name` is one of five rungs (`captions.RUNGS`).

    Raises:
        UnknownNameError: no such list.
    """
    concept, _, rung = kind.partition("-ladder-")
    if concept in captions.LADDERS and rung in captions.RUNGS:
        return captions.list_ladder(concept, rung, n)
    if (name := kind.removesuffix("-composition")) != kind and name in captions.TEMPLATES:
        return captions.list_compositions(name, n)
    listed = kind.removesuffix("-counterpart")
    name, trained = listed.removesuffix("-train"), listed.endswith("-train")
    if name not in captions.TEMPLATES:
        known = [k + end for k in captions.TEMPLATES for end in ENDINGS]
        known += [f"{k}-ladder-{rung}" for k in captions.LADDERS for rung in captions.RUNGS]
        raise UnknownNameError("mini prompt list", kind, known)
    return captions.list_prompts(name, n, trained=trained, counterpart=listed != kind)
