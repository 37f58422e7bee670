"""The border to diffusers: a loaded pipeline, checked, with a name for its weights."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from logging import CRITICAL
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    StableDiffusionXLPipeline,
)
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection
from transformers.utils import logging as transformers_logging

from safegen.core.errors import ConfigError, FileError, SafegenWarning, UnknownNameError
from safegen.core.files import exists
from safegen.core.hashing import hash_tensors
from safegen.core.registry import MODELS, resolve
from safegen.models.checkpoint.diffusers_folder import METADATA_FILE, parse_metadata
from safegen.models.hub import HUB, fetch, looks_like_hub

if TYPE_CHECKING:
    from safegen.patches.patch import AppliedPatch, Patch

XL = "StableDiffusionXLPipeline"
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "StableDiffusionPipeline": (
        StableDiffusionPipeline,
        {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False},
    ),
    XL: (StableDiffusionXLPipeline, {"feature_extractor": None}),
}
"""Pipeline class named in model_index.json: the class that opens it, what it is told: parts that draw nothing may lack their folders."""
TOWERS = {kind.__name__: kind for kind in (CLIPTextModel, CLIPTextModelWithProjection)}
"""Text encoders by the class that model_index.json names."""
PARTS = ("unet", "vae", "text_encoder")
"""Parts of every pipeline that have weights; SDXL has `text_encoder_2` too (`Model.parts`)."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MetadataMismatchWarning(SafegenWarning):
    """A model's file or folder says of itself what was true of other weights."""


