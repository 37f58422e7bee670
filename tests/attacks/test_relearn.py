"""The relearning attack from end to end at tiny size: stacks, figures, patches, cost and resume."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack

import pytest
from pydantic import ValidationError

from safegen.attacks.core.base import AttackRecord
from safegen.attacks.core.cost import Budget, Cost
from safegen.attacks.core.dataset import load_dataset
from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.attacks.relearn import Relearn
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, DivergedError, FileError
from safegen.core.generation import GenerationConfig
from safegen.edits.uce import UCE
from safegen.evaluation.report.page import NUMBERS, PAGE
from safegen.evaluation.run.folder import (
    ATTACK,
    ATTACK_FILES,
    SCORES,
    SETTINGS,
    Run,
    image_file,
    read_image,
)
from safegen.evaluation.run.journal import read_journal
from safegen.evaluation.verify import verify
from safegen.metrics.paired import mcnemar
from safegen.models.applied_patch import AppliedPatch
from safegen.models.generation import generate
from safegen.patches.arithmetic import merge
from safegen.patches.patch import BaseMismatchWarning, Patch
from safegen.stack import Stack, add_guards
from safegen.stack_loader import StackLoader

SKULLS = load_concept("skulls").model_copy(update={"tuning": {}})
TUNE = {"data": "concept", "rank": 2, "images_per_update": 2, "lr": 1e-2, "precision": "fp32"}
CONFIG = AttackConfig(
    limit=1, roles=("explicit", "benign"), generation=GenerationConfig(num_inference_steps=1)
)
NAMES = [f"{name}-{n}" for name in ("finetuned", "control", "modular") for n in (1, 2)]


@pytest.fixture(scope="module")
def loader():
    return StackLoader()


@pytest.fixture(scope="module")
def attack(triplets):
    return Relearn(updates=(1, 2), modular=True, triplets=triplets.folder, **TUNE)


@pytest.fixture(scope="module")
def edited(loader, tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "uce.safetensors"
    UCE(erase=("skulls",)).apply(loader.model("mini")[0]).save(path)
    return Stack(name="mine", model="mini", patches=(path,))


@pytest.fixture(scope="module")
def run(loader, edited):
    def run(attack, out, stack=edited, config=CONFIG, **options):
        return run_attack(attack, stack, SKULLS, config, out, loader=loader, **options)

    return run


@pytest.fixture(scope="module")
def done(run, attack, tmp_path_factory):
    """Return a finished attack."""
    return run(attack, tmp_path_factory.mktemp("relearn") / "out")


def contents(folder):
    """Return the bytes of every file except timings, and hash and metadata of patches."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("timings.jsonl", PAGE, NUMBERS, "report.md")
    }
    found = {name: path.read_bytes() for name, path in files.items()}
    for name, path in files.items():
        if name.endswith(".safetensors"):
            patch = Patch.load(path)
            found[name] = patch.hash, patch.metadata
        elif name.endswith(("log.jsonl", ATTACK)):
            found[name] = [
                without_seconds(json.loads(line)) for line in path.read_text().splitlines()
            ]
    return found


def without_seconds(row):
    row.pop("seconds", None)
    row.get("cost", {}).pop("seconds", None)
    return row


def test_every_stack_is_measured_in_order_and_the_run_verifies(done, tmp_path):
    scores = json.loads((done.folder / SCORES).read_text())
    assert list(scores["stacks"]) == ["base", "mine", *NAMES]
    assert set(scores["stacks"]["mine"]["lists"]) == {"mini:skulls", "mini:benign"}
    assert verify(done) == []
    files = done.folder / ATTACK_FILES
    assert {path.stem for path in files.glob("*.safetensors")} == set(NAMES)
    assert not list(files.rglob("checkpoint.safetensors"))
    page = (done.folder / PAGE).read_text()
    assert "Fine-tuned on 6 images" in page
    assert "Compared with the stack before the attack" in page
    Patch.load(files / "control-1.safetensors").save(tmp_path / "other.safetensors")
    changed = shutil.copytree(done.folder, tmp_path / "copy") / ATTACK_FILES
    shutil.move(tmp_path / "other.safetensors", changed / "finetuned-1.safetensors")
    assert verify(Run.open(changed.parent)) == [
        "attack/finetuned-1.safetensors: its hash is not the one of the card"
    ]


