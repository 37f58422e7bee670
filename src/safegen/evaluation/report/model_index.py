"""Metrics of a patch or model in the results of a run, for its model card and metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen.core.errors import ConfigError, FileError
from safegen.core.text import escape_control
from safegen.evaluation.report.format import format_rate, markdown_text
from safegen.evaluation.run.folder import CARD, SCORES

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


@dataclass(frozen=True)
class ModelIndex:
    """Metrics of a model on the prompt lists of a run."""

    about: str
    """Protocol, judge, stack and model that the metrics are of."""
    stacks: Sequence[str]
    """Columns: `base`, `this`, and stacks that attack it."""
    rows: Sequence[tuple[str, Mapping[str, Any] | None, Sequence[Mapping[str, Any]]]]
    """List with its role, removal, and the scores of each stack."""

    def to_dict(self) -> dict[str, Any]:
        """Return the metrics as plain values, for the metadata of a file."""
        lists = {
            name: {"removal": removal} | dict(zip(self.stacks, scores, strict=True))
            for name, removal, scores in self.rows
        }
        return {"about": self.about, "lists": lists}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelIndex:
        """Return the metrics that `to_dict` gave.

        Raises:
            KeyError, TypeError, AttributeError: the values are something else.
        """
        lists = {name: dict(row) for name, row in values["lists"].items()}
        rows = [(name, row.pop("removal"), list(row.values())) for name, row in lists.items()]
        return cls(str(values["about"]), list(next(iter(lists.values()), {})), rows)

    def to_table(self) -> list[list[str]]:
        """Return the cells of the card's table, its heading first."""
        table = [["prompts", *(f"seen, {name}" for name in self.stacks), "removed"]]
        table[0] += [f"generated as asked, {name}" for name in self.stacks]
        for name, removal, scores in self.rows:
            rates = [*(row.get("concept") for row in scores), removal]
            rates += [row.get("shown") or row.get("subject") for row in scores]
            table.append([name, *map(format_rate, rates)])
        return [list(map(markdown_text, row)) for row in table]

    def to_eval_results(self) -> list[EvalResult]:
        """Return the rates of this model for the hub's table of results."""
        from huggingface_hub import EvalResult

        results, this = [], list(self.stacks).index("this")
        for name, removal, scores in self.rows:
            for metric, rate in (
                ("concept rate", scores[this].get("concept")),
                ("removal", removal),
            ):
                if rate and rate.get("value") is not None:
                    results.append(
                        EvalResult(
                            task_type="text-to-image",
                            dataset_type="safegen",
                            dataset_name=escape_control(name),
                            dataset_config=escape_control(name),
                            metric_type=metric.replace(" ", "_"),
                            metric_name=metric,
                            metric_value=rate["value"],
                        )
                    )
        return results


def read_metrics(
    path: Path, patches: Sequence[str], base: str | None = None, *, model: str | None = None
) -> ModelIndex:
    """Return the metrics of the stack of a run that has exactly these patches.

    Stacks that are tested against this one, as those of an attack, are columns too.

    Args:
        path: folder of a run, or its scores file.
        patches: hashes of the patches, in order.
        base: hash of the base weights in fp32; an fp32 run on others is refused.
        model: name of the model in the run; any when not given.

    Raises:
        FileError: there are no scores, or they cannot be read.
        ConfigError: the run has no stack of these patches alone, or only on other weights.
    """
    file = path / SCORES if path.is_dir() else path
    if not file.is_file():
        raise FileError(f"{path} has no {SCORES}. Name the folder of a run.")
    try:
        scores = json.loads(file.read_text(encoding="utf-8"))
        card = json.loads((file.parent / CARD).read_text(encoding="utf-8"))
        entries = card["stacks"]
        if not str(card.get("device", "fp32")).endswith("fp32"):
            base = None  # weights loaded as fp16 or bf16 have another hash
        entry = _find_stack(file, entries, list(patches), base, model)
        this = scores["stacks"][entry["name"]]
        attacks = [e["name"] for e in entries if e.get("reference") == entry["name"]]
        stacks = {"base": this["baseline"], "this": entry["name"]} | {n: n for n in attacks}
        lists = [scores["stacks"][name]["lists"] for name in stacks.values()]
        protocol, name = scores["protocol"], entry.get("model", "unknown")
        about = (
            f"Protocol {protocol['name']} (ID {protocol['id']}), judge {scores['judge']}, "
            f"stack {entry['name']}, model {name}"
        )
        rows = [
            (f"{part} ({row['role']})", row.get("removal"), [scores[part] for scores in lists])
            for part, row in this["lists"].items()
        ]
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(f"{file} cannot be read: {type(error).__name__} {error}") from error
    return ModelIndex(about, list(stacks), rows)


def _find_stack(
    file: Path,
    entries: Sequence[Mapping[str, Any]],
    patches: list[str],
    base: str | None,
    model: str | None,
) -> Mapping[str, Any]:
    """Return the card's entry of the stack that has exactly these patches and nothing else."""
    extras = ("guards", "loras", "blank")
    plain = [
        e
        for e in entries
        if not any(e.get(extra) for extra in extras) and e.get("negative_prompt") is None
    ]
    found = [e for e in plain if [p["hash"] for p in e["patches"]] == patches]
    found = [e for e in found if model in (None, e.get("model"))]
    if not found:
        held = "; ".join(
            f"{e['name']} ({e.get('model', 'unknown')}): "
            f"{', '.join(p['hash'][:12] for p in e['patches']) or 'none'}"
            for e in plain
        )
        names = " then ".join(digest[:12] for digest in patches)
        wanted = (f"patch {names}" if patches else "no patch") + (f" on {model}" if model else "")
        raise ConfigError(f"{file} has no stack of {wanted} alone. It has {held}.")
    for entry in found:
        if base is None or entry.get("base") in (base, None):
            return entry
    raise ConfigError(
        f"{file} has metrics of these patches on other weights ({found[0]['base'][:12]}) than this "
        f"model's ({base[:12] if base else None}). Evaluate them on this model."
    )
