"""A patch as a LoRA: the change of each weight in two thin factors, in the keys of the web UIs or of diffusers, and back."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from safegen.core.errors import ConfigError, FileError, PatchError
from safegen.core.files import atomic_write
from safegen.models.checkpoint.key_map import lora_factors, lora_name, unet_names
from safegen.models.model import Model
from safegen.patches.patch import FORMAT, BaseMismatchWarning, Patch

Keys = Literal["kohya", "diffusers"]
TEXT = ("lora_te_", "lora_te1_", "lora_te2_", "text_encoder.", "text_encoder_2.")
"""How modules of a text encoder begin in a LoRA file."""
PEFT = "base_model.model."
"""How every module begins in an adapter that peft writes by itself."""
FACTORS = {
    ".lora_down.weight": ".lora_up.weight",
    ".lora_A.weight": ".lora_B.weight",
    ".lora.down.weight": ".lora.up.weight",
}
"""How the two factors of a module end: kohya's form, that of diffusers' pipelines, that of its training scripts."""


@dataclass(frozen=True, eq=False)
class Lora:
    """Two factors for each weight that they can hold, and how much of the patch's change that is."""

    factors: Mapping[str, tuple[Tensor, Tensor]]
    """By weight of the denoiser: down (r, in[, h, w]) and up (out, r[, 1, 1])."""
    rank: int
    """Columns of the widest factor."""
    kept: Mapping[str, float]
    """By weight, the share of its squared change that the factors hold."""
    left_out: tuple[str, ...]
    """Changed weights that a LoRA cannot hold: biases and norms."""
    retained_energy: float
    """Share of the patch's whole squared change that the factors hold, what is left out counted in.

    1 is all.
    """

    def patch(self, model: Model) -> Patch:
        """Return its change as a patch for the model that it is for."""
        own = dict(model.denoiser.named_parameters())
        return Patch(
            {name: _changed(own[name], down, up, 1.0) for name, (down, up) in self.factors.items()}
        )


@torch.no_grad()
def extract_lora(patch: Patch, model: Model, rank: int) -> Lora:
    """Return the best LoRA of a rank for a patch (`layout.lora_factors`, weight by weight).

    Args:
        patch: new values.
        model: what they are new against, without patches on it.
        rank: columns of each factor, at most; a weight with fewer rows or columns has fewer.

    Raises:
        ConfigError: the rank is below 1, or nothing that changed can be held.
        PatchError: the patch does not fit the model.

    Warns:
        BaseMismatchWarning: see `Patch.fits`; or a patch lay under this one when it was made, whose own
            change is not in the LoRA.
    """
    if rank < 1:
        raise ConfigError(f"the rank of a LoRA must be >= 1, got {rank}")
    patch.check_compatible(model)
    patch.warn_missing_parents(model)
    own = dict(model.denoiser.named_parameters())
    factors, kept, left = {}, {}, []
    whole = held = 0.0
    for name, value in patch.tensors.items():
        delta = value.detach().cpu().double() - own[name].detach().cpu().double()
        change = float(delta.pow(2).sum())
        whole += change
        if delta.ndim in (2, 4) and name.endswith(".weight"):
            down, up, kept[name] = lora_factors(delta, rank)
            factors[name] = (down, up)
            held += change * kept[name]
        elif change:
            left.append(name)
    if not held:
        raise ConfigError(
            "the patch changes nothing that a LoRA can hold: matrices and convolutions"
        )
    return Lora(
        factors, max(len(down) for down, _ in factors.values()), kept, tuple(left), held / whole
    )