def test_every_attacked_stack_is_tested_against_the_edited_one(done):
    scores = json.loads((done.folder / SCORES).read_text())["stacks"]
    verdicts = {}
    keys = {entry.name: done.keys(entry) for entry in done.stacks}
    for record in done.detections_records():
        scored = any(d.label == "skulls" and d.score >= 0.5 for d in record.detections.items)
        verdicts[record.key] = scored
    for name in ("base", "mine", *NAMES):
        for part in ("mini:skulls", "mini:benign"):
            at = [i for i, p in enumerate(done.samples) if p.list_name == part]
            row = scores[name]["lists"][part]
            if name in ("base", "mine"):
                assert "reference" not in row
                continue
            own, old = ([verdicts[keys[stack][i]] for i in at] for stack in (name, "mine"))
            assert row["reference"] == {"stack": "mine"} | mcnemar(own, old).to_json()


def test_patches_generate_the_images_of_their_stack(done, edited, loader):
    samples, (model, _) = done.samples, loader.model("mini")
    edit = Patch.load(edited.patches[0])
    tuned, control = (
        Patch.load(done.folder / ATTACK_FILES / f"{name}-2.safetensors")
        for name in ("finetuned", "control")
    )
    both = merge([edit, control], overlap="add", model=model)
    for name, patches in (("finetuned-2", [edit, tuned]), ("modular-2", [both])):
        entry = next(e for e in done.stacks if e.name == name)
        with ExitStack() as applied:
            for patch in patches:
                applied.enter_context(patch.apply(model))
            images = list(generate(model, samples, CONFIG.generation))
        for image, key in zip(images, done.keys(entry), strict=True):
            file = done.folder / image_file(name, key)
            assert read_image(file).tobytes() == image.tobytes()


def test_a_patch_has_its_base_and_parents(done, edited):
    tuned, control = (
        Patch.load(done.folder / ATTACK_FILES / f"{name}-1.safetensors").metadata
        for name in ("finetuned", "control")
    )
    assert [p.hash for p in tuned.parents] == [Patch.load(edited.patches[0]).hash]
    assert control.parents == ()
    assert (tuned.images, tuned.updates) == ("concept", 1)


def test_training_is_counted_and_its_images_by_their_hash(done, attack, tmp_path):
    records = read_journal(done.folder / ATTACK, AttackRecord)[0]
    cost = sum((record.cost for record in records), Cost())
    assert cost.denoiser == 2 * (2 * 2) * 2, "two trainings of 2 updates, 2 images, 2 directions"
    assert cost.queries == 0
    assert cost.seconds > 0
    settings = (done.folder / SETTINGS).read_text()
    assert load_dataset(SKULLS, "concept", triplets=attack.triplets).hash in settings
    assert str(attack.triplets.parent) not in settings


def test_a_killed_attack_resumes_to_the_same_results(done, run, attack, tmp_path):
    out = tmp_path / "out"

    def stop(what, n, _):
        if (what, n) == ("fine-tuning: base", 2):
            shutil.copytree(out, tmp_path / "killed")
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        run(attack, out, progress=stop)
    shutil.rmtree(out)
    shutil.move(tmp_path / "killed", out)
    run(attack, out)
    assert contents(out) == contents(done.folder)


def test_a_finished_attack_is_not_repeated(done, run, attack):
    before, stages = contents(done.folder), []
    again = run(attack, done.folder, progress=lambda stage, *_: stages.append(stage))
    assert contents(again.folder) == before
    assert not [stage for stage in stages if stage.startswith("fine-tuning")]


