"""ESD: target, latents, losses and settings."""

from __future__ import annotations

import pytest
import torch
from diffusers import PNDMScheduler
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError
from safegen.edits.esd import ESD, ESDObjective
from safegen.edits.functional.rollout import frozen_predictor
from safegen.edits.training.config import Training, step_seed
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

SHORT = {"steps": 4, "selector": "attn2", "erase": ("red cube",)}


def training(**changes):
    return Training(
        **{"updates": 3, "batch": 2, "accumulation": 1, "lr": 1e-3, "ema": 0.0, "weight_decay": 0.0}
        | changes
    )


def objective_of(edit, model):
    return ESDObjective(edit, model, select_parameters(model.denoiser, "attn2"))


@pytest.fixture
def seen(monkeypatch):
    """Arguments of each call of `compare`."""
    rows = []
    compare = ESDObjective.compare

    def record(self, denoiser, sample, t, text, captions):
        rows.append(
            {
                "sample": {k: v.clone() for k, v in sample.items()},
                "t": t.clone(),
                "text": text.hidden.clone(),
                "captions": captions and captions.hidden,
            }
        )
        return compare(self, denoiser, sample, t, text, captions)

    monkeypatch.setattr(ESDObjective, "compare", record)
    return rows


@torch.no_grad()
def say(net, row, text):
    return predict(net, row["sample"]["x"], row["t"], text)


@pytest.mark.parametrize("rollout", ["student", "base"])
@pytest.mark.parametrize("strength", [0.0, 1.0, 2.5])
def test_the_loss_equals_plain_forward_passes(make_model, seen, rollout, strength):
    """|e(c) - (e0(blank) - eta (e0(c) - e0(blank)))|^2, for the original and a changed network."""
    edit = ESD(**SHORT, rollout=rollout, strength=strength, training=training(updates=1))
    log = []
    edit.apply(make_model(), callback=lambda done, of, row: log.append(row))
    (row,), net, tower = seen, make_model().denoiser, make_model()
    c, blank = (tower.encode_text([text] * 2) for text in ("red cube", ""))
    want = say(net, row, blank) - strength * (say(net, row, c) - say(net, row, blank))
    assert torch.equal(row["text"], c.hidden)
    assert log[0]["L_e"] == pytest.approx(F.mse_loss(say(net, row, c), want).item(), rel=1e-3)
    changed = make_model().denoiser
    with torch.no_grad():
        for name in select_parameters(changed, "attn2"):
            changed.get_parameter(name).mul_(1.3)
        found = objective_of(edit, make_model()).compare(changed, row["sample"], row["t"], c, None)[
            "L_e"
        ]
    assert_close(found, (say(changed, row, c) - want).pow(2).mean((1, 2, 3)), rtol=1e-3, atol=1e-6)


