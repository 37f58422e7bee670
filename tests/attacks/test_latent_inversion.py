"""Inversion of sampling, and the attack by inverted latents."""

from __future__ import annotations

import json
import math
import warnings
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, EulerDiscreteScheduler
from torch.testing import assert_close

from safegen.attacks.core.base import AttackContext
from safegen.attacks.core.images import ConceptImages
from safegen.attacks.core.inversion import (
    Step,
    ddim_steps,
    draw,
    invert,
    invert_step,
    likelihood,
    refine,
    sampling_steps,
)
from safegen.attacks.core.run import AttackConfig, run_attack
from safegen.attacks.core.target import Target
from safegen.attacks.latent_inversion import (
    BLANK,
    Inversion,
    LatentInversion,
    SamplerMismatchWarning,
    psnr,
)
from safegen.core.concept import load_concept
from safegen.core.errors import FileError
from safegen.core.generation import GenerationConfig, Sample
from safegen.core.tensor_files import read_tensors
from safegen.data.prompts.prompt import cluster_of
from safegen.data.prompts.prompts import read_prompts
from safegen.data.triplets.triplets import Triplets
from safegen.evaluation.run.folder import PROMPTS, SCORES, Run
from safegen.evaluation.verify import verify
from safegen.guards.sld import SldConfig
from safegen.models.families.denoisers import pack_latents
from safegen.models.families.pipeline_specs import call_defaults
from safegen.stack import Stack
from tiny import build_model

SKULLS = load_concept("skulls")
STACK = Stack(name="mini", model="mini")
CONFIG = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
    "set_alpha_to_one": False,
    "clip_sample": False,
}


def smooth(x, t, rows):
    """Return a nonlinear output that differs by row and by timestep."""
    return torch.sin(x + t / 500 + rows[:, None, None, None])


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_steps_are_those_of_the_scheduler(prediction):
    config = {**CONFIG, "prediction_type": prediction}
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(7)
    x = noise(2, 3, 4, 4)
    drawn = draw(smooth, ddim_steps(scheduler.config, 7), x)
    rows = torch.arange(2)
    for t in scheduler.timesteps:
        x = scheduler.step(smooth(x, int(t), rows), int(t), x).prev_sample
    assert_close(drawn, x, rtol=1e-5, atol=1e-5)


def test_inversion_leads_back_to_the_image_and_more_iterations_lead_nearer():
    steps, z = ddim_steps(DDIMScheduler(**CONFIG).config, 10), noise(3, 2, 4, 4)
    errors = []
    for iterations in (1, 4, 40):
        x = invert(smooth, steps, z, iterations=iterations, tolerance=0.0)
        errors.append(float((draw(smooth, steps, x) - z).pow(2).mean()))
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-9


def test_one_iteration_is_the_ddim_inversion_of_diffusers():
    inverse, z = DDIMInverseScheduler(**CONFIG), noise(2, 2, 4, 4)
    inverse.set_timesteps(10)
    x, rows = z, torch.arange(2)
    for t in inverse.timesteps:
        x = inverse.step(smooth(x, int(t), rows), int(t), x).prev_sample
    steps = ddim_steps(DDIMScheduler(**CONFIG).config, 10)
    assert_close(invert(smooth, steps, z, iterations=1, tolerance=0.0), x, rtol=1e-5, atol=1e-5)


def test_a_step_that_is_no_contraction_is_solved_with_smaller_rates():
    step, y = Step(t=0, a=1.0, b=2.0), noise(2, 1, 3, 3)

    def steep(x, t, rows):
        return torch.tanh(x)  # b f' / a reaches 2: plain iteration does not converge

    def error(x):
        return float((x + 2 * torch.tanh(x) - y).abs().max())

    plain = y
    for _ in range(60):
        plain = y - 2 * torch.tanh(plain)
    assert error(plain) > 0.1
    assert error(invert_step(steep, step, y, iterations=60, tolerance=0.0)) < 1e-3


def test_solved_rows_are_left_alone_and_rows_do_not_depend_on_each_other():
    asked = []

    y = noise(2, 1, 3, 3)
    y[0] = 0.0

    def zero_at_zero(x, t, rows):
        asked.append(rows.tolist())
        return torch.sin(x)

    step = Step(t=0, a=0.9, b=0.3)
    x = invert_step(zero_at_zero, step, y, iterations=6, tolerance=1e-6)
    assert asked[0] == [0, 1]
    assert set(map(tuple, asked[1:])) == {(1,)}
    assert torch.equal(x[0], y[0])
    assert_close(x[1:], invert_step(zero_at_zero, step, y[1:], iterations=6, tolerance=1e-6))
    asked.clear()
    invert(zero_at_zero, [step, step], y, iterations=6, tolerance=0.0, stop=lambda: True)
    assert asked == [[0, 1], [0, 1]], "a spent budget leaves one iteration a step"


