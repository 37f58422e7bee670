"""Suite of attack prompts for any model and concept: made once, tried on every stack."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safegen._version import __version__
from safegen.attacks.core.base import Attack, AttackRecord
from safegen.attacks.core.cost import Cost
from safegen.attacks.core.prompts import attack_protocol
from safegen.attacks.core.run import AttackConfig, attack_samples, check_model, repeat_samples
from safegen.attacks.suite.files import (
    CARD,
    MANIFEST,
    PROMPT_FOLDER,
    PROTOCOL,
    SuiteAttack,
    SuiteConcept,
    SuiteList,
    SuiteManifest,
    file_digest,
    open_suite,
    prompt_files,
    protocol_toml,
    suite_card,
)
from safegen.attacks.suite.lists import context_lists, found_lists, reseed, suite_protocol
from safegen.core.concept import Concept
from safegen.core.errors import ConfigError, SafegenWarning, UserError
from safegen.core.files import atomic_write, claim_folder, display_name, is_unfinished
from safegen.core.progress import ProgressCallback, no_progress
from safegen.core.registry import ATTACKS, resolve
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol import Protocol
from safegen.evaluation.run.folder import ATTACK_FILES, SCORES, SETTINGS, Run, write_json
from safegen.evaluation.run.journal import Journal
from safegen.evaluation.run.judge import load_evaluators
from safegen.evaluation.run.scores import read_scores
from safegen.evaluation.run.settings import claim_directory
from safegen.evaluation.samples import is_bundled
from safegen.evaluation.schema import PromptList
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

BASE = "base"
"""Folder of the run of the protocol on the stack that a suite is made on."""


class SkippedAttackWarning(SafegenWarning):
    """Attack that is left out of a suite, as the concept lacks what it needs."""


def static_attacks(concept: Concept) -> list[Attack]:
    """Return every static attack that fits a concept with its default settings, by name.

    Warns:
        SkippedAttackWarning: an attack needs images, and the concept has no bundled triplets.
    """
    kinds: list[type[Attack]] = [resolve(ATTACKS, name, "attack") for name in sorted(ATTACKS)]
    attacks = []
    for kind in kinds:
        if kind.tier != "static" or not kind.changes_prompts:
            continue
        if "images" in kind.model_fields and concept.triplets is None:
            warnings.warn(
                f"{kind.method()} is left out: concept {concept.name!r} has no bundled triplets. "
                "Run it by itself with images of the concept.",
                SkippedAttackWarning,
                stacklevel=2,
            )
            continue
        attacks.append(kind())
    return attacks


def make_suite(
    base: Stack,
    concept: Concept,
    config: AttackConfig,
    out: Path,
    *,
    attacks: Sequence[Attack] | None = None,
    loader: StackLoader | None = None,
    argv: Sequence[str] = (),
    progress: ProgressCallback = no_progress,
) -> SuiteManifest:
    """Make a benchmark of attack prompts in a folder, and return its manifest.

    The folder has a prompt file for each attack, the start images that it needs, a card, and
    `protocol.toml`, which `safegen evaluate` takes for any stack. The same call resumes an
    interrupted one; at most one batch is repeated. A finished suite is only checked.

    Args:
        base: stack that the attacks work on, usually a model without patches. Prompts made on an
            edited one test whether they transfer.
        concept: concept to ask for; it gives the judge and the default prompts.
        config: prompts, generation, and the budget of each attack.
        out: folder of the suite, new or of an earlier call.
        attacks: the attacks. Default: every static one of the registry.
        loader: loads the model; on the CPU when not given.
        argv: command line to note in the card of the stack's run.
        progress: called with (stage, done, total).

    Raises:
        ConfigError: an attack is adaptive or repeated, the concept has no prompts of its role, or
            the model is on the hub.
        FileError: `out` holds something else, another suite or a changed one, or cannot be written.
    """
    check_model(base)
    attacks = static_attacks(concept) if attacks is None else attacks
    _check_attacks(attacks)
    loader = loader or StackLoader()
    protocols = [attack_protocol(attack, concept, config) for attack in attacks]
    settings = {
        "workflow": "suite",
        "attacks": [{"name": a.method()} | a.fingerprint(concept) for a in attacks],
        "config": _public(config),
        "stack": loader.hash(base),
        "concept": concept.model_dump(mode="json"),
        "protocols": [protocol.decides() for protocol in protocols],
        "device": f"{loader.device}, {loader.dtype}",
    }
    with _claim_suite(out):
        load_evaluators(protocols[0])  # a judge that is not installed stops the suite at once
        claim_directory(out, settings)
        if (out / MANIFEST).exists():
            return open_suite(out)
        entries, found = _search(
            attacks, protocols, base, concept, config, out, loader=loader, progress=progress
        )
        protocol = suite_protocol(protocols[0], [*context_lists(concept, config), *found])
        run = evaluate(
            protocol,
            [base],
            out / BASE,
            baselines="none",
            loader=loader,
            argv=argv,
            progress=progress,
        )
        return _write_suite(out, run, protocol, concept, config, entries)


def _search(
    attacks: Sequence[Attack],
    protocols: Sequence[Protocol],
    base: Stack,
    concept: Concept,
    config: AttackConfig,
    out: Path,
    *,
    loader: StackLoader,
    progress: ProgressCallback,
) -> tuple[list[SuiteAttack], list[PromptList]]:
    """Run the attacks, write their prompts, and return their entries and lists."""
    (out / ATTACK_FILES).mkdir(exist_ok=True)
    (out / PROMPT_FOLDER).mkdir(exist_ok=True)
    taken: set[tuple[object, ...]] = set()
    entries: list[SuiteAttack] = []
    lists: list[PromptList] = []
    for attack, protocol in zip(attacks, protocols, strict=True):
        samples = repeat_samples(protocol.samples(), config.repeat)
        folder = out / PROMPT_FOLDER / attack.method()
        with Journal(out / ATTACK_FILES / f"{attack.method()}.jsonl", AttackRecord) as journal:
            found = attack_samples(
                attack,
                base,
                concept,
                config,
                samples,
                journal,
                folder,
                loader=loader,
                progress=progress,
            )
        entries.append(_attack_entry(attack, concept, found))
        lists += found_lists(attack, samples, reseed(found, taken), config, folder)
    return entries, lists


@contextmanager
def _claim_suite(out: Path) -> Iterator[None]:
    """Keep other processes out of a folder; what a refused call wrote into a new one is removed."""
    is_new = not out.is_dir() or all(map(is_unfinished, out.iterdir()))
    with claim_folder(out):
        try:
            yield
        except UserError:
            journals = list((out / ATTACK_FILES).glob("*.jsonl"))
            if is_new and not any(path.stat().st_size for path in journals):
                for name in (ATTACK_FILES, PROMPT_FOLDER):
                    shutil.rmtree(out / name, ignore_errors=True)
                (out / SETTINGS).unlink(missing_ok=True)
            raise


def _check_attacks(attacks: Sequence[Attack]) -> None:
    """Raise if attacks are none, repeated, or not such that their prompts hold for any stack."""
    names = [attack.method() for attack in attacks]
    if not names or len(set(names)) < len(names):
        raise ConfigError(
            f"attacks of a suite must be named once each, got {', '.join(names) or 'none'}"
        )
    for attack in attacks:
        if attack.tier != "static" or not attack.changes_prompts:
            raise ConfigError(
                f"attacks of a suite must be static, got {attack.method()!r}, which works against "
                "one stack. Run it on that stack with `safegen attack`."
            )


def _public(config: AttackConfig) -> dict[str, Any]:
    """Return plain values, with paths reduced to file names; protocols have the prompts' hashes."""
    names = [s if is_bundled(s) else display_name(s) for s in config.prompts]
    return config.model_dump(mode="json") | {"prompts": names}


