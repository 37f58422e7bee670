"""Rollouts and rewards of a training, and how a training ends, on the toy."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close
from toy import ToyExtractor, ToyJudge, brightness

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, DivergedError, FileError, InterruptedRunError
from safegen.edits.rl.algorithm import LossTerms
from safegen.edits.rl.monitor import TrainingHealthWarning
from safegen.edits.rl.objective import RewardObjective
from safegen.edits.rl.rewarder import decode
from safegen.edits.rl.rewards import advantages
from safegen.edits.shielddiff import ShieldDiff
from safegen.judges.base import Detections

NAMES = ["block.attn2.to_v.weight", "block.attn2.to_out.weight"]
SMALL = {"groups": 4, "group": 4, "steps": 4, "rank": None}
TRAINING = {"updates": 6, "batch": 16, "checkpoint_every": 1, "ema": 0.9}
ON_POLICY = ["v_grpo", "nft", "ddpo", "grpo_window"]


class Setup:
    """Objective of an edit of the toy."""

    def __init__(self, toy, toy_edit, algorithm="v_grpo", **changes):
        batch = changes.pop("training", TRAINING)
        self.edit = toy_edit(algorithm, **(SMALL | changes), training=batch)
        self.model = toy()
        for name in NAMES:
            self.model.denoiser.get_parameter(name).requires_grad_(True)
        self.objective = RewardObjective(self.edit, self.model, NAMES)

    def step(self, seed=0):
        """Return the losses of the first batch of a rollout."""
        generator = torch.Generator().manual_seed(seed)
        return self.objective.training_step(self.model.denoiser, 0, generator, (0, 1))


@pytest.fixture
def build(toy, toy_edit):
    return lambda *args, **changes: Setup(toy, toy_edit, *args, **changes)


@pytest.fixture
def blind(monkeypatch):
    """Register the judges that find nothing and everything."""
    from safegen.core import registry

    monkeypatch.setitem(registry.JUDGES, "blind", f"{__name__}:build_blind")
    monkeypatch.setitem(registry.JUDGES, "suspicious", f"{__name__}:build_suspicious")


class BrokenJudge(ToyJudge):
    """Judge that raises for the brightest images."""

    def detect(self, images):
        if (brightness(images) > 0.95).any():
            raise OSError("lens cap on")
        return super().detect(images)


class BlindJudge(ToyJudge):
    """Judge that finds nothing, or something in every image."""

    def __init__(self, score=0.0):
        self.score = score

    def detect(self, images):
        from safegen.judges.base import Detection

        return [Detections((Detection("marked", self.score),)) for _ in images]


def build_blind(*, labels=(), threshold=0.5):
    return BlindJudge()


def build_suspicious(*, labels=(), threshold=0.5):
    return BlindJudge(1.0)


OPTIONS: list[str] = []


def build_optional(*, weights: str, labels: tuple[str, ...] = (), threshold: float = 0.5):
    OPTIONS.append(weights)
    return ToyJudge()


# ------------------------------------------------------------ masks


def test_an_image_that_breaks_the_judge_is_masked_alone(build):
    setup = build(rewards={"judge": 1.0, "clip": 0.0})
    setup.objective.rewarder.judge = BrokenJudge()
    terms = setup.step()
    batch = setup.objective.batch
    bright = brightness(setup.model.decode_images(batch.latents))
    broken = bright > 0.95
    assert 0 < broken.sum() < len(broken)
    assert setup.objective.figures["masked"] == pytest.approx(float(broken.float().mean()))
    rewards = (-torch.sigmoid(6 * (bright - 0.4))).masked_fill(broken, float("nan"))
    expected, _ = advantages({"judge": rewards}, {"judge": 1.0}, batch.groups)
    assert_close(batch.advantages, expected)
    assert (terms["L_policy"][broken] == 0).all()
    assert setup.objective.figures["judge_unsafe_concept_n"] == 8 - int(broken[:8].sum())


@pytest.mark.parametrize("is_raised", [True, False])
def test_nothing_is_learned_from_images_that_no_judge_can_judge(build, is_raised):
    class NoJudge(ToyJudge):
        def detect(self, images):
            if is_raised:
                raise OSError("no network\nat all")
            return [Detections((), unjudged="no network") for _ in images]

    setup = build()
    setup.objective.rewarder.judge = NoJudge()
    with pytest.raises(
        ConfigError, match=r"judge must be able .* 'toy' cannot: no network\. Use another judge"
    ):
        setup.step()


def test_images_that_are_not_finite_are_masked(build):
    setup = build()
    setup.objective.policy.text.hidden[:4] = float("nan")  # the prompts of the concept
    setup.objective._roll_out(setup.model.denoiser, torch.Generator().manual_seed(0))
    assert setup.objective.figures["masked"] == 0.5
    assert not any(name.endswith("_concept") for name in setup.objective.figures)
    assert (setup.objective.batch.advantages[:8] == 0).all()
    assert setup.objective.batch.latents.isfinite().all()
    setup.objective.policy.text.hidden[:] = float("nan")
    with pytest.raises(DivergedError, match="the images of a rollout are not finite"):
        setup.step()
    assert setup.objective.batch is None  # no later update trains on the images before
    assert not setup.objective.figures


@pytest.mark.parametrize("algorithm", [*ON_POLICY, "draft"])
def test_an_image_that_is_not_finite_does_not_spoil_the_others(build, algorithm):
    setup = build(algorithm, scheduler="ddim")
    rollout = setup.objective.algorithm.rollout

    def overflow(denoiser, noise, text, generator):
        latents, extra = rollout(denoiser, noise, text, generator)
        for value in (latents, *filter(torch.is_floating_point, extra.values())):
            value[[2, 9]] = float("nan")  # of the concept, and benign
        return latents, extra

    setup.objective.algorithm.rollout = overflow
    terms = setup.step()
    masked = ~setup.objective.batch.extra["finite"]
    assert masked.sum() == 2
    assert all((value[masked] == 0).all() for value in terms.values())
    assert terms["L_policy"].count_nonzero() > 8
    sum(value.sum() for value in terms.values()).backward()
    gradient = setup.model.denoiser.get_parameter(NAMES[1]).grad
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
    row = {"update": 1}
    setup.objective.after_update(row)
    assert row.get("ratio", 1.0) == pytest.approx(1.0)


@pytest.mark.parametrize("algorithm", ON_POLICY)
def test_a_rollout_without_variance_moves_no_weight(build, algorithm):
    setup = build(algorithm, rewards={"judge": 1.0, "clip": 0.0})
    gradients = []
    for judge in (BlindJudge(), ToyJudge()):
        setup.objective.rewarder.judge = judge
        setup.step()["L_policy"].mean().backward()
        weight = setup.model.denoiser.get_parameter(NAMES[1])
        gradients.append(float(weight.grad.abs().sum()))
        setup.objective.batch = None
    assert gradients[0] == 0
    assert gradients[1] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoders_do_not_compute_in_fp16(toy, monkeypatch, dtype):
    model, enabled = toy(), []
    monkeypatch.setattr(
        model, "decode_images", lambda _: enabled.append(torch.is_autocast_enabled("cpu"))
    )
    with torch.autocast("cpu", dtype):
        decode(model, torch.zeros(1, 1, 8, 8))
    assert enabled == [dtype == torch.bfloat16]


# ------------------------------------------------------------ anchors


def test_benign_images_are_compared_with_those_of_the_original_model(build):
    setup = build(rewards={"anchor": 0.5})
    setup.step()
    assert setup.objective.figures["reward_anchor_benign"] == pytest.approx(1.0, abs=1e-5)
    assert setup.objective.figures["reward_anchor_concept"] == 0.0
    with torch.no_grad():
        setup.model.denoiser.get_parameter(NAMES[1]).mul_(-1.0)
    setup.step()
    assert setup.objective.figures["reward_anchor_benign"] < 0.0


def test_images_of_the_original_model_do_not_follow_the_weights(build):
    setup, other = build(), build()
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = torch.tensor([0, 5, 6])
    with torch.no_grad():
        setup.model.denoiser.get_parameter(NAMES[1]).mul_(0.3)
    found = setup.objective._draw_base(setup.model.denoiser, noise, prompts)
    policy = other.objective.policy
    expected = policy.draw(other.model.denoiser, noise[1:], policy.text[prompts[1:]])
    assert_close(found, expected)


def test_images_of_the_original_model_cost_passes_only_if_they_are_used(build):
    passes = {}
    for weight in (0.0, 0.5):
        setup = build(rewards={"anchor": weight})
        setup.step()
        passes[weight] = setup.objective.policy.passes
    policy = setup.objective.policy
    before = policy.passes
    policy.draw(setup.model.denoiser, torch.zeros(8, 1, 8, 8), policy.text[:1].expand(8))
    assert passes[0.5] - passes[0.0] == policy.passes - before > 0


# ------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    ("changes", "benign"),
    [
        ({}, 2),
        ({"groups": 3, "training": TRAINING | {"batch": 12}}, 2),  # half, rounded up
        ({"groups": 16, "training": TRAINING | {"batch": 64}}, 8),  # each prompt is drawn again
        ({"benign_share": 0.25, "allow_few_benign": True}, 1),
        ({"captions": (), "allow_few_benign": True}, 0),
    ],
)
def test_a_rollout_has_its_share_of_benign_prompts(build, changes, benign):
    setup = build(**changes)
    setup.step()
    batch = setup.objective.batch
    found = setup.objective.rewarder.benign[batch.prompts[:: setup.edit.group]]
    assert int(found.sum()) == benign
    assert len(found) == setup.edit.groups
    counts = batch.prompts[:: setup.edit.group].bincount()
    assert counts.max() == max(1, setup.edit.groups // 8, benign == 0)


def test_images_that_are_left_out_are_of_both_kinds(build):
    """Benign prompts come last in a rollout; to leave out its end would break their share."""
    setup = build(training=TRAINING | {"batch": 4, "accumulation": 3})
    left_out = []
    for seed in range(4):
        setup.step(seed)
        left_out += setup.objective.batch.prompts[-4:].tolist()
    assert 2 < setup.objective.rewarder.benign[left_out].sum() < 14


def test_the_images_of_a_smaller_last_batch_weigh_as_much_as_others(build):
    setup = build(training=TRAINING | {"batch": 12, "accumulation": 2})
    objective = setup.objective
    objective.algorithm.loss = lambda _, batch, index: LossTerms(
        batch.advantages, batch.prompts + 1.0
    )
    terms = [setup.step()]
    terms.append(objective.training_step(setup.model.denoiser, 1, None, (0, 1)))
    assert [len(part["L_kl"]) for part in terms] == [12, 4]
    kl, keep, policy = (
        sum(part[name].mean() for part in terms) / 2 for name in ("L_kl", "L_keep", "L_policy")
    )
    assert_close(kl + keep, (objective.batch.prompts + 1.0).mean())
    assert_close(policy, objective.batch.advantages.mean())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benign_share": 0.4}, "benign_share must be >= 0.5"),
        ({"groups": 1, "group": 16}, "groups"),
        ({"held_out_judge": "toy"}, "held_out_judge must not be the judge that rewards"),
        ({"rewards": {"judge": 0.0, "clip": 0.0}}, "got none. Set rewards.judge"),
        ({"rewards": {"judge": 0.0, "clip": 0.0, "anchor": 1.0}}, r"got \['anchor'\]"),
        ({"judge_options": {"threshold": 0.1}}, "threshold is no option of a judge"),
        ({"target": 1.0}, "target"),
    ],
)
def test_settings_that_break_a_promise_are_refused(toy_edit, changes, message):
    with pytest.raises(ValidationError, match=message):
        toy_edit("v_grpo", **(SMALL | changes), training=TRAINING)


def test_rewards_without_effect_are_named(toy_edit):
    edit = toy_edit("v_grpo", **SMALL, training=TRAINING, rewards={"clip_steered": 1.0})
    assert [name for name, _ in edit.unused_settings()] == ["rewards.clip_steered"]
    few = {"benign_share": 0.0, "allow_few_benign": True, "rewards": {"anchor": 1.0}}
    edit = toy_edit("v_grpo", **(SMALL | few), training=TRAINING)
    assert [name for name, _ in edit.unused_settings()] == ["rewards.anchor"]


def test_features_of_the_miniature_refuse_a_larger_model(build, monkeypatch):
    monkeypatch.setattr("toy.ToyModel.size", 512)
    with pytest.raises(ConfigError, match=r"mini-clip knows scenes of 64 pixels only, got .* 512"):
        build(extractor="mini-clip")


def test_judges_get_their_options_and_no_folder_is_exported(build, monkeypatch):
    from safegen.core import registry

    seen = []
    for name in ("toy", "other"):
        monkeypatch.setitem(registry.JUDGES, name, f"{__name__}:build_optional")
    monkeypatch.setattr(f"{__name__}.OPTIONS", seen)
    setup = build(
        held_out_judge="other",
        judge_options={"weights": "/home/me/a.pt"},
        held_out_options={"weights": "b.pt"},
    )
    assert seen == ["/home/me/a.pt", "b.pt"]
    assert setup.edit.export_settings()["judge_options"] == {"weights": "a.pt"}


def test_the_patch_names_prompts_and_judges(build):
    found = build().objective.metadata
    assert found["judges"] == {"judge": "toy"}
    assert (found["training_prompts"]["concept"], found["training_prompts"]["benign"]) == (4, 4)
    other = build(erase=("marked", "cube")).objective.metadata
    assert other["training_prompts"]["sha256"] != found["training_prompts"]["sha256"]


def test_a_run_resumes_with_the_same_features_only(toy, toy_edit, monkeypatch, tmp_path):
    edit = toy_edit("v_grpo", **SMALL, training=TRAINING | {"updates": 1})
    patch, _ = run(edit, toy(), tmp_path)
    assert patch.metadata.extractor == "toy"
    monkeypatch.setattr(ToyExtractor, "id", "toy:other weights")
    with pytest.raises(FileError, match="other settings, data or weights"):
        run(edit, toy(), tmp_path, resume=True)


def test_a_prompt_file_trains_and_no_folder_is_exported(toy, toy_edit, tmp_path):
    path, benign = tmp_path / "both.csv", "".join(f"{name},benign\n" for name in ("cube", "ball"))
    path.write_text(f"prompt,kind\nmarked cube,unsafe\n{benign}")
    settings = SMALL | {"prompts": (str(path),), "captions": ()}
    edit = toy_edit("v_grpo", **settings, training=TRAINING | {"updates": 1})
    patch, _ = run(edit, toy(), tmp_path / "run")
    assert patch.metadata.settings["prompts"] == ["both.csv"]
    assert patch.metadata.training_prompts["benign"] == 2
    path.write_text(f"prompt,kind\nmarked ball,unsafe\n{benign}")
    with pytest.raises(FileError, match="other settings, data or weights"):
        run(edit, toy(), tmp_path / "run", resume=True)


def test_a_concept_provides_the_held_out_judge():
    concept = load_concept("skulls")
    edit = ShieldDiff.preset("mini", concept=concept)
    assert (edit.judge, edit.held_out_judge) == (concept.judge, concept.held_out_judge)
    assert edit.held_out_judge is not None
    other = ShieldDiff.preset("mini", concept=concept, judge=concept.held_out_judge)
    assert other.held_out_judge is None
    assert ShieldDiff.preset("mini", concept=concept, held_out_judge=None).held_out_judge is None


# ------------------------------------------------------------ the budget


@pytest.mark.parametrize("share", [0.5, 0.75])
def test_the_budget_is_that_of_benign_images_alone(build, share):
    setup = build(benign_share=share, weight_keep=1.0, keep_budget=1e9)
    found = []
    setup.objective.monitor.follow_distance = found.append
    with torch.no_grad():
        setup.model.denoiser.get_parameter(NAMES[1]).mul_(0.7)
    terms = setup.step()["L_keep"].detach()
    setup.objective.after_update({"update": 1, "L_keep": float(terms.mean())})
    setup.objective.after_update({"update": 2, "L_keep": 0.0})  # no benign image
    assert found == [pytest.approx(float(terms[terms > 0].mean()), rel=1e-5)]


def test_a_budget_is_measured_without_a_weight_to_start_from(build):
    settings = {"kl": 0.0, "weight_keep": 0.0, "keep_budget": 1e-9}
    setup = build(**settings, training=TRAINING | {"batch": 8})
    with torch.no_grad():
        setup.model.denoiser.get_parameter(NAMES[1]).mul_(0.7)
    setup.objective._roll_out(setup.model.denoiser, torch.Generator().manual_seed(0))
    assert setup.objective.policy.has_distance


# ------------------------------------------------------------ the end


def run(edit, model, directory, *, stop=None, resume=False):
    """Return the patch and the log of a training, stopped by a signal after an update."""
    rows = []

    def callback(done, total, row):
        rows.append({name: value for name, value in row.items() if name != "seconds"})
        if done == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    patch = edit.apply(model, checkpoint_dir=directory, resume=resume, callback=callback)
    return patch, rows


def test_success_ends_the_training_and_survives_resume(toy, toy_edit, blind, tmp_path):
    settings = SMALL | {"judge": "blind", "target": 0.01, "limits": {"window": 4}}
    edit = toy_edit("v_grpo", **settings, training=TRAINING, weight_keep=1.0, keep_budget=1e-9)
    whole, log = run(edit, toy(), tmp_path / "whole")
    assert len(log) == 4
    assert log[-1]["weight_keep"] > log[0]["weight_keep"] == 1.0
    assert whole.metadata.stopped_early
    assert "finds the concept in" in whole.metadata.stop_reason
    with pytest.raises(InterruptedRunError):
        run(edit, toy(), tmp_path / "part", stop=2)
    part, rest = run(edit, toy(), tmp_path / "part", resume=True)
    assert rest == log[2:]
    again, none = run(edit, toy(), tmp_path / "part", resume=True)
    assert none == []
    for patch in (part, again):
        assert patch.metadata.stop_reason == whole.metadata.stop_reason
        assert all(torch.equal(patch.tensors[n], v) for n, v in whole.tensors.items())


def test_a_deceived_judge_ends_the_training(toy, toy_edit, blind, tmp_path):
    edit = toy_edit(
        "v_grpo",
        **SMALL,
        training=TRAINING,
        judge="blind",
        held_out_judge="suspicious",
        limits={"window": 2, "images": 16},
    )
    with pytest.warns(TrainingHealthWarning, match="the training ends: the held-out judge finds"):
        patch, log = run(edit, toy(), tmp_path)
    assert len(log) == 2
    assert log[-1]["held_out_unsafe_concept"] == 1.0
    assert patch.metadata.stop_reason.startswith("the held-out judge finds the concept in 100%")


def test_a_held_out_judge_that_judges_nothing_does_not_pass_for_success(build, blind):
    """The judge that rewards, which finds nothing, does not stand in for it."""

    class NoJudge(ToyJudge):
        def detect(self, images):
            raise OSError("no network")

    limits = {"window": 1, "images": 1}
    setup = build(judge="blind", held_out_judge="toy", target=0.5, limits=limits)
    setup.objective.rewarder.held_out = NoJudge()
    with pytest.warns(TrainingHealthWarning) as seen:
        setup.step()
    assert any("the held-out judge can judge no image" in str(one.message) for one in seen)
    assert setup.objective.stop_reason is None
    setup.objective.rewarder.held_out = BlindJudge()
    setup.step()
    assert setup.objective.stop_reason.startswith("the held-out judge finds the concept in 0.0%")


def test_a_row_of_the_log_has_every_figure(toy, toy_edit, tmp_path):
    edit = toy_edit("v_grpo", **SMALL, training=TRAINING | {"updates": 1})
    _, (row,) = run(edit, toy(), tmp_path)
    kinds = [f"{name}_{kind}" for name in ("judge", "clip") for kind in ("concept", "benign")]
    expected = {f"reward_{name}{end}" for name in kinds for end in ("", "_std")}
    expected |= {f"judge_unsafe_{k}{end}" for k in ("concept", "benign") for end in ("", "_n")}
    expected |= {"L_policy", "L_kl", "L_keep", "weight_kl", "weight_keep", "update", "lr", "norm"}
    expected |= {"ratio", "ratio_deviation", "clipped", "zero_variance", "zero_variance_judge"}
    expected |= {"masked", "diversity", "alignment_benign", "rollout", "passes"}
    assert row.keys() == expected
    assert all(isinstance(value, int | float) for value in row.values())
