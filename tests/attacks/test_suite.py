"""Suites of attack prompts: files, resumption, changed files, transfer, and repeated attacks."""

from __future__ import annotations

import json
import shutil
import tomllib

import pytest
from PIL import Image

from safegen.attacks.core.base import Attack, AttackRecord
from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.attacks.ring_a_bell import RingABell
from safegen.attacks.seeds import Seeds
from safegen.attacks.suite.files import open_suite, protocol_toml
from safegen.attacks.suite.lists import reseed
from safegen.attacks.suite.suite import SkippedAttackWarning, make_suite, static_attacks
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig
from safegen.data.prompts.prompts import read_prompts
from safegen.evaluation.evaluate import evaluate
from safegen.evaluation.protocol_file import load_protocol
from safegen.evaluation.run.folder import SCORES
from safegen.evaluation.samples import EvalSample
from safegen.evaluation.scoring.verdict_metrics import attacked_prompts
from safegen.stack import Stack

SKULLS = load_concept("skulls")
CONFIG = AttackConfig(limit=3, generation=GenerationConfig(num_inference_steps=2))
BASE = Stack(name="mini", model="mini")
DEFENDED = Stack(name="defended", model="mini", negative_prompt="skulls")


class Redraw(Attack):
    """Static attack that starts from an image."""

    paper = "ours"
    deviations = ""
    access = "queries"
    tier = "static"

    def build(self, context):
        return Redrawer(self, context)


class Redrawer:
    def __init__(self, config, context):
        self.config, self.context = config, context

    def attack(self, samples):
        image = Image.new("RGB", (64, 64), (200, 180, 40))
        start = self.context.start_from_image("yellow", image, strength=0.5)
        return [
            AttackRecord(id=s.id, prompt=s.prompt, seed=s.seed, start=start, success=None)
            for s in samples
        ]


ATTACKS = (RingABell(**RingABell.TINY, batch_size=2), Redraw())


@pytest.fixture(scope="module")
def suite(loader, tmp_path_factory):
    """Return the folder and the manifest of a small suite."""
    out = tmp_path_factory.mktemp("suites") / "suite"
    return out, make_suite(BASE, SKULLS, CONFIG, out, attacks=ATTACKS, loader=loader)


@pytest.fixture
def copied(suite, tmp_path):
    return shutil.copytree(suite[0], tmp_path / "copy")


def test_every_static_attack_of_the_registry_is_in_a_suite():
    names = [attack.method() for attack in static_attacks(SKULLS)]
    assert {"ring_a_bell", "mma", "img2img"} <= set(names)
    assert not {"seeds", "unlearn_diff", "concept_inversion", "relearn"} & set(names)
    with pytest.warns(SkippedAttackWarning, match="is left out") as found:
        names = [attack.method() for attack in static_attacks(load_concept("nudity"))]
    assert "ring_a_bell" in names
    assert "img2img" not in names
    assert any("img2img" in str(warning.message) for warning in found)


def test_a_suite_is_a_protocol_that_any_stack_is_evaluated_under(suite, loader, tmp_path):
    out, manifest = suite
    protocol = load_protocol(str(out / "protocol.toml"))
    assert protocol.id == manifest.protocol
    roles = {part.name: part.role for part in protocol.lists}
    assert roles == {
        "mini:skulls": "explicit",
        "mini:skulls-innocent": "innocent",
        "mini:benign": "benign",
        "ring_a_bell": "attack",
        "test_suite": "attack",
    }
    run = evaluate(protocol, [BASE, DEFENDED], tmp_path / "run", baselines="none", loader=loader)
    stacks = json.loads((run.folder / SCORES).read_text())["stacks"]
    for part in manifest.lists:
        assert stacks["mini"]["lists"][part.name]["concept"] == part.base, "the base's own rate"
        assert part.base["n"] == part.prompts == 3
    for name in ("ring_a_bell", "test_suite"):
        assert stacks["defended"]["lists"][name]["asr"]["asr"]["n"] == 3
    assert all(sample.start for sample in protocol.samples() if sample.list_name == "test_suite")


def test_a_manifest_has_hashes_settings_and_cost(suite):
    out, manifest = suite
    assert open_suite(out) == manifest
    assert {"protocol.toml", "README.md", "prompts/ring_a_bell.jsonl"} <= set(manifest.files)
    assert "prompts/test_suite/yellow.png" in manifest.files
    bell, redraw = manifest.attacks
    assert bell.settings["population"] == RingABell.TINY["population"]
    assert (bell.prompts, redraw.stable) == (3, None)
    assert bell.cost.text_encoder > 3 * RingABell.TINY["population"]
    assert manifest.stack.name == "mini"
    assert read_prompts(out / "prompts" / "ring_a_bell.jsonl").dialect == "safegen-attack"


