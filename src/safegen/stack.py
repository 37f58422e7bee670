"""Stacks: a model with patches, learned words, LoRAs, a negative prompt and guards."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import SerializeAsAny, ValidationError, field_validator, model_validator

from safegen.core.concept import load_concept
from safegen.core.documents import read_toml, validate
from safegen.core.errors import ConfigError, FileError, UnknownNameError, UserError, explain
from safegen.core.files import exists
from safegen.core.hub import HUB
from safegen.core.registry import MODELS
from safegen.core.settings import FOLDER_NAME, BaseSettings, FolderName, raises_config_error
from safegen.guards import GuardConfig, read_guard
from safegen.patches.lora_spec import LoraSpecs

if TYPE_CHECKING:
    from safegen.models.model import Model


@raises_config_error
class Stack(BaseSettings):
    """Settings of what generates images. Nothing is loaded until `StackLoader.open`.

    Example:
        >>> guard = {"name": "sld", "preset": "max", "concept": "skulls"}
        >>> stack = safegen.Stack(name="guarded", model="mini", guards=(guard,))
    """

    name: FolderName
    """Name of the stack: letters, digits, dots, dashes and underscores."""
    model: str
    """Model: a built-in name, a diffusers folder, a one-file checkpoint, or hub:owner/name."""
    config: Path | None = None
    """For a one-file checkpoint: a diffusers folder with the configuration files that it lacks."""
    patches: tuple[Path, ...] = ()
    """Patches to apply, in order."""
    embeddings: tuple[Path, ...] = ()
    """Textual-inversion files (.safetensors): words that prompts may use."""
    loras: LoraSpecs = ()
    """LoRAs active beside the weights, never fused: `FILE`, `FILE:SCALE`, or tables of both."""
    negative_prompt: str | None = None
    """Prompt that guidance pushes every image away from."""
    guards: tuple[SerializeAsAny[GuardConfig], ...] = ()
    """Guards: `sld-max`, or tables with `name`, `preset`, `concept` and settings."""
    blank: bool = False
    """Generate nothing but black images: the baseline that is perfectly safe and useless."""

    @field_validator("guards", mode="before")
    @classmethod
    def _read_guards(cls, value: Any) -> Any:
        if not isinstance(value, list | tuple) or not all(
            isinstance(entry, str | Mapping | GuardConfig) for entry in value
        ):
            return value
        try:
            return tuple(read_guard(entry) for entry in value)
        except UserError as error:
            raise ValueError(str(error)) from error

    @model_validator(mode="after")
    def _check_blank(self) -> Self:
        if self.blank and not self._is_plain:
            raise ValueError(
                "a blank stack must have no patches, words, LoRAs, guards and negative prompt, "
                "since its images are black. Leave them out"
            )
        return self

    @property
    def _is_plain(self) -> bool:
        added = self.patches or self.embeddings or self.loras or self.guards
        return not (added or self.negative_prompt is not None)

    @property
    def is_base(self) -> bool:
        """Whether this is a model without patches, LoRAs, guards and negative prompt."""
        return self._is_plain and not self.blank

    def hash(self, model: Model, *, weights: str | None = None) -> str:
        """Return the SHA-256 over everything in the stack that decides an image.

        Args:
            model: the stack's model.
            weights: its `Model.pipeline_hash`, if known.

        Raises:
            FileError: a patch or a LoRA cannot be read.
            UserError: a guard's file cannot be read.
        """
        if self.blank:
            return _digest({"blank": model.size})
        from safegen.models.textual_inversion import hash_word
        from safegen.patches.patch import Patch

        loras = [lora.fingerprint() for lora in self.loras]
        words = [hash_word(path) for path in self.embeddings]
        return _digest(
            ({"embeddings": words} if words else {})
            | {
                "weights": weights or model.pipeline_hash,
                "patches": [Patch.load(path).hash for path in self.patches],
                "loras": [(lora["hash"], lora["scale"]) for lora in loras],
                "negative_prompt": self.negative_prompt,
                "guards": [guard.fingerprint() for guard in self.guards],
            }
        )


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def hash_guards(guards: Sequence[GuardConfig]) -> str:
    """Return the SHA-256 over the settings of guards, without a model.

    Raises:
        UserError: a guard's file cannot be read.
    """
    return _digest({"guards": [guard.fingerprint() for guard in guards]})


def load_stack(spec: str | Path) -> Stack:
    """Return the stack that an argument of the command line names.

    Args:
        spec: a model (a built-in name, a folder, a one-file checkpoint, or `hub:owner/name`); a
            TOML recipe, with paths relative to it; or `NAME=MODEL+patch.safetensors+...`. Without
            `NAME=` the stack is named as its last file or folder.

    Raises:
        UnknownNameError: it is none of them.
        FileError: the recipe is missing or invalid.
        ConfigError: it is neither text nor a path, or the name has other characters than
            `FolderName` allows.
    """
    if not isinstance(spec, str | Path):
        raise ConfigError(
            f"a stack must be a name or a path, got {type(spec).__name__}. Name the file of a "
            "patch, list Stacks without names, and give safegen.load(pipe) as the base"
        )
    spec = str(spec)
    name, separator, rest = spec.partition("=")
    if not separator or exists(Path(spec)):
        if spec.endswith(".toml"):
            return _read_recipe(Path(spec))
        name, rest = "", spec
    if rest.endswith(".toml"):
        raise ConfigError(f"a recipe must be given without a name: {rest}, got {spec!r}")
    model, *patches = [rest] if exists(Path(rest)) else rest.split("+")
    if not separator and not patches and not _is_model(model):
        raise UnknownNameError(
            "model, model folder or recipe", spec, MODELS, "Or give NAME=MODEL+patch.safetensors."
        )
    if not patches and _is_patch(Path(model)):
        raise ConfigError(
            f"a stack must be a model with its patches, got the patch {model!r} alone. "
            f"Give MODEL+{model}"
        )
    name = name or _name_of(patches[-1] if patches else model)
    if not re.fullmatch(FOLDER_NAME, name) or not model or not all(patches):
        raise ConfigError(
            "a stack must be NAME=model+patch.safetensors with a name of letters, digits and "
            f"'._-', got {spec!r}"
        )
    return Stack(name=name, model=model, patches=tuple(Path(patch) for patch in patches))


def _is_model(name: str) -> bool:
    """Return whether a name may be that of a model: it is checked when the model is loaded."""
    return name in MODELS or name.startswith(HUB) or exists(Path(name))


def _is_patch(path: Path) -> bool:
    """Return whether a file is a patch; what cannot be read is not."""
    if path.suffix != ".safetensors" or not exists(path, file=True):
        return False
    from safegen.core.tensor_files import read_metadata
    from safegen.models.checkpoint.metadata import PATCH_FORMAT

    try:
        return read_metadata(path).get("format") == PATCH_FORMAT
    except FileError:
        return False


def _name_of(source: str) -> str:
    """Return the name of a stack from a model's name or a file: letters, digits and `._-`."""
    if source in MODELS:
        return source
    path = Path(source.removeprefix(HUB))
    stem = path.name if path.is_dir() else path.name.removesuffix(".safetensors")
    stem = stem or path.resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._")[:64]


