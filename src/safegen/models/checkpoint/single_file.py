"""Format of one-file checkpoints in the layouts of the models' publishers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from safegen.core.errors import FileError, first_line
from safegen.core.tensor_files import FACTOR_DTYPES, LazyTensor, Tensors, check_pickle, open_tensors
from safegen.models.checkpoint.key_map import PREFIX, original_names, unpack

CONFIGS_KEY = "safegen_configs"
"""Header key with a pipeline's configuration files, which make the file self-contained."""
PREDICTION_KEY = "modelspec.prediction_type"
"""Header key with what the denoiser predicts."""
V_PREDICTION_TENSOR, ZERO_SNR_TENSOR = "v_pred", "ztsnr"
"""Marker tensors of ComfyUI: the denoiser predicts v; the schedule ends in pure noise."""
PREDICTION_NAMES = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
"""Prediction by its lower-case name in a header."""
HEADER_PREDICTIONS: dict[str, dict[str, str | None]] = {
    "sd1": {"stable-diffusion-v1": None},
    "sd2": {
        "stable-diffusion-v2": None,
        "stable-diffusion-v2-512": "epsilon",
        "stable-diffusion-v2-768-v": "v_prediction",
    },
    "sdxl": {"stable-diffusion-xl-v1-base": None},
}
"""Architecture: its names in headers, and the prediction that a name implies."""
ZERO_SNR_ABAR = 1e-4
"""Cumulative alpha below which a latent counts as pure noise.

The published schedules end at 4.7e-3, rescaled ones at 6e-8 or 0.
"""
EDM_PREFIXES = ("edm_mean", "edm_std", "edm_vpred.")
"""Prefixes of the tensors that mark the schedule of Playground 2.5 and CosXL."""
LEGACY_TEXT_PREFIX = "cond_stage_model.transformer."
"""Prefix of the text encoder's weights in SD 1.x merges of 2022."""
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
"""Prefix of the text encoder's weights in the published SD 1.x file."""
PROJECTION = "text_projection.weight"
"""Name of the projection of a CLIP's pooled embedding."""
UNUSED = ("embeddings.position_ids", "logit_scale", "attn_mask", "encoder.embed_tokens.weight")
"""Tensors of text encoders that decide no image."""
PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin"}


@dataclass(frozen=True)
class SingleFile:
    """Content of a one-file checkpoint."""

    path: Path
    tensors: Tensors
    header: Mapping[str, str]

    @property
    def prediction(self) -> str | None:
        """Prediction that the file states, `epsilon` or `v_prediction`; None if it states none.

        Raises:
            FileError: it states another.
        """
        if V_PREDICTION_TENSOR in self.tensors:
            return "v_prediction"
        stated = self.header.get(PREDICTION_KEY, "").lower()
        if stated and stated not in PREDICTION_NAMES:
            raise FileError(
                f"prediction of {self.path} must be one of {', '.join(PREDICTION_NAMES)}, got "
                f"{stated[:80]!r}"
            )
        return PREDICTION_NAMES.get(stated) or HEADER_PREDICTIONS["sd2"].get(self.architecture_name)

    @property
    def architecture_name(self) -> str:
        """Name of the architecture in the header, in lower case; empty if there is none."""
        return self.header.get("modelspec.architecture", "").lower()


