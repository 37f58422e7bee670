"""Laws of every attack, at its smallest settings on the miniature model."""

from __future__ import annotations

import json
import shutil

import pytest
from torch.testing import assert_close

from safegen.attacks.core.base import AttackRecord
from safegen.attacks.core.cost import Budget, Cost
from safegen.attacks.core.run import AttackConfig, attack_samples, repeat_samples, run_attack
from safegen.attacks.core.target import Target
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.hashing import hash_tensors
from safegen.core.registry import ATTACKS, resolve
from safegen.core.tensor_files import read_tensors
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.run.attack_records import read_attack
from safegen.evaluation.run.folder import ATTACK, PROMPTS, SAMPLES, SCORES, Run
from safegen.evaluation.run.journal import Journal, read_journal
from safegen.evaluation.verify import verify
from safegen.stack import Stack

SKULLS = load_concept("skulls")
GENERATION = GenerationConfig(num_inference_steps=2)
CONFIG = AttackConfig(limit=3, generation=GENERATION)
STACK = Stack(name="mini", model="mini")
ROUNDED = {"loss", "history", "cost", "details"}
"""Fields of a record that the batch changes by rounding."""
LONGEST = {"latent_inversion", "relearn"}
"""Attacks that take longest; nightly runs them too."""
LONG = {
    "concept_inversion",
    "inpaint",
    "p4d",
    "sneaky_prompt",
    "tree_search",
    "unlearn_diff",
    *LONGEST,
}
"""Attacks that take long to resume; nightly runs them too."""
every_attack = pytest.mark.parametrize("name", sorted(ATTACKS))


def attacks(slow):
    """Return every attack as a parameter; some are slow."""
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name in slow)) for name in sorted(ATTACKS)
    ]


def tiny(name, **changes):
    kind = resolve(ATTACKS, name, "attack")
    return kind(**{**kind.TINY, "batch_size": 2, **changes})


def digest(loader):
    pipe = loader.model("mini")[0].pipeline
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    vocabulary = len(pipe.tokenizer), pipe.text_encoder.config.vocab_size
    grads = [p.requires_grad for part in parts for p in part.parameters()]
    return [hash_tensors(part.state_dict()) for part in parts], vocabulary, grads


def assert_alike(a, b, folder):
    """Check that two records are equal but for rounding, and for the folder of their files.

    Args:
        a: a record.
        b: another one.
        folder: folder of the files of a record that was read from a journal.
    """
    latents = [record.start.latents if record.start else None for record in (a, b)]
    if None in latents:
        assert a.model_dump(exclude=ROUNDED) == b.model_dump(exclude=ROUNDED)
    else:
        fields = ROUNDED | {"start"}
        assert a.model_dump(exclude=fields) == b.model_dump(exclude=fields)
        paths = [(r.start.folder or folder) / r.start.latents for r in (a, b)]
        assert_close(*(read_tensors(path)[0] for path in paths))
    assert a.details == pytest.approx(b.details, rel=1e-2, abs=1e-3)


@every_attack
def test_class_attributes_name_source_and_access(name):
    kind = resolve(ATTACKS, name, "attack")
    assert kind.method() == name
    assert kind.paper.startswith(("arXiv:", "ours"))
    assert not kind.code_url or kind.code_url.startswith("https://")
    assert kind.access in ("queries", "text_encoder", "weights")
    assert kind.tier in ("static", "adaptive")
    assert kind.model_validate_json(tiny(name).model_dump_json()) == tiny(name)
    for preset in kind.PRESETS:
        assert kind.preset(preset)
    with pytest.raises(UnknownNameError):
        kind.preset("none of them")


@pytest.mark.parametrize("name", attacks(slow=LONGEST))
def test_results_repeat_whatever_the_batch_and_the_model_is_untouched(
    name, loader, attack_mini, benign_samples, tmp_path
):
    before, items = digest(loader), benign_samples
    first = attack_mini(tiny(name), items, folder="a/files")
    again = attack_mini(tiny(name), items[:1], items[1:], folder="b/files")
    for a, b in zip(first, again, strict=True):
        assert_alike(a, b, tmp_path)
        assert a.history == pytest.approx(b.history, rel=1e-4)
        assert list(a.history) == sorted(a.history, reverse=True), "the best so far"
    variants = (*tiny(name).variants, *tiny(name).controls)
    assert [(r.id, r.variant) for r in first] == [(i.id, v) for i in items for v in variants]
    assert digest(loader) == before
    tokenizer = loader.model("mini")[0].pipeline.tokenizer
    for record in first:
        assert record.prompt.strip() or (record.prompt and record.start)
        if record.tokens:
            ids = tokenizer(record.prompt).input_ids[1 : 1 + len(record.tokens)]
            assert record.stable == (tuple(ids) == record.tokens), "read back, as it says"


