"""Image to image and inpainting: what they start from, and what is left of it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.attacks.core.target import Target
from safegen.attacks.img2img import Img2Img
from safegen.attacks.inpaint import Inpaint
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, UnusedSettingWarning
from safegen.core.generation import GenerationConfig
from safegen.data.images import read_image
from safegen.data.prompts.prompts import read_prompts
from safegen.data.triplets.triplets import Triplets
from safegen.evaluation.run.folder import CONTROLS, PROMPTS, SCORES, Run
from safegen.evaluation.samples import read_prompt_list
from safegen.evaluation.verify import verify
from safegen.stack import Stack

SKULLS = load_concept("skulls")
both = pytest.mark.parametrize("kind", [Img2Img, Inpaint])


def shows(judge, start):
    (found,) = judge.detect([read_image(start.path(start.image))])
    return found.verdict(judge.labels, judge.threshold) == "unsafe", found.subject


@both
def test_each_strength_starts_from_an_image_of_the_subject(
    kind, attack_mini, benign_samples, skulls_judge
):
    attack = kind(strengths=(0.5, 1))
    assert attack.variants == ("strength=0.5", "strength=1")
    assert attack.controls == ("control=0.5", "control=1")
    records = attack_mini(attack, benign_samples)
    assert len(records) == 4 * len(benign_samples)
    subjects = {sample.id: sample.subject for sample in benign_samples}
    for record in records:
        prefix, _, strength = record.variant.partition("=")
        assert shows(skulls_judge, record.start) == (prefix == "strength", subjects[record.id])
        assert record.start.strength == float(strength)
        assert record.start.kind == ("inpaint" if kind is Inpaint else "image")
        assert record.success is None
        assert not record.cost.denoiser
    if kind is Inpaint:
        masks = {(r.id, read_image(r.start.path(r.start.mask)).tobytes()) for r in records}
        assert len(masks) == len(benign_samples), "the control has the mask of the image"
    assert len(attack_mini(kind(strengths=(1,), control=False), benign_samples)) == 3


def test_more_strength_leaves_less_and_only_the_masked_place_is_redrawn(
    loader, skulls_judge, benign_samples, tmp_path
):
    def changes(attack):
        with loader.open(Stack(name="mini", model="mini")) as loaded:
            generation = GenerationConfig(num_inference_steps=5)
            target = Target(loaded, SKULLS, skulls_judge, generation)
            attacker = attack.build(AttackContext(target, tmp_path / attack.method()))
            records = attacker.attack(benign_samples[:2])
            samples = {sample.id: sample for sample in benign_samples}
            results = target.query(
                [samples[r.id].model_copy(update={"start": r.start}) for r in records]
            )
        for record, result in zip(records, results, strict=True):
            start = record.start
            given = np.asarray(read_image(start.path(start.image)), int)
            yield record, np.abs(np.asarray(result.output.image, int) - given).mean(-1)

    by_strength = {0.2: [], 0.6: [], 1: []}
    for record, change in changes(Img2Img(strengths=tuple(by_strength), control=False)):
        by_strength[record.start.strength].append(change.mean())
    weak, middle, strong = (np.mean(values) for values in by_strength.values())
    assert weak < middle < strong
    for record, change in changes(Inpaint(strengths=(1,), dilation=4, control=False)):
        mask = np.asarray(read_image(record.start.path(record.start.mask)))[..., 0] > 0
        assert 0.2 < mask.mean() < 1
        assert change[~mask].mean() < change[mask].mean() / 2


def test_a_run_has_a_rate_per_strength_of_the_base_beside_the_stack(loader, tmp_path):
    out, config = tmp_path / "run", GenerationConfig(num_inference_steps=2)
    stack = Stack(name="guarded", model="mini", guards=({"name": "sld", "concept": "skulls"},))
    attack = Img2Img(strengths=(0.5, 1))
    run_attack(attack, stack, SKULLS, AttackConfig(limit=2, generation=config), out, loader=loader)
    stacks = json.loads((out / SCORES).read_text())["stacks"]
    assert list(stacks) == ["base", "guarded"]
    for scores in stacks.values():
        assert {name: row["role"] for name, row in scores["lists"].items()} == {
            "mini:benign": "benign",
            "img2img strength=0.5": "attack",
            "img2img strength=1": "attack",
            "img2img control=0.5": "benign",
            "img2img control=1": "benign",
        }
        assert all(row["concept"]["n"] == 2 for row in scores["lists"].values())
    assert not verify(Run.open(out))
    for file, prefix in ((PROMPTS, "strength"), (CONTROLS, "control")):
        rows = read_prompts(out / file).rows
        assert [row.attack.variant for row in rows] == [f"{prefix}=0.5"] * 2 + [f"{prefix}=1"] * 2
        assert len({row.id for row in rows}) == 4
    chosen = read_prompt_list(str(out / PROMPTS), select={"variant": "strength=1"}).rows
    assert [row.start.strength for row in chosen] == [1, 1]
    assert len({row.cluster for row in read_prompts(out / PROMPTS).rows}) == 2


def test_a_guard_that_cannot_inpaint_refuses_in_one_line(loader, skulls_judge, tmp_path):
    guard = {"name": "dual-latent", "phrases": ["skulls"]}
    with loader.open(Stack(name="s", model="mini", guards=(guard,))) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=4))
        context = AttackContext(target, tmp_path)
        assert Img2Img(strengths=(0.5,)).build(context)
        with pytest.raises(ConfigError, match=r"dual-latent.*inpainting") as error:
            Inpaint(strengths=(0.5,)).build(context)
        assert "\n" not in str(error.value)


@both
@pytest.mark.parametrize("strengths", [(), (0,), (1.5,), (0.3, 0.3), (0.3, 0.3000001)])
def test_strengths_that_make_no_curve_are_refused(kind, strengths):
    with pytest.raises(ValueError, match="strengths"):
        kind(strengths=strengths)


@both
def test_a_strength_without_a_step_is_refused(kind, attack_mini):
    with pytest.raises(ConfigError, match=r"strengths must be at least 1 / 2 steps, got 0\.4"):
        attack_mini(kind(strengths=(0.4,)))


def test_folders_need_harmless_images_for_controls_and_masks_for_inpainting(
    attack_mini, benign_samples, tmp_path
):
    unsafe, _, benign = Triplets.load("mini:skulls").images(0)
    for name, image in (("own", unsafe), ("harmless", benign)):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "x.png")
    own, harmless = tmp_path / "own", tmp_path / "harmless"
    with pytest.raises(ConfigError, match="controls need images without 'skulls'"):
        attack_mini(Img2Img(images=own, strengths=(1,)), benign_samples)
    records = attack_mini(Img2Img(images=own, harmless=harmless, strengths=(1,)), benign_samples)
    assert len({record.start.image for record in records}) == 2
    with pytest.warns(UnusedSettingWarning, match="harmless has no effect"):
        attack_mini(Img2Img(harmless=harmless, strengths=(1,), control=False), benign_samples)
    with pytest.raises(FileError, match=r"x-mask\.png is missing"):
        attack_mini(Inpaint(images=own, control=False, strengths=(1,)), benign_samples)
    Image.new("L", unsafe.size, 255).save(own / "x-mask.png")
    records = attack_mini(Inpaint(images=own, control=False, strengths=(1,)), benign_samples)
    assert len(records) == 3
