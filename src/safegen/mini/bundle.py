"""What the package carries of the miniature model: where its files lie.

Reached through the tables only.
"""

from __future__ import annotations

from pathlib import Path

from safegen.core.errors import UnknownNameError
from safegen.mini import captions

HERE = Path(__file__).parent


def pipeline_folder() -> Path:
    """Return the diffusers folder of the miniature model."""
    return HERE / "weights" / "pipeline"


def clip_folder() -> Path:
    """Return the folder of the miniature CLIP pair, its tokenizer and its image preprocessing."""
    return HERE / "weights" / "clip"


def judge_file() -> Path:
    """Return the weights of the miniature judge."""
    return HERE / "weights" / "judge.safetensors"


def triplets_folder(concept: str) -> Path:
    """Return the folder of the ready triplets of a concept.

    Raises:
        UnknownNameError: there are none for it.
    """
    known = [p.name for p in (HERE / "triplets").iterdir() if p.is_dir()]
    if concept not in known:
        raise UnknownNameError("bundled triplets", concept, known)
    return HERE / "triplets" / concept


def prompt_list(kind: str, n: int | None = None) -> list[tuple[str, str]]:
    """Return the `n` first (prompt, object) pairs of a list, or all of them.

    The split is in the name: `skulls` holds pairs of a template and an object that the model never
    met in training, and is what is measured; `skulls-train` holds pairs that it met, and shares no
    prompt with the other.

    Raises:
        UnknownNameError: there is no such list.
    """
    name, trained = kind.removesuffix("-train"), kind.endswith("-train")
    if name not in captions.TEMPLATES:
        raise UnknownNameError(
            "mini prompt list",
            kind,
            [k + end for k in captions.TEMPLATES for end in ("", "-train")],
        )
    return [(p.text, p.object) for p in captions.prompts(name, n, trained=trained)]
