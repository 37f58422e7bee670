"""CLIP: loading of weights, image preprocessing, and the feature extractor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.clip.modeling_clip import CLIPModel
from transformers.models.clip.tokenization_clip import CLIPTokenizer

from safegen.core.errors import ConfigError, FileError, first_line
from safegen.core.hashing import hash_tensors
from safegen.core.hub import HUB, fetch_snapshot
from safegen.core.quiet import silence_libraries
from safegen.core.registry import CLIPS, resolve

M = TypeVar("M", bound=nn.Module)

EXAMPLE = "hub:openai/clip-vit-large-patch14"
BATCH_SIZE = 32
PREPROCESSING = (
    "do_resize",
    "size",
    "resample",
    "do_center_crop",
    "crop_size",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
"""Settings of preprocessor_config.json that determine the pixels."""


def find_clip_folder(
    weights: str | Path | None, *, user: str, example: str = EXAMPLE, allow_pickle: bool = False
) -> Path:
    """Return the folder of CLIP weights, downloaded only for `hub:owner/name`.

    Args:
        weights: a name in `CLIPS`, a folder, or `hub:owner/name`.
        user: the judge, guard or extractor that needs the weights, for messages.
        example: weights to suggest in messages.
        allow_pickle: also download weights stored as pickles.

    Raises:
        ConfigError: no weights are given.
        FileError: there is no such folder, or the download fails.
    """
    if not weights:
        raise ConfigError(f"{user} needs weights. Set weights={example!r} or weights=FOLDER.")
    name = str(weights)
    if name in CLIPS:
        folder: Path = resolve(CLIPS, name, "CLIP")()
        return folder
    if name.startswith(HUB):
        patterns = ["*.json", "*.txt", "*.safetensors", *(["*.bin"] if allow_pickle else [])]
        with silence_libraries("transformers"):
            return fetch_snapshot(name, select=lambda names: patterns)
    if not Path(name).is_dir():
        raise FileError(
            f"there is no folder {name!r} with weights for {user}. "
            f"Set weights={example!r} or weights=FOLDER."
        )
    return Path(name)


def load_clip_network(
    network_class: type[M], folder: Path, *, device: str = "cpu", allow_pickle: bool = False
) -> M:
    """Return a network from a local folder in fp32, frozen and complete.

    Raises:
        FileError: the files cannot be read, are pickles that are not allowed, lack a weight, or
            have NaN.
    """
    hint = "" if allow_pickle else ". Pickled weights need allow_pickle=True."
    try:
        with silence_libraries("transformers"):
            network, info = network_class.from_pretrained(  # type: ignore[attr-defined]
                str(folder),
                dtype=torch.float32,
                local_files_only=True,
                use_safetensors=None if allow_pickle else True,
                output_loading_info=True,
            )
    except Exception as error:  # transformers and safetensors raise a dozen types
        raise FileError(
            f"{folder} cannot be read as {network_class.__name__}: {first_line(error)}{hint}"
        ) from error
    missing = sorted([*info["missing_keys"], *(str(k) for k in info["mismatched_keys"])])
    if missing:
        raise FileError(
            f"{folder} lacks {len(missing)} weights of {network_class.__name__}, such as "
            f"{missing[0]}. Get a complete copy."
        )
    for key, value in network.state_dict().items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise FileError(f"{folder} has NaN or infinite weights in {key}. Get an intact copy.")
    frozen: M = network.float().to(device).eval().requires_grad_(False)
    return frozen


def load_clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Return the tokenizer of a local folder.

    Raises:
        FileError: the folder has no tokenizer, or it cannot be read.
    """
    # without these files transformers returns an empty tokenizer
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise FileError(
            f"{folder} has no tokenizer. Add tokenizer.json, or vocab.json and merges.txt."
        )
    try:
        with silence_libraries("transformers"):
            return CLIPTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # no vocabulary, not JSON ...
        raise FileError(
            f"{folder} has a tokenizer that cannot be read: {first_line(error)}"
        ) from error