@torch.no_grad()
def effect_loss(
    lora: Lora,
    patch: Patch,
    model: Model,
    *,
    prompts: Sequence[str] = ("",),
    steps: int = 8,
    seed: int = 0,
) -> float | None:
    """Return how much of a patch's effect on the denoiser's predictions a LoRA misses, |e_lora - e_patch| / |e_base - e_patch| (ours).

    The predictions are those along the model's own drawings of some prompts, without guidance;
    norms are over all of them.

    Args:
        lora: the factors.
        patch: what they were taken from.
        model: the model both are for.
        prompts: texts to draw.
        steps: denoising steps of a drawing.
        seed: of their noise.

    Returns:
        0 where nothing is missed, 1 where the LoRA does nothing; None where the patch changes no
        prediction.

    Raises:
        ConfigError: the model is not in fp32, whose rounding would be all that is seen, or its
            predictions are not finite.
    """
    if model.denoiser.dtype != torch.float32:
        raise ConfigError(
            f"what a LoRA misses is told on a model in fp32 only, {model.name!r} is in {model.denoiser.dtype}"
        )
    asked: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def keep(
        module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
    ) -> None:
        asked.append(
            (
                tuple(a.clone() if isinstance(a, Tensor) else a for a in args),
                dict(kwargs),
                out[0].float(),
            )
        )

    handle = model.denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        for i, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + i)
            model.pipeline(
                prompt=[prompt],
                num_inference_steps=steps,
                guidance_scale=1.0,
                generator=generator,
                output_type="latent",
            )
    finally:
        handle.remove()
    answers = []
    for one in (patch, lora.patch(model)):
        with one.apply(model, named=False):
            answers.append(
                [model.denoiser(*args, **kwargs)[0].float() for args, kwargs, _ in asked]
            )
    whole = sum(
        float((base - new).pow(2).sum())
        for (_, _, base), new in zip(asked, answers[0], strict=True)
    )
    lost = sum(float((near - new).pow(2).sum()) for new, near in zip(*answers, strict=True))
    if not math.isfinite(whole + lost):
        raise ConfigError(
            f"predictions of {model.name!r} are not finite under this patch or its LoRA; nothing can be said of them"
        )
    return math.sqrt(lost / whole) if whole else None


def _changed(own: Tensor, down: Tensor, up: Tensor, strength: float) -> Tensor:
    """Return a weight with the change of two factors in it, on the CPU, float32."""
    delta = (up.double().flatten(1) @ down.double().flatten(1)).reshape(own.shape) * strength
    return (own.detach().cpu().double() + delta).float()


def save_lora(
    lora: Lora,
    model: Model,
    out: Path,
    *,
    keys: Keys = "kohya",
    dtype: torch.dtype = torch.float16,
    **facts: Any,
) -> None:
    """Write a LoRA to a new safetensors file; its strength 1 is the patch.

    Narrower factors are filled up with zeros to the widest: of unequal ranks, releases of diffusers
    misread the strengths.

    Args:
        lora: the factors.
        model: the model they are for, whose names they get.
        out: the new file.
        keys: `kohya` for A1111 and ComfyUI, `diffusers` for `load_lora_weights`. InvokeAI reads
            kohya's too, but tells SD 1.x and 2.x by the width of attn2's keys and values, and
            refuses a file without any.
        dtype: of the factors.
        facts: what else the header says, as plain values.

    Raises:
        FileError: `out` exists or cannot be written.
    """
    original = _original(model)
    tensors: dict[str, Tensor] = {}
    for name, (narrow_down, narrow_up) in lora.factors.items():
        more = lora.rank - len(narrow_down)
        down = torch.cat([narrow_down, narrow_down.new_zeros(more, *narrow_down.shape[1:])])
        up = torch.cat(
            [narrow_up, narrow_up.new_zeros(len(narrow_up), more, *narrow_up.shape[2:])], dim=1
        )
        if keys == "kohya":
            stem, alpha = lora_name(name, original.get(name)), torch.tensor(float(lora.rank))
            tensors |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": alpha,
            }
        else:
            stem = "unet." + name.removesuffix(".weight")
            tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    header = {"format": "pt", "ss_network_dim": str(lora.rank), "ss_network_alpha": str(lora.rank)}
    said = facts | {"energy": lora.retained_energy, "family": model.family}
    header |= _base_of(model) | {
        "ss_network_module": "networks.lora",
        "safegen": json.dumps(said, sort_keys=True),
    }
    with atomic_write(out) as tmp:
        try:
            save_file(
                {k: v.to(dtype).contiguous() for k, v in tensors.items()}, tmp, metadata=header
            )
        except SafetensorError as error:
            raise FileError(f"{out} cannot be written: {error}") from error


def _base_of(model: Model) -> dict[str, str]:
    """Return the entries of a header by which A1111 tells which models a LoRA is for.

    Without them it hides all but those of SD 1.x.
    """
    second, v = (
        bool(model.denoiser.config.use_linear_projection),
        "_v" if model.prediction == "v_prediction" else "",
    )
    if hasattr(model.denoiser, "add_embedding"):
        return {"ss_base_model_version": "sdxl_base_v1-0", "ss_v2": "False"}
    return {"ss_base_model_version": f"sd_v{2 if second else 1}{v}", "ss_v2": str(second)}