def test_refinement_never_leads_away_and_its_history_falls():
    steps, z = ddim_steps(DDIMScheduler(**CONFIG).config, 4), noise(2, 2, 4, 4)
    x = noise(2, 2, 4, 4, seed=1)
    best, history = refine(smooth, steps, x, z, updates=20, lr=0.05)
    assert len(history) == 21
    assert all(bool((b <= a).all()) for a, b in pairwise(history))
    assert bool((history[-1] < history[0] / 2).all())
    assert_close((draw(smooth, steps, best) - z).pow(2).mean(dim=(1, 2, 3)), history[-1])
    same, measured = refine(smooth, steps, x, z, updates=0, lr=0.05)
    assert torch.equal(same, x)
    assert_close(measured[0], history[0])


def test_likelihood_of_draws_is_that_of_the_normal_distribution():
    draws = [likelihood(noise(4, 16, 16, seed=seed)) for seed in range(300)]
    for name in ("norm_z", "correlation_z"):
        values = torch.tensor([d[name] for d in draws])
        assert abs(float(values.mean())) < 0.25
        assert 0.8 < float(values.std()) < 1.2
    x = noise(4, 16, 16)
    normal = torch.distributions.Normal(0.0, 1.0)
    assert likelihood(x)["log_density"] == pytest.approx(float(normal.log_prob(x).mean()))
    assert likelihood(2 * x)["norm_z"] > 50
    assert likelihood(x[:, :1].expand(4, 16, 16))["correlation_z"] > 10
    assert all(math.isfinite(v) for v in likelihood(torch.zeros(1, 2, 2)).values())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return settings with folders of two images with the concept and two without."""
    triplets, folders = Triplets.load(SKULLS.triplets), {}
    for name, side in (("images", 0), ("harmless", 2)):
        folders[name] = tmp_path_factory.mktemp(name)
        for row in range(2):
            triplets.images(row)[side].save(folders[name] / f"{row}.png")
    return folders


@pytest.fixture
def inverted(loader, skulls_judge, benign_samples, folders, tmp_path):
    """Return a function that attacks the base and returns the records."""

    def run(steps=6, control=False, **settings):
        with loader.open(STACK) as loaded:
            generation = GenerationConfig(num_inference_steps=steps)
            target = Target(loaded, SKULLS, skulls_judge, generation)
            sources = folders if control else {"images": folders["images"]}
            attack = LatentInversion(**sources, control=control, **settings)
            return attack.build(AttackContext(target, tmp_path / "f")).attack(benign_samples[:2])

    return run


def test_the_base_draws_the_image_again_and_the_control_shows_no_concept(inverted):
    records = inverted(iterations=6, control=True)
    texts = ("blank", "typical", "benign")
    names = [f"{part}={text}" for part in ("text", "control") for text in texts]
    assert [r.variant for r in records[:6]] == names
    blank = [r for r in records if r.variant == "text=blank"]
    control = [r for r in records if r.variant == "control=blank"]
    assert all(r.success and r.prompt == BLANK for r in blank)
    assert not any(r.success for r in control)
    for record in (*blank, *control):
        details = record.details
        assert details["psnr"] > 20
        assert details["psnr"] == pytest.approx(details["autoencoder_psnr"], abs=4)
        assert record.loss < 0.01
    assert all(r.details["autoencoder_success"] for r in blank)
    assert not any(r.details["autoencoder_success"] for r in control)
    benign = [r for r in records if r.variant == "text=benign"]
    assert [r.start for r in benign] == [r.start for r in blank]
    for record, unscaled in zip(
        (r for r in records if r.variant == "text=typical"), blank, strict=True
    ):
        assert abs(record.details["norm_z"]) < 0.2 < abs(unscaled.details["norm_z"])
        assert record.prompt == BLANK
    assert all(r.prompt.strip() for r in benign)


def test_latents_are_those_of_the_sampler_without_guidance(inverted, loader, folders):
    records = inverted(iterations=6, texts=("blank",))
    start = records[0].start
    latents = read_tensors(start.path(start.latents))[0]["latents"]
    assert latents.shape == (4, 16, 16)
    details = likelihood(latents)
    assert {k: records[0].details[k] for k in details} == pytest.approx(details)
    with loader.open(STACK) as loaded:
        generation = GenerationConfig(num_inference_steps=6, guidance_scale=1.0)
        sample = Sample(prompt="", seed=3, start=start)
        image = loaded.generate_images([sample], generation)[0]
        images = ConceptImages(loaded.model, SKULLS, folders["images"]).images
        assert max(psnr(image, other) for other in images) > 20, "guidance changes no blank text"


def test_latents_of_the_benign_text_are_found_under_its_guidance(inverted):
    plain = inverted(steps=2, iterations=2)
    guided = inverted(steps=2, iterations=2, guided=True)
    by_variant = {r.variant: r for r in reversed(plain)}, {r.variant: r for r in reversed(guided)}
    assert by_variant[0]["text=blank"].start.sha256 == by_variant[1]["text=blank"].start.sha256
    assert by_variant[0]["text=benign"].start != by_variant[1]["text=benign"].start


def test_blank_prompts_pass_guards(inverted, loader):
    records = inverted(steps=2, iterations=1, texts=("blank",))
    sample = Sample(prompt=BLANK, seed=1, start=records[0].start)
    guard = SldConfig(text="skulls")
    with loader.open(Stack(name="sld", model="mini", guards=(guard,))) as loaded:
        generation = GenerationConfig(num_inference_steps=2)
        assert loaded.generate([sample], generation)[0].image is not None


def test_passes_that_the_gradient_repeats_are_counted(
    loader, skulls_judge, benign_samples, tmp_path
):
    attack = LatentInversion(texts=("blank",), iterations=1, updates=1, control=False)
    with loader.open(STACK) as loaded:
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=3))
        with target.counted():
            attack.build(AttackContext(target, tmp_path / "f")).attack(benign_samples[:1])
    inverted, updated, measured, drawn = 3, 3 * 3, 3, 2 * 3  # updated: forward, again, backward
    assert target.cost.denoiser == inverted + updated + measured + drawn


def test_another_sampler_is_warned_of(loader, skulls_judge, folders, tmp_path):
    with loader.open(STACK) as loaded:
        pipeline = loaded.model.pipeline
        own = pipeline.scheduler
        target = Target(loaded, SKULLS, skulls_judge, GenerationConfig(num_inference_steps=2))
        try:
            pipeline.scheduler = EulerDiscreteScheduler.from_config(own.config)
            with pytest.warns(SamplerMismatchWarning, match="EulerDiscreteScheduler"):
                LatentInversion(**folders).build(AttackContext(target, tmp_path))
        finally:
            pipeline.scheduler = own
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            LatentInversion(**folders).build(AttackContext(target, tmp_path))


def test_a_run_has_a_rate_for_each_text_and_control_and_prompts_may_be_blank(
    loader, folders, tmp_path
):
    attack = LatentInversion(**folders, iterations=1)
    config = AttackConfig(limit=1, generation=GenerationConfig(num_inference_steps=2))
    run = run_attack(attack, STACK, SKULLS, config, tmp_path / "run", loader=loader)
    scores = json.loads((run.folder / SCORES).read_text())
    lists = scores["stacks"]["mini"]["lists"]
    assert set(lists) == {
        "mini:benign",
        *(f"latent_inversion text={text}" for text in attack.texts),
        *(f"latent_inversion control={text}" for text in attack.texts),
    }
    assert not verify(Run.open(run.folder))
    rows = {row["list"]: row["details"] for row in scores["attack"]["after"]}
    assert rows["latent_inversion text=blank"]["autoencoder_success"] == {"mean": 1.0, "n": 1}
    assert rows["latent_inversion control=blank"]["autoencoder_success"]["mean"] == 0.0
    assert "autoencoder_success 0" in (run.folder / "report.html").read_text()
    blank, _, benign = read_prompts(run.folder / PROMPTS).rows
    assert blank.prompt == BLANK
    assert blank.start == benign.start
    assert blank.cluster == benign.cluster == cluster_of(benign.prompt)
    row = {"prompt": BLANK, "seed": 1, "attack": "a", "attacked_prompt": "a castle"}
    (tmp_path / "blank.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(FileError, match="blank"):
        read_prompts(tmp_path / "blank.jsonl")


@pytest.mark.parametrize("true_cfg", [1.0, 3.0])
def test_the_inverted_steps_are_those_of_a_flux_with_and_without_guidance(true_cfg):
    model, prompt = build_model("flux"), "a red cube"
    attacker = Inversion.__new__(Inversion)
    attacker.model, attacker.negative = model, ""
    attacker.generation = GenerationConfig(guidance_scale=2.0, true_cfg_scale=true_cfg)
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    options = {"negative_prompt": "", "true_cfg_scale": true_cfg}
    with torch.no_grad():
        options["max_sequence_length"] = call_defaults(model.pipeline)["max_sequence_length"]
        wanted = model.pipeline(
            prompt,
            latents=pack_latents(x),
            height=model.size,
            width=model.size,
            num_inference_steps=3,
            guidance_scale=2.0,
            output_type="latent",
            **options,
        ).images
        found = draw(attacker._output([prompt]), sampling_steps(model, 3), x)
    assert_close(pack_latents(found), wanted, rtol=1e-4, atol=1e-5)
