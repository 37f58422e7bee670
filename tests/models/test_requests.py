"""What a request asks for: size, scheduler, seed mode, negative prompt, images per prompt."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler
from PIL import Image
from pydantic import ValidationError

import safegen
from safegen.attacks.core.target import Target
from safegen.core.errors import ConfigError, UnknownNameError
from safegen.core.generation import GenerationConfig, Sample, Start
from safegen.evaluation.protocol import Protocol
from safegen.guards import make_guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.models.generation import generate, join_negative
from safegen.models.schedulers import SAMPLERS, build_scheduler, sampler_name
from safegen.stack import Stack
from safegen.stack_loader import LoadedStack

CUBE = "a red cube on a white table"


def config_of(**settings):
    return GenerationConfig(**({"num_inference_steps": 2} | settings))


def pixels(images):
    return [np.asarray(image).tolist() for image in images]


def bare(pipe, prompt=CUBE, **options):
    """Return the images of the pipeline's own call."""
    return pipe(prompt, **{"num_inference_steps": 2, "guidance_scale": 5.0} | options).images


def stack_of(model, *guards, negative_prompt=None):
    """Return a loaded stack with guards."""
    stack = Stack(name="s", model="tiny", guards=guards, negative_prompt=negative_prompt)
    guarded = GuardedPipeline(model.pipeline, guards) if guards else None
    return LoadedStack(stack, model, "0" * 64, guarded)


