"""Protocol as a TOML file in its run, to be given again."""

from __future__ import annotations

import shutil
from pathlib import Path

import tomli_w

from safegen.core.files import atomic_write
from safegen.core.hub import HUB
from safegen.data.prompts.prompts import FOUND, read_prompts
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.card import public_protocol
from safegen.evaluation.run.folder import PROMPT_FILES, PROTOCOL_FILE
from safegen.evaluation.samples import is_bundled
from safegen.evaluation.schema import PromptList

MAX_COPY = 2**24
"""Largest prompt file that a run keeps a copy of, in bytes."""
READ_ANEW = ("left_out", "notes")
"""Fields of a list that are set whenever its file is read."""
HEAD = """# The protocol of this run. Give it again with: --protocol {name}
"""


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
    if part.unsafe or path.stat().st_size > MAX_COPY or read_prompts(source).dialect == FOUND:
        return None
    copy = folder / PROMPT_FILES / str(number) / path.name
    if copy.exists():  # of another list
        return copy.relative_to(folder).as_posix()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(copy, replace=True) as tmp:
        shutil.copyfile(path, tmp)
    return copy.relative_to(folder).as_posix()
