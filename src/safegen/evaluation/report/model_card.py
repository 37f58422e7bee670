"""Model cards in the format of the Hugging Face hub."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen._version import __version__
from safegen.core.errors import FileError
from safegen.core.files import atomic_write
from safegen.core.text import escape_control
from safegen.evaluation.report.format import markdown_code, markdown_text
from safegen.evaluation.report.model_index import ModelIndex, read_metrics

if TYPE_CHECKING:
    from safegen.patches.patch import Patch

TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
KINDS = {
    "patch": "a patch: new values for some weights of {model}",
    "lora": "a LoRA made of a patch of {model}",
    "folder": "{model} as a diffusers folder",
    "file": "{model} as one file in the original layout",
}
"""Kinds of a card's subject, and their text."""
METADATA = {
    "base": "made on weights (SHA-256)",
    "components": "made on text encoders (SHA-256)",
    "data": "triplets or images (SHA-256)",
    "updates": "updates of training",
    "seconds": "seconds it took",
    "losses": "last losses",
    "judges": "judges in training",
    "extractor": "features in training (SHA-256)",
    "training_prompts": "prompts in training",
    "stop_reason": "why it ended early",
    "family": "family",
}
"""Metadata of a patch that the card has a row for, in order."""


@dataclass(frozen=True)
class CardSubject:
    """File or folder that a card describes."""

    kind: str
    """A key of `KINDS`."""
    name: str
    """File or folder name."""
    model: str | None
    """Name of the base model without folders; None if unknown."""
    base: str | None
    """SHA-256 of the denoiser's weights; None if unknown."""
    patches: Sequence[tuple[str, Mapping[str, Any]]]
    """Hash and metadata of each patch in it, in order."""
    notes: Sequence[str] = ()
    """Sentences for the reader, on the type of the weights or what was left out."""
    embedded_patches: Sequence[str] = ()
    """Hashes of patches that are in the base's weights already, the oldest first."""
    match_name: bool = False
    """Whether metrics must be of a model of its name, because the base already holds patches."""

    @classmethod
    def of_patch(cls, patch: Patch, name: str) -> CardSubject:
        """Return a patch as the subject of its card."""
        metadata = patch.metadata
        entries = metadata.to_json()
        return cls("patch", name, metadata.model, metadata.base, [(patch.hash, entries)])

    def read_metrics(self, path: Path) -> ModelIndex:
        """Return the metrics of a run for this subject; errors as in `read_metrics`."""
        return read_metrics(
            path,
            [digest for digest, _ in self.patches],
            self.base,
            model=self.model if self.match_name else None,
        )


def with_metrics(patch: Patch, metrics: Sequence[Path]) -> Patch:
    """Return a patch with metrics in its metadata; its hash, which is over the values, stays.

    Args:
        patch: the patch.
        metrics: runs with metrics of it.

    Raises:
        FileError: a run cannot be read.
        ConfigError: a run has no stack of this patch alone.
    """
    subject = CardSubject.of_patch(patch, "")
    tables = tuple(subject.read_metrics(path).to_dict() for path in metrics)
    metadata = patch.metadata.model_copy(update={"metrics": tables})
    return replace(patch, metadata=metadata) if tables else patch


def card_path(path: Path) -> Path:
    """Return the path of a file's model card."""
    return path.with_name(path.name + ".md")


def write_with_card(path: Path, text: str | None, save: Callable[[], object]) -> None:
    """Write a file and its model card, or neither.

    Args:
        path: the file.
        text: its card; None for none.
        save: writes the file.

    Raises:
        FileError: either exists or cannot be written.
    """
    if text is None:
        save()
        return
    with atomic_write(card_path(path)) as tmp:
        tmp.write_text(text, encoding="utf-8")
        save()


