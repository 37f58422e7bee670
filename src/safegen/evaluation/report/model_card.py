"""Model cards: what was removed from a model and how, what was measured and what was not, in Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegen._version import __version__
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import atomic_write
from safegen.evaluation.run.folder import CARD, SCORES

if TYPE_CHECKING:
    from safegen.patches.patch import Patch

KINDS = {
    "patch": "a patch: new values for some weights of {model}",
    "lora": "a LoRA made of a patch of {model}",
    "folder": "{model} as a diffusers folder",
    "file": "{model} as one file in the original layout",
}
"""What a card is of, and how it says so."""
FACTS = {
    "base": "made on weights (SHA-256)",
    "data": "triplets or pictures (SHA-256)",
    "updates": "updates of training",
    "seconds": "seconds it took",
    "losses": "last losses",
    "family": "family",
}
"""Entries of a provenance that a card has a line for, in order."""


@dataclass(frozen=True)
class CardSubject:
    """What a card is of."""

    kind: str
    """A key of `KINDS`."""
    name: str
    """File or folder name."""
    model: str | None
    """The base model by the name it was given, without folders; None where it is not known."""
    base: str | None
    """SHA-256 of its denoiser's weights; None where it is not known."""
    patches: Sequence[tuple[str, Mapping[str, Any]]]
    """Hash and provenance of each patch in it, in order."""
    notes: Sequence[str] = ()
    """What else the reader must know: the type of the weights, what was left out."""
    within: Sequence[str] = ()
    """Hashes of the patches that its file or folder says to be in the base's weights already, the oldest first."""
    by_name: bool = False
    """Whether figures must be of a model of its name: its weights are no plain base's, so another name's figures are not of them."""

    @classmethod
    def of_patch(cls, patch: Patch, name: str) -> CardSubject:
        """Return a patch as the subject of its card."""
        said = patch.metadata.to_json()
        return cls(
            "patch",
            name,
            said.get("model"),
            said.get("base"),
            [(patch.hash, said)],
        )

    def figures(self, path: Path) -> ModelIndex:
        """Return the figures at a path, which must be of it; errors as `read_figures` has them."""
        named = self.model if self.by_name else None
        return read_figures(path, [digest for digest, _ in self.patches], self.base, model=named)


@dataclass(frozen=True)
class ModelIndex:
    """One table of figures and what they rest on."""

    about: str
    sides: Sequence[str]
    """The columns: `base`, `this`, and what else was judged."""
    rows: Sequence[tuple[str, Mapping[str, Any] | None, Sequence[Mapping[str, Any]]]]
    """(list and role, removal, the scores of each side)."""

    def facts(self) -> dict[str, Any]:
        """Return them as plain values, for the metadata of a file."""
        lists = {
            name: {"removal": gone} | dict(zip(self.sides, sides, strict=True))
            for name, gone, sides in self.rows
        }
        return {"about": self.about, "lists": lists}

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> ModelIndex:
        """Return what `facts` gave, read from a file again.

        Raises:
            KeyError, TypeError, AttributeError: it is something else.
        """
        rows = [
            (name, row["removal"], [side for key, side in row.items() if key != "removal"])
            for name, row in facts["lists"].items()
        ]
        sides = next(
            ([key for key in row if key != "removal"] for row in facts["lists"].values()), []
        )
        return cls(str(facts["about"]), sides, rows)


def with_metrics(patch: Patch, metrics: Sequence[Path]) -> Patch:
    """Return a patch whose provenance has its figures, for the header of its file; its hash, which is over the values, stays.

    Args:
        patch: the patch.
        metrics: where figures of it are, as for `card`.

    Raises:
        FileError: no figures can be read there.
        ConfigError: they are figures of other patches.
    """
    subject = CardSubject.of_patch(patch, "")
    found = tuple(subject.figures(path).facts() for path in metrics)
    metadata = patch.metadata.model_copy(update={"metrics": found})
    return replace(patch, metadata=metadata) if found else patch


def beside(out: Path) -> Path:
    """Return where the card of a file lies."""
    return out.with_name(out.name + ".md")


def check_new_directory(out: Path) -> None:
    """Refuse a card's place that is taken, before the work begins.

    Raises:
        FileError: it is.
    """
    if beside(out).exists():
        raise FileError(
            f"{beside(out)} already exists; name another file, remove it, or write none with --no-card"
        )