@pytest.mark.parametrize("copies", [1, 3])
@pytest.mark.parametrize("name", [None, "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("guarded", [False, True])
def test_torch_seeds_give_exactly_the_images_of_diffusers(make_model, copies, name, guarded):
    """With several images per prompt too, whose noise diffusers draws from one generator."""
    model = make_model()
    guards = [make_guard("negative-prompt", text="")] if guarded else []
    loaded = stack_of(model, *guards)
    found = loaded.generate_images(
        [Sample(prompt=CUBE, seed=42, num_images_per_prompt=copies)],
        config_of(seed_mode="torch", scheduler=name),
    )
    if name:
        own = model.pipeline.scheduler.config
        model.pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(own)
    generator = torch.Generator("cpu").manual_seed(42)
    want = bare(model.pipeline, generator=generator, num_images_per_prompt=copies)
    assert len(found) == copies
    assert pixels(found) == pixels(want)


def test_the_index_has_no_effect_on_torch_seeds(tiny_model):
    config = config_of(seed_mode="torch")
    zero, five = generate(
        tiny_model, [Sample(prompt=CUBE, seed=3, index=i) for i in (0, 5)], config
    )
    assert pixels([zero]) == pixels([five])


def test_images_per_prompt_have_the_noise_of_the_next_indices(tiny_model):
    request = Sample(prompt=CUBE, seed=3, index=4, num_images_per_prompt=3)
    singles = [Sample(prompt=CUBE, seed=3, index=i) for i in (4, 5, 6)]
    assert pixels(generate(tiny_model, request, config_of())) == pixels(
        generate(tiny_model, singles, config_of())
    )


@pytest.mark.parametrize("name", ["Euler", "euler a", "DPM++ 2M Karras", "PLMS"])
def test_a_scheduler_equals_the_pipelines_own_of_that_class(make_model, name):
    model = make_model()
    own = model.pipeline.scheduler
    found = generate(model, CUBE, config_of(scheduler=name, seed_mode="torch"), seed=1)
    assert model.pipeline.scheduler is own
    aliases = {alias.lower(): entry for alias, entry in SAMPLERS.items()}
    kind, settings = aliases.get(name.lower(), (name, {}))
    model.pipeline.scheduler = getattr(diffusers, kind).from_config(own.config, **settings)
    assert pixels(found) == pixels(bare(model.pipeline, generator=torch.manual_seed(1)))
    model.pipeline.scheduler = own
    if name != "Euler":  # Euler's method on this model is DDIM
        assert pixels(found) != pixels(generate(model, CUBE, config_of(seed_mode="torch"), seed=1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of KDPM2 in diffusers
def test_every_sampler_name_is_built_and_found_again(tiny_model):
    own = tiny_model.pipeline.scheduler
    for name in SAMPLERS:
        assert sampler_name(build_scheduler(own, name)) == name
    for kind in own.compatibles:
        if kind.__name__ != "DPMSolverSDEScheduler":  # needs torchsde
            assert type(build_scheduler(own, kind.__name__)) is kind


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("DDIMSchedular", "Did you mean 'DDIMScheduler'"),
        ("FlowMatchEulerDiscreteScheduler", "no scheduler that fits the model's DDIMScheduler"),
        ("Unet2DModel", "no scheduler that fits"),
    ],
)
def test_a_scheduler_that_does_not_fit_is_refused(tiny_model, name, says):
    own = tiny_model.pipeline.scheduler
    with pytest.raises(UnknownNameError, match=says):
        generate(tiny_model, CUBE, config_of(scheduler=name))
    assert tiny_model.pipeline.scheduler is own


@pytest.mark.parametrize("guards", [(), ("sld",), ("judge",)])
def test_a_size_is_that_of_the_images_also_of_withheld_ones(tiny_model, guards):
    known = {
        "sld": make_guard("sld", "max", text="a red cube"),
        "judge": make_guard("judge-filter", judge="mini", threshold=0.2, action="refuse"),
    }
    loaded = stack_of(tiny_model, *(known[g] for g in guards))
    config = config_of(width=48, height=24)
    found = loaded.generate([Sample(prompt=CUBE, seed=1)], config)
    assert loaded.display_image(found[0], config).size == (48, 24)
    assert loaded.black(config).size == (48, 24)
    if not guards:
        want = bare(tiny_model.pipeline, width=48, height=24, generator=torch.manual_seed(1))
        (same,) = generate(
            tiny_model, CUBE, config_of(width=48, height=24, seed_mode="torch"), seed=1
        )
        assert pixels([same]) == pixels(want)


def test_one_side_alone_keeps_the_models_other_side(tiny_model):
    assert generate(tiny_model, CUBE, config_of(height=40))[0].size == (32, 40)


def test_an_image_to_start_from_is_fitted_into_the_size(tiny_model, tmp_path):
    Image.effect_noise((64, 64), 90).convert("RGB").save(tmp_path / "0.png")
    start = Start.of(tmp_path, image="0.png", strength=0.9)
    (found,) = generate(
        tiny_model, Sample(prompt=CUBE, seed=1, start=start), config_of(width=40, height=48)
    )
    assert found.size == (40, 48)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"width": 100},
            "width must be a multiple of 8 on the model 'tiny', got 100. Use 96 or 104",
        ),
        ({"height": 5000}, "height must be less than or equal to 4096, got 5000"),
        ({"width": 0}, "width must be greater than or equal to 8, got 0"),
        ({"seed_mode": "cuda"}, "seed_mode must be 'safegen' or 'torch', got 'cuda'"),
        ({"step": 4}, "no setting named 'step'. Did you mean 'num_inference_steps'?"),
        ({"scheduler": "PNDMScheduler"}, "num_inference_steps must be a number that a PNDMSch"),
    ],
)
def test_a_setting_that_does_not_fit_is_refused_in_one_line(tiny_model, settings, says):
    with pytest.raises(ConfigError) as caught:
        generate(tiny_model, CUBE, config_of(**settings))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_nearest_name_of_a_setting_is_suggested():
    with pytest.raises(ConfigError, match="Did you mean 'width'"):
        GenerationConfig(widht=64)
    with pytest.raises(ConfigError, match="Did you mean 'seed'"):
        Sample(prompt="a", sed=1)


def test_settings_within_a_document_keep_their_path():
    with pytest.raises(ValidationError) as caught:
        Protocol.model_validate({"generation": {"steps": 4}})
    assert ("generation", "steps") in [error["loc"] for error in caught.value.errors()]


def test_what_a_request_leaves_unset_is_not_hashed():
    names = {"num_inference_steps", "guidance_scale", "batch_size", "precision"}
    assert set(GenerationConfig().model_dump(mode="json")) == names
    asked = GenerationConfig(width=64, seed_mode="torch", scheduler="DDIM")
    assert set(asked.model_dump()) == names | {"width", "seed_mode", "scheduler"}
    assert GenerationConfig.model_validate_json(asked.model_dump_json()) == asked


def test_an_attack_keeps_the_models_size_scheduler_and_noise(tiny_model, cubes):
    asked = GenerationConfig(width=64, seed_mode="torch")
    with pytest.raises(ConfigError, match="seed_mode, width must not be set in an attack"):
        Target(stack_of(tiny_model), cubes, None, asked)
    Target(stack_of(tiny_model), cubes, None, GenerationConfig(true_cfg_scale=3.0))