def add_guards(stack: Stack, guards: Sequence[str], concept: str | None = None) -> Stack:
    """Return a stack with more guards.

    Args:
        stack: the stack.
        guards: names or presets of guards.
        concept: gives its phrases and its judge to the guards that use them.

    Raises:
        UnknownNameError: there is no such guard, preset or concept.
        ConfigError: a guard lacks a setting, the stack is blank, or no guard uses the concept.
    """
    known = load_concept(concept) if concept is not None else None
    added = [read_guard(guard, known) for guard in guards]
    if known and not any(type(guard).defaults_from(known) for guard in added):
        raise ConfigError(
            f"concept must be used by a guard, got {known.name!r}, which none uses. Leave it out"
        )
    return _replace(stack, guards=(*stack.guards, *added))


def add_patches(stack: Stack, patches: Sequence[Path]) -> Stack:
    """Return a stack with more patches, applied after its own.

    Raises:
        ConfigError: the stack is blank.
    """
    return _replace(stack, patches=(*stack.patches, *patches))


def add_loras(stack: Stack, loras: Sequence[str]) -> Stack:
    """Return a stack with more active LoRAs, each FILE or FILE:SCALE.

    Raises:
        ConfigError: a scale is 0 or not finite, or the stack is blank.
    """
    return _replace(stack, loras=(*stack.loras, *loras))


def _replace(stack: Stack, **settings: Any) -> Stack:
    """Return a stack with other settings, checked."""
    try:
        return Stack.model_validate(dict(stack) | settings)
    except ValidationError as error:
        raise ConfigError(f"stack {stack.name!r}: {explain(error, Stack)}") from error


def _read_recipe(path: Path) -> Stack:
    """Return the stack in a TOML file, with paths relative to it."""
    if not exists(path):
        raise FileError(f"the stack file {str(path)!r} does not exist")
    folder = path.parent
    settings = {"name": path.stem} | read_toml(path)
    settings["guards"] = _resolve_concepts(settings.get("guards", []), folder)
    stack = validate(Stack, settings, str(path))
    is_name = stack.model in MODELS or stack.model.startswith(HUB)
    return stack.model_copy(
        update={
            "model": stack.model if is_name else str(folder / stack.model),
            "config": folder / stack.config if stack.config else None,
            "patches": tuple(folder / patch for patch in stack.patches),
            "embeddings": tuple(folder / file for file in stack.embeddings),
            "loras": tuple(
                lora.model_copy(update={"file": folder / lora.file}) for lora in stack.loras
            ),
            "guards": tuple(guard.resolve_paths(folder) for guard in stack.guards),
        }
    )


def _resolve_concepts(guards: Any, folder: Path) -> Any:
    """Return a recipe's guards with the files of their concepts relative to a folder."""

    def resolve(guard: Any) -> Any:
        concept = guard.get("concept") if isinstance(guard, dict) else None
        if isinstance(concept, str) and concept.endswith(".toml"):
            return guard | {"concept": str(folder / concept)}
        return guard

    return [resolve(guard) for guard in guards] if isinstance(guards, list) else guards
