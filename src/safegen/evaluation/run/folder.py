"""Directory of a run: its card, journals and images, read without a model."""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from safegen.core.documents import parse_json, read_bytes, read_record
from safegen.core.errors import FileError
from safegen.core.files import atomic_write
from safegen.core.text import short_repr
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.journal import iter_journal, to_line
from safegen.evaluation.run.records import (
    ChangeRecord,
    DetectionsRecord,
    FeatureRecord,
    JudgeRecord,
    RunCard,
    SampleRecord,
    StackEntry,
    TimingRecord,
)
from safegen.evaluation.run.score_table import score_lines
from safegen.evaluation.run.scores import read_scores
from safegen.evaluation.samples import EvalSample, image_keys

CARD, PLAN, SCORES, IMAGES = "protocol.json", "plan.jsonl", "scores.json", "images"
SAMPLES, JUDGES, DETECTIONS = "samples.jsonl", "judges.jsonl", "detections.jsonl"
CHANGES, FEATURES, TIMINGS = "changes.jsonl", "features.jsonl", "timings.jsonl"
SETTINGS, PATCHES = "settings.json", "patches"
"""Settings of the workflow that made the run, and the directory of the patches that it made."""
REPORT = "report.html"
TRUTH = "truth.csv"
"""What a person saw in images of the run."""
ATTACK, PROMPTS, ATTACK_FILES = "attack.jsonl", "prompts.jsonl", "attack"
"""Results of an attack by sample, the prompts that it found, and the directory of its files."""
SHARD = "shard.json"
"""Samples that one shard of an attack has."""
PROTOCOL_FILE, PROMPT_FILES = "protocol.toml", "prompt-files"
"""Protocol of the run as it can be given again, and the directory of its prompt files."""
CONTROLS = "controls.jsonl"
"""Prompts of an attack's controls, which have nothing of the concept."""
MAX_PIXELS = 2**26
"""Most pixels of an image: 8192 x 8192. A small file can hold more than memory does."""
PIL_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
"""Errors of Pillow for a damaged image."""


@dataclass(frozen=True)
class Run:
    """Directory of a run and its card.

    Example:
        >>> few = {"limit": 1, "num_inference_steps": 2, "baselines": "none"}
        >>> run = safegen.evaluate("mini", concept="skulls", out="run", **few)
        >>> print(safegen.Run.open("run"))  # doctest: +ELLIPSIS
        skulls, protocol ...
        >>> run.report.name
        'report.html'
    """

    folder: Path
    card: RunCard

    def __repr__(self) -> str:
        """Return the folder, the protocol and the stacks in one line."""
        stacks = [stack.name for stack in self.stacks]
        return short_repr(Run, repr(str(self.folder)), protocol=self.protocol.name, stacks=stacks)

    def __str__(self) -> str:
        """Return the table of scores, or the run in one line if it has no scores."""
        return (
            "\n".join(score_lines(self.scores)) if (self.folder / SCORES).exists() else repr(self)
        )

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Return the run in a directory.

        Raises:
            FileError: the directory is not a run, its card is damaged, or a link leads out of it.
        """
        folder = Path(folder)
        path = folder / CARD
        if not os.path.lexists(path):
            raise FileError(
                f"{folder} is not a run: it has no {CARD}; "
                f"make one with `safegen evaluate --out {folder}`"
            )
        check_links(folder)
        return cls(folder, read_record(RunCard, path))

    @property
    def protocol(self) -> Protocol:
        """Protocol of the run, with paths reduced to file names."""
        return self.card.protocol

    @property
    def scores(self) -> dict[str, Any]:
        """Rates with n and intervals, by stack and prompt list, as in scores.json.

        Raises:
            FileError: the run is not scored, or the file is damaged.
        """
        return read_scores(self.folder / SCORES)

    @property
    def report(self) -> Path:
        """Path of the report's page; `safegen report` writes it again."""
        return self.folder / REPORT

    @property
    def stacks(self) -> tuple[StackEntry, ...]:
        """Stacks in the order of generation."""
        return self.card.stacks

    @cached_property
    def samples(self) -> list[EvalSample]:
        """Samples of one stack, in order; prompts of unsafe lists are empty.

        Raises:
            FileError: plan.jsonl is damaged.
        """
        return [sample.compact() for sample in iter_journal(self.folder / PLAN, EvalSample)]

    def keys(self, stack: StackEntry) -> list[str]:
        """Return the key of every image of a stack, in the order of the samples."""
        if stack.hash not in self._keys:
            self._keys[stack.hash] = image_keys(self.samples, stack.hash, self.protocol.generation)
        return self._keys[stack.hash]

    @cached_property
    def _keys(self) -> dict[str, list[str]]:
        return {}

    def sample_records(self) -> Iterator[SampleRecord]:
        """Yield the records of all generated images."""
        return iter_journal(self.folder / SAMPLES, SampleRecord)

    def judge_records(self) -> Iterator[JudgeRecord]:
        """Yield the records of all judges."""
        return iter_journal(self.folder / JUDGES, JudgeRecord)

    def detections_records(self) -> Iterator[DetectionsRecord]:
        """Yield the detections of all judges."""
        return iter_journal(self.folder / DETECTIONS, DetectionsRecord)

    def change_records(self) -> Iterator[ChangeRecord]:
        """Yield the differences of all images from the base models'."""
        return iter_journal(self.folder / CHANGES, ChangeRecord)

    def feature_records(self) -> Iterator[FeatureRecord]:
        """Yield the features of all images."""
        return iter_journal(self.folder / FEATURES, FeatureRecord)

    def timing_records(self) -> Iterator[TimingRecord]:
        """Yield the times of all batches."""
        return iter_journal(self.folder / TIMINGS, TimingRecord)

    @property
    def judges(self) -> dict[str, JudgeRecord]:
        """Record of every judge with detections in this run, by its id.

        Raises:
            FileError: a judge has detections but no record, or a journal is damaged.
        """
        return self.describe_judges({record.judge for record in self.detections_records()})

    def describe_judges(self, ids: Iterable[str]) -> dict[str, JudgeRecord]:
        """Return the record of each of some judges with detections, by its id.

        Raises:
            FileError: a judge has no record, or the journal is damaged.
        """
        records, ids = {record.judge: record for record in self.judge_records()}, sorted(ids)
        if unknown := [id_ for id_ in ids if id_ not in records]:
            raise FileError(
                f"{self.folder / JUDGES} has no record of {unknown[0]}. "
                "Run `safegen evaluate --stage judge` again to write it."
            )
        return {id_: records[id_] for id_ in ids}

    def judge(
        self,
        name: str,
        *,
        options: Mapping[str, Any] | None = None,
        judges: Mapping[str, JudgeRecord] | None = None,
    ) -> str:
        """Return the id of the judge of that name (or that id) with detections in this run.

        Args:
            name: its name or id.
            options: options that it must have; any if None.
            judges: the judges with detections, where the caller has read them already.

        Raises:
            FileError: there is no such judge, or there are several.
        """
        judges = self.judges if judges is None else judges
        match = [
            id_
            for id_, record in judges.items()
            if name in (id_, id_.partition(":")[0]) and options in (None, record.options)
        ]
        if len(match) == 1:
            return match[0]
        if match:
            raise FileError(
                f"several judges {name!r} have judged {self.folder}. "
                f"Use the id of one: {', '.join(match)}"
            )
        raise FileError(
            f"no judge {name!r} has judged {self.folder} (known: {', '.join(judges) or 'none'}). "
            f"Run `safegen evaluate --stage judge --judge {name} --out {self.folder}`"
        )


