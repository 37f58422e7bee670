"""SLD against diffusers' pipeline for it, and its formula in double precision."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from safegen.core.errors import ConfigError
from safegen.guards import make_guard
from safegen.guards.core.pipeline import GuardedPipeline
from safegen.guards.sld import SldConfig, safety_guidance

PROMPTS = ("a red cube on a white table", "a blue ball in the grass", "a green cone under a tree")
TEXT = "a red cube"
PUBLISHED = {
    "released-weak": "WEAK",
    "released": "MEDIUM",
    "released-strong": "STRONG",
    "released-max": "MAX",
}
LEAST_EFFECT = {
    "released-weak": (8e-5, 2e-3),
    "released": (1.5e-3, 3e-2),
    "released-strong": (7e-3, 2.5e-2),
    "released-max": (8e-2, 8e-2),
}
"""Least change of a pixel by the published pipeline, without and with a scaled warm-up."""
SMALL = {"height": 16, "width": 16, "num_frames": 1, "max_sequence_length": 16}


def arrays(outputs):
    return np.stack([np.asarray(o.image, dtype=np.float32) for o in outputs])


@pytest.fixture(scope="module")
def safe(tiny_model):
    """Return diffusers' pipeline of the paper, with the parts of the tiny model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from diffusers import StableDiffusionPipelineSafe

        parts = {k: v for k, v in tiny_model.pipeline.components.items() if k != "image_encoder"}
        out = StableDiffusionPipelineSafe(**parts, requires_safety_checker=False)
    out.safety_concept = TEXT
    out.set_progress_bar_config(disable=True)
    return out


