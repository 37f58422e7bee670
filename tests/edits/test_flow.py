"""Parts of the edits on other families: flow matching, two encoders, transformers."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from safegen.core.errors import ConfigError, UnusedSettingWarning
from safegen.data.triplets.triplets import Triplets
from safegen.edits.duo import DUO, DUOObjective
from safegen.edits.functional.adversary import InversionAdversary, build_adversary
from safegen.edits.functional.gradients import detach_start_token
from safegen.edits.functional.rollout import Rollout, frozen_predictor
from safegen.edits.functional.text_search import fast_gradient_text
from safegen.edits.safegen import SafeGen, SafeGenObjective
from safegen.edits.training.samples import encode_triplets
from safegen.models.families.denoisers import pack_latents, predict, unpack_latents
from safegen.models.families.pipeline_specs import LENGTH_OPTION, call_defaults, guidance_option
from safegen.models.selectors import select_parameters
from tests.tiny import PROMPTS, build_model

FLOW = ("sd3", "sd35", "flux", "flux-schnell")
tiny = lru_cache(build_model)
"""Models that no test changes."""
BRIEF = {"updates": 1, "batch": 1, "accumulation": 1, "lr": 1e-2, "warmup": 0, "decay": "constant"}
PLAIN = {"captions": (), "adversary": 0.0, "flip": False}


@pytest.fixture(scope="module")
def two(triplets):
    return Triplets(triplets.folder, triplets.rows[:2])


def draw(model, count, n=2):
    """Return `count` latents of `n` samples."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, *model.latent_shape, generator=g) for _ in range(count)]


def guided(predictor, x, t, text, negative, scale=3.0):
    """Return a prediction with guidance, which FLUX.1-dev reads in place of a negative prompt."""
    if "guidance" in text.added:
        return predictor(x, t, text.replace_guidance(scale))
    cond, uncond = predictor(x, t, text), predictor(x, t, negative)
    return uncond + scale * (cond - uncond)


# ------------------------------------------------------------ rollouts


@pytest.mark.parametrize("family", FLOW)
def test_a_rollout_gives_the_latents_of_the_pipeline(family):
    """FLUX spaces the noise levels itself, and shifts them by the size of the image."""
    model = tiny(family)
    rollout, (start,) = Rollout(model, steps=4, guidance=3.0), draw(model, 1, n=1)
    is_packed = "flux" in family
    defaults = call_defaults(model.pipeline)
    options = {k: defaults[k] for k in (LENGTH_OPTION,) if k in defaults}
    text, predictor = model.encode_text(PROMPTS[:1]), frozen_predictor(model.denoiser)
    reads_guidance = "guidance" in text.added
    options |= (
        {"guidance_scale": 3.0}
        if reads_guidance
        else {guidance_option(model.pipeline): 3.0, "negative_prompt": ""}
    )
    made = model.pipeline(
        PROMPTS[0],
        latents=pack_latents(start) if is_packed else start.clone(),
        num_inference_steps=4,
        output_type="latent",
        **options,
    ).images
    assert_close(
        rollout.sample_until(4, start, text, predictor),
        unpack_latents(made, start.shape) if is_packed else made,
        rtol=1e-4,
        atol=1e-4,
    )


@pytest.mark.parametrize("family", FLOW)
def test_a_rollout_from_the_middle_takes_euler_steps_at_its_own_noise_levels(family):
    model = tiny(family)
    rollout, (x,) = Rollout(model, steps=5, guidance=1.0), draw(model, 1)
    text, predictor = model.encode_text(PROMPTS[:2]), frozen_predictor(model.denoiser)
    sigmas = [*(rollout.timesteps / 1000).tolist(), 0.0]
    assert sigmas[0] == 1
    whole = [x]
    for sigma, after in pairwise(sigmas):
        t = torch.full((2,), 1000 * sigma)
        prediction = predictor(whole[-1], t, text.replace_guidance(1.0))
        whole.append(whole[-1] + (after - sigma) * prediction)
    rows = rollout.trajectory(x, text, predictor, {})
    for k in (0, 2, 4):
        part = rollout.denoise(rollout.timesteps[k:], whole[k], text, predictor)
        assert_close(part, whole[-1], rtol=1e-4, atol=1e-4)
        assert_close(rollout.sample_until(k, x, text, predictor), whole[k], rtol=1e-4, atol=1e-4)
    assert rows["x"].shape == (2, 5, *model.latent_shape)
    assert_close(rows["x"][:, 0], x)


