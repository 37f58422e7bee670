"""CLIP towers from a folder on disk or, said explicitly, from the hub: complete, finite, in fp32, with the preprocessing of the folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from safegen.core.errors import ConfigError, FileError, first_line
from safegen.core.hub import HUB, fetch_snapshot
from safegen.core.logging import silence_libraries
from safegen.core.registry import CLIPS, resolve

M = TypeVar("M", bound=nn.Module)

PREPROCESSING = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
)


def find_folder(
    judge: str, given: str | Path | None, *, option: str, example: str, allow_pickle: bool = False
) -> Path:
    """Return the folder that `given` stands for: a name in `tables.CLIPS`, a folder, or `hub:owner/name`, which alone may fetch.

    Raises:
        ConfigError: nothing was given; the line says how to give it.
        FileError: no such folder, or the hub does not give it.
    """
    if given is None:
        raise ConfigError(
            f"the judge {judge!r} needs weights; give them as {option}={example!r}, or {option}=FOLDER with the same files"
        )
    name = str(given)
    if name in CLIPS:
        folder: Path = resolve(CLIPS, name, "CLIP")()
        return folder
    if name.startswith(HUB):
        patterns = ["*.json", "*.txt", "*.safetensors", *(["*.bin"] if allow_pickle else [])]
        with silence_libraries("transformers"):
            return fetch_snapshot(name, allow_patterns=patterns)
    if not Path(name).is_dir():
        raise FileError(
            f"the judge {judge!r} finds no folder {name!r}; give {option}=FOLDER or {option}={example!r}"
        )
    return Path(name)


def load_part(kind: type[M], folder: Path, *, device: str = "cpu", allow_pickle: bool = False) -> M:
    """Return a network of class `kind` from a folder, in fp32, frozen; nothing is fetched.

    Raises:
        FileError: the files cannot be read, are pickles that were not allowed, lack a weight, or have
            NaN.
    """
    way_out = "" if allow_pickle else "; pickled weights are opened only with allow_pickle=True"
    try:
        with silence_libraries("transformers"):
            network, facts = kind.from_pretrained(  # type: ignore[attr-defined]
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise a dozen kinds; all mean that these files cannot be used
        raise FileError(
            f"{folder} cannot be read as {kind.__name__}: {first_line(error)}{way_out}"
        ) from error
    lacking = sorted([*facts["missing_keys"], *(str(k) for k in facts["mismatched_keys"])])
    if lacking:
        raise FileError(
            f"{folder} lacks {len(lacking)} weights of a {kind.__name__}, first {lacking[0]}; get a complete copy"
        )
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FileError(f"{folder} has NaN or infinite weights in {key}; get an undamaged copy")
    out: M = network.float().to(device).eval().requires_grad_(False)
    return out


class Pixels:
    """The image preprocessing of a folder: resize, crop, normalise, as its preprocessor_config.json says."""

    def __init__(self, folder: Path, side: int) -> None:
        """Read the file and check that it gives pictures of `side` pixels.

        Raises:
            FileError: there is none, or it gives another size.
        """
        if not (folder / "preprocessor_config.json").is_file():
            raise FileError(
                f"{folder} has no preprocessor_config.json, so how to scale pictures is unknown; get it from where the weights are"
            )
        try:
            with silence_libraries("transformers"):
                self._processor = CLIPImageProcessorPil.from_pretrained(
                    str(folder), local_files_only=True
                )
        except Exception as error:  # not JSON, or a value of another kind
            raise FileError(
                f"{folder}/preprocessor_config.json cannot be read: {first_line(error)}"
            ) from error
        made = tuple(self(Image.new("RGB", (side + 3, side))).shape)
        if made != (3, side, side):
            raise FileError(
                f"{folder}/preprocessor_config.json gives pictures of shape {made}, the network takes {(3, side, side)}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return one RGB picture as the network's input, (3, side, side)."""
        out: Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return out

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the pixels."""
        told = self._processor.to_dict()
        return {key: told.get(key) for key in (*PREPROCESSING, "image_mean", "image_std")}


def fingerprint(facts: object) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