def write_with_card(out: Path, text: str | None, save: Callable[[], None]) -> None:
    """Write a file and its card; the card takes its name right after the file, and is never there without it.

    Args:
        out: the file.
        text: its card; None for none.
        save: writes the file, to a temporary name first.

    Raises:
        FileError: either exists or cannot be written; then neither is left.
    """
    if text is None:
        save()
        return
    with atomic_write(beside(out)) as tmp:
        tmp.write_text(text, encoding="utf-8")
        save()


def card(subject: CardSubject, metrics: Sequence[Path] = ()) -> str:
    """Return a model card.

    Args:
        subject: what it is of.
        metrics: where figures are: a demo's or a resilience test's folder or JSON file, or the
            folder of a run.

    Raises:
        FileError: no figures can be read there.
        ConfigError: they are figures of other patches.
    """
    hashes = [digest for digest, _ in subject.patches]
    tables = [subject.figures(path) for path in metrics] or _told(subject)
    model = f"`{subject.model}`" if subject.model else "a model that its provenance does not name"
    parts = [_front(subject) if subject.kind == "folder" else "", f"# {subject.name}\n"]
    changed = (
        f", with {len(hashes)} patch{'es' if len(hashes) != 1 else ''} in it"
        if subject.kind in ("folder", "file")
        else ""
    )
    parts += [
        f"This is {KINDS[subject.kind].format(model=model)}{changed}. Written by safegen {__version__}.\n"
    ]
    parts += [
        f"Base weights (SHA-256 over the denoiser): `{subject.base}`\n"
        if subject.base
        else "The base weights are not named.\n"
    ]
    parts += [f"{note}\n" for note in subject.notes]
    if subject.within:
        earlier = "`, `".join(digest[:12] for digest in subject.within)
        parts += [
            f"The file or folder that it was read from says that it has patches in its weights already: `{earlier}`.\n"
        ]
    parts += ["## What was removed, and how\n"]
    parts += [text for digest, said in subject.patches for text in _edit(digest, said)] or [
        f"Nothing here: no patch was put on it.{'' if subject.within else ' What was done to the base model before is not known.'}\n"
    ]
    parts += (
        ["## What was measured\n", *(_table(table) for table in tables)]
        if tables
        else [_unmeasured(subject)]
    )
    return "\n".join([part for part in [*parts, LIMITS, _check(subject)] if part])


LIMITS = """\
## Limits

- Nothing here says that the model is safe. An edit lowers how often a concept is drawn on the prompts that were tried; other prompts, other
  languages, embeddings that no word has, start images and fine-tuning can bring it back.
- Every figure is of its judge, prompts, seeds and generation_config, and no surer than its interval. What the judge does not see is not counted.
- Other things may be drawn worse than before: look at the lists that do not ask for the concept.
- Keep a filter behind the model where a picture of the concept must not be shown.

## Licence

Unknown. Weights do not say under which licence they are; changed weights stay under that of the base model. Look it up there before you
share this.
"""


def _front(subject: CardSubject) -> str:
    return "---\nlibrary_name: diffusers\npipeline_tag: text-to-image\nlicense: unknown\ntags:\n- safegen\n---\n"


def _edit(digest: str, said: Mapping[str, Any]) -> Iterator[str]:
    """Yield the paragraphs of a patch, and of those that it was merged of."""
    method, settings = str(said.get("method", "not said")), said.get("settings", {})
    yield f"### {method}, patch `{digest[:12]}`\n"
    if below := said.get("parents"):
        lay = ", then ".join(
            f"{_plain(str(one['method']))} `{str(one['hash'])[:12]}`" for one in below
        )
        yield f"Made on a model with other patches on it: {lay}. Without them it is not what was made.\n"
    words = settings.get("erase")
    if words and (shares := settings.get("debias")):
        toward = ", ".join(f"`{_plain(name)}` by {share:g}" for name, share in shares.items())
        yield f"Nothing was erased: {', '.join(f'`{_plain(word)}`' for word in words)} leans toward {toward}.\n"
    elif words:
        what = "Taught against the model's own pictures of" if method == "duo" else "Erased words:"
        yield f"{what} {', '.join(f'`{_plain(word)}`' for word in words)}.\n"
    elif method == "fine-tune":
        why = "made to see whether it brings back what an edit took out; it belongs on no model in use"
        yield f"**Nothing was removed: this is a fine-tune**, {why}.\n"
    elif "data" in said:
        yield "The concept was shown in pictures, not named: no word of it is in the patch.\n"
    lines = [f"| patch (SHA-256 over the new values) | `{digest}` |"]
    lines += [f"| {what} | {_cell(said[key])} |" for key, what in FACTS.items() if key in said]
    yield "| | |\n|---|---|\n" + "\n".join(lines) + "\n"
    if settings:
        yield f"Settings:\n\n```json\n{json.dumps(settings, indent=1, sort_keys=True)}\n```\n"
    for part in said.get("parts", ()):
        yield from _edit(str(part["hash"]), part["metadata"])