def open_single_file(path: Path, allow_pickle: bool) -> SingleFile:
    """Return a file's tensors and header.

    Raises:
        FileError: it cannot be read, or is a pickle and those are not allowed.
    """
    if path.suffix in PICKLE_SUFFIXES and not allow_pickle:
        raise FileError(
            f"{path} is a pickle, which can run code. Get it as safetensors, or pass "
            "--allow-pickle if you trust it"
        )
    header: dict[str, str] = {}
    try:
        if path.suffix in PICKLE_SUFFIXES:
            check_pickle(path)
            content = torch.load(path, map_location="cpu", weights_only=True)
            content = content.get("state_dict", content)
            tensors: dict[str, Tensor | LazyTensor] = {
                key: value
                for key, value in content.items()
                if isinstance(key, str) and isinstance(value, Tensor)
            }
        else:
            found, header = open_tensors(path)
            tensors = {**found}
    except FileError:
        raise
    except Exception as error:  # torch's unpickler raises a dozen types
        raise FileError(
            f"{path} cannot be read as a one-file checkpoint: {first_line(error)}"
        ) from error
    if not any(key.startswith(TEXT_PREFIX) for key in tensors):
        tensors = {
            TEXT_PREFIX + key.removeprefix(LEGACY_TEXT_PREFIX)
            if key.startswith(LEGACY_TEXT_PREFIX)
            else key: value
            for key, value in tensors.items()
        }
    return SingleFile(path, tensors, header)


def load_weights(
    checkpoint: SingleFile, architecture: str, component: str, module: nn.Module, hint: str
) -> None:
    """Load a file's weights into a component; every weight must be in the file, and no other.

    Args:
        checkpoint: the file.
        architecture: key of `PREFIX`.
        component: name of the component in the pipeline.
        module: the component, on the meta device.
        hint: way out for messages.

    Raises:
        FileError: the weights do not fit the component's configuration.
    """
    path, tensors = checkpoint.path, checkpoint.tensors
    state = module.state_dict()
    weights = {}
    if (architecture, component) == ("sd3", "text_encoder"):
        # SD 3 reads the pooled embedding of CLIP-L before its projection
        projection = state.pop(PROJECTION)
        weights[PROJECTION] = torch.eye(*projection.shape, dtype=projection.dtype)
    names = original_names(architecture, component, state)
    for original in names.values():
        if original not in tensors:
            raise FileError(f"{path} lacks {original}, which its configuration needs. {hint}")
        if tensors[original].dtype not in FACTOR_DTYPES:
            raise FileError(
                f"weights in {path} must be fp64, fp32, fp16 or bf16, got "
                f"{tensors[original].dtype} in {original}. Get the model in another precision"
            )
    shapes = {name: value.shape for name, value in state.items()}
    for name, value in unpack(architecture, component, tensors, shapes).items():
        if value.shape != tuple(shapes[name]):
            raise FileError(
                f"shape of {names[name]} in {path} must be {tuple(shapes[name])} for {name}, got "
                f"{tuple(tensors[names[name]].shape)}. {hint}"
            )
        in_file = isinstance(tensors[names[name]], LazyTensor)
        found = value.load().to(state[name].dtype, copy=not in_file).contiguous()
        # a view would hold the whole tensor, and one at an odd place is summed up in another order
        is_view = found.untyped_storage().nbytes() != found.nbytes
        weights[name] = found.clone() if is_view else found
    prefix = PREFIX[architecture][component]
    unknown = {
        key
        for key in tensors
        if key.startswith(prefix)
        and not _is_unused(architecture, component, key.removeprefix(prefix), module)
    } - set(names.values())
    if unknown:
        raise FileError(
            f"{path} has {len(unknown)} weights that its configuration does not know, first "
            f"{min(unknown)}. {hint}"
        )
    module.load_state_dict(weights, assign=True)


def _is_unused(architecture: str, component: str, name: str, module: Any) -> bool:
    """Return whether a text encoder's tensor decides no image.

    Those are buffers, the logit scale, T5's second name of its table and, in SD 2.x, which reads
    the last block but one, the projection and the last block; SD 3 and FLUX read CLIP-L without a
    projection.
    """
    if name.removeprefix("text_model.") in UNUSED:
        return True
    if architecture in ("sd3", "flux") and component == "text_encoder":
        return name == PROJECTION
    if (architecture, component) != ("sd2", "text_encoder"):
        return False
    last_block = f"transformer.resblocks.{module.config.num_hidden_layers}."
    return name == "text_projection" or name.startswith(last_block)