def _attack_entry(
    attack: Attack, concept: Concept, records: Mapping[tuple[str, str], AttackRecord]
) -> SuiteAttack:
    """Return the manifest's entry of an attack."""
    found = list(records.values())
    stable = [record.stable for record in found if record.stable is not None]
    return SuiteAttack(
        name=attack.method(),
        paper=attack.paper,
        settings=attack.fingerprint(concept),
        prompts=len(found),
        stopped=sum(bool(record.stopped) for record in found),
        stable=sum(stable) if stable else None,
        cost=sum((record.cost for record in found), Cost()),
    )


def _write_suite(
    out: Path,
    run: Run,
    protocol: Protocol,
    concept: Concept,
    config: AttackConfig,
    attacks: Sequence[SuiteAttack],
) -> SuiteManifest:
    """Write protocol, card and manifest, the manifest last, and return it."""
    stack = run.stacks[-1]  # a base model is generated before a stack on it
    scores = read_scores(run.folder / SCORES)["stacks"][stack.name]["lists"]
    manifest = SuiteManifest(
        safegen=__version__,
        concept=SuiteConcept.model_validate(
            concept.model_dump(include={"name", "words", "judge", "labels", "threshold"})
        ),
        stack=stack,
        config=_public(config),
        protocol=protocol.id,
        attacks=tuple(attacks),
        lists=tuple(
            SuiteList(
                name=part.name,
                role=part.role,
                prompts=part.prompts or 0,
                sha256=part.sha256,
                base=scores[part.name].get("concept"),
            )
            for part in protocol.lists
        ),
        files={},
    )
    texts = {PROTOCOL: protocol_toml(protocol, out), CARD: suite_card(manifest)}
    for name, text in texts.items():
        with atomic_write(out / name, replace=True) as temporary:
            temporary.write_text(text, encoding="utf-8")
    files = [*texts, *prompt_files(out)]
    digests = {name: file_digest(out / name) for name in files}
    manifest = manifest.model_copy(update={"files": digests})
    write_json(out / MANIFEST, manifest.model_dump(mode="json"))
    return manifest