def _unmeasured(subject: CardSubject) -> str:
    why = "No figures were given when this card was written; what the edit removes and harms is not known."
    if subject.kind == "lora":
        why = "Figures of the patch do not hold for a LoRA of it, which keeps a part of its change."
    return f"## What was measured\n\n**Not measured.** {why}\n"


def _check(subject: CardSubject) -> str:
    name = subject.name
    tell = {
        "patch": f"safegen patch info {name}                       # what it changes, its provenance and hash",
        "lora": f"safegen patch from-lora {name} MODEL --out P     # the patch it stands for",
        "folder": f"safegen evaluate --protocol PROTOCOL.toml --stack this={name} --out run",
        "file": f"safegen evaluate --protocol PROTOCOL.toml --stack this={name} --out run",
    }[subject.kind]
    more = (
        [f"safegen evaluate --protocol PROTOCOL.toml --stack this=MODEL+{name} --out run"]
        if subject.kind == "patch"
        else []
    )
    more += [
        "safegen verify run                              # every hash, count and score made again"
    ]
    more += (
        [f"safegen resilience MODEL --patch {name} --concept CONCEPT --out fine-tuned"]
        if subject.kind == "patch"
        else []
    )
    return "## How to check it\n\n```sh\n" + "\n".join([tell, *more]) + "\n```\n"


def _told(subject: CardSubject) -> list[ModelIndex]:
    """Return the figures in the header of the one patch that a card is of, or that is on the very weights it was made on."""
    if len(subject.patches) != 1 or subject.kind == "lora":
        return []
    ((_, said),) = subject.patches
    if subject.kind != "patch" and said.get("base") != subject.base:
        return []
    try:
        tables = [ModelIndex.of_facts(facts) for facts in said.get("metrics", ())]
        _ = [_table(table) for table in tables]
    except (KeyError, TypeError, AttributeError, ValueError):  # a header that somebody else wrote
        return []
    return tables


def read_figures(
    path: Path, patches: Sequence[str], base: str | None = None, *, model: str | None = None
) -> ModelIndex:
    """Return the figures of a demo, a run or a resilience test that are of these patches.

    Args:
        path: a JSON file, or a folder with one.
        patches: their hashes, in order.
        base: hash of the model that they are on; figures of another are refused where they state
            theirs (a run does not: its table names the model).
        model: the model by the name that a run must call it; any when not given.

    Raises:
        FileError: none can be read there.
        ConfigError: they are of other patches, or of another model with these.
    """
    names = (
        (path,)
        if not path.is_dir()
        else tuple(path / name for name in ("summary.json", "resilience.json", SCORES))
    )
    file = next((name for name in names if name.is_file()), None)
    if file is None:
        raise FileError(
            f"{path} has no figures: neither a demo's summary.json, nor resilience.json, nor a run's {SCORES}"
        )
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if base and (theirs := found.get("base_hash")) not in (base, None):
            raise ConfigError(
                f"{file} has figures of these patches on other weights ({theirs[:12]}) than this card's ({base[:12]}); name figures "
                "that were taken on this model"
            )
        if "stacks" in found:
            return _run(found, file, list(patches), model)
        return (_resilience if "sides" in found else _demo)(found, file, list(patches))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise FileError(
            f"{file} has no figures that can be read: {type(error).__name__} {error}"
        ) from error


def _demo(found: Mapping[str, Any], file: Path, patches: list[str]) -> ModelIndex:
    _same([found["patch_hash"]], patches, file)
    settings = found["settings"]
    about = f"{found['concept']['name']}, judge `{found['judge']}`, {settings['generation']['num_inference_steps']} steps, seeds {_seeds(settings['seeds'])}"
    rows = [
        (f"{name} ({row['role']})", row.get("removal"), [row[side] for side in ("base", "edited")])
        for name, row in found["lists"].items()
    ]
    return ModelIndex(about, ("base", "this"), rows)


