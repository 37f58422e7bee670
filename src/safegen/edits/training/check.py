"""Checks of a training before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from safegen.core.errors import ConfigError
from safegen.edits.training.checkpoint import check_resumable
from safegen.edits.training.config import Training


def check_training(
    denoiser: nn.Module,
    names: Sequence[str],
    config: Training,
    *,
    checkpoint_dir: Path | None = None,
    resume: bool = False,
) -> None:
    """Check what `train` needs, before an edit spends time on preparing its batches.

    Raises:
        ConfigError: `resume` lacks a directory, or the precision does not fit model and device.
        FileError: there is no checkpoint to resume, or a damaged one.
    """
    if resume and checkpoint_dir is None:
        raise ConfigError("resume needs the checkpoint directory of the stopped run, got none.")
    if resume and checkpoint_dir is not None:
        check_resumable(checkpoint_dir)
    parameters = dict(denoiser.named_parameters())
    if config.precision == "fp16" and parameters[names[0]].device.type == "cpu":
        raise ConfigError("training.precision must be bf16 or fp32 on a CPU, got fp16.")
    frozen = {p.dtype for name, p in parameters.items() if name not in names}
    if config.precision == "fp32" and frozen - {torch.float32}:
        raise ConfigError(
            "training.precision fp32 needs a model loaded in fp32. "
            "Load it with dtype fp32, or set training.precision to bf16 or fp16."
        )
