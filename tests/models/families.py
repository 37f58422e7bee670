"""Which file formats hold which family of models: a part of the contract table."""

from __future__ import annotations

from tests.tiny import FAMILIES

FORMATS = ("folder", "hub", "one file", "one file without a folder", "transformer file")
WHOLE = "a file of it holds the whole model"
ALONE = "a file of it holds the transformer alone"
NEEDS_FOLDER = "must come with a diffusers folder"
_UNETS = ("sd1", "sd2-v", "sdxl", "sdxl-v")

FILES_OF_FAMILIES: dict[str, dict[str, str]] = {
    family: dict.fromkeys(FORMATS, "")
    | (
        {"transformer file": WHOLE}
        if family in _UNETS
        else {"one file": ALONE, "one file without a folder": NEEDS_FOLDER}
    )
    for family in FAMILIES
}
"""Family, format: why models of the family have no such file; empty if it is read and written.

`folder`: a diffusers folder; `hub`: `hub:owner/name`, with one precision of each component, whole
or in shards; `one file`: `export --format single-file` writes the whole model; `one file without
a folder`: that is read without `--config`; `transformer file`: the same command writes the
transformer alone. Files of SD 3 with all components are read, and not written.
`test_file_families.py` checks every cell."""