def test_a_directory_of_other_settings_is_refused_and_not_changed(done, run, attack, tmp_path):
    before = contents(done.folder)
    other = CONFIG.model_copy(update={"limit": 2})
    with pytest.raises(FileError, match=r"was made with other settings .*config.limit: 1 and 2"):
        run(attack, done.folder, config=other)
    benign = attack.model_copy(update={"data": "benign"})
    with pytest.raises(FileError, match=r"attack.data: .*attack.dataset.hash: "):
        run(benign, done.folder)
    assert contents(done.folder) == before
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(FileError, match="already exists"):
        run(attack, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_budget_ends_the_fine_tune_and_the_stack_at_its_end_is_measured(run, attack, tmp_path):
    long = attack.model_copy(update={"updates": (1, 9)})
    config = CONFIG.model_copy(update={"budget": Budget(nfe=8), "roles": ("explicit",)})
    ended = run(long, tmp_path / "out", config=config)
    assert [entry.name for entry in ended.stacks] == ["base", "mine", "finetuned-1", "finetuned-2"]
    records = read_journal(ended.folder / ATTACK, AttackRecord)[0]
    assert {record.stopped for record in records} == {"nfe"}
    before = contents(ended.folder)
    assert contents(run(long, tmp_path / "out", config=config).folder) == before


def test_a_guard_stays_on_and_a_plain_model_is_its_own_control(run, triplets, tmp_path):
    attack = Relearn(updates=(1,), triplets=triplets.folder, **TUNE)
    stack = add_guards(Stack(name="guarded", model="mini"), ["sld-max"], "skulls")
    config = CONFIG.model_copy(update={"roles": ("explicit",)})
    guarded = run(attack, tmp_path / "guarded", stack=stack, config=config)
    assert [entry.name for entry in guarded.stacks] == ["base", "guarded", "finetuned-1"]
    (tuned,) = attack.attacked_stacks(stack, guarded.folder / ATTACK_FILES)
    assert tuned.guards == stack.guards
    plain = run(attack, tmp_path / "plain", stack=Stack(name="mini", model="mini"), config=config)
    assert [entry.name for entry in plain.stacks] == ["mini", "finetuned-1"]
    for made in (guarded, plain):
        assert Patch.load(made.folder / ATTACK_FILES / "finetuned-1.safetensors").names


def test_refused_attacks_leave_nothing(run, attack, edited, loader, tmp_path, monkeypatch):
    out, (model, _) = tmp_path / "out", loader.model("mini")
    with pytest.raises(ConfigError, match="as patches alone, got no patch"):
        run(attack, out, stack=Stack(name="x", model="mini"))
    with Patch.load(edited.patches[0]).apply(model):
        UCE(erase=("fire",)).apply(model).save(tmp_path / "above.safetensors")
    above = edited.model_copy(update={"patches": (tmp_path / "above.safetensors",)})
    with (
        pytest.warns(BaseMismatchWarning, match="made on a model with the patch uce"),
        pytest.raises(ConfigError, match="needs every patch below the edit, got none of uce"),
    ):
        run(attack, out, stack=above)
    with pytest.raises(ConfigError, match="either triplets or images, got both"):
        run(attack.model_copy(update={"images": tmp_path}), out)
    wild = attack.training.model_copy(update={"lr": 1e30})
    monkeypatch.setattr(Relearn, "training", wild)
    with pytest.raises(DivergedError, match="Lower lr"):
        run(attack.model_copy(update={"rank": None}), out)
    assert not out.exists()


def test_patches_come_off_and_go_on_again_bit_for_bit(edited, loader):
    model, _ = loader.model("mini")
    edit, above = Patch.load(edited.patches[0]), UCE(erase=("fire",)).apply(model)
    clean = model.hash_denoiser()
    with edit.apply(model), above.apply(model):
        on, patches = model.hash_denoiser(), model.patches
        with pytest.raises(KeyboardInterrupt), model.without_patches():  # noqa: PT012
            assert model.hash_denoiser() == clean
            assert model.patches == []
            raise KeyboardInterrupt
        assert model.hash_denoiser() == on
        assert model.patches == patches
    assert model.hash_denoiser() == clean


def test_an_interrupt_while_patches_come_off_puts_them_on_again(edited, loader, monkeypatch):
    model, _ = loader.model("mini")
    undo = AppliedPatch.undo

    def interrupt(applied):
        undo(applied)
        raise KeyboardInterrupt

    with Patch.load(edited.patches[0]).apply(model):
        on, patches = model.hash_denoiser(), model.patches
        monkeypatch.setattr(AppliedPatch, "undo", interrupt)
        with pytest.raises(KeyboardInterrupt), model.without_patches():
            pass
        monkeypatch.undo()
        assert (model.hash_denoiser(), model.patches) == (on, patches)


def test_the_dataset_is_the_images_of_the_triplets_that_the_fine_tune_learns(triplets, tmp_path):
    benign, concept = (
        load_dataset(SKULLS, data, triplets=triplets.folder) for data in ("benign", "concept")
    )
    for found, side in ((benign, 2), (concept, 0)):
        assert [p.tobytes() for p in found.images] == [
            triplets.images(i)[side].tobytes() for i in range(6)
        ]
    assert (benign.captions[0], concept.captions[0]) == (("",), SKULLS.words)
    with pytest.raises(ConfigError, match="'nudity' has no bundled triplets"):
        load_dataset(load_concept("nudity"), "benign")


@pytest.mark.parametrize(
    ("given", "words"),
    [((), "at least 1 item"), ((0,), "rise from 1"), ((5, 5), "rise from 1"), ((9, 2), "got 9, 2")],
)
def test_updates_must_rise(given, words):
    with pytest.raises(ValidationError, match=words):
        Relearn(updates=given)