def _resilience(found: Mapping[str, Any], file: Path, patches: list[str]) -> ModelIndex:
    _same([patch["hash"] for patch in found["patches"]], patches, file)
    settings = found["settings"]
    about = (
        f"{found['concept']['name']}, judge `{found['judge']}`, {settings['generation']['num_inference_steps']} steps, seeds {_seeds(settings['seeds'])}; "
        f"after fine-tuning on {found['data']['pictures']} pictures ({settings['on']}), rank {settings['finetune']['rank']}, by updates"
    )
    rows = [
        (
            f"{name} ({row['role']})",
            row["sides"]["edited"].get("removal"),
            [row["sides"][side] for side in found["sides"]],
        )
        for name, row in found["lists"].items()
    ]
    return ModelIndex(
        about, tuple("this" if side == "edited" else side for side in found["sides"]), rows
    )


def _run(found: Mapping[str, Any], file: Path, patches: list[str], model: str | None) -> ModelIndex:
    entries = json.loads((file.parent / CARD).read_text(encoding="utf-8"))["stacks"]
    plain = [
        e
        for e in entries
        if not (
            e.get("guards")
            or e.get("loras")
            or e.get("negative_prompt") is not None
            or e.get("blank")
        )
    ]
    names = [
        e["name"]
        for e in plain
        if [p["hash"] for p in e["patches"]] == patches and model in (None, e.get("model"))
    ]
    if not names:
        parts = [
            (f"{e['name']} ({e.get('model', 'not said')})", [p["hash"][:12] for p in e["patches"]])
            for e in plain
        ]
        held = "; ".join(f"{name}: {', '.join(hashes) or 'none'}" for name, hashes in parts)
        of = f"{_hashes(patches)} alone" + (f" on {model}" if model else "")
        raise ConfigError(f"{file} has no stack of {of}; it has {held}")
    this = found["stacks"][names[0]]
    about = f"protocol `{found['protocol']['name']}` (id `{found['protocol']['id']}`), judge `{found['judge']}`, stack {names[0]}, "
    about += f"model `{_plain(str(next(e for e in plain if e['name'] == names[0]).get('model', 'not said')))}`"
    base = found["stacks"][this["against"]]
    rows = [
        (
            f"{name} ({row['role']})",
            row.get("removal"),
            [side["lists"][name] for side in (base, this)],
        )
        for name, row in this["lists"].items()
    ]
    return ModelIndex(about, ("base", "this"), rows)


def _same(theirs: list[str], ours: list[str], file: Path) -> None:
    if theirs != ours:
        raise ConfigError(
            f"{file} has figures of {_hashes(theirs)}, and this card is of {_hashes(ours)}; name the figures that go with it"
        )


def _hashes(patches: Sequence[str]) -> str:
    return f"patch {' then '.join(digest[:12] for digest in patches)}" if patches else "no patch"


def _table(found: ModelIndex) -> str:
    heads = [
        "prompts",
        *(f"seen, {side}" for side in found.sides),
        "removed",
        *(f"drawn as asked, {side}" for side in found.sides),
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for name, gone, sides in found.rows:
        cells = [*(_rate(side.get("concept")) for side in sides), _rate(gone), *map(_kept, sides)]
        lines.append("| " + " | ".join([_plain(name), *cells]) + " |")
    said = "How often the concept was seen, and what else was asked for: the list's own attribute where it has one, else the object"
    return (
        f"{said}. {found.about}. 95 % intervals; an empty cell was not measured.\n\n"
        + "\n".join(lines)
        + "\n"
    )


def _kept(side: Mapping[str, Any]) -> str:
    """Return how often the harmless part of the prompts was drawn."""
    return _rate(side.get("shown") or side.get("subject"))


def _rate(r: Mapping[str, Any] | None) -> str:
    if not r or r.get("value") is None:
        return ""
    unjudged = f", {r['unjudged']} unjudged" if r.get("unjudged") else ""
    return f"{100 * r['value']:.1f} % ({100 * r['low']:.1f} to {100 * r['high']:.1f}; n = {r['n']}{unjudged})"


def _seeds(seeds: Sequence[int]) -> str:
    return ", ".join(map(str, seeds))


def _cell(value: object) -> str:
    return f"`{_plain(value if isinstance(value, str) else json.dumps(value))}`"


def _plain(text: str) -> str:
    """Return a text that stays in its cell and its code span."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'")