@pytest.mark.parametrize("name", attacks(slow=LONG))
def test_an_interrupted_attack_resumes_to_the_same_results(name, loader, benign_samples, tmp_path):
    attack, items = tiny(name), benign_samples
    records = {}
    for part in ("unbroken", "resumed"):
        folder = tmp_path / part
        folder.mkdir()
        for stop in (2, 3) if part == "resumed" else (3,):
            with Journal(folder / ATTACK, AttackRecord) as journal:
                records[part] = attack_samples(
                    attack,
                    STACK,
                    SKULLS,
                    CONFIG,
                    items[:stop],
                    journal,
                    folder / "files",
                    loader=loader,
                )
    for key, record in records["unbroken"].items():
        assert_alike(record, records["resumed"][key], tmp_path / "resumed")
        costs = [r.cost.model_dump(exclude={"seconds"}) for r in (record, records["resumed"][key])]
        assert costs[0] == costs[1]


def test_costs_are_counted_and_a_budget_ends_the_attack_within_a_batch(
    loader, skulls_judge, benign_samples, tmp_path
):
    with loader.open(STACK) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GENERATION, Budget(queries=2))
        with target.counted(Cost(queries=1, seconds=5.0)):
            assert not target.exhausted
            target.query([Sample(prompt="a castle", seed=1), Sample(prompt="a bus", seed=2)])
            assert target.exhausted == "queries"
        cost = target.cost
    assert (cost.queries, cost.denoiser) == (3, 2 * 2 * GENERATION.num_inference_steps)
    assert cost.text_encoder == 4
    assert cost.seconds > 5
    assert [part.denoiser for part in Cost(denoiser=5).split(2)] == [3, 2]
    config = CONFIG.model_copy(update={"budget": Budget(queries=1)})
    with Journal(tmp_path / ATTACK, AttackRecord) as journal:
        records = attack_samples(
            tiny("seeds", tries=4),
            *(STACK, SKULLS, config, benign_samples, journal, tmp_path),
            loader=loader,
        )
    assert len(records) == 2, "the batch that reached the limit is finished, no other begins"
    assert all(record.stopped == "queries" for record in records.values())
    assert sum((record.cost for record in records.values()), Cost()).queries == 2


@pytest.mark.parametrize("text", ["nfe", "nfe=0", "nfe=1.5", "queries=1,queries=2", "hours=1"])
def test_budgets_that_cannot_be_read_are_refused(text):
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(text)


def test_a_run_has_the_rates_before_and_after_and_prompts_for_other_runs(loader, tmp_path):
    out = tmp_path / "run"
    attack = tiny("seeds", tries=1)
    run = run_attack(attack, STACK, SKULLS, CONFIG, out, loader=loader)
    scores = json.loads((out / SCORES).read_text())["stacks"]["mini"]["lists"]
    assert {name: row["role"] for name, row in scores.items()} == {
        "mini:skulls": "explicit",
        "seeds": "attack",
    }
    assert scores["mini:skulls"]["concept"]["n"] == scores["seeds"]["concept"]["n"] == 3
    assert not verify(Run.open(out))
    prompts = read_prompts(out / PROMPTS)
    assert prompts.dialect == "safegen-attack"
    assert [row.attack.name for row in prompts.rows] == ["seeds"] * 3
    before = (out / SAMPLES).read_bytes()
    again = run_attack(attack, STACK, SKULLS, CONFIG, out, loader=loader)
    assert again.folder == run.folder
    assert (out / SAMPLES).read_bytes() == before
    assert len(read_journal(out / ATTACK, AttackRecord)[0]) == 3
    with pytest.raises(FileError, match="other settings"):
        run_attack(tiny("seeds", tries=3), STACK, SKULLS, CONFIG, out, loader=loader)
    shutil.rmtree(out)


def test_settings_of_a_run_have_no_path(loader, tmp_path):
    prompts = tmp_path / "secret" / "mine.txt"
    prompts.parent.mkdir()
    prompts.write_text("a castle\nan owl\n")
    config = AttackConfig(prompts=(str(prompts),), limit=1, generation=GENERATION)
    run_attack(tiny("seeds", tries=1), STACK, SKULLS, config, tmp_path / "run", loader=loader)
    for name in ("settings.json", "protocol.json", "report.json", "report.html", "scores.json"):
        assert "secret" not in (tmp_path / "run" / name).read_text()


@every_attack
def test_settings_hold_hashes_of_files_so_that_other_contents_are_other_settings(name, tmp_path):
    kind = resolve(ATTACKS, name, "attack")
    annotations = {field: str(info.annotation) for field, info in kind.model_fields.items()}
    fields = [field for field, text in annotations.items() if "Path" in text]
    for field in fields if name != "relearn" else ():  # its fingerprint has the dataset's hash
        source = tmp_path / field / "source"
        source.mkdir(parents=True)
        found = []
        for content in ("one", "two"):
            (source / "a.txt").write_text(content)
            found.append(kind(**{**kind.TINY, field: source}).fingerprint(SKULLS)[field])
        assert found[0] != found[1]
        assert "source" not in found[0]
        assert kind(**{field: source / "a.txt"}).fingerprint(SKULLS)[field] != found[1]


