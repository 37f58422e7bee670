"""A plan counts what the job then does, changes nothing, and says what it leaves out."""

from __future__ import annotations

from dataclasses import replace

import pytest

import safegen
from safegen.attacks.core.cost import Budget
from safegen.attacks.core.run import AttackConfig
from safegen.core.concept import load_concept
from safegen.core.generation import GenerationConfig
from safegen.core.registry import EDITS, resolve
from safegen.edits.training.config import Training
from safegen.edits.training.lora import trainable_parameters
from safegen.evaluation.protocol import Protocol
from safegen.models.patched_weights import hash_components, pipeline_weights
from safegen.stack import Stack, load_stack
from safegen.stack_loader import StackLoader
from safegen.workflows.attack import make_attack
from safegen.workflows.edit import prepare_edit
from safegen.workflows.plan import Plan, attack, edit, plan_attack, plan_edit, plan_evaluation
from safegen.workflows.plan.memory import model_bytes, training_bytes
from safegen.workflows.plan.plan import format_seconds
from safegen.workflows.plan.probe import measured
from tiny import build_model

CONFIG = GenerationConfig(num_inference_steps=7, batch_size=4)
FAST = {"sdxl": "sdd", "sd35": "des", "flux": "uce"}
"""Family: the edit that is planned on it in every run; the others are planned nightly."""


@pytest.fixture(scope="module")
def model():
    return safegen.load("mini", device="cpu")


@pytest.fixture(autouse=True)
def short_probes(monkeypatch):
    """End probes early: counts of passes do not depend on their length."""
    for module in (edit, attack):
        monkeypatch.setattr(module, "PROBE_SECONDS", 0.5)


def prepare(method, **settings):
    """Return the settings of an edit of the miniature, and its triplets."""
    prepared = prepare_edit(method, "mini", **settings)
    return prepared.by_preset["mini"], prepared.triplets


def counted(config, model, triplets):
    """Return the passes of an edit that runs to its end."""
    with measured(model) as cost:
        config.apply(model, triplets)
    return cost.passes


@pytest.mark.parametrize(
    ("method", "settings"),
    [("safegen", {"triplets": "mini:skulls"}), ("concept_ablation", {"num_images": 9, "steps": 2})],
)
def test_passes_of_a_training_are_those_of_its_run(model, method, settings):
    training = {"updates": 3, "warmup": 0, "batch": 2, "accumulation": 2}
    config, rows = prepare(method, concept="skulls", training=training, **settings)
    rows = rows and replace(rows, rows=rows.rows[:6])
    before = model.hash_denoiser()
    plan = plan_edit(config, model, rows)
    assert model.hash_denoiser() == before
    assert plan.passes == pytest.approx(counted(config, model, rows), rel=0.02)
    assert plan.seconds > 0
    assert plan.memory > 2**27
    assert plan.images == settings.get("num_images", 0)


@pytest.mark.parametrize(
    ("method", "family"),
    [
        pytest.param(method, family, marks=[pytest.mark.slow] * (FAST[family] != method))
        for method in ("uce", "sdd", "des")
        for family in FAST
    ],
)
def test_edits_of_every_family_are_planned(method, family, cubes):
    tiny = build_model(family)
    config = resolve(EDITS, method, "edit")
    settings = {"training": {"updates": 2, "warmup": 0, "batch": 2}} if config.is_trained else {}
    config = config.preset("mini", concept=cubes, **config.TINY, **settings)
    before = tiny.hash_denoiser(), hash_components(tiny, pipeline_weights(tiny.pipeline))
    plan = plan_edit(config, tiny)
    assert (tiny.hash_denoiser(), hash_components(tiny, pipeline_weights(tiny.pipeline))) == before
    assert bool(plan.passes) == (method == "sdd")  # the others never call the denoiser
    assert plan.memory > 2**27


@pytest.mark.parametrize("method", ["sdd", "des"])
def test_the_memory_of_a_training_is_that_of_its_trained_values(method):
    tiny = build_model("sdxl")
    kind = resolve(EDITS, method, "edit")
    for rank in (None, 2):
        edit = kind(rank=rank, training=Training(ema=0.0), erase=("red cube",))
        network = edit.network(tiny)
        with trainable_parameters(
            tiny, edit.selector, rank=rank, alpha=None, seed=0, network=network
        ) as trainable:
            values = dict(network.named_parameters())
            trained = sum(values[name].numel() for name in trainable.names)
        assert training_bytes(edit, tiny) == 16 * trained
    averaged = edit.model_copy(update={"training": Training(ema=0.9)})
    assert training_bytes(averaged, tiny) == 20 * trained


def test_the_size_of_a_model_counts_every_component():
    tiny = build_model("flux")
    numbers = sum(
        p.numel() for name in tiny.components for p in getattr(tiny.pipeline, name).parameters()
    )
    assert model_bytes(tiny) == 4 * numbers