@dataclass(eq=False)
class Model:
    """A loaded text-to-image model. Edits and guards see it only through this border."""

    name: str
    """What it was loaded by."""
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline
    folder: Path | None = None
    """The folder it was read from, where that is known: parts that are not loaded (the safety checker) lie there."""
    applied_patches: list[AppliedPatch] = field(default_factory=list)
    """What is on it now, in order; `Patch.apply` puts it here and its undoing takes it away."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """What a file or folder of ours says of itself: its base, the patches that are in its weights, its figures. `told` holds it to them."""
    _rounded: dict[str, str] = field(default_factory=dict, init=False, repr=False)
    _read: str = field(default="", init=False, repr=False)
    """The denoiser as it was read, as `weight_digests` has it.

    Asked only of what says something of itself.
    """

    @property
    def patches(self) -> list[Patch]:
        """Patches that are on it now, in order, but for those that are not to be named."""
        return [one.patch for one in self.applied_patches if one.named]

    @property
    def parts(self) -> tuple[str, ...]:
        """The pipeline's parts that have weights."""
        return parts_of(self.pipeline)

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The network that predicts the noise."""
        return self.pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        """The autoencoder between pictures and latents."""
        return self.pipeline.vae

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.pipeline.unet.device

    @property
    def size(self) -> int:
        """Side in pixels of the pictures it was trained on."""
        scale: int = self.pipeline.vae_scale_factor
        return int(self.denoiser.config.sample_size) * scale

    @cached_property
    def hash(self) -> str:
        """SHA-256 over the denoiser's weights as they were first asked for: the identity that patches refer to."""
        return hash_tensors(self.denoiser.state_dict())

    @cached_property
    def verified_metadata(self) -> Mapping[str, Any]:
        """What it says of itself (`provenance`) and has the weights for.

        Warns:
            MetadataMismatchWarning: its weights are not those that this was said of; nothing is told then.
                Said once of a model.
        """
        if self.provenance and self._read not in self.provenance.get("weights", ()):
            warnings.warn(
                f"{self.name!r} says what is in it, and not of the weights that it has (were they trained or merged since, or written by "
                "an early safegen?): that is left out of what is made of it",
                MetadataMismatchWarning,
                stacklevel=2,
            )
            return {}
        return self.provenance

    @property
    def weights(self) -> list[str]:
        """The denoiser as it is now, patches included, as `weight_digests` has it."""
        return weight_digests(self.denoiser.state_dict())

    def set_metadata(self, provenance: Mapping[str, Any]) -> None:
        """Take down what its file or folder says of itself.

        Before any patch is on it, for `told` holds it to these weights.
        """
        self.provenance = provenance
        if provenance:
            self._read = weight_digests(self.denoiser.state_dict(), rounded=False)[0]

    @property
    def components_hash(self) -> str:
        """SHA-256 over what stands around the denoiser: the other parts' weights and the schedule."""
        config = {
            k: str(v) for k, v in self.pipeline.scheduler.config.items() if not k.startswith("_")
        }
        facts = {
            part: hash_tensors(getattr(self.pipeline, part).state_dict())
            for part in self.parts
            if part != "unet"
        }
        return sha256(json.dumps(facts | {"schedule": config}, sort_keys=True).encode()).hexdigest()

    @property
    def cast_hashes(self) -> dict[str, str]:
        """What `hash` is when the same weights are loaded as fp16 or bf16.

        Empty of a model not in fp32, or not asked before a patch.
        """
        if not self._rounded and not self.applied_patches and self.denoiser.dtype == torch.float32:
            state = self.denoiser.state_dict()
            self._rounded |= {
                name: hash_tensors(state, dtype=DTYPES[name]) for name in ("fp16", "bf16")
            }
        return dict(self._rounded)

    @property
    def family(self) -> str:
        """The denoiser's build where shapes alone do not tell: SD 1.x and 2.x have self-attention of equal shapes and unequal heads."""
        config = self.denoiser.config
        heads = (
            config.attention_head_dim
        )  # the library's name for the number of heads, of every level or of each
        heads = [heads] * len(config.down_block_types) if isinstance(heads, int) else list(heads)
        return f"{type(self.denoiser).__name__}, heads {heads}, text {config.cross_attention_dim}"

    @torch.no_grad()
    def encode_text(self, texts: list[str]) -> Tensor:
        """Return the text embeddings (n, tokens, width) that the denoiser is conditioned on.

        Raises:
            ConfigError: the model is an SDXL, whose denoiser is conditioned on more.
        """
        if "text_encoder_2" in self.parts:
            raise ConfigError(
                f"{self.name!r} is an SDXL, whose denoiser is conditioned on two text encoders and the picture's size; "
                "edits and fine-tuning know SD 1.x and 2.x only so far"
            )
        tokenizer, tower = self.pipeline.tokenizer, self.pipeline.text_encoder
        ids = tokenizer(
            texts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        out: Tensor = tower(ids.to(self.device))[0]
        return out

    def last_token_positions(self, texts: list[str]) -> list[int]:
        """Return the position of each text's own last token in its embedding.

        Of an empty text, 0, the start mark.
        """
        tokenizer = self.pipeline.tokenizer
        mask = tokenizer(
            texts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True
        ).attention_mask
        return [sum(row) - 2 for row in mask]

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, batch: int = 8) -> Tensor:
        """Return scaled latents: the posterior mean, so that the same picture always gives the same latent.

        Args:
            images: (n, 3, h, w) in [-1, 1].
            batch: pictures encoded at once.
        """
        parts = [
            self.vae.encode(b.to(self.device, self.vae.dtype)).latent_dist.mode()
            for b in images.split(batch)
        ]
        return torch.cat(parts) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_images(self, latents: Tensor, *, batch: int = 8) -> list[Image.Image]:
        """Return the pictures of scaled latents, as the pipeline makes them.

        Args:
            latents: (n, c, h, w).
            batch: pictures decoded at once.
        """
        scaled = (latents / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        show = self.pipeline.image_processor.postprocess
        return [
            image
            for part in scaled.split(batch)
            for image in show(self.vae.decode(part).sample, output_type="pil")
        ]

    def alphas_cumprod(self) -> Tensor:
        """Return the schedule's abar, (train timesteps,)."""
        out: Tensor = self.pipeline.scheduler.alphas_cumprod
        return out

    @property
    def prediction(self) -> str:
        """What the denoiser predicts: `epsilon` or `v_prediction`."""
        return str(self.pipeline.scheduler.config.prediction_type)


def load(
    name: str | Path,
    *,
    dtype: str = "fp32",
    device: str = "cpu",
    allow_pickle: bool = False,
    config: str | Path | None = None,
) -> Model:
    """Load a model by its name in the table, from a diffusers folder, a one-file checkpoint, or (`hub:owner/name`) from the hub.

    Args:
        name: `mini`, a folder that holds model_index.json, a .safetensors (or .ckpt) file, or
            `hub:owner/name`. Only the last is fetched.
        dtype: fp32, bf16 or fp16.
        device: a torch device.
        allow_pickle: also open weights stored as pickles (.bin, .ckpt), which can run code of
            whoever made them.
        config: for a one-file checkpoint, a diffusers folder of the same family, for the small
            files that it lacks.

    Raises:
        ConfigError: config is given with something else than a one-file checkpoint, or the device is
            not to be had here.
        UnknownNameError: neither a known model nor a folder.
        FileError: the folder lacks parts, holds pickles or damaged files, its weights have NaN, or
            the hub's model is not to be had.
    """
    name = f"{'' if name.is_absolute() else './'}{name}" if isinstance(name, Path) else name
    if dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    check_device(device)
    if name not in MODELS and exists(name, file=True):
        from safegen.models.checkpoint.single_file import load_single_file

        small = None if config is None else Path(config)
        return load_single_file(
            Path(name), config=small, dtype=dtype, device=device, allow_pickle=allow_pickle
        )
    if config is not None:
        raise ConfigError(
            f"config has no effect on {name!r}, which is no one-file checkpoint; leave it out"
        )
    options: dict[str, Any] = {
        "dtype": DTYPES[dtype],
        "use_safetensors": None if allow_pickle else True,
    }
    if name.startswith(HUB):
        with silence_libraries():
            path = fetch(name, allow_pickle=allow_pickle)
    else:
        path = resolve(MODELS, name, "model")() if name in MODELS else Path(name)
    kind, told = FAMILIES[_look(name, path, allow_pickle)]
    try:
        with silence_libraries():
            towers = _text_encoders(path, options)
            pipeline = kind.from_pretrained(
                str(path), **options, **told, **towers, local_files_only=True
            )
    except FileError as error:
        raise FileError(f"the model {name!r} {error}") from error
    except Exception as error:  # diffusers and safetensors raise a dozen kinds; all mean that these files cannot be used
        raise FileError(f"the model {name!r} cannot be read: {first_line(error)}") from error
    model = finish_loading(name, pipeline, device, path)
    try:
        if exists(path / METADATA_FILE):
            model.set_metadata(
                parse_metadata((path / METADATA_FILE).read_text(encoding="utf-8", errors="replace"))
            )
    except OSError as error:
        raise FileError(f"the model {name!r} cannot be read: {error}") from error
    return model


def weight_digests(state: Mapping[str, Tensor], *, rounded: bool = True) -> list[str]:
    """Return hashes by which a denoiser is known in any type: of its values as fp32, and rounded to fp16 and bf16 before."""
    kinds = (torch.float32, torch.float16, torch.bfloat16) if rounded else (torch.float32,)
    return [
        hash_tensors({name: value.to(kind) for name, value in state.items()}, dtype=torch.float32)
        for kind in kinds
    ]


def check_device(device: str) -> None:
    """Refuse a device before anything is opened.

    Raises:
        ConfigError: torch knows none of that name, or cannot use it here.
    """
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device must be one that torch can use here (cpu, cuda, mps ...), got {device!r}: {first_line(error)}"
        ) from error