def model_card(subject: CardSubject, metrics: Sequence[Path] = ()) -> str:
    """Return the model card of a file or folder as Markdown.

    Args:
        subject: the file or folder.
        metrics: folders of runs, or their scores files.

    Raises:
        FileError: a run cannot be read.
        ConfigError: a run has no stack of these patches alone.
    """
    from huggingface_hub import ModelCard, ModelCardData

    tables = [subject.read_metrics(path) for path in metrics] or _stored_metrics(subject)
    results = [result for table in tables for result in table.to_eval_results()]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        license="unknown",
        tags=["safegen"],
        model_name=subject.name if results else None,
        eval_results=results or None,
    )
    count, whole = len(subject.patches), subject.kind in ("folder", "file")
    model = "a model that its metadata does not name"
    if subject.model:
        model = markdown_code(subject.model)
    return str(
        ModelCard.from_template(
            data,
            template_path=str(TEMPLATE),
            name=markdown_text(subject.name),
            kind=KINDS[subject.kind].format(model=model),
            contents=f", with {count} patch{'' if count == 1 else 'es'} in it" if whole else "",
            version=__version__,
            base=f"Base weights (SHA-256 over the denoiser): `{subject.base}`"
            if subject.base
            else "The base weights are not named.",
            notes=[*map(markdown_text, subject.notes), *_embedded(subject)],
            edits=[e for digest, metadata in subject.patches for e in _edits(digest, metadata)],
            no_edits="No patch was applied here."
            + ("" if subject.embedded_patches else " Earlier changes to the base are not known."),
            tables=[{"about": markdown_text(t.about), "rows": t.to_table()} for t in tables],
            no_metrics="Metrics of the patch do not hold for a LoRA, which keeps a part of it."
            if subject.kind == "lora"
            else "What the edit removes and harms is not known.",
            commands=_commands(subject),
        )
    )


def _embedded(subject: CardSubject) -> list[str]:
    hashes = "`, `".join(digest[:12] for digest in subject.embedded_patches)
    return [f"Its weights held patches before: `{hashes}`."] if hashes else []


def _edits(digest: str, metadata: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a patch as the template takes it, and each patch that it was merged from."""
    method, settings = str(metadata.get("method", "unknown")), metadata.get("settings", {})
    rows = [("patch (SHA-256 over the new values)", f"`{digest}`")]
    for key, what in METADATA.items():
        if key in metadata:
            value = metadata[key]
            text = value if isinstance(value, str) else json.dumps(value)
            rows.append((what, markdown_code(text)))
    yield {
        "method": markdown_text(method),
        "hash": digest,
        "paragraphs": list(_paragraphs(method, metadata)),
        "rows": rows,
        "settings": json.dumps(settings, indent=1, sort_keys=True) if settings else "",
    }
    for part in metadata.get("parts", ()):
        yield from _edits(str(part["hash"]), part.get("metadata", {}))


def _paragraphs(method: str, metadata: Mapping[str, Any]) -> Iterator[str]:
    if parents := metadata.get("parents"):
        names = ", then ".join(
            f"{markdown_text(str(p['method']))} {markdown_code(str(p['hash'])[:12])}"
            for p in parents
        )
        yield f"Made on a model with other patches: {names}. It needs them."
    settings = metadata.get("settings", {})
    phrases, shares = settings.get("erase"), settings.get("debias")
    phrases = phrases if isinstance(phrases, list | tuple) else ()
    words = ", ".join(markdown_code(str(phrase)) for phrase in phrases)
    if words and shares and isinstance(shares, dict):
        toward = ", ".join(f"{markdown_code(name)} by {shares[name]}" for name in shares)
        yield f"Nothing was erased: {words} leans toward {toward}."
    elif words:
        yield f"Erased words: {words}."
    elif method == "fine-tune":
        yield (
            "**Nothing was removed: this is a fine-tune** of the relearning attack. "
            "It tests whether a removed concept comes back. Do not use it in a product."
        )
    if description := metadata.get("description"):
        yield markdown_text(str(description))
    elif "data" in metadata and not words and method != "fine-tune":
        yield "The concept was given as images: no word of it is in the patch."


def _commands(subject: CardSubject) -> list[str]:
    name = escape_control(shlex.quote(subject.name))
    evaluate = "safegen evaluate --protocol PROTOCOL.toml --stack this={} --out run"
    first = {
        "patch": [f"safegen patch info {name}", evaluate.format(f"MODEL+{name}")],
        "lora": [f"safegen patch from-lora MODEL {name} --out P.safetensors"],
        "folder": [evaluate.format(name)],
        "file": [evaluate.format(name)],
    }[subject.kind]
    attack = f"safegen attack relearn --stack this=MODEL+{name} --concept CONCEPT --out attack"
    return [*first, "safegen verify run", *([attack] if subject.kind == "patch" else [])]


def _stored_metrics(subject: CardSubject) -> list[ModelIndex]:
    """Return the metrics in the metadata of the subject's only patch, if they hold for it."""
    if len(subject.patches) != 1 or subject.kind == "lora":
        return []
    ((_, metadata),) = subject.patches
    base = metadata.get("base")
    if subject.kind != "patch" and (base is None or base != subject.base):
        return []
    try:
        return [ModelIndex.from_dict(values) for values in metadata.get("metrics", ())]
    except FileError:  # metadata of another program
        return []
