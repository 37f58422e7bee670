"""A loaded diffusion pipeline behind one interface for all architectures."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from PIL import Image
from torch import Tensor

from safegen.core.device import describe_device
from safegen.core.errors import ConfigError, SafegenWarning
from safegen.core.files import display_name
from safegen.core.hashing import HashMemory
from safegen.core.text import short_repr
from safegen.models.checkpoint.metadata import CheckpointMetadata, ParentRef
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import describe_architecture
from safegen.models.families.noise_schedule import NoiseSchedule, prediction_type
from safegen.models.families.pipeline_specs import (
    add_inputs,
    call_defaults,
    denoiser_name,
    encode_texts,
)
from safegen.models.patched_weights import (
    describe_parts,
    hash_components,
    hash_rounded,
    undone_patches,
)
from safegen.models.selectors import plain_name
from safegen.models.text_encoder import expand_prompt, text_encoder_names, token_spans

if TYPE_CHECKING:
    from safegen.models.applied_patch import AppliedPatch

Pipeline: TypeAlias = Any
"""A text-to-image pipeline of diffusers of a class in `NOISE_PIPELINES`."""
ENCODED_PIXELS = 8 * 256 * 256
"""Pixels that the autoencoder encodes at once: its activations take 4 KB for each in fp32."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MetadataMismatchWarning(SafegenWarning):
    """The metadata of a checkpoint was written for other weights than it has."""