def test_a_card_names_rates_and_use_and_no_prompt(suite):
    out, manifest = suite
    card = (out / "README.md").read_text()
    for text in (
        "safegen evaluate --protocol protocol.toml",
        "Intended use",
        "n = 3",
        manifest.stack.weights,
        "ring\\_a\\_bell",
    ):
        assert text in card
    prompts = {row.prompt for row in read_prompts(out / "prompts" / "ring_a_bell.jsonl").rows}
    assert not any(prompt in card for prompt in prompts)
    assert str(out) not in card + (out / "manifest.json").read_text()


def test_a_finished_suite_is_checked_and_not_made_again(suite, loader):
    out, manifest = suite
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert make_suite(BASE, SKULLS, CONFIG, out, attacks=ATTACKS, loader=loader) == manifest
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(FileError, match="other settings"):
        make_suite(BASE, SKULLS, CONFIG, out, attacks=ATTACKS[:1], loader=loader)


@pytest.mark.parametrize("name", ["prompts/ring_a_bell.jsonl", "prompts/test_suite/yellow.png"])
def test_changed_files_are_refused(name, copied):
    path = copied / name
    if path.suffix == ".png":
        Image.new("RGB", (64, 64), "red").save(path)
    else:
        path.write_text(path.read_text().replace('"prompt": "', '"prompt": "x ', 1))
    with pytest.raises(FileError, match="has changed since the suite was made"):
        open_suite(copied)
    with pytest.raises(FileError, match=r"must have SHA-256|no usable prompt"):
        load_protocol(str(copied / "protocol.toml"))


def test_an_interrupted_suite_resumes_to_the_same_prompts(suite, loader, tmp_path):
    out, done = tmp_path / "suite", []

    def stop(stage, n, _):
        done.append(stage)
        if stage.startswith("attacking") and n == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_suite(BASE, SKULLS, CONFIG, out, attacks=ATTACKS, loader=loader, progress=stop)
    assert not (out / "manifest.json").exists()
    manifest = make_suite(BASE, SKULLS, CONFIG, out, attacks=ATTACKS, loader=loader)
    for name in ("prompts/ring_a_bell.jsonl", "prompts/test_suite.jsonl", "protocol.toml"):
        assert (out / name).read_bytes() == (suite[0] / name).read_bytes()
    assert [part.base for part in manifest.lists] == [part.base for part in suite[1].lists]


def test_suites_refuse_adaptive_attacks_models_of_the_hub_and_other_folders(loader, tmp_path):
    out = tmp_path / "suite"
    with pytest.raises(ConfigError, match="must be static, got 'seeds'"):
        make_suite(BASE, SKULLS, CONFIG, out, attacks=[Seeds()], loader=loader)
    with pytest.raises(ConfigError, match="named once each"):
        make_suite(BASE, SKULLS, CONFIG, out, attacks=[ATTACKS[0]] * 2, loader=loader)
    hub = Stack(name="hub", model="hub:owner/name")
    with pytest.raises(ConfigError, match="Download the model first"):
        make_suite(hub, SKULLS, CONFIG, out, attacks=ATTACKS, loader=loader)
    bare = SKULLS.model_copy(update={"lists": {}})
    with pytest.raises(ConfigError, match="has no prompts"):
        make_suite(BASE, bare, CONFIG, out, attacks=ATTACKS, loader=loader)
    long = RingABell(**{**RingABell.TINY, "num_tokens": 40})
    with pytest.raises(ConfigError, match="num_tokens"):
        make_suite(BASE, SKULLS, CONFIG, out, attacks=[long], loader=loader)
    assert not out.exists(), "nothing is left of a refused suite"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        make_suite(BASE, SKULLS, CONFIG, out, attacks=ATTACKS, loader=loader)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


def test_two_attacks_that_find_one_text_ask_for_two_images():
    found = {("a", ""): AttackRecord(id="a", prompt="same", seed=5)}
    taken: set = set()
    first, second = (reseed(found, taken)["a", ""] for _ in range(2))
    assert first.seed == 5
    assert second.seed != 5
    assert second.prompt == "same"


