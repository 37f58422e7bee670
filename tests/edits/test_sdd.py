"""SDD: losses, rollouts by the weight average, and settings."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.core.errors import ConfigError
from safegen.edits.functional.rollout import frozen_predictor
from safegen.edits.sdd import SDD, SDDObjective
from safegen.edits.training.config import Training, step_seed
from safegen.edits.training.trainer import train
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

SHORT = {"steps": 4, "erase": ("red cube", "ball")}


def training(**changes):
    return Training(
        **{"updates": 3, "batch": 2, "accumulation": 1, "lr": 1e-2, "ema": 0.9, "weight_decay": 0.0}
        | changes
    )


def objective_of(edit, model):
    return SDDObjective(edit, model, select_parameters(model.denoiser, "attn2"))


@pytest.fixture
def seen(monkeypatch):
    """Arguments of each call of `compare`."""
    rows = []
    compare = SDDObjective.compare

    def record(self, denoiser, x, t, text):
        rows.append({"x": x.clone(), "t": t.clone(), "text": text.hidden.clone()})
        return compare(self, denoiser, x, t, text)

    monkeypatch.setattr(SDDObjective, "compare", record)
    return rows


def changed_net(make_model):
    net = make_model().denoiser
    with torch.no_grad():
        for name in select_parameters(net, "attn2"):
            net.get_parameter(name).mul_(1.4)
    return net


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_losses_equal_plain_forward_passes(make_model, anchor):
    model, net = make_model(), changed_net(make_model)
    objective = objective_of(SDD(**SHORT, weight_anchor=anchor), model)
    g = torch.Generator().manual_seed(0)
    x, t, text = (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([3, 700]),
        model.encode_text(["red cube", "ball"]),
    )
    blank = model.encode_text([""] * 2)
    found = objective.compare(net, x, t, text)
    with torch.no_grad():
        own, before = predict(net, x, t, blank), predict(make_model().denoiser, x, t, blank)
        l_d = (predict(net, x, t, text) - own).pow(2).mean((1, 2, 3))
        l_a = (own - before).pow(2).mean((1, 2, 3))
    assert_close(found["L_d"].detach(), l_d, rtol=1e-4, atol=1e-7)
    assert objective.weights == {"L_d": 1.0} | ({"L_a": 0.5} if anchor else {})
    if anchor:
        assert_close(found["L_a"].detach(), l_a, rtol=1e-4, atol=1e-7)
        assert l_a.min() > 1e-8
    else:
        assert "L_a" not in found


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_the_target_gets_no_gradient(make_model, anchor):
    """The gradient of L_d is that for a constant target."""
    net, model = changed_net(make_model), make_model()
    names = select_parameters(net, "attn2")
    weights = [net.get_parameter(n).requires_grad_() for n in names]
    objective = objective_of(SDD(**SHORT, weight_anchor=anchor), model)
    g = torch.Generator().manual_seed(0)
    x, t, text = (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.tensor([300, 700]),
        model.encode_text(["red cube", "ball"]),
    )
    with torch.no_grad():
        aim = predict(net, x, t, model.encode_text([""] * 2))
    want = torch.autograd.grad(F.mse_loss(predict(net, x, t, text), aim), weights)
    found = torch.autograd.grad(objective.compare(net, x, t, text)["L_d"].mean(), weights)
    for a, b in zip(found, want, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-7)


def test_the_weight_average_generates_the_latents_and_becomes_the_patch(make_model, seen):
    """The latents of the third batch are a rollout of the average after two updates."""
    model, edit = make_model(), SDD(**SHORT, training=training(seed=3))
    objective, names, kept, last = (
        objective_of(edit, model),
        select_parameters(model.denoiser, "attn2"),
        [],
        [],
    )

    def watch(done, of, row):
        kept.append({n: v.clone() for n, v in objective._ema_weights().items()})
        last.append({n: model.denoiser.get_parameter(n).detach().clone() for n in names})

    found = train(
        model.denoiser, names, objective, edit.training, fingerprint="sdd", callback=watch
    )
    assert all(torch.equal(v, kept[-1][n]) for n, v in found.tensors.items())
    g = torch.Generator("cpu").manual_seed(
        step_seed(3, 2)
    )  # the loop's own draws of the third batch
    stop = int(torch.randint(4, (2,), generator=g)[0])
    noise, drawn = objective.rollout.noise(2, g), objective.rollout_text.expand(2)
    assert stop > 0, "this seed draws stop 0; take another"
    row = seen[2]
    assert row["t"].tolist() == [int(objective.rollout.timesteps[stop])] * 2
    right = objective.rollout.sample_until(
        stop, noise, drawn, frozen_predictor(model.denoiser, kept[1])
    )
    wrong = objective.rollout.sample_until(
        stop, noise, drawn, frozen_predictor(model.denoiser, last[1])
    )
    assert_close(row["x"], right, rtol=1e-4, atol=1e-4)
    assert (row["x"] - wrong).abs().max() > 1e-3


def test_rollouts_use_all_phrases_and_samples_use_them_in_turn(tiny_model, seen):
    edit = SDD(
        **SHORT, rollout="base", trajectories=2, training=training(batch=3, updates=2, lr=1e-5)
    )
    edit.apply(tiny_model)
    assert torch.equal(
        objective_of(edit, tiny_model).rollout_text.hidden,
        tiny_model.encode_text(["red cube, ball"]).hidden,
    )
    one, two = tiny_model.encode_text(["red cube", "ball"]).hidden
    taught = [text for row in seen for text in row["text"]]
    assert all(torch.equal(text, word) for text, word in zip(taught, [one, two] * 3, strict=True))


def test_latents_belong_to_their_timestep(tiny_model, seen):
    """The released sampler denoises fully at step 0; here step 0 is pure noise."""
    edit = SDD(
        **SHORT, rollout="base", trajectories=2, training=training(batch=16, updates=1, lr=1e-5)
    )
    edit.apply(tiny_model)
    objective = objective_of(edit, tiny_model)
    (row,) = seen
    assert set(row["t"].tolist()) == set(objective.rollout.timesteps.tolist())
    for x, t in zip(row["x"], row["t"], strict=True):
        stop = objective.rollout.timesteps.tolist().index(int(t))
        assert float((objective.trajectories[:, stop] - x).abs().amax((1, 2, 3)).min()) == 0
    start = objective.rollout.noise(2, torch.Generator().manual_seed(0))
    assert torch.equal(objective.trajectories[:, 0], start)


@pytest.mark.parametrize(
    "changes", [{}, {"rollout": "base", "trajectories": 2}, {"weight_anchor": 1.0}]
)
def test_bf16_training_changes_the_weights(make_model, changes):
    model = make_model()
    patch = SDD(**SHORT, **changes, training=training(precision="bf16", updates=2)).apply(model)
    own = dict(model.denoiser.named_parameters())
    assert set(patch.tensors) == set(select_parameters(model.denoiser, "attn2"))
    assert all(
        not torch.equal(v, own[k]) for k, v in patch.tensors.items() if k.endswith("to_v.weight")
    )


@pytest.mark.slow
def test_training_lowers_the_loss(make_model):
    log = []
    edit = SDD(
        **SHORT, rollout="base", trajectories=2, training=training(updates=40, lr=3e-3, batch=4)
    )
    edit.apply(make_model(), callback=lambda done, of, row: log.append(row))
    assert sum(row["L_d"] for row in log[-5:]) < 0.7 * sum(row["L_d"] for row in log[:5])


def test_the_paper_preset_has_the_published_values():
    paper = make_edit("sdd", "paper")
    assert (paper.selector, paper.rollout, paper.steps, paper.guidance, paper.weight_anchor) == (
        "attn2",
        "average",
        50,
        3.0,
        0.0,
    )
    run = paper.training
    assert (
        run.updates,
        run.batch,
        run.accumulation,
        run.lr,
        run.weight_decay,
        run.clip,
        run.ema,
    ) == (1500, 1, 1, 1e-5, 1e-4, 1.0, 0.999)
    assert not run.ema_ramp


REFUSED = {"weight_anchor": {"weight_anchor": -1}}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_an_invalid_setting_raises_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("sdd", **REFUSED[words])
    assert "\n" not in str(caught.value)
