"""Files of a `make_safe` job: its folder, and what is moved out of it at the end."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegen.core.documents import read_json_object
from safegen.core.errors import ConfigError, FileError, UserError
from safegen.core.files import check_output, claim_folder, is_unfinished, writing
from safegen.edits.base import Edit, TrainedEdit
from safegen.evaluation.compare import differences, join_gaps
from safegen.evaluation.run.folder import SETTINGS, write_json
from safegen.models.model import Model

WORK, REPORT, NOT_SAFE, LORA = ".work", ".report", ".not-safe", ".lora"
"""Endings of the folder of an unfinished job, of its report, of a model that is not shipped, and of
a LoRA."""
IMAGES = "images"
"""Folder in the job's folder with latents or triplets, by what decides them."""
FINISHED = "finished"
"""Folder in the job's folder with files that are complete."""
RESULTS = (".png", ".safetensors")
"""Endings of files that take time to make."""


@dataclass(frozen=True)
class JobFiles:
    """Names of the files of a job, all in one folder."""

    out: Path
    """Model that is written if the check passes: a .safetensors file, or a diffusers folder."""
    lora: bool = False
    """Whether a LoRA is written too."""

    def __post_init__(self) -> None:
        """Raise ConfigError if the ending is neither that of a file nor of a folder."""
        if self.out.suffix not in ("", ".safetensors"):
            raise ConfigError(
                f"out must end in .safetensors, or have no ending for a diffusers folder, "
                f"got {str(self.out)!r}"
            )

    @property
    def is_file(self) -> bool:
        """Whether the model is written as one file."""
        return bool(self.out.suffix)

    @property
    def work(self) -> Path:
        """Folder of the unfinished job."""
        return self.out.with_name(self.out.name + WORK)

    @property
    def patch(self) -> Path:
        """Patch in the job's folder."""
        return self.work / "patches" / "edited.safetensors"

    @property
    def lora_file(self) -> Path:
        """LoRA in the job's folder."""
        return self.work / "patches" / "lora.safetensors"

    @property
    def run(self) -> Path:
        """Folder of the check's run."""
        return self.work / "check"

    @property
    def finished(self) -> Path:
        """Folder of the files that are to be moved beside `out`."""
        return self.work / FINISHED

    def model_name(self, *, shipped: bool) -> str:
        """Return the name of the model: another one if it is not shipped."""
        return self.out.name if shipped else f"{self.out.stem}{NOT_SAFE}{self.out.suffix}"

    def lora_name(self, *, shipped: bool) -> str:
        """Return the name of the LoRA's file."""
        return f"{self.out.stem}{'' if shipped else NOT_SAFE}{LORA}.safetensors"

    def report_name(self, *, shipped: bool) -> str:
        """Return the name of the report's folder."""
        return self.model_name(shipped=shipped) + REPORT

    @property
    def result(self) -> Path:
        """File with the result, written when all files are complete."""
        return self.work / "result.json"

    @property
    def is_begun(self) -> bool:
        """Whether an earlier call left an unfinished job."""
        return (self.work / SETTINGS).exists()

    def check_outputs(self) -> None:
        """Raise if a file that would be shipped exists already or cannot be written.

        Raises:
            FileError: it does, or cannot.
        """
        if self.result.exists():  # some files may be in their place
            return
        names = [self.model_name(shipped=True), self.report_name(shipped=True)]
        names += [self.lora_name(shipped=True)] if self.lora else []
        cards = [f"{name}.md" for name in names if name.endswith(".safetensors")]
        for name in [*names, *cards]:
            check_output(self.out.with_name(name))

    def check_edit(self, edit: Edit, model: Model) -> None:
        """Check that the files have a place for what an edit changes.

        Raises:
            ConfigError: it changes text encoders, and a LoRA, or the transformer alone, is written.
        """
        if not isinstance(edit, TrainedEdit) or edit.network(model) is model.denoiser:
            return
        if self.lora:
            raise ConfigError(
                f"lora must not be asked for with {edit.method()}, which changes text encoders. "
                "Leave it out."
            )
        if self.is_file and model.denoiser_name == "transformer":
            raise ConfigError(
                f"out must be a folder with {edit.method()} on {model.name!r}, got "
                f"{str(self.out)!r}: the file would hold the transformer alone. Leave the ending "
                "out."
            )

    def claim_settings(self, settings: Mapping[str, Any]) -> None:
        """Write the job's settings into its folder, or check those that it has.

        Raises:
            FileError: the unfinished job has others, or the folder is not of a job.
        """
        path, wanted = self.work / SETTINGS, json.loads(json.dumps(settings))
        if path.exists():
            if gaps := differences(read_json_object(path), wanted):
                raise FileError(
                    f"{self.work} was made with other settings (then and now): {join_gaps(gaps)}. "
                    "Use those, or remove it to start again."
                )
            return
        if any(not is_unfinished(p) and p.name != IMAGES for p in self.work.iterdir()):
            raise FileError(f"{self.work} already exists and is not of a job. Remove it.")
        write_json(path, wanted)

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from working on the job; remove its folder if nothing is in it.

        After an error of the user before the edit, the same job may be started with other settings:
        only images that are made remain, and nothing if there are none.

        Raises:
            FileError: another process works on it, or the folder cannot be written.
        """
        with claim_folder(self.work):
            try:
                yield
            except UserError:
                if not any((self.work / "patches").rglob("*.safetensors")):
                    images = self.work / IMAGES
                    has_images = any(path.suffix in RESULTS for path in images.rglob("*"))
                    self.clear(keep=IMAGES if has_images else "")
                raise
        with suppress(OSError):
            self.work.rmdir()

    def publish(self) -> None:
        """Move the finished files beside `out`, the model last, and remove the job's folder.

        An earlier model that was not shipped, and its report, are replaced.

        Raises:
            FileError: a file exists already or cannot be moved.
        """
        for path in sorted(self.finished.iterdir(), key=lambda p: p.name in self._model_names):
            target = self.out.with_name(path.name)
            if NOT_SAFE not in path.name:
                check_output(target)
            with writing(target):
                if target.is_dir():
                    shutil.rmtree(target)
                path.replace(target)
        self.clear()

    @property
    def _model_names(self) -> set[str]:
        return {self.model_name(shipped=shipped) for shipped in (True, False)}

    def clear(self, *, keep: str = "") -> None:
        """Remove everything from the job's folder but the lock, and what is named `keep`."""
        for path in self.work.iterdir():
            if is_unfinished(path) or path.name == keep:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
