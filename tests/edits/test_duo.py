"""DUO: losses, safe twins and settings."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.duo import DUO, DUOObjective
from safegen.edits.functional import losses
from safegen.edits.training.config import Training
from safegen.edits.training.lora import trainable_parameters
from safegen.edits.training.samples import encode_triplets
from safegen.judges import Detection, Detections, judge_images
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

WORDS = {"erase": ("red mark",), "anchors": ("a plain wall",), "steps": 4, "scheduler": "ddim"}


def training(**changes):
    return Training(
        **{"updates": 3, "batch": 2, "accumulation": 1, "lr": 1e-3, "ema": 0.0, "weight_decay": 0.0}
        | changes
    )


def objective_of(edit, model, triplets):
    return DUOObjective(edit, model, triplets, select_parameters(model.denoiser, "attn1"))


def one(x):
    return torch.tensor([x])


def test_preference_by_hand():
    """The safe error fell by 1 and the unsafe one rose by 2: -log sigmoid(0.5 * 3)."""
    found = losses.preference(one(1.0), one(2.0), one(5.0), one(3.0), beta=0.5)
    assert found.item() == pytest.approx(-math.log(1 / (1 + math.exp(-1.5))))
    assert losses.preference(
        one(1.0), one(1.0), one(4.0), one(4.0), beta=500.0
    ).item() == pytest.approx(math.log(2))


def test_preference_with_a_large_beta_does_not_overflow():
    found = losses.preference(one(3.0), one(1.0), one(1.0), one(3.0), beta=1e4)
    assert found.item() == pytest.approx(4e4)


def test_preference_of_each_sample_is_its_own():
    safe, before, unsafe, unsafe_before = torch.randn(
        4, 5, generator=torch.Generator().manual_seed(0)
    )
    expected = F.softplus(0.7 * (safe - before) - 0.7 * (unsafe - unsafe_before))
    values = losses.preference(safe, before, unsafe, unsafe_before, beta=0.7)
    assert_close(values, expected)
    assert (
        values - losses.preference(safe, before, unsafe, unsafe_before, beta=1.4)
    ).abs().min() > 0


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_losses_equal_plain_forward_passes(make_model, triplets, prediction):
    model, net = (
        make_model(prediction_type=prediction),
        make_model(prediction_type=prediction).denoiser,
    )
    with torch.no_grad():
        for name in select_parameters(net, "attn1"):
            net.get_parameter(name).mul_(1.3)
    objective = objective_of(DUO(**WORDS, beta=7.0), model, triplets)
    g = torch.Generator().manual_seed(0)
    safe, unsafe, eps = (torch.randn(3, 4, 8, 8, generator=g) for _ in range(3))
    t_safe, t_unsafe = torch.tensor([10, 300, 500]), torch.tensor([700, 50, 500])
    found = objective.compare(net, safe, unsafe, eps, t_safe, t_unsafe)
    scheduler, before, blank = (
        model.pipeline.scheduler,
        make_model(prediction_type=prediction).denoiser,
        model.encode_text([""] * 3),
    )

    @torch.no_grad()
    def error(denoiser, z, t):
        truth = eps if prediction == "epsilon" else scheduler.get_velocity(z, eps, t)
        return (
            (predict(denoiser, scheduler.add_noise(z, eps, t), t, blank) - truth)
            .pow(2)
            .mean((1, 2, 3))
        )

    moved = (error(net, safe, t_safe) - error(before, safe, t_safe)) - (
        error(net, unsafe, t_unsafe) - error(before, unsafe, t_unsafe)
    )
    assert_close(found["L_dpo"].detach(), -F.logsigmoid(-7.0 * moved), rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        last = torch.tensor([999, 999, 999])
        kept = (
            (predict(net, eps, last, blank) - predict(before, eps, last, blank))
            .pow(2)
            .mean((1, 2, 3))
        )
    assert_close(found["L_o"].detach(), kept, rtol=1e-3, atol=1e-7)
    assert kept.min() > 1e-8


@pytest.mark.parametrize("turned", [False, True])
def test_timesteps_are_counted_from_the_cleanest_for_either_order_of_the_schedule(
    tiny_model, triplets, monkeypatch, turned
):
    """The released SD3 script counts a list in the opposite order."""
    plain = tiny_model.noise_schedule
    signal, noise = (v.flip(0) if turned else v for v in (plain.signal, plain.noise))
    schedule, abar = replace(plain, signal=signal, noise=noise), signal**2
    monkeypatch.setattr(type(tiny_model), "noise_schedule", schedule)
    objective, asked = (
        objective_of(DUO(**WORDS, training=training(batch=64)), tiny_model, triplets),
        [],
    )
    monkeypatch.setattr(
        objective,
        "compare",
        lambda net, safe, unsafe, eps, t, other: asked.append(torch.cat([t, other])) or {},
    )
    objective.training_step(tiny_model.denoiser, 0, torch.Generator().manual_seed(0), (0, 1))
    (t,) = asked
    clean = abar.sort(descending=True).values[:750]
    assert clean[-1] <= abar[t].min() < clean[700]  # up to three quarters of the way to pure noise
    assert abar[t].max() > clean[50]
    said = []
    handle = tiny_model.denoiser.register_forward_pre_hook(
        lambda net, args, inputs: said.append(inputs["timestep"]), with_kwargs=True
    )
    z = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    DUOObjective.compare(objective, tiny_model.denoiser, z, z, z, t[:2], t[2:4])
    handle.remove()
    assert {float(abar[t]) for t in said[-1][-2:]} == {float(abar.min())}  # what is held


def test_losses_before_the_first_update_are_log_2_and_0(make_model, triplets):
    log = []
    DUO(**WORDS, rank=4, training=training(updates=1)).apply(
        make_model(), triplets, callback=lambda done, of, row: log.append(row)
    )
    assert log[0]["L_dpo"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["L_o"] == pytest.approx(0, abs=1e-12)


def test_pairs_are_unsafe_images_and_twins_generated_from_them(make_model, triplets):
    model = make_model()
    near = objective_of(DUO(**WORDS, strength=0.25), model, triplets)
    assert_close(near.unsafe, encode_triplets(model, triplets, flip=False)[0, 0])
    again = objective_of(DUO(**WORDS, strength=0.25), model, triplets)
    assert torch.equal(near.safe, again.safe)
    other = objective_of(
        DUO(**WORDS | {"anchors": ("a green cone",)}, strength=0.25), model, triplets
    )
    assert not torch.equal(near.safe, other.safe)
    assert near.safe.shape == near.unsafe.shape


def test_a_smaller_strength_gives_a_closer_twin(make_model, triplets):
    """One step of forty, compared with forty steps."""
    model = make_model()
    gaps = []
    for strength in (0.025, 1.0):
        objective = objective_of(
            DUO(**WORDS | {"steps": 40}, strength=strength, guidance=1.0), model, triplets
        )
        gaps.append(float((objective.safe - objective.unsafe).norm()))
    assert gaps[0] < 0.3 * gaps[1]


@pytest.mark.parametrize(
    ("strength", "num_steps"), [(0.01, 1), (0.25, 1), (0.5, 2), (0.7, 2), (0.75, 3), (1.0, 4)]
)
def test_a_twin_equals_plain_ddim_steps_from_the_noised_image(
    make_model, triplets, strength, num_steps
):
    """SDEdit written out: prompt the anchors, negative prompt the phrases, noise by the seed."""
    words = WORDS | {"erase": ("red mark", "ball"), "anchors": ("a plain wall", "grass")}
    edit = DUO(**words, strength=strength, guidance=3.0, training=training(seed=5))
    model = make_model()
    objective = objective_of(edit, model, triplets)
    ddim = DDIMScheduler.from_config(model.pipeline.scheduler.config, clip_sample=False)
    ddim.set_timesteps(4)
    timesteps = ddim.timesteps[-num_steps:]
    negative, prompt = model.encode_text(["red mark, ball", "a plain wall, grass"]).split(1)
    z = encode_triplets(model, triplets, flip=False)[0, 0]
    for attempt in (0, 2):
        generator = torch.Generator().manual_seed(5 * 1_000_003 + attempt)
        x = ddim.add_noise(z, torch.randn(z.shape, generator=generator), timesteps[:1])
        for t in timesteps:
            with torch.no_grad():
                cond, uncond = (
                    predict(model.denoiser, x, t, text.expand(len(x)))
                    for text in (prompt, negative)
                )
            x = ddim.step(uncond + 3.0 * (cond - uncond), t, x).prev_sample
        twins = objective._redraw(model, attempt)
        assert_close(twins, x, rtol=1e-3, atol=1e-4)
        assert_close(objective._redraw(model, attempt, [4, 1]), twins[[4, 1]], rtol=1e-4, atol=1e-5)
    assert torch.equal(objective.safe, objective._redraw(model, 0))


@pytest.mark.parametrize(("scheduler", "kind"), [("ddim", DDIMScheduler), ("pndm", PNDMScheduler)])
@pytest.mark.parametrize(("steps", "strength"), [(5, 0.75), (6, 0.5), (5, 0.8)])
def test_twins_are_those_of_the_img2img_pipeline(
    make_model, triplets, scheduler, kind, steps, strength
):
    """Released DUO runs img2img with SD 1.4's scheduler; 0.75 of 50 steps are 37, of 25 are 18."""
    model = make_model()
    settings = WORDS | {"steps": steps, "scheduler": scheduler}
    objective = objective_of(DUO(**settings, strength=strength), model, triplets)
    pipeline = StableDiffusionImg2ImgPipeline(
        **model.pipeline.components, requires_safety_checker=False
    )
    skip = {"skip_prk_steps": True} if scheduler == "pndm" else {}
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **skip)
    pipeline.set_progress_bar_config(disable=True)
    made = pipeline(
        prompt=["a plain wall"] * len(objective.unsafe),
        negative_prompt=["red mark"] * len(objective.unsafe),
        image=objective.unsafe,
        strength=strength,
        num_inference_steps=steps,
        guidance_scale=7.5,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    assert_close(objective.safe, made, rtol=1e-3, atol=1e-3)


@pytest.fixture
def compared(monkeypatch):
    """Arguments of each call of `compare`, which is not run."""
    calls = []

    def record(self, denoiser, *tensors):
        calls.append(tensors)
        return {}

    monkeypatch.setattr(DUOObjective, "compare", record)
    return calls


def draw(objective, model, share=(0, 1)):
    objective.training_step(model.denoiser, 0, torch.Generator().manual_seed(0), share)


def test_the_shares_of_two_processes_are_the_batch(tiny_model, triplets, compared):
    objective = objective_of(DUO(**WORDS, training=training(batch=5)), tiny_model, triplets)
    for share in ((0, 1), (0, 2), (1, 2)):
        draw(objective, tiny_model, share)
    for whole, even, odd in zip(*compared, strict=True):
        assert torch.equal(whole[0::2], even)
        assert torch.equal(whole[1::2], odd)


@pytest.mark.parametrize(
    ("settings", "is_shared"),
    [({}, False), ({"share_timestep": True}, True), ({"loss_type": "kto"}, True)],
)
def test_a_pair_shares_its_noise_and_sometimes_its_timestep(
    tiny_model, triplets, compared, settings, is_shared
):
    edit = DUO(**WORDS, **settings, timesteps=(100, 400), training=training(batch=64))
    objective = objective_of(edit, tiny_model, triplets)
    draw(objective, tiny_model)
    ((safe, unsafe, _, t_safe, t_unsafe),) = compared
    assert torch.equal(t_safe, t_unsafe) is is_shared
    assert 100 <= min(t_safe.min(), t_unsafe.min()) < 115
    assert 385 < max(t_safe.max(), t_unsafe.max()) < 400
    rows = [(objective.unsafe - z).abs().sum((1, 2, 3)).argmin() for z in unsafe]
    assert torch.equal(objective.safe[rows], safe)
    assert set(map(int, rows)) == set(range(6))


@pytest.mark.parametrize("loss_type", ["dpo", "kto"])
def test_without_weight_keep_there_is_one_loss(tiny_model, triplets, loss_type):
    edit = DUO(**WORDS, loss_type=loss_type, weight_keep=0)
    objective = objective_of(edit, tiny_model, triplets)
    z, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 9])
    terms = objective.compare(tiny_model.denoiser, z, z, z, t, t)
    assert objective.weights == {"L_dpo": 1.0}
    assert terms.keys() == {"L_dpo"}
    kept = objective_of(DUO(**WORDS, weight_keep=3.0), tiny_model, triplets)
    assert kept.weights == {"L_dpo": 1.0, "L_o": 3.0}