def test_a_negative_prompt_is_that_of_its_request(tiny_model):
    samples = [
        Sample(prompt=CUBE, seed=1),
        Sample(prompt=CUBE, seed=1, negative_prompt="a tree"),
        Sample(prompt=CUBE, seed=1, negative_prompt="a ball"),
    ]
    found = generate(tiny_model, samples, config_of(seed_mode="torch"))
    for sample, image in zip(samples, found, strict=True):
        (want,) = bare(
            tiny_model.pipeline,
            negative_prompt=sample.negative_prompt,
            generator=torch.manual_seed(1),
        )
        assert abs(np.asarray(image).astype(int) - np.asarray(want)).max() <= 1
    with pytest.raises(ConfigError, match="guidance_scale must be > 1 with a negative prompt"):
        generate(tiny_model, samples[1:], config_of(guidance_scale=1.0))


def test_a_stacks_negative_prompt_stands_before_that_of_a_request(tiny_model):
    assert join_negative("a tree", "a ball") == "a tree, a ball"
    assert join_negative(None, None) is None
    assert join_negative("", None) == join_negative(None, "") == ""
    sample = Sample(prompt=CUBE, seed=1, negative_prompt="a ball")
    loaded = stack_of(tiny_model, negative_prompt="a tree")
    both = Sample(prompt=CUBE, seed=1, negative_prompt="a tree, a ball")
    assert pixels(loaded.generate_images([sample], config_of())) == pixels(
        generate(tiny_model, both, config_of())
    )


def test_a_requests_negative_prompt_takes_nothing_from_a_guard(tiny_model):
    """The guard's text is read in full beside it; one that would undo a guard is refused."""
    guard = make_guard("negative-prompt", text="a cone")
    asked = Sample(prompt=CUBE, seed=1, negative_prompt="a ball")
    found = stack_of(tiny_model, guard).generate([asked], config_of())
    joined = Sample(prompt=CUBE, seed=1, negative_prompt="a ball, a cone")
    (want,) = generate(tiny_model, joined, config_of())
    assert found[0].trace.action == "edit"
    assert abs(np.asarray(found[0].image).astype(int) - np.asarray(want)).max() <= 1
    long = Sample(prompt=CUBE, seed=1, negative_prompt="a ball " * 40)
    with pytest.raises(ConfigError, match="must have at most"):
        stack_of(tiny_model, guard).generate([long], config_of())
    sld = make_guard("sld", "max", text="a red cube")
    undone = Sample(prompt=CUBE, seed=1, negative_prompt="a red cube")
    with pytest.raises(ConfigError, match="'sld' would have no effect"):
        stack_of(tiny_model, sld).generate([undone], config_of())


@pytest.mark.parametrize("guards", [(), (make_guard("sld", "max", text="a red cube"),)])
def test_a_callback_gets_the_part_that_is_done_and_may_stop_it(tiny_model, guards):
    loaded = stack_of(tiny_model, *guards)
    samples = [Sample(prompt=CUBE, seed=i) for i in range(3)]
    config, seen = config_of(batch_size=2), []
    found = loaded.generate(samples, config, callback=seen.append)
    assert seen == [0.25, 0.5, 0.5, 0.75, 1.0, 1.0]
    plain = loaded.generate(samples, config)
    assert pixels(o.image for o in found) == pixels(o.image for o in plain)

    def stop(share):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loaded.generate(samples, config, callback=stop)
    assert not tiny_model.denoiser._forward_hooks
    assert "step" not in vars(tiny_model.pipeline.scheduler)


def test_prompts_are_text_or_samples_one_or_several(tiny_model):
    config = config_of()
    (one,) = safegen.generate(tiny_model, CUBE, config)
    two = safegen.generate(tiny_model, [CUBE, "a blue ball"], config, seed=0)
    mixed = safegen.generate(
        tiny_model,
        [Sample(prompt=CUBE, seed=0), Sample(prompt="a blue ball", seed=0, index=1)],
        config,
    )
    assert pixels(two) == pixels(mixed)
    assert abs(np.asarray(one).astype(int) - np.asarray(two[0])).max() <= 1
    with pytest.raises(ConfigError, match="prompts must be text or samples, got int"):
        safegen.generate(tiny_model, [1], config)
