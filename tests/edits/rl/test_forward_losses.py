"""V-GRPO and DiffusionNFT: ratio, gradients, the old copy, and the draws."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from sampling import draws
from torch.testing import assert_close
from toy import BENIGN, EXPLICIT

from safegen.edits.rl.algorithm import DenoisingPolicy, RolloutBatch
from safegen.edits.rl.forward import stratified_timesteps
from safegen.edits.rl.nft import NFT, two_sided_loss
from safegen.edits.rl.v_grpo import VGRPO, clipped_surrogate, soft_clip
from safegen.models.selectors import select_parameters

NAMES = ("block.attn2.to_v.weight", "block.attn2.to_out.weight")
TEXTS = [*EXPLICIT, *BENIGN]
PREDICTIONS = ["epsilon", "v_prediction", "flow_prediction"]
ALGORITHMS = [VGRPO(), VGRPO(error="x0", weighting="uniform"), NFT(), NFT(beta=0.3)]
EACH = pytest.mark.parametrize("settings", ALGORITHMS, ids=lambda s: s.name)
BOTH = pytest.mark.parametrize("prediction", PREDICTIONS)


class Setup:
    """Toy, algorithm and a rollout of four groups of four images."""

    def __init__(self, model, settings, *, updates=1, has_distance=True, names=NAMES, texts=TEXTS):
        self.net = model.denoiser
        for name in names:
            self.net.get_parameter(name).requires_grad_(True)
        self.policy = DenoisingPolicy(
            model,
            names,
            texts,
            steps=4,
            guidance=1.0,
            scheduler="ddim",
            precision="fp32",
            has_distance=has_distance,
        )
        self.algorithm = settings.build(self.policy, 4, 4, updates=updates)
        generator = torch.Generator().manual_seed(5)
        groups = torch.arange(4).repeat_interleave(4)
        prompts = torch.tensor([0, 1, 4, 5])[groups]
        noise = torch.randn(16, *self.policy.sampler.shape, generator=generator)
        text = self.policy.text[prompts]
        latents, _ = self.algorithm.rollout(self.net, noise, text, draws(16, generator))
        advantages = torch.randn(16, generator=generator)
        self.batch = RolloutBatch(prompts, groups, latents, advantages)
        self.algorithm.prepare(self.net, self.batch, 4, generator)

    def parts(self):
        """Yield the rows of four batches of four."""
        yield from torch.arange(16).split(4)

    def gradient(self, rows=None, *, kl=0.0):
        """Return the gradient of the mean loss of some images."""
        self.net.zero_grad()
        batch = self.batch if rows is None else self.batch.rows(rows)
        terms = self.algorithm.loss(self.net, batch, 0)
        (terms.policy.mean() + kl * terms.kl.mean()).backward()
        return [self.net.get_parameter(name).grad.clone() for name in NAMES]

    def move(self, size=0.05):
        """Move the trained weights at random."""
        generator = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for name in NAMES:
                weight = self.net.get_parameter(name)
                weight += size * torch.randn(weight.shape, generator=generator)

    def errors(self):
        """Return the denoising error of each image on its draws."""
        plain = VGRPO(weighting="uniform").build(self.policy, 4, 4, updates=1)
        return plain.errors(self.net, self.batch, frozen=True)[0]


def levels(policy, t):
    """Return the share of the image and of the noise at timesteps, read off the scheduler."""
    scheduler = policy.model.pipeline.scheduler
    if policy.model.prediction == "flow_prediction":
        return 1 - t / 1000, t / 1000
    abar = scheduler.alphas_cumprod[t]
    return abar.sqrt(), (1 - abar).sqrt()


# ------------------------------------------------------------ error


@BOTH
@pytest.mark.parametrize("error", ["prediction", "x0"])
def test_the_true_prediction_has_no_error(toy, prediction, error):
    """It is eps, sqrt(a) eps - sqrt(1 - a) x0 for v-prediction, or eps - x0 for flow."""
    setup = Setup(toy(prediction), VGRPO(error=error, weighting="uniform"))
    z, extra = setup.batch.latents.repeat_interleave(4, 0), setup.batch.extra
    eps = extra["eps"].flatten(0, 1)
    a, s = (v.view(-1, 1, 1, 1) for v in levels(setup.policy, extra["t"].flatten()))
    truth = {"epsilon": eps, "v_prediction": a * eps - s * z, "flow_prediction": eps - z}[
        prediction
    ]
    assert setup.algorithm.errors(setup.net, setup.batch, frozen=True)[0].min() > 1e-3
    setup.policy.predict_frozen = lambda *_: truth
    found = setup.algorithm.errors(setup.net, setup.batch, frozen=True)[0]
    assert_close(found, torch.zeros(16), rtol=0, atol=1e-6)


# ------------------------------------------------------------ ratio and clip


@BOTH
@pytest.mark.parametrize("updates", [1, 2])
@pytest.mark.parametrize("error", ["prediction", "x0"])
def test_the_ratio_is_one_before_the_first_update(toy, prediction, updates, error):
    setup = Setup(toy(prediction), VGRPO(error=error), updates=updates)
    for rows in setup.parts():
        figures = setup.algorithm.loss(setup.net, setup.batch.rows(rows), 0).figures
        assert torch.equal(figures["ratio"], torch.ones(4))
        assert not figures["clipped"].any()


@pytest.mark.parametrize("prediction", PREDICTIONS[:2])
def test_the_ratio_is_one_on_a_unet_in_training_mode(make_model, prediction):
    model = make_model(prediction_type=prediction)
    names = select_parameters(model.denoiser, "attn2")
    model.denoiser.train()
    setup = Setup(model, VGRPO(), updates=2, names=names, texts=["a castle"] * 8)
    for rows in setup.parts():
        ratio = setup.algorithm.loss(setup.net, setup.batch.rows(rows), 0).figures["ratio"]
        assert_close(ratio, torch.ones(4), rtol=0, atol=1e-6)


def test_the_ratio_of_a_second_update_compares_with_the_losses_of_the_rollout(toy):
    setup = Setup(toy(), VGRPO(), updates=2)
    before = setup.algorithm.errors(setup.net, setup.batch, frozen=True)[0]
    setup.move()
    after = setup.algorithm.errors(setup.net, setup.batch, frozen=True)[0]
    ratio = setup.algorithm.loss(setup.net, setup.batch, 0).figures["ratio"]
    assert_close(ratio, (before - after).exp())
    assert (ratio - 1).abs().max() > 0.01


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_clipped"),
    [(1.3, 1.0, True), (1.3, -1.0, False), (0.7, -1.0, True), (0.7, 1.0, False), (1.1, 1.0, False)],
)
def test_the_clip_stops_the_gradient_of_a_change_that_was_rewarded(ratio, advantage, is_clipped):
    value = torch.tensor([ratio], requires_grad=True)
    loss, clipped = clipped_surrogate(value, torch.tensor([advantage]), 0.2)
    loss.sum().backward()
    assert value.grad.item() == (0 if is_clipped else pytest.approx(-advantage))
    assert bool(clipped) is is_clipped


def test_the_soft_clip_bounds_advantages_and_leaves_small_ones():
    values = torch.linspace(-20, 20, 81)
    clipped = soft_clip(values, 3.0)
    assert clipped.abs().max() <= 3
    assert (clipped.diff() >= 0).all()
    assert_close(soft_clip(torch.tensor([0.1]), 3.0), torch.tensor([0.1]), rtol=1e-3, atol=0)
    assert torch.equal(soft_clip(values, None), values)


# ------------------------------------------------------------ gradients


@EACH
@BOTH
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_an_update_makes_an_image_as_likely_as_its_advantage_says(
    toy, settings, prediction, advantage
):
    setup = Setup(toy(prediction), settings)
    setup.batch.advantages = torch.zeros(16).index_fill(0, torch.tensor([6]), advantage)
    before = setup.errors()
    gradient = setup.gradient()
    length = sum(g.pow(2).sum() for g in gradient).sqrt()
    with torch.no_grad():
        for name, g in zip(NAMES, gradient, strict=True):
            setup.net.get_parameter(name).sub_(1e-2 * g / length)
    assert advantage * (setup.errors() - before)[6] < 0


@EACH
def test_images_without_advantage_have_no_gradient(toy, settings):
    setup = Setup(toy(), settings)
    setup.batch.advantages = torch.zeros(16)
    for gradient in setup.gradient():
        assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)


@EACH
@BOTH
def test_four_batches_of_four_have_the_gradient_of_one_of_sixteen(toy, settings, prediction):
    setup = Setup(toy(prediction), settings, updates=2)
    setup.move()
    whole = setup.gradient(kl=0.3)
    parts = [setup.gradient(rows, kl=0.3) for rows in setup.parts()]
    for i, gradient in enumerate(whole):
        mean = sum(part[i] for part in parts) / 4
        assert_close(mean, gradient, rtol=1e-5, atol=1e-5 * float(gradient.abs().max()))


# ------------------------------------------------------------ DiffusionNFT


def restated_nft(setup, prediction, *, beta, limit):
    """Return the loss of the paper for each image, from the predictions, in float64."""
    policy, batch, nft = setup.policy, setup.batch, setup.algorithm
    losses = []
    for i in range(16):
        text, z = policy.text[batch.prompts[i : i + 1]], batch.latents[i].double()
        share = min(max(float(batch.advantages[i]) / limit, -1), 1) * 0.5 + 0.5
        values = []
        for t, eps in zip(batch.extra["t"][i], batch.extra["eps"][i].double(), strict=True):
            a, s = (value.double() for value in levels(policy, t))
            x = a * z + s * eps
            v, v_old = (
                policy.predict_frozen(setup.net, x[None].float(), t[None], text, tensors)[0]
                for tensors in (None, nft.old)
            )
            value = 0.0
            for weight, mixed in (
                (share, (1 - beta) * v_old + beta * v),
                (1 - share, (1 + beta) * v_old - beta * v),
            ):
                x0 = {
                    "epsilon": (x - s * mixed) / a,
                    "v_prediction": a * x - s * mixed,
                    "flow_prediction": x - s * mixed,
                }[prediction]
                value += weight * (x0 - z).pow(2).mean() / (x0 - z).abs().mean()
            values.append(value * limit / beta)
        losses.append(torch.stack(values).mean())
    return torch.stack(losses)


@BOTH
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_nft_has_the_loss_of_the_paper(toy, prediction, beta):
    setup = Setup(toy(prediction), NFT(beta=beta, max_advantage=2.0))
    setup.batch.advantages *= 2  # some beyond the limit
    setup.move()
    loss = setup.algorithm.loss(setup.net, setup.batch, 0).policy
    expected = restated_nft(setup, prediction, beta=beta, limit=2.0)
    assert_close(loss.double(), expected, rtol=1e-3, atol=1e-4)


def test_the_gradient_of_nft_at_the_old_weights_is_the_advantage_times_that_of_the_error():
    """d/de of A_max / b (p |(1-b) e_o + b e|^2 / w + (1-p) |(1+b) e_o - b e|^2 / w) at e = e_o.

    The terms are 2 p b e / w and -2 (1 - p) b e / w, over D elements; (2 p - 1) A_max = A.
    """
    generator = torch.Generator().manual_seed(1)
    old = torch.randn(5, 1, 8, 8, generator=generator, dtype=torch.float64)
    error = old.clone().requires_grad_(True)
    advantages = torch.tensor([-9.0, -1.0, 0.0, 2.0, 7.0], dtype=torch.float64)
    two_sided_loss(error, old, advantages, beta=0.4, max_advantage=5.0).sum().backward()
    clipped = advantages.clamp(-5, 5).view(-1, 1, 1, 1)
    assert_close(error.grad, clipped * 2 * old / 64 / old.abs().mean((1, 2, 3), keepdim=True))


@BOTH
def test_the_first_gradient_of_nft_is_that_of_v_grpo_on_clean_latents(toy, prediction):
    nft = Setup(toy(prediction), NFT(beta=0.5))
    v_grpo = Setup(toy(prediction), VGRPO(error="x0", clip=None, soft_clip=None))
    v_grpo.batch = nft.batch
    for a, b in zip(nft.gradient(), v_grpo.gradient(), strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_the_loss_of_nft_does_not_depend_on_what_the_network_predicts(toy):
    losses = []
    for prediction in PREDICTIONS:
        setup = Setup(toy(prediction), NFT())
        setup.move()
        losses.append(setup.algorithm.loss(setup.net, setup.batch, 0).policy)
    assert_close(losses[0], losses[1], rtol=1e-3, atol=1e-4)


def test_an_image_without_advantage_holds_the_weights_near_the_old_ones(toy):
    setup = Setup(toy(), NFT())
    setup.batch.advantages = torch.zeros(16)
    before = setup.algorithm.loss(setup.net, setup.batch, 0)
    assert not before.figures["old_distance"].any()
    setup.move(0.5)
    after = setup.algorithm.loss(setup.net, setup.batch, 0)
    assert (after.policy > before.policy).all()
    assert (after.figures["old_distance"] > 0).all()


def test_the_old_weights_draw_the_images(toy):
    setup = Setup(toy(), NFT())
    noise, text = torch.randn(2, 1, 8, 8), setup.policy.text[:2]
    before, _ = setup.algorithm.rollout(setup.net, noise, text, draws(2))
    setup.move()
    after, _ = setup.algorithm.rollout(setup.net, noise, text, draws(2))
    assert torch.equal(before, after)


@pytest.mark.parametrize("updates", [1, 2])
def test_the_old_weights_follow_with_the_decay_of_the_paper_after_each_rollout(toy, updates):
    nft = NFT(decay_rate=0.1, max_decay=0.25)
    algorithm = Setup(toy(), nft, updates=updates).algorithm
    expected = {name: value.clone() for name, value in algorithm.old.items()}
    for step in range(1, 7):
        weights = {name: torch.full_like(v, float(step)) for name, v in expected.items()}
        figures = algorithm.after_update(weights)
        if step % updates == 0:
            decay = min(0.1 * step, 0.25)
            assert figures == {"old_decay": pytest.approx(decay)}
            expected = {k: decay * v + (1 - decay) * step for k, v in expected.items()}
        for name, value in algorithm.old.items():
            assert_close(value, expected[name])


# ------------------------------------------------------------ draws and passes


def test_timesteps_are_one_in_each_part_of_the_schedule():
    t = stratified_timesteps(500, 4, 1000, torch.Generator().manual_seed(0))
    assert torch.equal(t // 250, torch.arange(4).expand(500, 4))
    assert t.min() < 10
    assert t.max() > 990


def test_the_images_of_a_group_share_their_draws_in_v_grpo_only(toy):
    shared, own = Setup(toy(), VGRPO()).batch.extra, Setup(toy(), NFT()).batch.extra
    for name in ("t", "eps"):
        rows = shared[name].view(4, 4, -1)
        assert torch.equal(rows, rows[:, :1].expand_as(rows))
        assert len(rows[:, 0].unique(dim=0)) == 4
        assert len(own[name].flatten(1).unique(dim=0)) == 16


@EACH
def test_the_distance_costs_a_pass_only_where_it_has_a_weight(toy, settings):
    passes, distances = [], []
    for has_distance in (True, False):
        setup = Setup(toy(), settings, has_distance=has_distance)
        setup.move()
        before = setup.policy.passes
        distances.append(setup.algorithm.loss(setup.net, setup.batch, 0).kl)
        passes.append(setup.policy.passes - before)
    assert passes[0] - passes[1] == 16 * 4
    assert (distances[0] > 0).all()
    assert not distances[1].any()


# ------------------------------------------------------------ what limits the policy


@pytest.mark.parametrize("algorithm", [{"name": "nft"}, {"name": "v_grpo"}])
def test_an_edit_whose_policy_nothing_limits_is_refused(toy_edit, algorithm):
    for weights in ({"weight_keep": 0}, {"benign_share": 0, "allow_few_benign": True}):
        with pytest.raises(ValidationError, match="kl or weight_keep must be > 0"):
            toy_edit(algorithm, kl=0, **weights)
    assert toy_edit(algorithm, kl=0).has_distance


def test_a_clip_limits_the_policy_from_the_second_update_of_a_rollout(toy_edit):
    free = {"kl": 0, "weight_keep": 0, "training": {"batch": 64}}
    assert toy_edit("v_grpo", **free).updates_per_rollout == 2
    with pytest.raises(ValidationError, match="kl or weight_keep must be > 0"):
        toy_edit({"name": "v_grpo", "clip": None}, **free)
    with pytest.raises(ValidationError, match="kl or weight_keep must be > 0"):
        toy_edit("nft", **free)
