"""Base class of all settings, and the bounds and field types that schemas share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import PurePath, PureWindowsPath
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator

from safegen.core.documents import check_plain
from safegen.core.errors import ConfigError, explain
from safegen.core.text import has_control, short_repr

MAX_SEED = 2**63 - 1
"""Largest seed, and largest integer of any setting."""
MAX_SEEDS = 10_000
"""Largest number of seeds for each prompt."""
MAX_STEPS = 1000
"""Largest number of denoising steps."""
MAX_SIDE = 4096
"""Most pixels of a side of a generated image."""
MAX_BATCH = 4096
"""Largest number of images in a batch."""
MAX_RANK = 4096
"""Largest rank of a LoRA; no layer of the supported models is wider."""
MAX_THREADS = 1024
"""Largest number of CPU threads."""
MAX_WORKERS = 1024
"""Largest number of processes that share a job."""
MAX_COUNT = 1_000_000
"""Largest number of updates, images, prompts or draws."""
MAX_NUMBER = 1e9
"""Largest absolute value of a setting that is not an integer."""

Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
Seeds = Annotated[tuple[Seed, ...], Field(max_length=MAX_SEEDS)]
FOLDER_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
"""Pattern of a name that is also the name of a folder, such as a stack's."""
MAX_NAME = 200
"""Most characters of a name."""
MAX_FILE_NAME = 255
"""Most bytes of a file's name."""


def check_name(name: str) -> str:
    """Return a name if it can stand in a line of output.

    Raises:
        ValueError: it is empty or too long, or has a control character or half a surrogate pair.
    """
    if not name.strip() or has_control(name) or len(name) > MAX_NAME:
        raise ValueError(
            f"names must have 1 to {MAX_NAME} printable characters, got {name[:MAX_NAME]!r}"
        )
    return name


def check_file_name(name: str) -> str:
    """Return a name if it is the name of a file, without a folder.

    Raises:
        ValueError: it is a path, or no name.
    """
    if has_control(name) or len(name.encode()) > MAX_FILE_NAME:
        raise ValueError(
            f"file names must have at most {MAX_FILE_NAME} bytes, all printable, got {name[:99]!r}"
        )
    if name in ("", ".", "..") or PurePath(name).name != name or PureWindowsPath(name).name != name:
        raise ValueError(f"a file name must have no folder in it, got {name!r}")
    return name


Name = Annotated[str, AfterValidator(check_name)]
"""Name of a list, a protocol, a concept or a judge."""
FolderName = Annotated[str, Field(pattern=f"^{FOLDER_NAME}$")]
"""Name that is also the name of a folder."""
FileName = Annotated[str, AfterValidator(check_file_name)]
"""Name of a file, without a folder."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""SHA-256 in hexadecimal digits."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
"""Number of something."""
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
"""Time in seconds."""
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
"""Part of a whole: a rate, a score or a distance."""
Number = Annotated[float, Field(ge=-1e12, le=1e12, allow_inf_nan=False)]
"""Finite number."""
JsonObject = Annotated[dict[str, Any], AfterValidator(check_plain)]
"""Plain values that no schema describes."""


class BaseSettings(BaseModel):
    """Frozen settings without unknown names, NaN, infinities or numbers beyond any use."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    def __repr__(self) -> str:
        """Return the settings that differ from their defaults in one line."""
        return changed_repr(self)

    def __str__(self) -> str:
        """Return the `repr`."""
        return repr(self)

    @field_validator("*")
    @classmethod
    def _check_numbers(cls, value: Any) -> Any:
        for number in _numbers(value):
            limit = MAX_SEED if isinstance(number, int) else MAX_NUMBER
            if not abs(number) <= limit:  # NaN too
                # an integer may be larger than any float
                got = str(number)[:20] if isinstance(number, int) else f"{number:g}"
                raise ValueError(f"must be between -{limit:g} and {limit:g}, got {got}")
        return value


class MethodSettings(BaseSettings):
    """Settings of a method, with its source and how this implementation compares with it."""

    paper: ClassVar[str] = ""
    """Source of the method: an arXiv number such as "arXiv:2303.07345", or "ours"."""
    code_url: ClassVar[str] = ""
    """Address of the released code; empty if there is none."""
    code_commit: ClassVar[str] = ""
    """Commit of the released code that `parity` and `deviations` speak of."""
    parity: ClassVar[str] = ""
    """Comparison with the released code: what was run beside it, and how far apart the two are."""
    deviations: ClassVar[str] = ""
    """Differences between this implementation and the paper or its code, and why."""


Settings = TypeVar("Settings", bound=type[BaseModel])


def changed_repr(model: BaseModel) -> str:
    """Return the `repr` of a pydantic model: its fields that differ from their defaults."""
    fields = type(model).model_fields
    defaults = {k: field.get_default(call_default_factory=True) for k, field in fields.items()}
    return short_repr(type(model), **{k: v for k, v in model if v != defaults[k]})


def raises_config_error(settings: Settings) -> Settings:
    """Make a call of a settings class raise a `ConfigError` of one line, not pydantic's error.

    A subclass, and settings read as a part of others, raise pydantic's.
    """
    plain = settings.__init__

    @wraps(plain)
    def build(self: BaseModel, **values: Any) -> None:
        try:
            plain(self, **values)
        except ValidationError as error:
            if type(self) is not settings:
                raise
            raise ConfigError(f"{settings.__name__}: {explain(error, settings)}") from error

    setattr(settings, "__init__", build)  # noqa: B010  # mypy forbids the plain assignment
    return settings


def _numbers(value: object) -> Iterator[float]:
    """Yield the numbers in a value, those of its entries too."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _numbers(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _numbers(entry)
