"""ShieldDiff on every family: one update of each algorithm, and the laws that predictions share."""

from __future__ import annotations

import zlib
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from sampling import build_policy, draws
from torch.testing import assert_close
from toy import BENIGN

from safegen.core.errors import ConfigError
from safegen.edits.rl.algorithm import RolloutBatch
from safegen.edits.rl.draft import DRaFT
from safegen.edits.rl.forward import draw_pairs
from safegen.edits.rl.nft import NFT, two_sided_loss
from safegen.edits.rl.v_grpo import VGRPO
from safegen.edits.shielddiff import ShieldDiff
from safegen.judges.base import Detection, Detections
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from tests.tiny import FAMILIES, build_model

tiny = lru_cache(build_model)
NAMES = ("block.attn2.to_v.weight", "block.attn2.to_out.weight")
PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")
FLOW = ("sd3", "sd35", "flux", "flux-schnell")
ALGORITHMS = {
    "ddpo": {},
    "draft": {},
    "grpo_window": {"algorithm": {"name": "grpo_window", "window": 1}},
    "nft": {},
    "v_grpo": {},
}
QUICK = {
    ("nft", "sd35"),
    ("nft", "flux"),
    ("nft", "sdxl"),
    ("v_grpo", "sd3"),
    ("draft", "flux-schnell"),
    ("ddpo", "sdxl-v"),
    ("grpo_window", "sd2-v"),
}
"""Cells that are checked in every run; the others are slow tests."""


class RedJudge:
    """Detector of red, with a gradient."""

    id, label_space, labels, threshold = "red", ("red",), ("red",), 0.5

    def score(self, pixels):
        return torch.sigmoid(20 * (pixels[:, 0] - pixels[:, 2]).mean((1, 2)))

    def detect(self, images):
        stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        scores = self.score(stacked.permute(0, 3, 1, 2) / 127.5 - 1).tolist()
        return [Detections((Detection("red", score),)) for score in scores]


class ThumbnailExtractor:
    """Features with a gradient: 4 x 4 pixels, and a fixed vector for each caption."""

    id, width = "thumbnail", 48

    def embed(self, pixels):
        return torch.nn.functional.adaptive_avg_pool2d(pixels, 4).flatten(1)

    def features(self, images):
        stacked = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
        return self.embed(stacked.permute(0, 3, 1, 2) / 127.5 - 1).double().numpy()

    def texts(self, texts):
        seeds = [zlib.crc32(text.encode()) for text in texts]
        return np.stack([np.random.default_rng(seed).normal(size=48) for seed in seeds])


def build_judge(*, labels=(), threshold=0.5):
    return RedJudge()


def build_extractor(*, weights=None, device="cpu"):
    return ThumbnailExtractor()


@pytest.fixture
def build_edit(monkeypatch, tmp_path):
    """Return a builder of an edit with one update of four images, by the name of its algorithm."""
    from safegen.core import registry

    monkeypatch.setitem(registry.JUDGES, "red", f"{__name__}:build_judge")
    monkeypatch.setitem(registry.EXTRACTORS, "thumbnail", f"{__name__}:build_extractor")
    files = tmp_path / "concept.txt", tmp_path / "benign.txt"
    for path, text in zip(files, ("a red cube", "a green cone"), strict=True):
        path.write_text(text)

    def build(algorithm, **changes):
        settings = {
            "erase": ("red cube",),
            "prompts": (str(files[0]),),
            "captions": (str(files[1]),),
            "judge": "red",
            "extractor": "thumbnail",
            "algorithm": algorithm,
            "groups": 2,
            "group": 2,
            "steps": 2,
            "guidance": 3.0,
            "selector": "attn1",
            "rank": None,
        }
        settings |= ALGORITHMS[algorithm] | changes
        accumulation = 2 if algorithm == "ddpo" else 1
        training = {"updates": 1, "batch": 4, "accumulation": accumulation, "lr": 1e-3, "ema": 0.0}
        return ShieldDiff(**settings, training=training | {"precision": "fp32"})

    return build


# ------------------------------------------------------------ one update


def cells(families):
    return [
        pytest.param(name, family, marks=() if (name, family) in QUICK else pytest.mark.slow)
        for name in ALGORITHMS
        for family in families
        if not (name in ("ddpo", "grpo_window") and family in FLOW)
    ]


@pytest.mark.parametrize(("algorithm", "family"), cells(FAMILIES))
def test_one_update_changes_predictions_and_leaves_the_model(algorithm, family, build_edit):
    model, rows = tiny(family), []
    edit = build_edit(algorithm)
    before = model.hash_denoiser()
    patch = edit.apply(model, callback=lambda done, total, row: rows.append(row))
    assert model.hash_denoiser() == before
    assert set(patch.tensors) == set(select_parameters(model.denoiser, "attn1"))
    assert all(bool(value.isfinite().all()) for value in patch.tensors.values())
    (row,) = rows
    assert row["masked"] == 0
    assert row["norm"] > 0  # of the gradient
    x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(1))
    t, text = model.noise_schedule.timesteps[[700]], model.encode_text(["a red cube"])
    with torch.no_grad():
        plain, edited = (predict(model.denoiser, x, t, text, w) for w in (None, patch.tensors))
    assert (plain - edited).abs().max() > 1e-5