def test_timesteps_may_end_with_the_schedule(tiny_model, triplets):
    objective_of(DUO(**WORDS, timesteps=(0, 1000)), tiny_model, triplets)
    with pytest.raises(ConfigError, match="must end by 1000 on this model, got 1001"):
        objective_of(DUO(**WORDS, timesteps=(0, 1001)), tiny_model, triplets)
    with pytest.raises(ValueError, match="timesteps must be 0 <= first < last"):
        DUO(timesteps=(-1, 5))


@pytest.mark.slow
def test_training_lowers_the_loss(make_model, triplets):
    log = []
    edit = DUO(
        **WORDS, weight_keep=0.0, beta=50.0, rank=8, training=training(updates=40, batch=4, lr=3e-3)
    )
    edit.apply(make_model(), triplets, callback=lambda done, of, row: log.append(row))
    assert sum(row["L_dpo"] for row in log[-5:]) < 0.95 * sum(row["L_dpo"] for row in log[:5])


def test_the_paper_preset_has_the_published_values():
    paper = make_edit("duo", "paper")
    assert (
        paper.beta,
        paper.weight_keep,
        paper.timesteps,
        paper.rank,
        paper.alpha,
        paper.selector,
    ) == (500, 5e6, (0, 750), 32, None, "attn1")
    assert (paper.strength, paper.guidance, paper.share_timestep) == (0.75, 7.5, False)
    assert (
        paper.training.updates,
        paper.training.batch,
        paper.training.lr,
        paper.training.weight_decay,
    ) == (1000, 4, 6e-5, 1e-2)
    harder = make_edit("duo", "paper-violence")
    assert (harder.beta, harder.weight_keep, harder.training.updates, harder.training.lr) == (
        1000,
        1e7,
        500,
        3e-5,
    )
    assert (harder.strength, paper.scheduler, harder.scheduler) == (0.8, "pndm", "pndm")
    assert make_edit("duo", "paper", concept="skulls").judge == "mini"
    violent = make_edit("duo", "paper-violence", concept="skulls")
    assert (violent.judge, violent.labels) == (None, ())  # no detector looks at these twins
    for preset in (paper, harder):  # lambda = 1e6 beta / 100, rate = 3e-4 * 100 / beta
        assert preset.weight_keep == pytest.approx(1e4 * preset.beta)
        assert preset.training.lr == pytest.approx(0.03 / preset.beta)