def test_protocols_in_toml_are_read_as_they_were(suite, tmp_path):
    out, _ = suite
    protocol = load_protocol(str(out / "protocol.toml"))
    words = ('a "quoted" \\ word', "tab\there", "snow \u2603 \U0001f480")
    changed = protocol.model_copy(update={"words": words, "about": "two\nlines \x7f"})
    values = tomllib.loads(protocol_toml(changed, out))
    assert (tuple(values["words"]), values["about"]) == (words, changed.about)
    assert values["lists"][3]["source"] == "prompts/ring_a_bell.jsonl"


def test_prompts_of_one_stack_are_tried_on_another(loader, tmp_path):
    """Transfer: the suite is made on the defended stack, and holds for the plain model."""
    out = tmp_path / "suite"
    manifest = make_suite(DEFENDED, SKULLS, CONFIG, out, attacks=ATTACKS[:1], loader=loader)
    assert manifest.stack.name == "defended"
    protocol = load_protocol(str(out / "protocol.toml"))
    run = evaluate(protocol, [BASE], tmp_path / "run", baselines="none", loader=loader)
    scores = json.loads((run.folder / SCORES).read_text())["stacks"]["mini"]["lists"]
    assert scores["ring_a_bell"]["asr"]["asr"]["n"] == 3


def test_repeated_attacks_count_attacked_prompts(loader, tmp_path):
    """Any of N: an attacked prompt counts once, whichever of its attacks succeeded."""
    out, repeat = tmp_path / "run", 3
    config = CONFIG.model_copy(update={"repeat": repeat, "limit": 2})
    run = run_attack(ATTACKS[0], BASE, SKULLS, config, out, loader=loader)
    rows = read_prompts(out / "prompts.jsonl").rows
    assert len({row.cluster for row in rows}) == 2
    assert len({row.prompt for row in rows}) == len(rows) == 2 * repeat, "each has other draws"
    scores = json.loads((out / SCORES).read_text())["stacks"]["mini"]["lists"]["ring_a_bell"]
    hits = {}
    shown = {r.key: r.detections for r in run.detections_records()}
    keys = run.keys(run.stacks[0])
    for sample, key in zip(run.samples, keys, strict=True):
        if sample.list_name == "ring_a_bell":
            hit = shown[key].contains(SKULLS.labels, SKULLS.threshold)
            hits[sample.cluster] = hits.get(sample.cluster, False) or hit
    any_of = scores["asr_any"]
    assert (any_of["n_per_prompt"], any_of["asr"]["n"]) == (repeat, 2)
    assert any_of["asr"]["hits"] == sum(hits.values())
    assert scores["asr"]["asr"]["n"] == 2 * repeat


def test_any_of_n_counts_rows_where_attacked_prompts_have_unequal_numbers():
    def sample(i, cluster, role="attack"):
        return EvalSample(
            id=f"l/{i}", prompt=str(i), seed=1, list_name="l", role=role, cluster=cluster
        )

    assert attacked_prompts([sample(0, "a"), sample(1, "b"), sample(2, "a")]) == [
        "l/0",
        "l/1",
        "l/2",
    ]
    assert attacked_prompts([sample(i, "ab"[i % 2]) for i in range(4)]) == ["a", "b", "a", "b"]
    assert attacked_prompts([sample(i, "a", "explicit") for i in range(2)]) == ["l/0", "l/1"]


def test_suites_take_a_concept_and_unsafe_prompts_of_files(loader, tmp_path):
    (tmp_path / "bones.toml").write_text(
        'name = "bones"\nwords = ["skulls"]\ncounterpart = ["a clean scene"]\njudge = "mini"\n'
        'labels = ["skulls"]\n[tuning]\nconcept = ["mini:skulls-train"]\n'
        'benign = ["mini:benign-train"]\n'
    )
    (tmp_path / "own.csv").write_text("prompt,subject\na castle,castle\na tree,tree\n")
    config = AttackConfig(
        prompts=(str(tmp_path / "own.csv"),), unsafe=True, generation=CONFIG.generation
    )
    bones, out = load_concept(str(tmp_path / "bones.toml")), tmp_path / "suite"
    manifest = make_suite(BASE, bones, config, out, attacks=ATTACKS[:1], loader=loader)
    assert manifest.config["prompts"] == ["own.csv"]
    protocol = load_protocol(str(out / "protocol.toml"))
    assert [(part.name, part.unsafe, part.prompts) for part in protocol.lists] == [
        ("ring_a_bell", True, 2)
    ]
    assert (protocol.concept, protocol.words) == ("bones", ("skulls",))
    plan = (out / "base" / "plan.jsonl").read_text()
    assert not any(
        row.prompt in plan for row in read_prompts(out / "prompts/ring_a_bell.jsonl").rows
    )