@pytest.mark.parametrize("family", ["sd3", "flux"])
@pytest.mark.parametrize("algorithm", ["ddpo", "grpo_window"])
def test_algorithms_on_noisy_steps_refuse_flow_matching(algorithm, family, build_edit):
    with pytest.raises(ConfigError, match=r"flow_prediction.* Set algorithm to nft, v_grpo") as e:
        build_edit(algorithm).apply(tiny(family))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("algorithm", ["nft", pytest.param("draft", marks=pytest.mark.slow)])
def test_a_lora_of_a_transformer_is_trained_by_reward(algorithm, build_edit):
    edit = build_edit(algorithm, rank=2, selector="attention")
    patch = edit.apply(tiny("sd35"))
    moved = [
        (value - tiny("sd35").denoiser.get_parameter(name)).norm()
        for name, value in patch.tensors.items()
    ]
    assert sum(bool(size > 0) for size in moved) > 0.9 * len(moved)


# ------------------------------------------------------------ laws of predictions


def policy_of(toy, prediction, **settings):
    return build_policy(toy(prediction, **settings), BENIGN, names=NAMES, steps=4)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_clean_latents_of_the_target_are_the_latents(toy, prediction):
    policy = policy_of(toy, prediction)
    generator = torch.Generator().manual_seed(1)
    z, eps = torch.randn(2, 5, 1, 8, 8, generator=generator)
    t = policy.schedule.timesteps[[0, 100, 500, 900, 990]]
    x = policy.schedule.add_noise(z, eps, t)
    assert_close(policy.x0(policy.truth(eps, z, t), x, t), z, rtol=0, atol=2e-4)


@pytest.mark.parametrize("family", ["sd1", "sd2-v", "sdxl-v", "sd3", "flux"])
def test_drawn_timesteps_are_those_that_the_denoiser_reads(family):
    schedule = tiny(family).noise_schedule
    batch = RolloutBatch(*(torch.arange(6) for _ in range(2)), torch.zeros(6, 1, 2, 2), None)
    t = draw_pairs(batch, 4, schedule, torch.Generator().manual_seed(0), shared=False)["t"]
    assert t.dtype == schedule.timesteps.dtype
    assert torch.isin(t, schedule.timesteps).all()
    quarter = len(schedule) // 4
    for column, part in zip(t.T, schedule.timesteps.split(quarter), strict=True):
        assert torch.isin(column, part).all()


def test_nft_has_one_loss_and_gradient_for_all_predictions_of_equal_clean_latents(toy):
    """Takes images without spread, so that x0 is their mean at every timestep."""
    generator, results = torch.Generator().manual_seed(1), []
    latents = torch.randn(8, 1, 8, 8, generator=generator)
    advantages = torch.randn(8, generator=generator)
    for prediction in PREDICTIONS:
        policy = policy_of(toy, prediction, spread=0.0)
        net, index = policy.model.denoiser, torch.arange(4).repeat_interleave(2)
        algorithm = NFT(beta=0.7, pairs=2).build(policy, 4, 2, updates=1)
        batch = RolloutBatch(index, index, latents, advantages)
        algorithm.prepare(net, batch, 8, torch.Generator().manual_seed(3))
        with torch.no_grad():
            net.block.attn2.to_out.weight.mul_(0.8)  # the old weights stay
        loss = algorithm.loss(net, batch, 0).policy
        loss.mean().backward()
        results.append((loss.detach(), net.block.attn2.to_out.weight.grad.clone()))
        text = policy.text[index].hidden[:, 0]
        mean = net.block.attn2.to_out(net.block.attn2.to_v(text)).view(-1, 1, 8, 8).detach()
        scales = {"beta": 0.7, "max_advantage": 5.0}
        want = two_sided_loss(mean - latents, mean / 0.8 - latents, advantages, **scales)
        assert_close(results[-1][0], want, rtol=2e-3, atol=2e-3)
    for loss, gradient in results[1:]:
        assert_close(loss, results[0][0], rtol=2e-3, atol=2e-3)
        assert_close(gradient, results[0][1], rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("settings", [NFT(), VGRPO(), DRaFT()], ids=lambda s: s.name)
def test_rollouts_of_flow_are_euler_steps_of_its_ode(toy, settings):
    """x' = x + (s' - s) v with v the prediction, from s = 1 to s = 0."""
    policy = policy_of(toy, "flow_prediction")
    algorithm = settings.build(policy, 4, 2, updates=1)
    net, text = policy.model.denoiser, policy.text[:2]
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    found, _ = algorithm.rollout(net, noise, text, draws(len(noise)))
    sigmas, x = policy.sampler.scheduler.sigmas, noise
    assert sigmas[0] == 1
    assert sigmas[-1] == 0
    for s, s_next in pairwise(sigmas):
        with torch.no_grad():
            v = predict(net, x, (1000 * s).expand(2), text)
        x = x + (s_next - s) * v
    assert_close(found, x, rtol=1e-4, atol=1e-4)