def test_the_target_by_hand(make_model):
    """e0(blank) = 1, e0(c) = 3, eta = 2: the target is 1 - 2 * 2 = -3.

    From another class with e0 = 5 it is 5 - 2 * 2 = 1.
    """

    model, one = make_model(), torch.ones(2, 4, 8, 8)
    objective = objective_of(ESD(**SHORT, strength=2.0), model)
    with torch.no_grad():  # it predicts 0
        for parameter in model.denoiser.conv_out.parameters():
            parameter.zero_()
    given = torch.tensor([1, 1]), model.encode_text(["ball"] * 2), None
    plain = {"x": one, "text": 3 * one, "blank": one}
    assert objective.compare(model.denoiser, plain, *given)["L_e"].tolist() == [9.0, 9.0]
    within = {"x": one, "text": 5 * one, "blank": one, "erase": 3 * one}
    assert objective.compare(model.denoiser, within, *given)["L_e"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("rollout", ["student", "base"])
def test_latents_belong_to_their_timestep(make_model, seen, rollout):
    """The latents of the first update are the rollout of the original model."""
    model = make_model()
    edit = ESD(**SHORT, rollout=rollout, training=training(updates=1, batch=4, seed=2))
    edit.apply(model)
    objective = objective_of(edit, model)
    known = objective.trajectories[0]["x"] if rollout == "base" else None
    (row,) = seen
    for x, t in zip(row["sample"]["x"], row["t"], strict=True):
        stop = objective.rollout.timesteps.tolist().index(int(t))
        if known is not None:
            assert float((known[:, stop] - x).abs().amax((1, 2, 3)).min()) == 0
    if rollout == "student":
        assert len(set(row["t"].tolist())) == 1  # the samples of a batch stop together
        g = torch.Generator("cpu").manual_seed(
            step_seed(2, 0)
        )  # the loop's own draws of the first batch
        _ = torch.randint(1, (4,), generator=g)
        stop = int(torch.randint(4, (4,), generator=g)[0])
        _ = torch.randint(1, (4,), generator=g)
        rollout, text = objective.rollout, model.encode_text(["red cube"] * 4)
        assert 0 < stop < 3, "this seed draws an end; take another"
        assert row["t"].tolist() == [int(rollout.timesteps[stop])] * 4
        latents = [
            rollout.sample_until(at, x, text, frozen_predictor(model.denoiser))
            for x in [rollout.noise(4, g)]
            for at in range(4)
        ]
        assert_close(row["sample"]["x"], latents[stop], rtol=1e-4, atol=1e-4)
        assert all(
            (row["sample"]["x"] - latents[at]).abs().max() > 1e-3 for at in range(4) if at != stop
        )


def test_latents_depend_on_the_training_for_rollout_student_only(make_model, seen):
    """Two learning rates, one seed: only latents of the student differ after the first update."""
    for rollout in ("student", "base"):
        seen.clear()
        for lr in (1e-5, 1e-1):
            ESD(**SHORT, rollout=rollout, training=training(updates=4, lr=lr, seed=5)).apply(
                make_model()
            )
        first, second = seen[:4], seen[4:]
        assert torch.equal(first[0]["sample"]["x"], second[0]["sample"]["x"])
        same = [
            torch.equal(a["sample"]["x"], b["sample"]["x"])
            for a, b in zip(first, second, strict=True)
        ]
        assert all(same) is (rollout == "base")


def test_every_phrase_is_trained(tiny_model, seen):
    ESD(
        **SHORT | {"erase": ("red cube", "ball", "cone")},
        rollout="base",
        trajectories=2,
        training=training(batch=8),
    ).apply(tiny_model)
    known = tiny_model.encode_text(["red cube", "ball", "cone"]).hidden
    kinds = {
        int((known - text).abs().amax((1, 2)).argmin()) for row in seen for text in row["text"]
    }
    assert kinds == {0, 1, 2}


@pytest.mark.parametrize("rollout", ["student", "base"])
def test_erase_from_samples_and_trains_that_phrase(make_model, seen, rollout):
    edit = ESD(
        **SHORT, rollout=rollout, erase_from="a cube", strength=1.0, training=training(updates=1)
    )
    edit.apply(make_model())
    (row,), net, tower = seen, make_model().denoiser, make_model()
    within, word = tower.encode_text(["a cube"] * 2), tower.encode_text(["red cube"] * 2)
    assert torch.equal(row["text"], within.hidden)
    assert_close(row["sample"]["erase"], say(net, row, word), rtol=1e-3, atol=1e-4)
    assert_close(row["sample"]["text"], say(net, row, within), rtol=1e-3, atol=1e-4)


def test_l_r_keeps_the_original_prediction_for_captions(make_model, seen, tmp_path):
    (tmp_path / "calm.txt").write_text("a blue ball\n")
    edit = ESD(
        **SHORT,
        rollout="base",
        trajectories=2,
        weight_retain=0.5,
        captions=(str(tmp_path / "calm.txt"),),
        training=training(updates=5),
    )
    log = []
    edit.apply(make_model(), callback=lambda done, of, row: log.append(row))
    assert log[0]["L_r"] < 1e-10  # nothing has moved
    assert log[-1]["L_r"] > 1e-9
    assert all(
        torch.equal(row["captions"], make_model().encode_text(["a blue ball"] * 2).hidden)
        for row in seen
    )


def test_the_adversary_moves_the_text_and_raises_the_loss(make_model):
    model, terms = make_model(), {}
    g = torch.Generator().manual_seed(0)
    sample = {name: torch.randn(2, 4, 8, 8, generator=g) for name in ("x", "text", "blank")}
    t, text = torch.tensor([100, 700]), model.encode_text(["red cube", "ball"])
    given = []
    model.denoiser.register_forward_pre_hook(
        lambda module, args, inputs: given.append(inputs["encoder_hidden_states"].detach().clone()),
        with_kwargs=True,
    )
    for radius in (0.0, 0.1):
        objective = objective_of(
            ESD(**SHORT, rollout="base", trajectories=2, adversary=radius), model
        )
        terms[radius] = objective.compare(model.denoiser, sample, t, text, None)["L_e"].detach()
    assert (terms[0.1] > terms[0.0]).all()
    assert_close(
        (given[-1] - text.hidden).norm(dim=(1, 2)),
        0.1 * text.hidden.norm(dim=(1, 2)),
        rtol=1e-3,
        atol=1e-4,
    )


@pytest.mark.slow
def test_training_lowers_the_loss(make_model):
    edit = ESD(
        **SHORT, rollout="base", trajectories=2, training=training(updates=40, lr=3e-3, batch=4)
    )
    log = []
    edit.apply(make_model(), callback=lambda done, of, row: log.append(row))
    assert sum(row["L_e"] for row in log[-5:]) < 0.7 * sum(row["L_e"] for row in log[:5])


@pytest.mark.parametrize("rollout", ["student", "base"])
def test_bf16_training_changes_the_weights(make_model, rollout):
    model = make_model()
    patch = ESD(**SHORT, rollout=rollout, training=training(precision="bf16", updates=2)).apply(
        model
    )
    own = dict(model.denoiser.named_parameters())
    assert set(patch.tensors) == set(select_parameters(model.denoiser, "attn2"))
    assert all(not torch.equal(v, own[k]) for k, v in patch.tensors.items() if k.endswith("weight"))


def test_the_presets_have_the_published_values():
    u, x, new = (make_edit("esd", name) for name in ("paper", "paper-x", "rewritten"))
    assert (u.selector, x.selector, new.selector) == ("noxattn", "attn2", "attn2")
    assert (u.strength, u.rollout, u.steps, u.guidance, u.weight_retain) == (
        1.0,
        "student",
        50,
        3.0,
        0.0,
    )
    run = u.training
    assert (run.updates, run.batch, run.accumulation, run.lr, run.ema, run.weight_decay) == (
        1000,
        1,
        1,
        1e-5,
        0.0,
        0.0,
    )
    assert (new.strength, new.rollout, new.training.updates, new.training.lr) == (
        1.0,
        "base",
        200,
        5e-5,
    )


def test_the_selector_esd_u_names_the_linear_and_convolutional_layers_outside_attn2(make_model):
    """The rule of the present code, by the class of each module."""
    net = make_model().denoiser
    layers = [
        name
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and "attn2" not in name
    ]
    names = select_parameters(net, "esd-u")
    assert {name.rpartition(".")[0] for name in names} == set(layers)
    assert {"conv_out.weight", "time_embedding.linear_1.bias"} < set(names)
    assert len(names) == sum(len(list(net.get_submodule(n).parameters())) for n in layers)


def test_rewritten_samples_by_pndm_with_its_second_timestep_twice(make_model):
    """Latents of a stop are those of that many PNDM steps, and its timestep is the next one."""
    edit = ESD.preset("rewritten", erase=("red cube",), steps=6, trajectories=2)
    model = make_model()
    objective = objective_of(edit, model)
    assert isinstance(objective.rollout.scheduler, PNDMScheduler)
    t = objective.rollout.timesteps.tolist()
    assert len(t) == 7
    assert t[1] == t[2]
    stops = []
    objective.compare = lambda net, sample, t, text, captions: stops.append(sample | {"t": t}) or {}
    objective.training_step(model.denoiser, 0, torch.Generator().manual_seed(0), (0, 1))
    x = objective.trajectories[0]["x"]
    (row,) = stops
    (index,) = (x == row["x"]).flatten(2).all(2).nonzero().tolist()
    assert int(row["t"]) == t[index[1]]


def test_a_concept_provides_captions_only_if_they_are_used():
    skulls = load_concept("skulls")
    assert set(skulls.captions) <= set(make_edit("esd", concept="skulls").captions)
    assert make_edit("esd", "paper", concept="skulls").captions == ()
    assert make_edit("esd", concept="skulls", weight_retain=0.0).captions == ()
    assert make_edit("esd", "paper-x", concept="skulls").erase == skulls.words


REFUSED = {
    "phrases must not be blank": {"erase": ("",)},
    "strength": {"strength": -1},
    "adversary": {"adversary": -1},
    "guidance": {"guidance": 0.5},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_an_invalid_setting_raises_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("esd", **REFUSED[words])
    assert "\n" not in str(caught.value)
