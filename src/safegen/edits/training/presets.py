"""Choice of an edit's preset by the size of the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safegen.core.errors import SafegenWarning
from safegen.edits.training.config import Training
from safegen.models.families.noise_schedule import FLOW_PREDICTION
from safegen.models.model import Model

FULL_SIZE = 100_000_000
"""Parameters of a denoiser from which on a model is full-size.

The miniature has 7 million; the smallest distilled Stable Diffusion in use (BK-SDM-Tiny) has 320
million, SD 1.x 860 million, SDXL 2.6 billion.
"""
PRESET_NAMES = ("mini", "full")
"""Presets of every edit; the default is one of them, by the size of the model."""
FLOW_PRESETS = ("mini-flow", "full-flow")
"""Presets that some edits have for models with flow matching, in place of that for their size."""


class MiniatureSettingsWarning(SafegenWarning):
    """Settings tuned on the miniature model, on a full-size model."""


def is_full_size(model: Model) -> bool:
    """Return whether a model is far larger than the miniature that presets `mini` are tuned on."""
    return model.num_parameters >= FULL_SIZE


def default_presets(presets: Iterable[str]) -> tuple[str, ...]:
    """Return the presets of an edit that `default_preset` chooses from."""
    return *PRESET_NAMES, *(name for name in FLOW_PRESETS if name in presets)


def default_preset(model: Model, presets: Iterable[str] = PRESET_NAMES) -> str:
    """Return the preset for a model if none is given.

    That is `full` for a full-size model and `mini` for others, or `full-flow` and `mini-flow` for
    those with flow matching if the edit has them.

    Args:
        model: the model.
        presets: names of the edit's presets.
    """
    size = "full" if is_full_size(model) else "mini"
    flow = f"{size}-flow"
    has_flow = model.prediction == FLOW_PREDICTION and flow in FLOW_PRESETS
    return flow if has_flow and flow in presets else size


def warn_of_mini_lists(lists: Iterable[str], model: Model) -> None:
    """Warn if a full-size model learns from prompt lists of the miniature's drawings.

    Warns:
        MiniatureSettingsWarning: one of the lists is a bundled one, `mini:...`.
    """
    bundled = sorted({name for name in lists if name.startswith("mini:")})
    if bundled and is_full_size(model):
        warnings.warn(
            f"{', '.join(bundled)} describe the drawings of the miniature model, and "
            f"{model.name!r} is full-size: what they do not name is not preserved. Set captions to "
            "text files of your own.",
            MiniatureSettingsWarning,
            stacklevel=4,
        )


def warn_of_size(
    training: Training,
    default: Training,
    presets: Mapping[str, Mapping[str, Any]],
    tuned_on_mini: Sequence[str],
    model: Model,
) -> None:
    """Warn if a full-size model is trained with a learning rate tuned on the miniature.

    Args:
        training: the settings of the training.
        default: those of a preset that names none.
        presets: settings of each preset of the edit.
        tuned_on_mini: names of those that are tuned on the miniature.
        model: the model.

    Warns:
        MiniatureSettingsWarning: the learning rate is that of one of `tuned_on_mini`.
    """
    rates = {name: given.get("training", default).lr for name, given in presets.items()}
    if not is_full_size(model) or training.lr not in {rates[name] for name in tuned_on_mini}:
        return
    warnings.warn(
        f"the settings are tuned on the miniature model, and {model.name!r} has "
        f"{model.num_parameters / 1e6:,.0f} M parameters: learning rate {training.lr:g} is "
        f"{training.lr / rates['full']:.3g} times that of preset full. Use preset full or paper.",
        MiniatureSettingsWarning,
        stacklevel=4,
    )
