"""A stack: a model with its patches and a negative prompt; the unit that is drawn with and measured."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safegen.errors import BadFile, BadSetting, UnknownName
from safegen.sampler import Ask, Sampler
from safegen.tables import MODELS

if TYPE_CHECKING:
    from safegen.models.model import Model

NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Stacks name folders, so their names are plain."""


class Stack(BaseModel):
    """What draws. Built from a word, a recipe file, or in code; loading happens when it is opened."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    name: str = Field(pattern=f"^{NAME}$")
    """The stack in one word of letters, digits, dots, dashes and underscores."""
    model: str
    """Model to load: a built-in name, a diffusers folder, or hub:owner/name."""
    patches: tuple[Path, ...] = ()
    """Patches to put on it, in order."""
    negative_prompt: str | None = None
    """Text that guidance pushes every picture away from."""
    guards: tuple[str, ...] = ()
    """Defences that act while drawing; none can be named in this version."""
    blank: bool = False
    """Draw nothing: every picture is black. The baseline that is perfectly safe and perfectly useless."""

    @model_validator(mode="after")
    def _has_no_idle_setting(self) -> Self:
        if self.guards:
            raise ValueError(f"guards cannot be used in this version, got {', '.join(self.guards)}; leave them out")
        if self.blank and (self.patches or self.negative_prompt is not None):
            raise ValueError("patches and a negative prompt have no effect on a blank stack; leave them out")
        return self

    @property
    def base(self) -> bool:
        """Whether this is a model as it comes."""
        return not (self.patches or self.blank or self.negative_prompt is not None)

    def hash(self, model: Model, *, weights: str | None = None) -> str:
        """Return a SHA-256 over everything of the stack that decides a picture: weights, patches, negative prompt.

        Args:
            model: the stack's model, without patches on it.
            weights: its `weights_hash`, if known.

        Raises:
            BadFile: a patch cannot be read.
        """
        if self.blank:
            return _digest({"blank": model.size})
        from safegen.models.patch import Patch

        patches = [Patch.load(path).hash for path in self.patches]
        return _digest({"weights": weights or weights_hash(model), "patches": patches, "negative": self.negative_prompt})


def load_stack(spec: str) -> Stack:
    """Return the stack that a word of the command line means.

    Args:
        spec: a built-in model's name; a TOML recipe, whose paths are relative to it; or `NAME=model+patch.safetensors+...`.

    Raises:
        UnknownName: neither.
        BadFile: the recipe is missing or is not one.
        BadSetting: the name is not plain.
    """
    name, found, rest = spec.partition("=")
    if not found and spec.endswith(".toml"):
        return _read_recipe(Path(spec))
    if not found:
        if spec not in MODELS:
            raise UnknownName("stack (nor is it a recipe.toml, nor NAME=model+patch.safetensors)", spec, MODELS)
        return Stack(name=spec, model=spec)
    model, *patches = rest.split("+")
    if not re.fullmatch(NAME, name) or not model or not all(patches):
        raise BadSetting(f"a stack is written NAME=model+patch.safetensors, its name in letters, digits and '._-'; got {spec!r}")
    return Stack(name=name, model=model, patches=tuple(Path(p) for p in patches))


def _read_recipe(path: Path) -> Stack:
    if not path.is_file():
        raise BadFile(f"the stack file {str(path)!r} does not exist")
    try:
        facts = {"name": path.stem} | tomllib.loads(path.read_text(encoding="utf-8"))
        stack = Stack.model_validate(facts)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadFile(f"{path} is not a stack file: {' '.join(str(error).split())}") from error
    except ValidationError as error:
        e = error.errors()[0]
        raise BadFile(f"{path} is not a stack file: {'.'.join(map(str, e['loc'])) or 'stack'}: {e['msg']}") from error
    beside = path.parent / stack.model
    model = stack.model if stack.model in MODELS or stack.model.startswith("hub:") else str(beside)
    return stack.model_copy(update={"model": model, "patches": tuple(path.parent / p for p in stack.patches)})


def weights_hash(model: Model) -> str:
    """Return a SHA-256 over all that a model draws with: the weights of every part, its schedule and its vocabulary."""
    from safegen.hashes import hash_tensors
    from safegen.models.model import PARTS

    pipeline = model.pipeline
    schedule = {k: str(v) for k, v in pipeline.scheduler.config.items() if not k.startswith("_")}
    facts = {part: hash_tensors(getattr(pipeline, part).state_dict()) for part in PARTS}
    return _digest(facts | {"schedule": schedule, "vocabulary": _digest(pipeline.tokenizer.get_vocab())})


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Opened:
    """A stack that is ready to draw."""

    stack: Stack
    model: Model
    hash: str

    def draw(self, asks: Sequence[Ask], sampler: Sampler) -> list[Image.Image]:
        """Return one picture per ask, in order.

        Raises:
            BadSetting: a negative prompt without guidance.
        """
        if self.stack.blank:
            return [Image.new("RGB", (self.model.size, self.model.size)) for _ in asks]
        from safegen.models.sampling import generate

        return list(generate(self.model, asks, sampler, negative=self.stack.negative_prompt))

    def free(self) -> None:
        """Give back the accelerator's memory that nothing holds any more."""
        if self.model.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()


class Shelf:
    """Opens stacks. It keeps the model that it loaded last, so that stacks on one model in a row share it."""

    def __init__(self, *, device: str = "cpu", dtype: str = "fp32", allow_pickle: bool = False) -> None:
        self.device, self.dtype, self.allow_pickle = device, dtype, allow_pickle
        self._kept: tuple[str, Model, str] | None = None
        self._open = False

    def model(self, name: str) -> tuple[Model, str]:
        """Return a model without patches, and its `weights_hash`.

        Raises:
            UserError: it cannot be loaded.
        """
        if self._kept is None or self._kept[0] != name:
            from safegen.models.model import load

            self._kept = None  # two models need not fit in memory
            model = load(name, dtype=self.dtype, device=self.device, allow_pickle=self.allow_pickle)
            self._kept = (name, model, weights_hash(model))
        return self._kept[1:]

    def hash(self, stack: Stack) -> str:
        """Return a stack's hash without opening it."""
        model, weights = self.model(stack.model)
        return stack.hash(model, weights=weights)

    @contextmanager
    def opened(self, stack: Stack) -> Iterator[Opened]:
        """Yield a stack ready to draw; afterwards its patches are taken off exactly. One is open at a time.

        Raises:
            UserError: the model or a patch cannot be loaded, or does not fit.
        """
        from safegen.models.patch import Patch

        assert not self._open, "another stack is open"
        model, weights = self.model(stack.model)
        _ = model.hash  # of the untouched weights: what patches refer to
        digest = stack.hash(model, weights=weights)
        with ExitStack() as on:
            self._open = True
            on.callback(setattr, self, "_open", False)
            for path in stack.patches:
                on.enter_context(Patch.load(path).apply(model))
            yield Opened(stack, model, digest)
