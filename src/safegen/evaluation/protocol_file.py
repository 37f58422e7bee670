"""Protocols in TOML files: built-in ones, those of users, and that of a run to be given again."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import tomli_w

from safegen.core.documents import read_toml, validate
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.files import atomic_write
from safegen.core.hub import HUB
from safegen.core.registry import PROTOCOLS
from safegen.data.prompts.prompts import FOUND, read_prompts
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.card import public_protocol
from safegen.evaluation.run.folder import PROMPT_FILES, PROTOCOL_FILE
from safegen.evaluation.samples import hash_prompts, is_bundled
from safegen.evaluation.schema import PromptList

MAX_COPY = 2**24
"""Largest prompt file that a run keeps a copy of, in bytes."""
READ_ANEW = ("left_out", "notes")
"""Fields of a list that are set whenever its file is read."""
HEAD = """# The protocol of this run. Give it again with: --protocol {name}
"""


def load_protocol(name: str, *, prompts: Mapping[str, str | Path] | None = None) -> Protocol:
    """Return a protocol with its prompts read and checked against their hashes.

    Args:
        name: a built-in protocol, or the path of a TOML file. Paths in the file are relative to it.
        prompts: file of each list without a source, or `hub:owner/name/path/in/repo.csv`.

    Raises:
        UnknownNameError: no such protocol, or no list of that name needs a file.
        FileError: the file is not a protocol, or the prompts of a list are not the intended ones.
        ConfigError: a list still needs its file.

    Example:
        >>> protocol = safegen.load_protocol("mini-smoke")
        >>> protocol.judge.name
        'mini'
    """
    protocol, files = read_protocol(name), dict(prompts or {})
    missing = [part.name for part in protocol.lists if part.source is None]
    for word in files:
        if not missing:
            raise ConfigError(
                f"the protocol {name!r} must be used with its own prompts, got --prompts {word}=. "
                "Leave --prompts out; or leave --protocol out, to evaluate on your prompts"
            )
        if word not in missing:
            raise UnknownNameError("prompt list that needs a file", word, missing)
    folder = Path() if name in PROTOCOLS else Path(name).parent
    lists = tuple(_with_prompts(protocol, part, files, folder) for part in protocol.lists)
    return protocol.model_copy(update={"lists": lists})


def read_protocol(name: str) -> Protocol:
    """Return a protocol as it is written, without reading its prompts.

    Raises:
        UnknownNameError: no such built-in protocol, and not the path of a TOML file.
        FileError: the file is missing or is not a protocol.
    """
    path = Path(name)
    if name in PROTOCOLS:
        path = Path(__file__).parent / "protocols" / f"{name}.toml"
    elif path.suffix != ".toml":
        raise UnknownNameError("protocol", name, PROTOCOLS)
    if not os.path.lexists(path):
        raise FileError(
            f"the protocol file {name!r} does not exist. Built in: {', '.join(PROTOCOLS)}"
        )
    return validate(Protocol, read_toml(path), name)


def _with_prompts(
    protocol: Protocol, part: PromptList, files: Mapping[str, str | Path], folder: Path
) -> PromptList:
    """Return a list with the source, hash and number of its prompts."""
    source = part.source
    if source is None:
        if part.name not in files:
            raise ConfigError(
                f"the protocol {protocol.name!r} needs the prompts of {part.name!r}: "
                f"{part.requires}; give the file with --prompts {part.name}=FILE"
            )
        source = str(files[part.name])
    elif not (is_bundled(source) or source.startswith(HUB)):
        source = str(folder / source)
    part = part.model_copy(update={"source": source})
    prompts = part.read(protocol_seed=protocol.protocol_seed)
    digest, n, left_out = hash_prompts(prompts.rows), len(prompts), list(map(str, prompts.problems))
    if part.sha256 not in ("", digest):
        raise FileError(
            f"the prompts of {part.name!r} must have SHA-256 {part.sha256}, got {digest} in "
            f"{source}. Use the intended file, or write a protocol of your own"
        )
    if part.prompts not in (None, n):
        unusable = f" and {len(left_out)} unusable ({'; '.join(left_out[:3])})" if left_out else ""
        raise FileError(
            f"the prompts of {part.name!r} must be {part.prompts}, got {n} in {source}{unusable}. "
            "Use the intended file"
        )
    new = {"sha256": digest, "prompts": n, "left_out": tuple(left_out), "notes": prompts.notes}
    return part.model_copy(update=new)


def write_protocol(protocol: Protocol, folder: Path) -> None:
    """Write the protocol of a run into its folder, with copies of the prompt files.

    `load_protocol` reads it as the same protocol, with the same ID. Files of unsafe prompts are
    never copied, nor are those larger than `MAX_COPY`: their lists need `--prompts NAME=FILE`.

    Raises:
        FileError: a file cannot be read.
    """
    shown = public_protocol(protocol)
    lists = []
    files = list(dict.fromkeys(part.source for part in protocol.lists))
    for part, public in zip(protocol.lists, shown.lists, strict=True):
        source = _copy(part, folder, files.index(part.source))
        needs = f"the file {public.source} of the run" if source is None else ""
        new = {"source": source, "requires": needs}
        lists.append(public.model_copy(update=new))
    values = shown.model_dump(mode="json", exclude_none=True, exclude={"lists"})
    values["lists"] = [
        {
            key: value
            for key, value in part.model_dump(mode="json", exclude_none=True).items()
            if key not in READ_ANEW and value not in ("", {}, False)
        }
        for part in lists
    ]
    text = HEAD.format(name=f"RUN/{PROTOCOL_FILE}") + tomli_w.dumps(values)
    with atomic_write(folder / PROTOCOL_FILE, replace=True) as tmp:
        tmp.write_text(text, encoding="utf-8")


def _copy(part: PromptList, folder: Path, number: int) -> str | None:
    """Return the source of a list as seen from a run's folder; None if its file is not kept.

    A file is copied to a folder of the given number.
    """
    source = part.source or ""
    if is_bundled(source) or source.startswith(HUB):
        return source
    path = Path(source)
    if part.unsafe or path.stat().st_size > MAX_COPY:
        return None
    found = read_prompts(source, dialect=part.dialect or None, column=part.column or None)
    if found.dialect == FOUND:
        return None
    copy = folder / PROMPT_FILES / str(number) / path.name
    if copy.exists():  # of another list
        return copy.relative_to(folder).as_posix()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(copy, replace=True) as tmp:
        shutil.copyfile(path, tmp)
    return copy.relative_to(folder).as_posix()