@torch.no_grad()
def load_lora(path: Path, model: Model, *, scale: float = 1.0) -> Patch:
    """Return the denoiser's part of a LoRA file, ours or another's, as a patch for a model: the weights with the change in them.

    What changes the text encoder is left out, and counted in the provenance.

    Args:
        path: a safetensors file in kohya's keys or diffusers', those of its training scripts and of
            2023 included.
        model: what it is put on; the patch is made on this base, whatever the LoRA was made on.
        scale: its strength; 1 is as trained.

    Raises:
        ConfigError: the scale is 0 or not finite.
        FileError: not readable, a factor's partner is missing, or there is more in it than plain
            factors.
        PatchError: a module has no counterpart of its shape, or the file says that it was made for
            another family.

    Warns:
        BaseMismatchWarning: the file says that it was made on other weights.
    """
    if not math.isfinite(scale) or not scale:
        raise ConfigError(
            f"the scale of a LoRA must be a finite number other than 0, got {scale:g}"
        )
    read = read_factors(path, model)
    own, out = dict(model.denoiser.named_parameters()), {}
    for name, (down, up, strength) in read.change.items():
        out[name] = _changed(own[name], down, up, scale * strength)
    facts = {
        "method": "lora",
        "file": path.name,
        "scale": scale,
        "base": model.hash,
        "base_rounded": model.cast_hashes,
    }
    facts |= {"family": model.family, "made by": dict(read.said)}
    return Patch(
        out,
        facts
        | ({"left out": f"{read.left_out} tensors of the text encoder"} if read.left_out else {}),
    )


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The denoiser's part of a LoRA file."""

    file: str
    """Its name, without folders."""
    change: Mapping[str, tuple[Tensor, Tensor, float]]
    """By weight of the denoiser: down (r, in[, h, w]), up (out, r[, 1, 1]), and what their product is multiplied by."""
    left_out: int
    """Tensors for a text encoder, which are not among them."""
    said: Mapping[str, Any]
    """What a file of ours says of itself."""


def read_factors(path: Path, model: Model) -> LoraFactors:
    """Return the factors in a LoRA file by the weights of a model.

    Args:
        path: a safetensors file in kohya's keys or diffusers'.
        model: whose weights they change.

    Raises:
        FileError: not readable, not finite, a factor's partner is missing, or there is more in it
            than plain factors.
        PatchError: a module has no counterpart of its shape, or the file says that it was made for
            another family.

    Warns:
        BaseMismatchWarning: the file says that it was made on other weights.
    """
    tensors, said, default = _read(path)
    if said.get("family") not in (None, model.family):
        raise PatchError(
            f"the LoRA does not fit the model {model.name!r}: it was made for another family ({said['family']}), this one is {model.family}"
        )
    own = dict(model.denoiser.named_parameters())
    original = _original(model)
    weights = [n for n in own if n.endswith(".weight")]
    stems = {lora_name(n): n for n in weights} | {
        "unet." + n.removesuffix(".weight"): n for n in weights
    }
    stems |= {lora_name(n, original[n]): n for n in weights if n in original}
    if bare := next((k for k in tensors if k.startswith(PEFT)), None):
        raise FileError(
            f"{path} is a bare peft adapter ({bare}), whose strength stands in another file; "
            "open it with diffusers or peft and save it by save_lora_weights"
        )
    beside = [k for k in tensors if k.startswith(TEXT)]
    found, used = dict[str, tuple[Tensor, Tensor, float]](), set(beside)
    for key, theirs in tensors.items():
        stem, kind = next(((key.removesuffix(e), e) for e in FACTORS if key.endswith(e)), ("", ""))
        if not stem or key in used:
            continue
        if stem not in stems:
            raise PatchError(
                f"the LoRA does not fit the model {model.name!r}: it has no module {stem}; it was made for another family"
            )
        partner = stem + FACTORS[kind]
        if partner not in tensors:
            raise FileError(f"{path} is damaged: it has {key} and not {partner}")
        name, alpha = stems[stem], tensors.get(f"{stem}.alpha")
        try:
            down, up, strength = _fitted(
                theirs,
                tensors[partner],
                default if alpha is None else alpha,
                tuple(own[name].shape),
            )
        except ValueError as error:
            raise FileError(f"{path} has {error} in {stem}; make or fetch it again") from error
        except PatchError as error:
            raise PatchError(
                f"the LoRA does not fit the model {model.name!r}: the factors of {stem} are {error}"
            ) from error
        found[name] = (down, up, strength)
        used |= {key, partner, f"{stem}.alpha"}
    if not found:
        raise FileError(
            f"{path} is not a LoRA of a denoiser: it has no module that ends in {', '.join(k[1:] for k in FACTORS)}"
        )
    if more := sorted(tensors.keys() - used):
        raise FileError(
            f"{path} has {more[0]}, which a plain LoRA has not; LoHa, LoKr, DoRA and their like would be half read, so they are not"
        )
    rounded = said["base_rounded"].values() if isinstance(said.get("base_rounded"), dict) else ()
    if (base := said.get("base")) is not None and model.hash not in (base, *rounded):
        warnings.warn(
            f"the LoRA was made on weights {base[:12]}, the model {model.name!r} has {model.hash[:12]}: measure before you trust it",
            BaseMismatchWarning,
            stacklevel=3,
        )
    return LoraFactors(path.name, found, len(beside), said)


