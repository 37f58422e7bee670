"""Generation on every family: seeds, batches, starts, sizes, schedulers and true guidance."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from safegen.core.errors import ConfigError, FileError, UnknownNameError, UnusedSettingWarning
from safegen.core.generation import GenerationConfig, Sample, Start
from safegen.models.families.denoisers import pack_latents
from safegen.models.generation import generate, generator, image_size, truncated_prompts
from safegen.models.image_files import parameters_text
from safegen.models.schedulers import list_schedulers
from safegen.stack import Stack
from safegen.stack_loader import LoadedStack
from tests.tiny import FAMILIES, PROMPTS, build_model

CUBE = Sample(prompt=PROMPTS[0], seed=1)


class Models(dict):
    """Tiny models by family, each built at its first use."""

    def __missing__(self, family):
        self[family] = build_model(family)
        return self[family]


@pytest.fixture(scope="module")
def models():
    """Return the tiny model of each family."""
    return Models()


def draw(model, samples, **settings):
    config = GenerationConfig(**{"num_inference_steps": 2} | settings)
    return [np.asarray(image).astype(int) for image in generate(model, samples, config)]


def call_pipeline(model, **options):
    """Return the image of the pipeline's own call for `CUBE`."""
    call = {"num_inference_steps": 2, "guidance_scale": 5.0} | options
    if model.name != "sd3":  # without T5, the length is that of its zeros
        call["max_sequence_length"] = 32
    image = model.pipeline(prompt=[CUBE.prompt], generator=[generator(1, 0)], **call).images[0]
    return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(family, marks=() if family == "flux" else pytest.mark.slow)
        for family in FAMILIES
    ],
)
def test_an_image_depends_on_its_seed_and_not_on_its_batch(models, family):
    samples = [CUBE, Sample(prompt=PROMPTS[1], seed=1, index=1), CUBE]
    together = draw(models[family], samples)
    alone = draw(models[family], samples[:2], batch_size=1)
    assert together[0].shape == (32, 32, 3)
    assert np.array_equal(together[0], together[2])
    assert max(abs(a - b).max() for a, b in zip(together, alone, strict=False)) <= 2
    assert abs(together[0] - together[1]).max() > 2


@pytest.mark.parametrize("family", ["sd3", "sd35", "flux"])
def test_an_image_is_that_of_the_pipelines_own_call(models, family):
    model = models[family]
    assert np.array_equal(draw(model, [CUBE])[0], call_pipeline(model))


@pytest.mark.parametrize("family", ["flux"])
def test_true_guidance_on_flux_has_an_empty_negative_prompt_unless_one_is_given(models, family):
    model = models[family]
    plain, guided = draw(model, [CUBE])[0], draw(model, [CUBE], true_cfg_scale=4.0)[0]
    assert np.array_equal(guided, call_pipeline(model, true_cfg_scale=4.0, negative_prompt=[""]))
    assert not np.array_equal(guided, plain)
    away = [CUBE.model_copy(update={"negative_prompt": "a blue ball"})]
    found = draw(model, away, true_cfg_scale=4.0)[0]
    assert np.array_equal(
        found, call_pipeline(model, true_cfg_scale=4.0, negative_prompt=["a blue ball"])
    )
    with pytest.raises(ConfigError, match=r"^true_cfg_scale must be > 1 with a negative prompt, g"):
        draw(model, away)


def test_the_embedded_guidance_reaches_the_network_only_where_it_is_an_input(models):
    low, high = (draw(models["flux"], [CUBE], guidance_scale=s)[0] for s in (1.0, 50.0))
    assert not np.array_equal(low, high)
    low, high = (draw(models["flux-schnell"], [CUBE], guidance_scale=s)[0] for s in (1.0, 50.0))
    assert np.array_equal(low, high)


def test_true_guidance_elsewhere_warns(models):
    with pytest.warns(UnusedSettingWarning, match="no effect on a StableDiffusion3Pipeline"):
        draw(models["sd3"], [CUBE], true_cfg_scale=2.0)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_start_an_image_in_their_plain_shape(models, tmp_path, family):
    model = models[family]
    noise = torch.randn((16, 8, 8), generator=torch.Generator().manual_seed(3))
    save_file({"latents": noise}, tmp_path / "x.safetensors")
    sample = CUBE.model_copy(update={"start": Start.of(tmp_path, latents="x.safetensors")})
    packed = pack_latents(noise[None]) if family == "flux" else noise[None]
    assert np.array_equal(draw(model, [sample])[0], call_pipeline(model, latents=packed))
    save_file({"latents": noise[:, :4].contiguous()}, tmp_path / "y.safetensors")
    sample = CUBE.model_copy(update={"start": Start.of(tmp_path, latents="y.safetensors")})
    with pytest.raises(FileError, match=r"must hold finite latents \(16, 8, 8\)"):
        draw(model, [sample])