@pytest.mark.parametrize("family", ["sd35", "flux"])
@pytest.mark.parametrize(("strength", "num_steps"), [(0.25, 1), (0.5, 2), (1.0, 4)])
def test_a_twin_of_duo_is_noised_to_the_first_step_that_it_is_denoised_from(
    two, family, strength, num_steps
):
    model = tiny(family)
    settings = {"erase": ("red mark",), "anchors": ("a plain wall",), "steps": 4, "guidance": 3.0}
    edit = DUO(**settings, strength=strength)
    objective = DUOObjective(edit, model, two, select_parameters(model.denoiser, "attn1"))
    z = encode_triplets(model, two, flip=False)[0, 0]
    seed = edit.training.seed * 1_000_003
    eps = torch.randn(z.shape, generator=torch.Generator().manual_seed(seed))
    timesteps = Rollout(model, steps=4, guidance=3.0).timesteps[-num_steps:]
    sigmas = [*(timesteps / 1000).tolist(), 0.0]
    prompt, negative = (model.encode_text([text] * 2) for text in ("a plain wall", "red mark"))
    x, predictor = (1 - sigmas[0]) * z + sigmas[0] * eps, frozen_predictor(model.denoiser)
    for sigma, after in pairwise(sigmas):
        t = torch.full((2,), 1000 * sigma)
        x = x + (after - sigma) * guided(predictor, x, t, prompt, negative)
    assert_close(objective.safe, x, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------ losses


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("anchor", ["noise", "teacher"])
def test_losses_of_safegen_on_flow_matching_are_written_out(two, family, anchor):
    """x = (1 - s) z + s eps; a velocity moves by (z_u - z_c) / s, at most 3 times."""
    model = build_model(family)
    edit = SafeGen(target={"name": "x0", "anchor": anchor}, teacher=False, **PLAIN)
    names = select_parameters(model.denoiser, "attn1")
    objective = SafeGenObjective(edit, model, two, names)
    z_u, z_c, z_b, eps, eps_b = draw(model, 5)
    t, text = model.noise_schedule.timesteps[[150, 900]], model.encode_text(["", "", "", "cone"])
    with torch.no_grad():
        s = (t / 1000)[:, None, None, None]
        x_u, x_b = (1 - s) * z_u + s * eps, (1 - s) * z_b + s * eps_b
        prediction = eps - z_u if anchor == "noise" else predict(model.denoiser, x_u, t, text[:2])
        want = prediction + (1 / s).clamp(max=3) * (z_u - z_c)
        for name in names:
            model.denoiser.get_parameter(name).mul_(1.5)
        found = objective.compare(model.denoiser, z_u, z_c, z_b, eps, eps_b, t, text)
        unsafe, benign = (
            predict(model.denoiser, x, t, rows) for x, rows in ((x_u, text[:2]), (x_b, text[2:]))
        )
    assert_close(found["L_m"], (unsafe - want).pow(2).mean((1, 2, 3)), rtol=1e-4, atol=1e-5)
    target = eps_b - z_b
    assert_close(found["L_p"], (benign - target).pow(2).mean((1, 2, 3)), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------ adversaries

QUICK = {("one-step", "sdxl"), ("adv-unlearn", "flux"), ("closed-form", "sd35")}
"""Pairs that are trained in every run; the others are slow tests."""


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_one_gradient_step_moves_token_and_pooled_embeddings_by_their_own_norms(family):
    model = tiny(family)
    x, want = draw(model, 2)
    t, text = model.noise_schedule.timesteps[[200, 700]], model.encode_text(PROMPTS[:2])
    worse = fast_gradient_text(model.denoiser, x, t, text, want, radius=0.01)
    for after, before in ((worse.hidden, text.hidden), (worse.pooled, text.pooled)):
        moved, norm = (v.flatten(1).norm(dim=1) for v in (after - before, before))
        assert_close(moved, 0.01 * norm, rtol=1e-3, atol=0)
    with torch.no_grad():
        now, then = (
            (predict(model.denoiser, x, t, c) - want).pow(2).mean((1, 2, 3)) for c in (worse, text)
        )
    assert (now > then).all()
    assert worse.added == text.added


@pytest.mark.parametrize(
    ("adversary", "family"),
    [
        pytest.param(name, family, marks=() if (name, family) in QUICK else pytest.mark.slow)
        for name in ("one-step", "adv-unlearn", "closed-form")
        for family in ("sdxl", "sd35", "flux")
    ],
)
def test_adversaries_train_on_every_family(two, tmp_path, family, adversary):
    (tmp_path / "calm.txt").write_text("a blue ball")
    model, steps = tiny(family), {"steps": 1} if adversary == "adv-unlearn" else {}
    settings = {
        **PLAIN,
        "captions": (str(tmp_path / "calm.txt"),),
        "caption_share": 1.0,
        "selector": "kv2" if family == "sdxl" else "context",
        "training": BRIEF,
    }
    plain = SafeGen(**settings).apply(model, two)
    found = SafeGen(**settings | {"adversary": {"name": adversary, **steps}}).apply(model, two)
    assert found.tensors.keys() == plain.tensors.keys()
    assert found.hash != plain.hash


def test_the_blank_text_of_sdxl_is_not_moved(two):
    """A step relative to embeddings of zeros is zero."""
    model = tiny("sdxl")
    names = select_parameters(model.denoiser, "attn1")
    with pytest.warns(UnusedSettingWarning, match="adversary has no effect without captions on a"):
        SafeGenObjective(SafeGen(**PLAIN | {"adversary": 0.25}), model, two, names)
    x, want = draw(model, 2)
    t, text = model.noise_schedule.timesteps[[200, 700]], model.encode_text([""] * 2)
    found = fast_gradient_text(model.denoiser, x, t, text, want, radius=0.25)
    assert not text.hidden.any()
    assert torch.equal(found.hidden, text.hidden)
    assert torch.equal(found.pooled, text.pooled)


@pytest.mark.parametrize("family", ["sdxl", "sd3", "sd35", "flux"])
def test_a_learned_word_needs_a_single_text_encoder(family):
    with pytest.raises(
        ConfigError, match="inversion needs a model with one text encoder"
    ) as caught:
        build_adversary(InversionAdversary(), tiny(family), ())
    assert "\n" not in str(caught.value)
    assert build_adversary(InversionAdversary(), tiny("sd2-v"), ())


# ------------------------------------------------------------ gradients and the loop


@pytest.mark.parametrize("family", ["sd35", "flux"])
def test_the_start_token_is_detached_where_there_is_one(family):
    """FLUX reads the tokens of T5, which has none."""
    model = build_model(family)
    (x,), t = draw(model, 1, n=1), model.noise_schedule.timesteps[[600]]
    text = model.encode_text(["red cube"])
    first = text.replace_hidden(text.hidden[:, :1])
    names = select_parameters(model.denoiser, "kv2")
    weights = [model.denoiser.get_parameter(n).requires_grad_() for n in names]
    norms, predictions = [], []
    for given in (text, first):
        with detach_start_token(model.denoiser):
            prediction = predict(model.denoiser, x, t, given)
        predictions.append(prediction.detach())
        gradients = torch.autograd.grad(prediction.pow(2).sum(), weights, allow_unused=True)
        norms.append(sum(float(g.norm()) for g in gradients if g is not None))
    with torch.no_grad():
        assert torch.equal(predictions[0], predict(model.denoiser, x, t, text))
    assert norms[0] > 0
    assert (norms[1] == 0) is (family == "sd35")


@pytest.mark.parametrize("family", ["sdxl", "sd35", "flux"])
def test_gradient_checkpointing_changes_nothing(two, family):
    model = tiny(family)
    patches = [
        SafeGen(**PLAIN, training=BRIEF | {"gradient_checkpointing": on}).apply(model, two)
        for on in (False, True)
    ]
    for name, value in patches[0].tensors.items():
        assert_close(patches[1].tensors[name], value, rtol=1e-3, atol=1e-4)
    assert not model.denoiser.is_gradient_checkpointing


@pytest.mark.parametrize(
    ("method", "family"),
    [
        ("safegen", "sd35"),
        ("safegen", "flux"),
        pytest.param("duo", "sdxl-v", marks=pytest.mark.slow),
        pytest.param("duo", "flux", marks=pytest.mark.slow),
    ],
)
def test_models_in_bf16_train(two, family, method):
    model = build_model(family)
    model.pipeline.to(torch.bfloat16)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    training = BRIEF | {"precision": "bf16"}
    words = {"erase": ("red mark",), "anchors": ("a plain wall",), "steps": 2}
    edit = SafeGen(**PLAIN, training=training) if method == "safegen" else None
    patch = (edit or DUO(**words, training=training)).apply(model, two)
    after = model.denoiser.state_dict()
    assert all(after[k].dtype == v.dtype and torch.equal(after[k], v) for k, v in before.items())
    assert all(v.dtype == torch.float32 for v in patch.tensors.values())
    assert any(not torch.equal(v, before[k].float()) for k, v in patch.tensors.items())