def test_prompts_of_several_lists_are_evaluated_with_the_noise_that_the_attack_saw(
    loader, tmp_path
):
    config = CONFIG.model_copy(update={"roles": ("explicit", "innocent"), "limit": 1, "repeat": 2})
    run = run_attack(tiny("seeds", tries=1), STACK, SKULLS, config, tmp_path / "run", loader=loader)
    lists = [part for part in run.protocol.lists if part.role != "attack"]
    attacked = repeat_samples([s for s in run.samples if s.role != "attack"], 2)
    found = [s for s in run.samples if s.role == "attack"]
    assert len(lists) == 2
    assert [(s.prompt, s.seed, s.index) for s in found] == [
        (s.prompt, s.seed, s.index) for s in attacked
    ]


def test_prompts_of_the_role_attack_keep_their_variants_and_controls_apart(loader, tmp_path):
    prompts = tmp_path / "mine.txt"
    prompts.write_text("a castle\n")
    config = AttackConfig(prompts=(str(prompts),), roles=("attack",), generation=GENERATION)
    attack = tiny("img2img")
    run = run_attack(attack, STACK, SKULLS, config, tmp_path / "run", loader=loader)
    found = read_attack(run)
    assert [(v.variant, v.is_control) for v in found.variants] == [
        ("strength=0.5", False),
        ("control=0.5", True),
    ]


@pytest.mark.parametrize("name", ["ring_a_bell", "concept_inversion"])
def test_a_batch_that_is_half_written_is_attacked_again_at_no_lower_cost(
    name, loader, benign_samples, tmp_path
):
    attack, path = tiny(name), tmp_path / ATTACK

    def records(stop):
        with Journal(path, AttackRecord) as journal:
            return attack_samples(
                attack,
                *(STACK, SKULLS, CONFIG, benign_samples[:stop], journal, tmp_path / "files"),
                loader=loader,
            )

    whole = records(3)
    lines = path.read_text().splitlines(keepends=True)
    for kept in (1, 2):
        path.write_text("".join(lines[:kept]))
        again = records(3)
        assert list(again) == list(whole)
        for cost in ("denoiser", "text_encoder", "queries"):
            totals = [sum(getattr(r.cost, cost) for r in part.values()) for part in (whole, again)]
            assert totals[0] == totals[1], (kept, cost)
        assert len(path.read_text().splitlines()) == 3


def test_a_resumed_attack_does_not_pay_again_for_what_it_builds(loader, benign_samples, tmp_path):
    attack, found = tiny("ring_a_bell", batch_size=1), {}
    for part, stops in {"unbroken": (3,), "resumed": (1, 3)}.items():
        for stop in stops:
            budget = Budget(text=40)  # the pairs take 8 passes, each sample 17
            with Journal(tmp_path / part, AttackRecord) as journal:
                found[part] = attack_samples(
                    attack,
                    STACK,
                    SKULLS,
                    CONFIG.model_copy(update={"budget": budget}),
                    benign_samples[:stop],
                    journal,
                    tmp_path / "files",
                    loader=loader,
                )
    assert [r.cost.text_encoder for r in found["unbroken"].values()] == [
        r.cost.text_encoder for r in found["resumed"].values()
    ]
    assert [r.stopped for r in found["unbroken"].values()] == [
        r.stopped for r in found["resumed"].values()
    ]


def test_a_budget_leaves_out_no_sample_of_an_attack_that_changes_no_prompt(
    loader, benign_samples, tmp_path
):
    config = CONFIG.model_copy(update={"budget": Budget(nfe=1)})
    with Journal(tmp_path / ATTACK, AttackRecord) as journal:
        records = attack_samples(
            tiny("relearn"),
            *(STACK, SKULLS, config, benign_samples, journal, tmp_path / "files"),
            loader=loader,
        )
    assert len(records) == 3
    assert {record.stopped for record in records.values()} == {"nfe"}


def test_a_run_does_not_resume_with_other_phrases_of_the_concept(loader, tmp_path):
    attack, config = tiny("seeds", tries=1), CONFIG.model_copy(update={"limit": 1})
    own = SKULLS.model_copy(update={"name": "mine", "words": ("bones",)})
    run_attack(attack, STACK, own, config, tmp_path / "run", loader=loader)
    other = own.model_copy(update={"words": ("skulls",)})
    with pytest.raises(FileError, match="other settings"):
        run_attack(attack, STACK, other, config, tmp_path / "run", loader=loader)