@dataclass(eq=False)
class Model:
    """A loaded text-to-image model.

    Example:
        >>> model = safegen.load("mini")
        >>> model.size
        64
    """

    name: str
    """The name or path it was loaded by."""
    pipeline: Pipeline
    folder: Path | None = None
    """Folder it was read from, if any. Components that are not loaded are copied from there."""
    metadata: CheckpointMetadata | None = None
    """Metadata read from the checkpoint, not yet checked: see `verified_metadata`."""
    applied_patches: list[AppliedPatch] = field(default_factory=list)
    """Patches on it, in order. `Patch.apply` adds one and `AppliedPatch.undo` removes it."""
    stored_dtype: str | None = None
    """Type of all weights in the files it was read from; None if there are several, or no files."""
    hash_memory: HashMemory = field(default_factory=HashMemory)
    """Hashes of its weights that were taken."""
    has_disabled_loras: bool = False
    """Whether its active LoRAs are turned off (`safegen.patches.active_lora.disabled_loras`)."""

    def __repr__(self) -> str:
        """Return name, size, device, type of the weights and patches in one line."""
        patches = [applied.metadata.method or "unknown" for applied in self.patches]
        return short_repr(Model, self.describe(), patches=patches or None)

    @property
    def patches(self) -> list[AppliedPatch]:
        """Patches that are on it now, in order, without hidden ones."""
        return [applied for applied in self.applied_patches if not applied.hidden]

    @property
    def parents(self) -> tuple[ParentRef, ...]:
        """Method and hash of each patch on it: the parents of a patch that is made on it now."""
        return tuple(
            ParentRef(method=applied.metadata.method or "unknown", hash=applied.hash)
            for applied in self.patches
        )

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the pipeline's components that have weights."""
        return components_of(self.pipeline)

    @property
    def denoiser_name(self) -> str:
        """Name of the component that predicts: `unet` or `transformer`."""
        return denoiser_name(self.pipeline)

    @property
    def denoiser(self) -> Any:
        """Network that predicts the noise or the velocity."""
        return getattr(self.pipeline, self.denoiser_name)

    @property
    def vae(self) -> AutoencoderKL:
        """Autoencoder between images and latents."""
        return cast(AutoencoderKL, self.pipeline.vae)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return cast(torch.device, self.denoiser.device)

    @property
    def dtype(self) -> str:
        """Type of the denoiser's weights, a key of `DTYPES`."""
        return dtype_name(self.denoiser)

    @property
    def size(self) -> int:
        """Side in pixels of the images it was trained on."""
        return self.latent_shape[-1] * int(self.pipeline.vae_scale_factor)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape (c, h, w) of the latents of an image of its size."""
        side = self.denoiser.config.get("sample_size") or self.pipeline.default_sample_size
        return int(self.vae.config.latent_channels), int(side), int(side)

    @property
    def num_parameters(self) -> int:
        """Number of the denoiser's weights."""
        return sum(p.numel() for p in self.denoiser.parameters())

    def describe(self) -> str:
        """Return what runs where in one line: name, size, device and type of the weights."""
        millions = self.num_parameters / 1e6
        return (
            f"{display_name(self.name)}: {type(self.denoiser).__name__} of {millions:,.1f} M "
            f"weights, {self.size} x {self.size} pixels, {self.dtype} on "
            f"{describe_device(self.device)}"
        )

    @property
    def prediction(self) -> str:
        """What the denoiser predicts: `epsilon`, `v_prediction` or `flow_prediction`."""
        return prediction_type(self.pipeline.scheduler)

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """How images are noised in training, and what the denoiser predicts of them."""
        return NoiseSchedule.of(self.pipeline.scheduler)

    @property
    def family(self) -> str:
        """Architecture of the denoiser, including what weight shapes do not show.

        Self-attention of SD 1.x and 2.x has equal shapes and unequal numbers of heads; SD 3 and 3.5
        medium differ in blocks with attention of the image alone (`dual`).
        """
        return describe_architecture(self.denoiser)

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the denoiser's values in fp32 without patches, which patches refer to.

        It is taken at the first access; `Patch.apply` takes it before it changes a weight. Weights
        stored as fp32 have another hash when they are loaded as fp16 or bf16, which rounds them.
        """
        return self.hash_denoiser()

    def hash_denoiser(self, dtype: str | None = None) -> str:
        """Return the SHA-256 of the denoiser's values in fp32 as they are now, patches included.

        Args:
            dtype: type to round the values to first, a key of `DTYPES`. Default: they stay.
        """
        state = self.denoiser.state_dict()
        weights = {plain_name(key): state[key] for key in state if ".lora_" not in key}
        return hash_rounded(self.hash_memory, weights, DTYPES.get(dtype or ""))

    @property
    def pipeline_hash(self) -> str:
        """SHA-256 of all that decides an image: weights without patches, schedule, vocabulary."""
        return hashlib.sha256(json.dumps(self.pipeline_parts, sort_keys=True).encode()).hexdigest()

    @property
    def pipeline_parts(self) -> dict[str, Any]:
        """Hashes and settings that `pipeline_hash` is taken over, by part of the pipeline."""
        return describe_parts(self)

    @cached_property
    def verified_metadata(self) -> CheckpointMetadata | None:
        """Metadata of the checkpoint if its weights are those it was written for, else None.

        Warns:
            MetadataMismatchWarning: they are others. Warned once for each model.
        """
        stated = self.metadata
        if stated is None or (
            stated.weights == self.hash
            and stated.components == hash_components(self, stated.components)
        ):
            return stated
        reason = (
            f"it is loaded as {self.dtype}; load it as fp32"
            if self.dtype not in ("fp32", self.stored_dtype)
            else "they were trained or merged since"
        )
        warnings.warn(
            f"metadata of {self.name!r} must match its weights, and does not: {reason}. It is not "
            "passed on",
            MetadataMismatchWarning,
            stacklevel=2,
        )
        return None

    @contextmanager
    def without_patches(self) -> Iterator[None]:
        """Take all patches off inside the block, and put them on again bit for bit."""
        with undone_patches(self):
            yield

    def encode_text(self, texts: Sequence[str], *, with_gradient: bool = False) -> Conditioning:
        """Return what the denoiser is conditioned on for texts at the model's size, one row each.

        An empty text has the embedding that the pipeline guides away from, which for SDXL is 0
        where its `force_zeros_for_empty_prompt` says so.

        Args:
            texts: the texts.
            with_gradient: whether gradients flow to what the text encoders read.
        """
        text = encode_texts(self.pipeline, texts, with_gradient=with_gradient)
        return add_inputs(self.pipeline, text, texts, self.size)

    def token_ids(self, texts: list[str]) -> Tensor:
        """Return the ids (n, tokens) that the text encoder reads for texts."""
        ids: Tensor = self._tokenize(texts, return_tensors="pt").input_ids
        return ids.to(self.device)

    def token_spans(self, texts: Sequence[str]) -> list[list[tuple[int, int, int]]]:
        """Return start, last own token and stop of each span of each text's token embeddings.

        SD 3 has the tokens of CLIP, then those of T5; FLUX those of T5; the others one span of
        CLIP. The last token of an empty text is the first one of the span.
        """
        return token_spans(self.pipeline, texts, call_defaults(self.pipeline))

    def _tokenize(self, texts: list[str], **options: Any) -> Any:
        tokenizer = self.pipeline.tokenizer
        return tokenizer(
            [expand_prompt(self.pipeline, text, tokenizer) for text in texts],
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            **options,
        )

    @torch.no_grad()
    def encode_images(self, images: Tensor, *, batch: int | None = None) -> Tensor:
        """Return scaled latents: the posterior mean, so that equal images have equal latents.

        Args:
            images: (n, 3, h, w) in [-1, 1].
            batch: images encoded at once. Default: as many as have `ENCODED_PIXELS`, at most 8.
        """
        batch = batch or min(8, max(1, ENCODED_PIXELS // images.shape[-2:].numel()))
        latents = [
            self.vae.encode(part.to(self.device, self.vae.dtype)).latent_dist.mode()
            for part in images.split(batch)
        ]
        shift = self.vae.config.get("shift_factor") or 0.0
        return (torch.cat(latents) - shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_images(self, latents: Tensor, *, batch: int = 8) -> list[Image.Image]:
        """Return the images of scaled latents, decoded as the pipeline does.

        Args:
            latents: (n, c, h, w).
            batch: images decoded at once.
        """
        postprocess = self.pipeline.image_processor.postprocess
        return [
            image
            for part in latents.split(batch)
            for image in postprocess(self.decode_pixels(part), output_type="pil")
        ]

    def decode_pixels(self, latents: Tensor) -> Tensor:
        """Return the pixels (n, 3, h, w) of scaled latents, in [-1, 1], with a gradient.

        `decode_images` rounds them to 8 bits.

        Args:
            latents: (n, c, h, w).
        """
        shift = self.vae.config.get("shift_factor") or 0.0
        scaled = latents / self.vae.config.scaling_factor + shift
        scaled = scaled.to(self.device, self.vae.dtype)
        pixels: Tensor = self.vae.decode(scaled).sample
        return pixels.clamp(-1, 1)


def dtype_name(value: Any) -> str:
    """Return the type of a tensor's or a network's values, a key of `DTYPES` if it is one."""
    return next((name for name in DTYPES if DTYPES[name] == value.dtype), str(value.dtype))


def check_is_loaded(model: object) -> None:
    """Check that a value is a loaded model.

    Raises:
        ConfigError: it is a name, a pipeline or something else.
    """
    if not isinstance(model, Model):
        raise ConfigError(
            f"model must be a safegen.Model, got {type(model).__name__}. "
            "Give safegen.load(...) of a name, a path or a pipeline."
        )


def components_of(pipeline: Pipeline) -> tuple[str, ...]:
    """Return the names of a pipeline's components that have weights."""
    return (denoiser_name(pipeline), "vae", *text_encoder_names(pipeline))