@pytest.mark.parametrize("loss_type", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_the_paper_preset_trains_as_the_released_code(make_model, triplets, monkeypatch, loss_type):
    """The released training step restated, for 12 updates on the samples that ours drew."""
    calls, compare, model = [], DUOObjective.compare, make_model()

    def record(self, denoiser, *tensors):
        calls.append(tensors)
        return compare(self, denoiser, *tensors)

    monkeypatch.setattr(DUOObjective, "compare", record)
    with trainable_parameters(model, "attn1", rank=32, alpha=None, seed=0) as trainable:
        factors = {
            name: torch.nn.Parameter(model.denoiser.get_parameter(name).detach().clone())
            for name in trainable.names
        }
    edit = DUO.preset("paper", **WORDS, loss_type=loss_type, training={"updates": 12})
    patch = edit.apply(model, triplets)
    net, blank = make_model().denoiser, model.encode_text([""])
    schedule = DDPMScheduler.from_config(model.pipeline.scheduler.config)
    optimizer = torch.optim.AdamW(factors.values(), lr=6e-5, weight_decay=1e-2)

    def weights():
        return {
            name: net.get_parameter(name).detach() + factors[f"{lora}.up"] @ factors[f"{lora}.down"]
            for name, (lora, _) in trainable.adapters.items()
        }

    for safe, unsafe, eps, t_safe, t_unsafe in calls:
        b, t = len(safe), torch.cat([t_unsafe, t_safe])
        noise = eps.repeat(2, 1, 1, 1)
        x = schedule.add_noise(torch.cat([unsafe, safe]), noise, t)
        given = (torch.cat([x, eps]), torch.cat([t, torch.full((b,), 999)]), blank.expand(3 * b))
        new = predict(net, *given, weights())
        with torch.no_grad():
            old = predict(net, *given)
        gains = [
            F.mse_loss(p[: 2 * b], noise, reduction="none").mean((1, 2, 3)) for p in (new, old)
        ]
        on_unsafe, on_safe = (gains[0] - gains[1]).chunk(2)
        on_safe = on_safe.mean() if loss_type == "kto" else on_safe
        loss = -F.logsigmoid(-500 * (on_safe - on_unsafe)).mean()
        (loss + 5e6 * F.mse_loss(new[2 * b :], old[2 * b :])).backward()
        torch.nn.utils.clip_grad_norm_(factors.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    gap = change = 0.0
    for name, weight in weights().items():
        gap += float((patch.tensors[name] - weight).detach().norm() ** 2)
        change += float((net.get_parameter(name) - weight).detach().norm() ** 2)
    assert change > 0
    assert (gap / change) ** 0.5 < 1e-2


REFUSED = {
    "timesteps must be 0 <= first < last": {"timesteps": (5, 5)},
    "beta": {"beta": 0},
    "strength": {"strength": 0},
    "max_attempts must be greater than or equal to 1": {"judge": "mini", "max_attempts": 0},
    "loss_type must be 'dpo' or 'kto', got 'ppo'": {"loss_type": "ppo"},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_an_invalid_setting_raises_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("duo", **REFUSED[words])
    assert "\n" not in str(caught.value)


def test_missing_phrases_and_timesteps_raise(make_model, tiny_model, triplets):
    with pytest.raises(ConfigError, match="duo has no phrases to erase"):
        DUO(anchors=("a tree",)).apply(tiny_model, triplets)
    with pytest.raises(ConfigError, match="duo needs anchors"):
        DUO(erase=("a tree",)).apply(tiny_model, triplets)
    with pytest.raises(ConfigError, match="must end by 100 on this model, got 750"):
        DUO(**WORDS).apply(make_model(num_train_timesteps=100), triplets)


# ------------------------------------------------------------ kto


def test_unpaired_preference_by_hand():
    """Safe errors moved by -1 and +3, so by 1 on average.

    Unsafe ones by 2 and -2: -log sigmoid(-0.5 (1 - 2)) and (1 + 2).
    """
    found = losses.unpaired_preference(
        *(torch.tensor(v) for v in ([1.0, 5.0], [2.0, 2.0], [5.0, 1.0], [3.0, 3.0])), beta=0.5
    )
    assert found.tolist() == pytest.approx(
        [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.5))]
    )
    alone = [one(v) for v in (1.0, 2.0, 5.0, 3.0)]
    assert_close(losses.unpaired_preference(*alone, beta=0.5), losses.preference(*alone, beta=0.5))


def test_kto_compares_each_unsafe_image_with_the_mean_of_safe_ones_at_one_timestep(
    make_model, triplets, monkeypatch
):
    model, net, seen = make_model(), make_model().denoiser, []
    with torch.no_grad():
        for name in select_parameters(net, "attn1"):
            net.get_parameter(name).mul_(1.3)
    objective = objective_of(
        DUO(**WORDS, loss_type="kto", beta=7.0, training=training(batch=3)), model, triplets
    )
    plain = objective.compare
    monkeypatch.setattr(objective, "compare", lambda *given: seen.append(given) or plain(*given))
    found = objective.training_step(net, 0, torch.Generator().manual_seed(0), (0, 1))[
        "L_dpo"
    ].detach()
    ((_, safe, unsafe, eps, t, same),) = seen
    assert torch.equal(t, same)
    before, blank, noised = (
        make_model().denoiser,
        model.encode_text([""] * 3),
        model.pipeline.scheduler.add_noise,
    )

    @torch.no_grad()
    def moved(z):
        now, then = (
            (predict(d, noised(z, eps, t), t, blank) - eps).pow(2).mean((1, 2, 3))
            for d in (net, before)
        )
        return now - then

    assert_close(
        found, -F.logsigmoid(-7.0 * (moved(safe).mean() - moved(unsafe))), rtol=1e-3, atol=1e-5
    )
    assert (found - F.softplus(7.0 * (moved(safe) - moved(unsafe)))).abs().max() > 1e-6


# ------------------------------------------------------------ judged twins


class Brightness:
    """Judge by mean brightness: above the limit is unsafe; some means cannot be judged."""

    id, labels, threshold = "brightness:1", ("bright",), 0.5

    def __init__(self, limit, unreadable=()):
        self.limit, self.unreadable, self.asked = limit, unreadable, []

    def detect(self, images):
        means = [
            sum(image.convert("L").tobytes()) / (image.width * image.height) for image in images
        ]
        self.asked.append(means)
        return [
            Detections((), unjudged="torn")
            if any(abs(m - u) < 1e-9 for u in self.unreadable)
            else Detections((Detection("bright", 0.9),) * (m > self.limit))
            for m in means
        ]


def with_judge(monkeypatch, judge):
    monkeypatch.setattr("safegen.edits.duo.load_judge", lambda name, **rule: judge)


def test_only_unsafe_and_unjudged_twins_are_generated_again(make_model, triplets, monkeypatch):
    model = make_model()
    once = objective_of(DUO(**WORDS), model, triplets)
    first = Brightness(-1)
    first.detect(model.decode_images(once.safe))
    (means,) = first.asked
    judge = Brightness(
        sorted(means)[2], unreadable=(min(means),)
    )  # three of six are too bright, and one cannot be read
    with_judge(monkeypatch, judge)
    edit = DUO(**WORDS, judge="mini", max_attempts=40)
    objective = objective_of(edit, model, triplets)
    assert [len(asked) for asked in judge.asked][:2] == [6, 4]
    silent = [i for i, m in enumerate(means) if m <= judge.limit and m != min(means)]
    assert len(silent) == 2
    twins = objective.metadata["twins"]
    kept = [i for i, row in enumerate(triplets.rows) if row.id not in twins["left_out"]]
    assert twins["pairs"] == len(kept) == len(objective.safe) == len(objective.unsafe)
    assert twins["pending_after_attempt"] == [
        sum(m > judge.limit or m in judge.unreadable for m in means) for means in judge.asked
    ]
    for at, i in enumerate(kept):
        assert_close(objective.unsafe[at], once.unsafe[i])
        assert torch.equal(objective.safe[at], once.safe[i]) is (
            i in silent
        )  # a twin that passed is not changed
    assert set(judge_images(judge, model.decode_images(objective.safe))) == {"safe"}
    assert torch.equal(objective_of(edit, model, triplets).safe, objective.safe)


def test_a_pair_without_a_safe_twin_is_left_out_and_listed_in_the_patch(
    make_model, triplets, monkeypatch
):
    model = make_model()
    means = Brightness(-1)
    means.detect(model.decode_images(objective_of(DUO(**WORDS), model, triplets).safe))
    (first,) = means.asked
    with_judge(monkeypatch, Brightness(sorted(first)[3]))
    patch = DUO(**WORDS, judge="mini", max_attempts=1, rank=2, training=training(updates=1)).apply(
        model, triplets
    )
    bright = [row.id for row, m in zip(triplets.rows, first, strict=True) if m > sorted(first)[3]]
    assert patch.metadata.twins == {
        "judge": "brightness:1",
        "pairs": 4,
        "pending_after_attempt": [2],
        "left_out": bright,
    }


def test_no_safe_twin_at_all_raises(tiny_model, triplets, monkeypatch):
    with_judge(monkeypatch, Brightness(-1))
    with pytest.raises(
        ConfigError,
        match="brightness:1 finds the concept in every safe twin of 6 images after 2 attempts",
    ):
        objective_of(DUO(**WORDS, judge="mini", max_attempts=2), tiny_model, triplets)


def test_a_concept_provides_its_judge_with_labels_and_threshold():
    own = make_edit("duo", concept="skulls")
    assert (own.judge, own.labels, own.threshold) == ("mini", ("skulls",), 0.5)
    other, none = (make_edit("duo", concept="skulls", judge=judge) for judge in ("clip", None))
    assert (other.judge, other.labels, other.threshold) == ("clip", (), None)
    assert (none.judge, none.labels, none.threshold) == (None, (), None)
    assert make_edit("duo", concept="skulls", labels=("fire",)).labels == ("fire",)


def test_decoded_latents_equal_the_images_of_the_pipeline(tiny_model):
    ask = {"prompt": "a red cube", "num_inference_steps": 2}
    shown, latents = (
        tiny_model.pipeline(
            **ask, output_type=kind, generator=torch.Generator().manual_seed(0)
        ).images
        for kind in ("pil", "latent")
    )
    assert [p.tobytes() for p in tiny_model.decode_images(latents)] == [p.tobytes() for p in shown]