@pytest.mark.slow
def test_rollouts_of_shielddiff_are_planned_from_few_images(model):
    config, _ = prepare(
        "shielddiff",
        concept="skulls",
        steps=2,
        groups=4,
        group=4,
        training={"updates": 2, "warmup": 0, "batch": 4, "accumulation": 4},
    )
    assert plan_edit(config, model).passes == pytest.approx(counted(config, model, None), rel=0.1)


def test_closed_forms_have_no_passes_and_keep_their_settings(model):
    config, _ = prepare("uce", concept="skulls")
    plan = plan_edit(config, model)
    assert (plan.passes, plan.images) == (0, 0)
    assert 0 < plan.seconds < 60


@pytest.mark.slow
def test_an_edit_of_two_parts_is_planned_as_both(model):
    config, rows = prepare("safegen-plus", concept="skulls", triplets="mini:skulls")
    config = config.model_copy(update={"training": Training(updates=3, batch=2, accumulation=1)})
    plan, images = plan_edit(config, model, rows), plan_edit(config.build_safegen(), model, rows)
    assert plan.passes == images.passes
    assert plan.title.startswith("safegen-plus, 3 updates")


def test_batches_that_do_not_fit_into_the_probe_are_scaled(model, monkeypatch):
    monkeypatch.setattr(edit, "SLOW_UPDATE", 0.0)
    training = {"updates": 2, "warmup": 0, "batch": 4}
    config, rows = prepare("safegen", triplets="mini:skulls", training=training)
    plan = plan_edit(config, model, rows)
    assert plan.passes == counted(config, model, rows)
    assert any("scaled from one of 1" in note for note in plan.notes)


def test_an_evaluation_is_planned_with_all_its_stacks():
    protocol = Protocol.from_concept(
        load_concept("skulls"), prompts=2, seeds=[1], generation=CONFIG, roles=("explicit",)
    )
    stacks = [load_stack("mini"), Stack(name="guarded", model="mini", guards=("sld-max",))]
    with pytest.raises(safegen.core.errors.ConfigError):  # sld lacks its text
        plan_evaluation(protocol, stacks)
    text = {"name": "sld", "preset": "max", "text": "skulls"}
    stacks[1] = Stack(name="guarded", model="mini", guards=(text,))
    plan = plan_evaluation(protocol, stacks)
    assert plan.images == 2 * 4  # base, guarded, negative prompt, black images
    rows = 2 * CONFIG.num_inference_steps
    assert plan.passes == rows * 2 + rows * 3 + rows * 2  # sld predicts its text too
    assert plan.model.startswith("mini: ")
    assert any("report" in note for note in plan.notes)


def test_an_attack_is_planned_and_its_budget_ends_it():
    concept = load_concept("skulls")
    settings = {"limit": 2, "generation": CONFIG, "prompts": ("mini:skulls",)}
    loader = StackLoader(device="cpu")
    seeds = make_attack("seeds", tries=2, guidance_scales=(3.0,))
    plan = plan_attack(seeds, load_stack("mini"), concept, AttackConfig(**settings), loader=loader)
    assert plan.images >= 2 + 2
    assert plan.title.startswith("seeds on 2 samples")
    config = AttackConfig(**settings, budget=Budget(minutes=0.01))
    limited = plan_attack(seeds, load_stack("mini"), concept, config, loader=loader)
    assert any("the budget ends the attack" in note for note in limited.notes)


def test_a_plan_is_printed_and_nothing_is_written(monkeypatch, capsys, tmp_path):
    from safegen.cli import main

    out = tmp_path / "p.safetensors"
    words = ["edit", "mini", "--method", "uce", "--concept", "skulls", "--plan", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["safegen", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plan: uce, a closed form"
    assert [line.split()[0] for line in lines[1:6]] == [
        "model",
        "images",
        "passes",
        "time",
        "memory",
    ]
    assert list(tmp_path.iterdir()) == []


def test_plans_add_up():
    one = Plan("a", "m", 1, 10, 60.0, 100, ("x",))
    both = one + Plan("b", "m", 2, 20, 120.0, 50, ("x", "y"))
    assert (both.images, both.passes, both.seconds, both.memory) == (3, 30, 180.0, 100)
    assert both.notes == ("x", "y")
    assert [format_seconds(s) for s in (45, 150, 7200)] == ["45 s", "2.5 min", "2.0 h"]


def test_an_evaluation_on_own_prompts_is_planned_and_not_run(monkeypatch, capsys, tmp_path):
    from safegen.cli import main

    words = ["evaluate", "mini", "--concept", "skulls", "--limit", "1", "--steps", "3", "--plan"]
    monkeypatch.setattr("sys.argv", ["safegen", *words, "--out", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert capsys.readouterr().out.startswith("plan: evaluation of 3 stacks")
    assert list(tmp_path.iterdir()) == []