@pytest.mark.parametrize("scale_warmup", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("preset", "negative"),
    [*((name, None) for name in PUBLISHED), ("released-max", "a green cone")],
)
def test_equals_the_published_pipeline(tiny_model, safe, generate, preset, negative, scale_warmup):
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    steps = 5 if scale_warmup else 17
    more = {} if negative is None else {"negative_prompt": [negative] * 2}
    config = getattr(SafetyConfig, PUBLISHED[preset])
    if scale_warmup:
        config = config | {"sld_warmup_steps": round(config["sld_warmup_steps"] / 10)}
    guard = make_guard("sld", preset, text=TEXT)
    if scale_warmup:
        guard = make_guard("sld", preset, text=TEXT, scale_warmup=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        theirs = safe(
            prompt=list(PROMPTS[1:]),
            num_inference_steps=steps,
            guidance_scale=5.0,
            output_type="np",
            **config,
            **more,
            generator=[torch.Generator().manual_seed(i) for i in range(2)],
        ).images
    ours = generate(tiny_model.pipeline, [guard], num_inference_steps=steps, **more)
    plain = generate(tiny_model.pipeline, num_inference_steps=steps, **more)
    effect, difference = np.abs(theirs - plain).max(), np.abs(arrays(ours) - theirs).max()
    assert effect > LEAST_EFFECT[preset][scale_warmup]
    assert difference <= min(1e-5, effect / 100)


def test_is_refused_if_the_negative_prompt_equals_its_text(tiny_model):
    guards = [make_guard("sld", "max", text=TEXT), make_guard("negative-prompt", text=f"{TEXT} ")]
    text = "'sld' would have no effect: the negative prompt equals its text. Change it"
    for order in (guards, guards[::-1]):
        with pytest.raises(ConfigError, match=text):
            GuardedPipeline(tiny_model.pipeline, order)
    with pytest.raises(ConfigError, match=text):
        GuardedPipeline(tiny_model.pipeline, guards[:1], negative_prompt=TEXT)
    GuardedPipeline(
        tiny_model.pipeline, guards, negative_prompt="a tree"
    )  # comes before the guard's text
    GuardedPipeline(tiny_model.pipeline, [guards[0], make_guard("negative-prompt", text="a cone")])
    GuardedPipeline(
        tiny_model.pipeline, [*guards, make_guard("negative-prompt", text="a cone")]
    )  # the joined text differs


def test_the_trace_reports_for_each_image_whether_it_was_steered(tiny_model, generate):
    guards = [make_guard("sld", "max", text=TEXT)]
    same_tokens = TEXT.replace(" ", "  ")  # an equal text is refused
    outputs = generate(tiny_model.pipeline, guards, negative_prompt=[same_tokens, ""])
    plain = generate(tiny_model.pipeline, negative_prompt=[same_tokens, ""])
    np.testing.assert_allclose(
        arrays(outputs)[0], plain[0], rtol=0, atol=1e-5
    )  # the negative prompt reads like the text: no correction
    assert not np.allclose(arrays(outputs)[1], plain[1], atol=1e-3)
    assert [(o.trace.action, o.trace.guards[0].scores["steps"] > 0) for o in outputs] == [
        ("none", False),
        ("edit", True),
    ]


@pytest.mark.parametrize(("apart", "steered"), [(0.0, False), (1e-6, False), (1e-2, True)])
def test_a_correction_as_small_as_rounding_is_not_reported(
    tiny_model, generate, monkeypatch, apart, steered
):
    """Predictions for equal texts of one batch may differ in their last bits."""
    import safegen.guards.sld as sld

    own = sld.safety_guidance
    monkeypatch.setattr(
        sld,
        "safety_guidance",
        lambda u, c, f, nu, **settings: own(u, c, u + apart * u.abs().amax(), nu, **settings),
    )
    (output,) = generate(tiny_model.pipeline, [make_guard("sld", "max", text=TEXT)], ["a red cube"])
    assert (output.trace.guards[0].scores["steps"] > 0) == steered


def test_presets_equal_the_published_numbers():
    from diffusers.pipelines.deprecated.stable_diffusion_safe import SafetyConfig

    for name, theirs in PUBLISHED.items():
        own = make_guard("sld", name)
        assert getattr(SafetyConfig, theirs) == {
            "sld_warmup_steps": own.warmup,
            "sld_guidance_scale": own.scale,
            "sld_threshold": own.threshold,
            "sld_momentum_scale": own.momentum_scale,
            "sld_mom_beta": own.momentum,
        }
        assert not own.scale_warmup
        if name != "released-weak":
            scaled = make_guard("sld", name.removeprefix("released-").replace("released", "medium"))
            assert scaled == make_guard("sld", name, scale_warmup=True)
    assert make_guard("sld") == make_guard("sld", "medium")
    assert make_guard("sld", "weak").scale == 200  # as in the model card; the code has 20


def test_the_default_text_equals_the_published_one():
    import inspect

    from diffusers import StableDiffusionPipelineSafe

    code = "".join(
        part.strip().strip('"')
        for part in inspect.getsource(StableDiffusionPipelineSafe.__init__).split("\n")
    )
    assert SldConfig().text.replace(" ", "") in code.replace(" ", "").replace('"', "")


def test_two_calls_per_step_equal_an_explicit_loop(tiny_wan, generate):
    from safegen.guards.core.adapter import PipelineAdapter

    guard, s, n = make_guard("sld", "strong", text=TEXT, warmup=20.0), 5.0, 5
    ours = generate(
        tiny_wan, [guard], num_inference_steps=n, guidance_scale=s, output_type="latent", **SMALL
    )

    adapter, scheduler = PipelineAdapter(tiny_wan), tiny_wan.scheduler
    c, u, f = (
        adapter.encode(texts, SMALL).hidden for texts in (list(PROMPTS[1:]), ["", ""], [TEXT, TEXT])
    )
    scheduler.set_timesteps(n)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    x, nu = (
        tiny_wan.prepare_latents(2, 16, 16, 16, 1, torch.float32, torch.device("cpu"), generators),
        torch.zeros(1),
    )
    with torch.no_grad():
        for i, t in enumerate(scheduler.timesteps):
            predictions = [
                tiny_wan.transformer(x, t.expand(2), text, return_dict=False)[0]
                for text in (u, c, f)
            ]
            gamma, nu = safety_guidance(
                *predictions, nu, scale=2000, threshold=0.025, momentum_scale=0.5, momentum=0.7
            )
            e = predictions[0] + s * (predictions[1] - predictions[0] - (gamma if i >= 2 else 0))
            x = scheduler.step(e, t, x, return_dict=False)[0]
    theirs = x.numpy()
    assert np.abs(arrays(ours) - theirs).max() < 1e-4
    assert (
        np.abs(
            generate(tiny_wan, num_inference_steps=n, output_type="latent", **SMALL).numpy()
            - theirs
        ).max()
        > 1e-2
    )


@pytest.mark.parametrize("family", ["sd", "xl", "wan"])
def test_changes_images_of_every_pipeline_class_but_not_for_its_own_text(
    family, tiny_model, tiny_xl, tiny_wan, generate
):
    pipe = {"sd": tiny_model.pipeline, "xl": tiny_xl, "wan": tiny_wan}[family]
    options = SMALL if family == "wan" else {}
    guarded = arrays(generate(pipe, [make_guard("sld", "max", text=TEXT)], **options))
    assert np.isfinite(guarded).all()
    assert np.abs(guarded - generate(pipe, **options)).max() > 1e-3
    # f = c: the gate is min(s_S * 0, 1) = 0, and the correction is zero
    same = generate(pipe, [make_guard("sld", "max", text=TEXT)], [TEXT], **options)
    assert np.abs(arrays(same) - generate(pipe, None, [TEXT], **options)).max() < 1e-3


def test_a_prediction_that_gets_lost_withholds(tiny_model, generate, monkeypatch):
    from safegen.guards.core.hooks import PipelineHooks

    monkeypatch.setattr(PipelineHooks, "_extra_conditions", lambda *_: [])
    outputs = generate(tiny_model.pipeline, [make_guard("sld", "max", text=TEXT)])
    assert [(o.image, o.trace.reason) for o in outputs] == [
        (None, "error: sld: the noise was not predicted for the safety text")
    ] * 2


def test_warmup_is_scaled_to_the_steps_of_the_run(tiny_model, generate):
    def acted(preset, n):
        record = generate(
            tiny_model.pipeline,
            [make_guard("sld", preset, text=TEXT)],
            ["x"],
            num_inference_steps=n,
        )[0].trace.guards[0]
        return record.scores["steps"], record.rows

    assert acted("max", 3) == (3, 3)
    assert acted("medium", 10) == (8, 10)  # momentum builds up from the first step on
    assert acted("weak", 10) == (
        7,
        7,
    )  # without momentum the warm-up adds no rows; unscaled it would never end


def test_a_warmup_as_long_as_the_run_is_refused_where_it_is_not_scaled(tiny_model, generate):
    def run(preset, steps):
        guard = make_guard("sld", preset, text=TEXT)
        return generate(tiny_model.pipeline, [guard], ["x"], num_inference_steps=steps)[0]

    assert run("released", 11).trace.guards[0].scores["steps"] == 1
    with pytest.raises(ConfigError, match="warmup of the guard 'sld' must be less than the run's"):
        run("released", 10)
    assert run("medium", 10).trace.guards[0].scores["steps"] == 8


def test_safety_guidance_equals_the_formula_element_by_element():
    rng = torch.Generator().manual_seed(0)
    u, c, f, nu = (torch.randn(2, 3, 4, generator=rng, dtype=torch.float64) for _ in range(4))
    gamma, new = safety_guidance(
        u, c, f, nu, scale=1.5, threshold=0.3, momentum_scale=0.3, momentum=0.4
    )
    for at in np.ndindex(2, 3, 4):
        d = float(c[at] - f[at])
        mu = min(1.5 * abs(d), 1.0) if d < 0.3 else 0.0
        want = mu * float(f[at] - u[at]) + 0.3 * float(nu[at])
        assert float(gamma[at]) == pytest.approx(want, abs=1e-12)
        assert float(new[at]) == pytest.approx(0.4 * float(nu[at]) + 0.6 * want, abs=1e-12)


def test_an_open_gate_equals_guidance_from_the_safety_text():
    """At max nearly every element passes: u + s (c - u - (f - u)) = u + s (c - f)."""
    u, c, f = torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).double()
    gamma, _ = safety_guidance(
        u, c, f, torch.zeros(5).double(), scale=1e9, threshold=1e9, momentum_scale=0.5, momentum=0.7
    )
    assert torch.allclose(c - u - gamma, c - f)


def test_a_text_longer_than_the_encoder_reads_is_refused(tiny_model):
    with pytest.raises(
        ConfigError, match=r"text of the guard 'sld' must have at most 32 tokens, got \d+"
    ):
        GuardedPipeline(tiny_model.pipeline, [SldConfig()])