def _text_encoders(path: Path, options: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return a folder's text encoders: opened here, since a pipeline fills weights that a file lacks with chance and says nothing.

    Raises:
        FileError: a file lacks weights.
    """
    index, out = json.loads((path / "model_index.json").read_text(encoding="utf-8")), {}
    for part, said in index.items():
        if (
            not part.startswith("text_encoder")
            or not isinstance(said, list)
            or said[-1] not in TOWERS
        ):
            continue
        tower, found = TOWERS[said[-1]].from_pretrained(
            str(path / part), **options, output_loading_info=True, local_files_only=True
        )
        if lacking := sorted(found["missing_keys"]):
            raise FileError(
                f"lacks weights in {part}: {lacking[0]} first of {len(lacking)}; get a whole copy"
            )
        out[part] = tower
    return out


def parts_of(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> tuple[str, ...]:
    """Return a pipeline's parts that have weights."""
    return (*PARTS, "text_encoder_2") if hasattr(pipeline, "text_encoder_2") else PARTS


def finish_loading(
    name: str,
    pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline,
    device: str,
    folder: Path | None = None,
) -> Model:
    """Return an opened pipeline as a model: checked, on its device, silent and without gradients.

    Raises:
        FileError: its weights have NaN, or some are not there.
    """
    for part in parts_of(pipeline):
        for key, value in getattr(pipeline, part).state_dict().items():
            if value.is_meta:
                raise FileError(
                    f"the model {name!r} lacks weights in {part}: {key} first; get a whole copy"
                )
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise FileError(
                    f"the model {name!r} has NaN or infinite weights in {part}.{key}; get an undamaged copy"
                )
    pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)
    for part in parts_of(pipeline):
        module: nn.Module = getattr(pipeline, part)
        module.eval().requires_grad_(False)
    return Model(name, pipeline, folder)


def _look(name: str, path: Path, allow_pickle: bool) -> str:
    """Check a model folder before anything is opened, and return its family."""
    if not exists(path):
        if looks_like_hub(name):
            raise FileError(
                f"there is no folder {name!r} here; if it is a model of the Hugging Face hub, say {HUB}{name}, which fetches it"
            )
        raise UnknownNameError("model (nor a folder of that name)", name, MODELS)
    index = path / "model_index.json"
    if not index.is_file():
        raise FileError(f"{name} is not a diffusers folder: it has no model_index.json")
    try:
        family = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise FileError(f"{index} is not JSON: {first_line(error)}") from error
    if family not in FAMILIES:
        raise FileError(f"{name} is a {family}; this version reads: {', '.join(FAMILIES)}")
    for part in (*PARTS, "text_encoder_2") if family == XL else PARTS:
        if any((path / part).glob("*.safetensors")):
            continue
        if not any((path / part).glob("*.bin")):
            raise FileError(
                f"{name} cannot be read: it has no weights, for there is no .safetensors file in {path / part}"
            )
        if not allow_pickle:
            raise FileError(
                f"{name} holds pickled weights in {part}, which can run code of whoever made them; "
                "get it as safetensors, or say --allow-pickle if you trust it"
            )
    return str(family)


@contextmanager
def silence_libraries() -> Iterator[None]:
    """Keep the libraries below from printing bars and messages; what they raise says it all."""
    was = [
        (lib, lib.get_verbosity(), lib.is_progress_bar_enabled())
        for lib in (diffusers_logging, transformers_logging)
    ]
    for lib, _, _ in was:
        lib.set_verbosity(CRITICAL)
        lib.disable_progress_bar()
    try:
        yield
    finally:
        for lib, verbosity, bar in was:
            lib.set_verbosity(verbosity)
            if bar:
                lib.enable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of what a library says, cut to 300 characters."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
