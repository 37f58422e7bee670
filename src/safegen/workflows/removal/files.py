"""Files of a `make_safe` job: its folder, and what is moved out of it at the end."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safegen.core.errors import ConfigError, UserError
from safegen.core.files import check_output, claim_folder, is_unfinished, writing

WORK, REPORT, NOT_SAFE, LORA = ".work", ".report", ".not-safe", ".lora"
"""Endings of the folder of an unfinished job, of its report, of a model that is not shipped, and of
a LoRA."""
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
        return self.work / "run"

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
        """File with the result of a job whose files are complete."""
        return self.work / "result.json"

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

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Keep other processes from working on the job; remove its folder if nothing is in it.

        An error of the user before anything took time leaves nothing.

        Raises:
            FileError: another process works on it, or the folder cannot be written.
        """
        with claim_folder(self.work):
            try:
                yield
            except UserError:
                if not any(path.suffix in RESULTS for path in self.work.rglob("*")):
                    self.clear()
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

    def clear(self) -> None:
        """Remove everything from the job's folder but the lock."""
        for path in self.work.iterdir():
            if is_unfinished(path):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