class ClipPreprocessor:
    """Image preprocessing of a CLIP folder: resize, crop and normalize."""

    def __init__(self, folder: Path, size: int) -> None:
        """Read preprocessor_config.json and check its output.

        Raises:
            FileError: the file is missing or invalid, or does not give images of `size` pixels.
        """
        path = folder / "preprocessor_config.json"
        if not path.is_file():
            raise FileError(f"{folder} has no preprocessor_config.json. Get it with the weights.")
        try:
            with silence_libraries("transformers"), np.errstate(all="ignore"):
                self._processor = CLIPImageProcessorPil.from_pretrained(
                    str(folder), local_files_only=True
                )
                output = self(Image.new("RGB", (size + 3, size)))
        except Exception as error:  # not JSON, or a value of another type
            raise FileError(f"{path} cannot be read: {first_line(error)}") from error
        if tuple(output.shape) != (3, size, size) or not bool(output.isfinite().all()):
            raise FileError(
                f"{path} must give finite images of shape {(3, size, size)}, "
                f"got {tuple(output.shape)}"
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """Return an RGB image as the network's input, (3, size, size)."""
        pixels: Tensor = self._processor(images=image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def preprocess_pixels(self, pixels: Tensor) -> Tensor:
        """Return pixels as the network's input, with a gradient, (n, 3, size, size).

        They differ from those of images by the rounding to 8 bits before and after resizing.

        Args:
            pixels: (n, 3, h, w) in [-1, 1].

        Raises:
            ConfigError: images are resized by another filter than bicubic or bilinear.
        """
        settings, x = self.settings, (pixels.float() + 1) * 127.5
        if settings["do_resize"]:
            mode = {2: "bilinear", 3: "bicubic"}.get(int(settings["resample"]))
            if mode is None:
                raise ConfigError(
                    "resample must be 2 (bilinear) or 3 (bicubic) for a gradient, got "
                    f"{settings['resample']}. Change it in preprocessor_config.json."
                )
            size = _resized(settings["size"], *x.shape[2:])
            x = nn.functional.interpolate(x, size, mode=mode, antialias=True).clamp(0, 255)
        if settings["do_center_crop"]:
            height, width = settings["crop_size"]["height"], settings["crop_size"]["width"]
            top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
            x = x[:, :, top : top + height, left : left + width]
        if settings["do_rescale"]:
            x = x * float(settings["rescale_factor"])
        if settings["do_normalize"]:
            mean, std = (x.new_tensor(settings[k]) for k in ("image_mean", "image_std"))
            x = (x - mean[:, None, None]) / std[:, None, None]
        return x

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that determine the pixels."""
        settings = self._processor.to_dict()
        return {key: settings.get(key) for key in PREPROCESSING}


def _resized(size: Mapping[str, int], height: int, width: int) -> tuple[int, int]:
    """Return the height and width after resizing: fixed ones, or by the shortest edge."""
    edge = size.get("shortest_edge")
    if edge is None:
        return size["height"], size["width"]
    short = min(height, width)
    return int(edge * height / short), int(edge * width / short)


class Clip:
    """Feature extractor: projected embeddings of a CLIP model."""

    def __init__(self, *, weights: str | None = None, device: str = "cpu") -> None:
        """Load the model.

        Args:
            weights: `mini`, a folder in the layout of transformers (config.json,
                model.safetensors, preprocessor_config.json, tokenizer), or `hub:owner/name`.
            device: a torch device.

        Raises:
            ConfigError: no weights are given.
            FileError: the weights cannot be fetched or read.
        """
        self._folder = find_clip_folder(weights, user="the extractor 'clip'")
        self._net = load_clip_network(CLIPModel, self._folder, device=device)
        size = int(self._net.config.vision_config.image_size)
        self._preprocess = ClipPreprocessor(self._folder, size)
        self.width = int(self._net.config.projection_dim)
        self.id = f"clip:{hash_tensors(self._net.state_dict())}"

    def features(self, images: Sequence[Image.Image]) -> NDArray[np.float64]:
        """Return image embeddings (n, width), not normalized."""
        batches = (images[i : i + BATCH_SIZE] for i in range(0, len(images), BATCH_SIZE))
        pixels = [torch.stack([self._preprocess(i.convert("RGB")) for i in b]) for b in batches]
        return embed_images(self._net, pixels)

    def embed(self, pixels: Tensor) -> Tensor:
        """Return image embeddings (n, width) with a gradient; see `DifferentiableExtractor`."""
        inputs = self._preprocess.preprocess_pixels(pixels.to(self._net.device))
        embeddings: Tensor = self._net.get_image_features(pixel_values=inputs).pooler_output
        return embeddings

    def texts(self, texts: Sequence[str]) -> NDArray[np.float64]:
        """Return text embeddings (n, width), not normalized; long texts are truncated.

        Raises:
            FileError: the folder has no tokenizer.
        """
        return embed_texts(self._net, load_clip_tokenizer(self._folder), texts)


@torch.no_grad()
def embed_images(net: CLIPModel, batches: Sequence[Tensor]) -> NDArray[np.float64]:
    """Return the projected embeddings of preprocessed images (b, 3, size, size), (n, width)."""
    outputs = (net.get_image_features(pixel_values=b.to(net.device)) for b in batches)
    return _concatenate(net, [o.pooler_output for o in outputs])


@torch.no_grad()
def embed_texts(
    net: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]
) -> NDArray[np.float64]:
    """Return the projected embeddings of texts, (n, width)."""
    rows, length = [], int(net.config.text_config.max_position_embeddings)
    for i in range(0, len(texts), BATCH_SIZE):
        tokens = tokenizer(
            list(texts[i : i + BATCH_SIZE]),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )
        rows.append(net.get_text_features(**tokens.to(net.device)).pooler_output)
    return _concatenate(net, rows)


def _concatenate(net: CLIPModel, rows: Sequence[Tensor]) -> NDArray[np.float64]:
    if not rows:
        return np.empty((0, int(net.config.projection_dim)))
    return np.concatenate([row.double().cpu().numpy() for row in rows])