def _fitted(
    down: Tensor, up: Tensor, alpha: Tensor | float | None, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, float]:
    """Return a pair of factors as wide as their weight, and what their product is multiplied by.

    Raises:
        PatchError: they are not factors of a weight of this shape, or their strength is not one
            number.
        ValueError: they are of rank 0, or not finite.
    """
    theirs, dims = f"{tuple(down.shape)} and {tuple(up.shape)}", len(shape)
    down, up = _as_wide(down, dims), _as_wide(up, dims)
    wide = (
        down.ndim == up.ndim == dims >= 2
        and set(up.shape[2:]) <= {1}
        and (len(up), *down.shape[1:]) == shape
    )
    if not wide or up.shape[1] != len(down) or (isinstance(alpha, Tensor) and alpha.numel() != 1):
        raise PatchError(f"{theirs} there, the weight is {shape} here")
    if not len(down):
        raise ValueError("factors of rank 0")
    strength = float(len(down) if alpha is None else alpha)
    if not bool(down.isfinite().all() and up.isfinite().all()) or not math.isfinite(strength):
        raise ValueError("NaN or infinite values")
    return down, up, strength / len(down)


def _as_wide(factor: Tensor, dims: int) -> Tensor:
    """Return a factor with as many dimensions as its weight: the matrices of SD 2.x are 1x1 convolutions to some tools."""
    if dims == 2 and factor.ndim == 4 and factor.shape[2:] == (1, 1):
        return factor.flatten(1)
    return factor[:, :, None, None] if dims == 4 and factor.ndim == 2 else factor


def _original(model: Model) -> dict[str, str]:
    """Return the original names of an SDXL's weights, by which its LoRAs go; none of other models.

    The weight that a guidance-distilled one has beside them (LCM's) has no such name, and no LoRA
    changes it.
    """
    if not hasattr(model.denoiser, "add_embedding"):
        return {}
    return unet_names(
        name
        for name in model.denoiser.state_dict()
        if not name.startswith("time_embedding.cond_proj")
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any], float | None]:
    """Return a LoRA file's tensors, what ours says of itself, and the alpha that diffusers' header gives to modules without their own.

    Raises:
        FileError: not readable, or its header gives strengths that are not read.
    """
    try:
        with safe_open(path, framework="pt") as file:
            tensors, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata() or {}
        if header.get("format") == FORMAT:
            raise FileError(
                f"{path} is a safegen patch, not a LoRA; put it on with --patch, or turn it into one: safegen patch extract-lora"
            )
        said, theirs = (
            _object(header.get(key, "{}")) for key in ("safegen", "lora_adapter_metadata")
        )
        default = theirs.get("unet.lora_alpha")
        if default is not None and not isinstance(default, int | float):
            raise ValueError(f"unet.lora_alpha is {default!r}")
    except (SafetensorError, OSError) as error:
        raise FileError(
            f"{path} is not a readable safetensors file ({error}); make or fetch it again"
        ) from error
    except ValueError as error:  # not JSON, or not what it should say
        raise FileError(
            f"{path} is a damaged LoRA: its header cannot be read ({error}); make or fetch it again"
        ) from error
    if theirs.get("unet.alpha_pattern") or theirs.get("unet.use_rslora"):
        raise FileError(
            f"{path} has modules of several strengths, or strengths by the root of the rank; neither is read"
        )
    return {_named(k): v for k, v in tensors.items()}, said, default


def _object(text: str) -> dict[str, Any]:
    """Return what a header's JSON object says.

    Raises:
        ValueError: it is no object, or names base or family by anything but text.
    """
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"{found!r} is no object")
    if wrong := [key for key in ("base", "family") if not isinstance(found.get(key, ""), str)]:
        raise ValueError(f"{wrong[0]} is {found[wrong[0]]!r}")
    return found


def _named(key: str) -> str:
    """Return a key as it is, or as today if it is one of 2023, when diffusers' attention processors held the factors."""
    if ".processor.to_" not in key:
        return key
    return (
        key.replace(".processor.", ".")
        .replace("_lora.", ".lora.")
        .replace(".to_out.lora.", ".to_out.0.lora.")
    )