def check_links(folder: Path) -> None:
    """Raise if a link in a run's directory leads out of it: what it names is not of the run.

    Raises:
        FileError: there is such a link, or the directory cannot be read.
    """
    root, pending = Path(os.path.realpath(folder)), [folder]
    try:
        while pending:
            with os.scandir(pending.pop()) as scan:
                entries = list(scan)
            for entry in entries:
                if entry.is_symlink() and not is_inside(Path(entry.path), root):
                    raise FileError(
                        f"{entry.path} must lie in the run's folder, got a link that leads out of "
                        "it. Copy the file or folder there."
                    )
                if entry.is_dir(follow_symlinks=False):
                    pending.append(Path(entry.path))
    except OSError as error:
        raise FileError(f"{folder} cannot be read: {error.strerror or error}") from error


def is_inside(path: Path, root: Path) -> bool:
    """Return whether a path, with its links resolved, lies in a resolved folder."""
    return Path(os.path.realpath(path)).is_relative_to(root)


def image_file(stack: str, key: str) -> str:
    """Return the path of an image in its run's directory."""
    return f"{IMAGES}/{stack}/{key}.png"


def read_image(path: Path) -> Image.Image:
    """Return an image in RGB; `info` has its metadata.

    Raises:
        FileError: it is missing or damaged, is no PNG, or has more than `MAX_PIXELS` pixels.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: bytes, path: Path) -> Image.Image:
    """Return the image in a file's content; see `read_image`.

    Args:
        data: content of the file.
        path: the file, for messages.

    Raises:
        FileError: it is damaged, is no PNG, or has more than `MAX_PIXELS` pixels.
    """
    try:
        with Image.open(BytesIO(data), formats=["PNG"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"it must have at most {MAX_PIXELS} pixels")
            return image.convert("RGB")
    except PIL_ERRORS as error:
        raise FileError(
            f"{path} cannot be read: {' '.join(str(error).split())}. "
            "Remove it and resume the run to generate it again."
        ) from error


def image_metadata(image: Image.Image) -> dict[str, Any]:
    """Return the metadata of a run in an image; empty if it has none."""
    try:
        metadata = parse_json(str(image.info.get("safegen")), "metadata")
    except FileError:
        return {}
    return metadata if isinstance(metadata, dict) else {}


def is_blank(image: Image.Image) -> bool:
    """Return whether an image has one color, as a refused one has."""
    return (image if image.mode == "RGB" else image.convert("RGB")).getcolors(1) is not None


def write_plan(folder: Path, samples: Sequence[EvalSample], unsafe_lists: set[str]) -> None:
    """Write plan.jsonl: one line per sample of a stack, without the prompts of unsafe lists."""
    public = (
        s.model_copy(update={"prompt": ""}) if s.list_name in unsafe_lists else s for s in samples
    )
    with atomic_write(folder / PLAN, replace=True) as tmp, tmp.open("wb") as file:
        file.writelines(to_line(sample).encode() for sample in public)


def write_json(path: Path, value: Any) -> None:
    """Write plain values to a JSON file, or replace it."""
    with atomic_write(path, replace=True) as tmp:
        tmp.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
