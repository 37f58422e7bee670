"""A plain diffusers folder as we write it, and what it says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field
from safetensors import SafetensorError

from safegen.core.errors import FileError
from safegen.core.files import staged_directory

if TYPE_CHECKING:
    from safegen.models.model import Model

METADATA_FILE = "safegen.json"
"""What a folder of ours says of itself, for programs."""


class _Held(BaseModel):
    hash: str = Field(pattern="^[0-9a-f]{64}$")


class _Whole(BaseModel):
    """What is read of what a file or folder of ours says of itself.

    Whatever else it says is kept as it is.
    """

    base: str = Field(pattern="^[0-9a-f]{64}$")
    weights: list[str] = Field(default_factory=list)
    patches: list[_Held]
    made_from: _Whole | None = None


def parse_metadata(text: str) -> dict[str, Any]:
    """Return what a model of ours says of itself; nothing of another's, or where it is not what we write.

    It is a statement: `Model.told` asks whether the weights beside it are those that it is of.
    """
    try:
        _Whole.model_validate_json(text)
        return dict(json.loads(text))
    except (ValueError, RecursionError):
        return {}


def save_folder(
    model: Model,
    out: str | Path,
    *,
    card: str | None = None,
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a plain diffusers folder that `from_pretrained` of old and new releases opens.

    Mends three things that today's libraries write and yesterday's cannot read: text-encoder keys
    without `text_model.`, a tokenizer without vocab.json and merges.txt, and the image processor's
    new name.

    Args:
        model: the model, with or without patches on it.
        out: the new folder.
        card: text of its README.md; none is written without.
        facts: content of its safegen.json, to which the hashes of what is written are added; none
            is written without. `safegen.export_folder` makes it.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    with staged_directory(Path(out), last="model_index.json") as tmp:
        tower = model.pipeline.text_encoder
        state = tower.state_dict()
        try:
            model.pipeline.save_pretrained(tmp)
            if not any(k.startswith("text_model.") for k in state):
                shutil.rmtree(tmp / "text_encoder")
                tower.save_pretrained(
                    tmp / "text_encoder",
                    state_dict={"text_model." + k: v for k, v in state.items()},
                )
        except Exception as error:
            if (
                isinstance(error, SafetensorError) or type(error) is Exception
            ):  # the latter is tokenizers' word for a full disk
                raise FileError(f"{out} cannot be written: {error}") from error
            raise
        for folder in tmp.glob("tokenizer*"):
            save_vocabulary(folder)
        forget_places(tmp)
        index = tmp / "model_index.json"
        parts = json.dumps(
            json.loads(index.read_text(encoding="utf-8")) | _keep_unloaded(model, tmp), indent=2
        )
        index.write_text(
            parts.replace("CLIPImageProcessorPil", "CLIPImageProcessor") + "\n", encoding="utf-8"
        )
        if card is not None:
            (tmp / "README.md").write_text(card, encoding="utf-8")
        if facts:
            (tmp / METADATA_FILE).write_text(
                json.dumps(dict(facts) | {"weights": model.weights}, indent=1, sort_keys=True)
                + "\n",
                encoding="utf-8",
            )


def _keep_unloaded(model: Model, out: Path) -> dict[str, Any]:
    """Copy the safety checker and its image processor, which we never load, and return their entries of model_index.json."""
    if model.folder is None or not (model.folder / "model_index.json").is_file():
        return {}
    was = json.loads((model.folder / "model_index.json").read_text(encoding="utf-8"))
    kept = [
        part
        for part in ("safety_checker", "feature_extractor")
        if (model.folder / part).is_dir() and was.get(part, [None])[0]
    ]
    for part in kept:
        shutil.copytree(model.folder / part, out / part, dirs_exist_ok=True)
    return {part: was[part] for part in kept} | (
        {"requires_safety_checker": True} if "safety_checker" in kept else {}
    )


def forget_places(folder: Path) -> None:
    """Take out of a folder's configurations where their writer read them from: no fact about the model, and a name of the machine."""
    for path in folder.rglob("*.json"):
        facts = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(facts, dict) and facts.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def save_vocabulary(folder: Path) -> None:
    """Write vocab.json and merges.txt beside a tokenizer.json, for releases that do not read the latter."""
    model = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    (folder / "vocab.json").write_text(
        json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8"
    )
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8"
    )