@pytest.mark.parametrize("kind", ["image", pytest.param("inpaint", marks=pytest.mark.slow)])
@pytest.mark.parametrize("family", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_an_image_starts_an_image_of_its_family(models, tmp_path, family, kind):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.png")
    Image.fromarray(np.repeat([[0, 255]], 32, 0).astype(np.uint8)).save(tmp_path / "m.png")
    mask = {"mask": "m.png"} if kind == "inpaint" else {}
    start = Start.of(tmp_path, image="x.png", strength=0.5, **mask)
    samples = [CUBE.model_copy(update={"start": start, "index": i}) for i in range(2)]
    found = draw(models[family], samples, num_inference_steps=4)
    assert [image.shape for image in found] == [(32, 32, 3)] * 2
    assert abs(found[0] - found[1]).max() > 2
    alone = draw(models[family], samples[1:], num_inference_steps=4)
    assert abs(found[1] - alone[0]).max() <= 2


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_side_is_a_multiple_of_the_patches(models, family):
    model = models[family]
    config = GenerationConfig(width=20)
    with pytest.raises(ConfigError, match=r"^width must be a multiple of 8 on .*Use 16 or 24\.$"):
        image_size(model, config)
    assert draw(model, [CUBE], width=24)[0].shape == (32, 24, 3)


def test_full_size_flux_and_sd3_have_sides_of_sixteen(models, monkeypatch):
    for family in ("sd3", "flux"):
        monkeypatch.setattr(models[family].pipeline, "vae_scale_factor", 8)
        with pytest.raises(ConfigError, match="must be a multiple of 16 on"):
            image_size(models[family], GenerationConfig(width=1032))


def test_an_image_beyond_the_positions_of_sd3_is_refused(models):
    with pytest.raises(ConfigError, match=r"^height must be <= 64 on the model 'sd3', got 72\."):
        image_size(models["sd3"], GenerationConfig(height=72))
    assert image_size(models["flux"], GenerationConfig(height=72)) == (32, 72)


@pytest.mark.parametrize("name", ["DPM++ 2M", "UniPC"])
@pytest.mark.parametrize("family", ["sd3", pytest.param("flux", marks=pytest.mark.slow)])
def test_flow_matching_has_schedulers_by_name(models, family, name, caplog):
    model, steps = models[family], 8
    caplog.set_level(logging.CRITICAL)
    before = model.pipeline.scheduler
    assert name in list_schedulers(before)
    plain = draw(model, [CUBE], num_inference_steps=steps)[0]
    found = draw(model, [CUBE], scheduler=name.lower(), num_inference_steps=steps)[0]
    assert model.pipeline.scheduler is before
    assert not np.array_equal(found, plain)
    assert abs(found - plain).mean() < 12  # another solver of the same equation


def test_a_scheduler_that_cannot_run_is_refused_in_one_line(models, caplog):
    caplog.set_level(logging.CRITICAL)
    with pytest.raises(UnknownNameError, match=r"fits the model's FlowMatchEulerDiscreteSched"):
        draw(models["sd3"], [CUBE], scheduler="DDIM")
    with pytest.raises(ConfigError, match=r"takes the shift of a FluxPipeline, got DPMSolverMult"):
        draw(models["flux-schnell"], [CUBE], scheduler="DPM++ 2M")


def test_the_callback_sees_every_step(models):
    for family in ("sd3", "flux"):
        shares = []
        config = GenerationConfig(num_inference_steps=3, batch_size=1)
        generate(models[family], [CUBE, CUBE], config, callback=shares.append)
        assert shares == pytest.approx([1 / 6, 1 / 3, 1 / 2, 1 / 2, 2 / 3, 5 / 6, 1, 1])


def test_a_prompt_is_cut_where_the_longest_encoder_ends(models):
    long = " ".join(["cube"] * 31)
    assert len(models["sd35"].pipeline.tokenizer(long).input_ids) > 32
    for family, wanted in {"sd1": [0, 1], "sd3": [0, 1], "sd35": [1], "flux": [1]}.items():
        assert truncated_prompts(models[family], [long, f"{long} cube", "cube"]) == wanted


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_blank_stack_covers_the_image_in_black(models, family):
    stack = Stack(name="blank", model="x", blank=True)
    loaded = LoadedStack(stack, models[family], "0" * 64, None)
    (image,) = loaded.generate([CUBE], GenerationConfig(num_inference_steps=1, height=24))
    assert image.image.size == (32, 24)
    assert image.image.getbbox() is None


def test_a1111_reads_both_scales_of_flux(models):
    config = GenerationConfig(guidance_scale=3.5, true_cfg_scale=2.0)
    text = parameters_text(CUBE, config, models["flux"])
    assert "Sampler: Euler," in text
    assert "CFG scale: 2.0, " in text
    assert "Distilled CFG Scale: 3.5" in text
    assert "Distilled" not in parameters_text(CUBE, GenerationConfig(), models["sd3"])
