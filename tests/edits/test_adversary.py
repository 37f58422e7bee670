"""Adversaries: moved texts by hand and by oracles.

And that a number is what it always was, to the bit.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from safegen.cli.options import read_settings
from safegen.core import registry as tables
from safegen.core.errors import ConfigError
from safegen.edits.esd import ESD
from safegen.edits.functional import losses
from safegen.edits.functional.adversary import (
    AdvUnlearn,
    FastGradient,
    InversionAdversary,
    ReceAdversary,
    build_adversary,
)
from safegen.edits.functional.closed_form import adversarial_embeddings, projections
from safegen.edits.functional.text_search import adv_unlearn_text, fast_gradient_text
from safegen.edits.safegen import SafeGen, SafeGenObjective
from safegen.edits.training.lora import trainable_parameters
from safegen.models.families.conditioning import Conditioning
from safegen.models.families.denoisers import predict
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import make_edit

QUICK = {("one-step", "safegen"), ("adv-unlearn", "esd"), ("inversion", "esd")}
"""Adversaries that are trained with an edit in every run; the others are slow tests."""
BRIEF = {"updates": 4, "batch": 2, "accumulation": 1, "lr": 1e-3, "warmup": 0, "precision": "fp32"}
SETTINGS = {
    "none": {"name": "none"},
    "one-step": {"name": "one-step", "radius": 0.1},
    "adv-unlearn": {"name": "adv-unlearn", "steps": 2},
    "closed-form": {"name": "closed-form"},
    "inversion": {"name": "inversion", "steps": 1},
}


def brief(method, adversary, **changes):
    more = (
        {"erase": ("red cube",), "steps": 3, "rollout": "base", "trajectories": 2}
        if method == "esd"
        else {}
    )
    return (
        make_edit(
            method, adversary=adversary, selector="attn2", weight_retain=0.0, **more, **changes
        )
        if method == "esd"
        else make_edit(method, adversary=adversary, selector="attn2", **changes)
    )


def applied(edit, model, triplets, **how):
    return edit.apply(model, triplets if edit.inputs == "triplets" else None, **how)


class UNet2DConditionModel(nn.Module):
    """Denoiser of one pixel that predicts w . c, summed over rows."""

    def __init__(self, *weights):
        super().__init__()
        self.w = torch.tensor(weights)

    def forward(self, *, encoder_hidden_states, **inputs):
        return ((encoder_hidden_states * self.w).sum((1, 2)).view(-1, 1, 1, 1),)


PIXEL, NOW = torch.zeros(1, 1, 1, 1), torch.tensor([1])


# ------------------------------------------------------------ by hand


def test_one_gradient_step_by_hand():
    """The loss is (w c)^2 for w = (.6, .8), c = (3, 4); its gradient has the direction of w."""
    text, net = Conditioning(torch.tensor([[[3.0, 4.0]]])), UNet2DConditionModel(0.6, 0.8)
    found = fast_gradient_text(net, PIXEL, NOW, text, PIXEL, radius=0.2)
    assert_close(found.hidden, torch.tensor([[[3.6, 4.8]]]))


@pytest.mark.parametrize("rule", ["sign", "adam"])
def test_the_first_step_of_adv_unlearn_by_hand(rule):
    """w c = 7 - 12 = -5 should be 0; a step is a tenth of the root mean square, (7, 1) -> 5."""
    text, net = Conditioning(torch.tensor([[[7.0, 1.0]]])), UNet2DConditionModel(1.0, -12.0)
    found = adv_unlearn_text(
        net, PIXEL, NOW, text, PIXEL, steps=1, step=0.1, rule=rule, prefix=None
    )
    assert_close(found.hidden, torch.tensor([[[7.5, 0.5]]]))


def test_a_prefix_follows_the_start_token_and_is_moved_alone():
    text = torch.tensor([[[5.0, 5.0], [5.0, -5.0], [-5.0, 5.0], [5.0, 5.0]]])
    found = adv_unlearn_text(
        UNet2DConditionModel(1.0, 2.0),
        PIXEL,
        NOW,
        Conditioning(text),
        PIXEL - 99,
        steps=1,
        step=0.1,
        rule="sign",
        prefix=torch.tensor([[1.0, 1.0]]),
    )
    assert_close(found.hidden, torch.tensor([[[5.0, 5.0], [0.5, 0.5], [5.0, -5.0], [-5.0, 5.0]]]))


@pytest.mark.parametrize("rule", ["adam", "sign"])
def test_many_steps_equal_adam_of_torch(tiny_model, rule):
    """With `sign`, Adam gets the signs of the gradient, as in the released fast_at."""
    g = torch.Generator().manual_seed(0)
    x, before = torch.randn(2, 2, 4, 8, 8, generator=g)
    t, text = torch.tensor([100, 800]), tiny_model.encode_text(["red cube", "ball"])
    found = adv_unlearn_text(
        tiny_model.denoiser, x, t, text, before, steps=5, step=0.03, rule=rule, prefix=None
    )

    hidden = text.hidden
    size = hidden.pow(2).mean((1, 2), keepdim=True).sqrt()
    move = nn.Parameter(torch.zeros_like(hidden))
    adam = torch.optim.Adam([move], lr=0.03)
    for _ in range(5):
        adam.zero_grad()
        said = tiny_model.denoiser(x, t, hidden + size * move).sample
        (said - before).pow(2).mean((1, 2, 3)).sum().backward()
        if rule == "sign":
            move.grad.sign_()
        adam.step()
    assert_close(found.hidden, (hidden + size * move).detach(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_it_recovers_the_concept_on_an_edited_model_and_samples_are_independent(make_model, tokens):
    model, edited = make_model(), make_model().denoiser
    with torch.no_grad():
        for name in select_parameters(edited, "attn2"):
            edited.get_parameter(name).mul_(0.5)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([300, 600])
    text = model.encode_text(["red cube", "ball"])
    before = predict(model.denoiser, x, t, text).detach()
    attack = AdvUnlearn(steps=20, step=0.1, tokens=tokens).build(model, ())
    found = attack(edited, x, t, text, want=-before, before=before)

    @torch.no_grad()
    def gap(c):
        return losses.squared_error(predict(edited, x, t, c), before)

    start = AdvUnlearn(steps=1, step=1e-9, tokens=tokens).build(model, ())(
        edited, x, t, text, want=before, before=before
    )
    assert (gap(found) < 0.97 * gap(start)).all()
    assert not found.hidden.requires_grad
    assert all(p.grad is None for p in edited.parameters())
    alone = attack(edited, x[1:], t[1:], text[1:], want=-before[1:], before=before[1:])
    assert_close(found[1:].hidden, alone.hidden, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rank", [None, 2])
def test_the_closed_form_is_the_embedding_of_race_for_the_current_weights(make_model, rank):
    """A LoRA's change counts as the same change of the weights does."""
    model = make_model()
    original = projections(model)["hidden"]
    text = model.encode_text(["red cube", "ball"])
    with trainable_parameters(model, "kv2", rank=rank, alpha=None, seed=0) as trainable:
        attack = ReceAdversary(ridge=0.05).build(model, trainable.names)
        params, g = dict(model.denoiser.named_parameters()), torch.Generator().manual_seed(1)
        before = {n: params[n].detach().clone() for n in trainable.names}
        try:
            with torch.no_grad():
                for name in trainable.names:
                    params[name].add_(0.2 * torch.randn(params[name].shape, generator=g))
            new = trainable.merge({n: params[n].detach().clone() for n in trainable.names})
            found = attack(model.denoiser, PIXEL, NOW, text, want=PIXEL, before=PIXEL).hidden
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    params[name].copy_(value)
    now, text = [new[name] for name in original], text.hidden
    want = adversarial_embeddings(now, list(original.values()), text.flatten(0, 1), ridge=0.05)
    assert found.shape == text.shape
    assert found.dtype == text.dtype
    assert_close(found.flatten(0, 1), want.float(), rtol=1e-4, atol=1e-4)

    def gap(c):
        return sum(
            (c.double() @ w.double().T - text.double() @ w_0.T).pow(2).sum()
            for w, w_0 in zip(now, original.values(), strict=True)
        )

    assert gap(found) < 0.5 * gap(text)


def edited_pair(make_model):
    """Return a model, an edited denoiser, and latents with the original prediction there."""
    model, edited = make_model(), make_model().denoiser
    with torch.no_grad():
        for name in select_parameters(edited, "attn2"):
            edited.get_parameter(name).mul_(0.5)
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 4, 8, 8, generator=g), torch.tensor([100, 300, 600, 900])
    text = model.encode_text(["red cube"] * 4)
    return model, edited, x, t, text, predict(model.denoiser, x, t, text).detach()


def test_the_word_is_learned_from_batch_to_batch_and_half_of_the_texts_get_it(make_model):
    model, edited, x, t, text, before = edited_pair(make_model)
    attack = InversionAdversary(steps=4, lr=0.05).build(model, ())

    @torch.no_grad()
    def loss():
        return float(attack.loss(edited, x, t, before).mean())

    curve, words = [loss()], []
    for _ in range(4):
        found = attack(edited, x, t, text, want=-before, before=before)
        assert_close(found.hidden[2:], text.hidden[2:], rtol=0, atol=0)
        assert_close(found.hidden[:2], attack.encode().expand(2).hidden, rtol=0, atol=0)
        words.append(attack.vectors.detach().clone())
        curve.append(loss())
    assert curve == sorted(curve, reverse=True), "each batch goes on where the last one ended"
    assert curve[-1] < 0.99 * curve[0]
    with torch.no_grad():
        attack(edited, x, t, text, want=before, before=before)
    assert torch.equal(attack.vectors.detach(), words[-1]), "a validation teaches it nothing"
    assert all(p.grad is None for p in edited.parameters())
    assert all(p.grad is None for p in model.pipeline.text_encoder.parameters())


def test_steps_of_the_word_equal_those_of_adam_on_the_embedding_table(make_model):
    """The released code trains the whole table and writes back all rows but the word's."""
    model, edited, x, t, text, before = edited_pair(make_model)
    attack = InversionAdversary(steps=3, num_vectors=2, lr=0.01).build(model, ())
    start = attack.vectors.detach().clone()
    attack(edited, x, t, text, want=before, before=before)

    encoder, tokenizer = model.pipeline.text_encoder, model.pipeline.tokenizer
    tokenizer.add_tokens(["<a>", "<b>"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    table = encoder.get_input_embeddings().weight.requires_grad_(True)
    with torch.no_grad():
        table[-2:] = start
    known = table[:-2].detach().clone()
    adam = torch.optim.Adam([table], lr=0.01)
    for _ in range(3):
        adam.zero_grad()
        c = encoder(model.token_ids(["<a><b>"]))[0].expand(4, -1, -1)
        (edited(x, t, c).sample - before).pow(2).mean().backward(inputs=[table])
        adam.step()
        with torch.no_grad():
            table[:-2] = known
    assert (table[-2:].detach() - start).abs().max() > 0.01
    assert_close(attack.vectors.detach(), table[-2:].detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("share", "b", "counts"), [(0.5, 1, [0, 1, 0, 1]), (0.4, 2, [0, 1, 1, 1])])
def test_a_share_of_small_batches_is_kept_over_batches(make_model, share, b, counts):
    model, edited, x, t, text, before = edited_pair(make_model)
    attack = InversionAdversary(steps=1, share=share).build(model, ())
    found = []
    for _ in counts:
        moved = attack(edited, x[:b], t[:b], text[:b], want=before[:b], before=before[:b])
        found.append(int((moved.hidden != text.hidden[:b]).flatten(1).any(1).sum()))
    assert found == counts


# ------------------------------------------------------------ in a training


def plain(self, denoiser, z_u, z_c, z_b, eps, eps_b, t, text):
    """SafeGen's losses with one gradient step of 0.25 on unsafe samples, written out.

    Benign texts get the same move if it is shared, and the target of L_p is the prediction of the
    original model for them.
    """

    def untouched(*given):
        with torch.no_grad():
            return torch.func.functional_call(denoiser, self.reference, given).sample

    text = text.hidden
    a, s = (v[t][:, None, None, None] for v in (self.schedule.signal, self.schedule.noise))
    x_u, x_b = (a * z + s * e for z, e in ((z_u, eps), (z_b, eps_b)))
    text_u, text_b = text.chunk(2)
    shared = self.edit.moves_benign
    if shared:
        said_u = untouched(x_u, t, text_u)
    else:
        said_u, said_b = untouched(torch.cat([x_u, x_b]), torch.cat([t, t]), text).chunk(2)
    factor = self.schedule.factors[t][:, None, None, None].clamp(max=3.0)
    want = said_u + factor * (z_u - z_c)
    c = text_u.clone().requires_grad_()
    (denoiser(x_u, t, c).sample.float() - want.float()).pow(2).mean(dim=(1, 2, 3)).sum().backward(
        inputs=[c]
    )
    long, steep = (v.norm(dim=(1, 2), keepdim=True) for v in (text_u, c.grad))
    worse = text_u + 0.25 * (long / steep.clamp(min=1e-12)) * c.grad
    if shared:
        text_b = text_b + (worse - text_u)
        said_b = untouched(x_b, t, text_b)
    out_u, out_b = denoiser(
        torch.cat([x_u, x_b]), torch.cat([t, t]), torch.cat([worse, text_b])
    ).sample.chunk(2)
    return {
        k: (a.float() - b.float()).pow(2).mean(dim=(1, 2, 3))
        for k, a, b in (("L_m", out_u, want), ("L_p", out_b, said_b))
    }


@pytest.mark.parametrize(
    ("precision", "moves"), [("fp32", None), ("fp32", "unsafe"), ("bf16", "both")]
)
def test_the_default_adversary_equals_a_plain_restatement(
    make_model, triplets, monkeypatch, precision, moves
):
    training = SafeGen().training.model_copy(update=BRIEF | {"precision": precision})
    settings = {"training": training, "adversary_moves": moves}
    edits = [
        SafeGen(**settings, **more)
        for more in ({}, {"adversary": SETTINGS["one-step"] | {"radius": 0.25}})
    ]
    found = [edit.apply(make_model(), triplets).hash for edit in edits]
    other = (
        SafeGen(training=training, adversary_moves="both" if moves == "unsafe" else "unsafe")
        .apply(make_model(), triplets)
        .hash
    )
    none = SafeGen(training=training, adversary=0.0).apply(make_model(), triplets).hash
    monkeypatch.setattr(SafeGenObjective, "compare", plain)
    assert [edits[0].apply(make_model(), triplets).hash] * 2 == found
    assert len({none, other, *found}) == 3


@pytest.mark.parametrize(
    "more", [{}, {"teacher": False, "target": {"name": "x0", "anchor": "noise"}}]
)
def test_benign_texts_get_the_move_of_the_unsafe_ones(
    make_model, triplets, tmp_path, monkeypatch, more
):
    """The original model predicts for the moved benign text too."""
    (tmp_path / "calm.txt").write_text("a red cube\na blue ball\na green cone")
    words = {"captions": (str(tmp_path / "calm.txt"),), "caption_share": 1.0}
    model, seen = make_model(), []
    forward, compare = type(model.denoiser).forward, SafeGenObjective.compare

    def watch(net, **inputs):
        seen.append(inputs["encoder_hidden_states"].detach().clone())
        return forward(net, **inputs)

    def begin(self, denoiser, *given):
        seen.append(given[-1].hidden.clone())
        return compare(self, denoiser, *given)

    monkeypatch.setattr(type(model.denoiser), "forward", watch)
    monkeypatch.setattr(SafeGenObjective, "compare", begin)
    SafeGen(**words, **more, training=BRIEF | {"updates": 1, "batch": 6}).apply(model, triplets)
    (text_u, text_b), (moved_u, moved_b) = seen[0].chunk(2), seen[-1].chunk(2)
    assert (text_u != text_b).flatten(1).any(1).sum() >= 2  # samples whose two captions differ
    assert_close(moved_b - text_b, moved_u - text_u, rtol=0, atol=1e-5)
    assert_close(
        (moved_u - text_u).norm(dim=(1, 2)), 0.25 * text_u.norm(dim=(1, 2)), rtol=1e-4, atol=0
    )
    if not more:
        assert torch.equal(seen[-2], moved_b)


def test_benign_texts_are_moved_by_default_for_additive_adversaries():
    moved = {name for name in tables.ADVERSARIES if SafeGen(adversary=name).moves_benign}
    assert moved == {"one-step"}
    assert SafeGen(adversary=0.1).moves_benign
    assert make_edit("safegen-plus", text="none").build_safegen().moves_benign
    assert not SafeGen(adversary_moves="unsafe").moves_benign
    assert not SafeGen(adversary=0).moves_benign
    assert not SafeGen(weight_preserve=0).moves_benign
    assert not SafeGen.preset("paper").moves_benign
    for method in ("safegen", "safegen-plus"):
        with pytest.raises(ConfigError, match="adversary_moves must be unsafe for an adversary"):
            make_edit(method, adversary="adv-unlearn", adversary_moves="both")


def test_a_number_is_serialized_as_a_number():
    assert '"adversary":0.25' in SafeGen().model_dump_json()
    assert '"adversary":0.0' in ESD().model_dump_json()
    assert ESD(adversary=1).model_dump()["adversary"] == ESD(adversary="1").adversary == 1.0


@pytest.mark.parametrize(
    ("name", "method"),
    [
        pytest.param(name, method, marks=() if (name, method) in QUICK else pytest.mark.slow)
        for name in sorted(tables.ADVERSARIES)
        for method in ("esd", "safegen")
    ],
)
def test_every_adversary_works_with_every_edit_that_has_one(
    make_model, triplets, tmp_path, method, name
):
    edit = brief(method, SETTINGS[name], training=BRIEF | {"checkpoint_every": 2})
    assert type(edit).model_validate_json(edit.model_dump_json()) == edit
    assert brief(method, name).adversary == tables.resolve(tables.ADVERSARIES, name, "adversary")()
    model = make_model()

    def pull(done, of, row):
        if done == 3:
            raise ConnectionError("pulled the plug")

    whole = applied(edit, model, triplets, checkpoint_dir=tmp_path / "whole")
    assert type(edit).model_validate(whole.metadata.settings) == edit
    with pytest.raises(ConnectionError):
        applied(edit, model, triplets, checkpoint_dir=tmp_path / "torn", callback=pull)
    assert (
        applied(edit, make_model(), triplets, checkpoint_dir=tmp_path / "torn", resume=True).hash
        == whole.hash
    )
    none = applied(brief(method, 0, training=BRIEF), model, triplets)
    assert (whole.hash == none.hash) is (name == "none")


@pytest.mark.parametrize("name", sorted(tables.ADVERSARIES))
def test_every_setting_of_every_adversary_has_a_sentence(name):
    fields = tables.resolve(tables.ADVERSARIES, name, "adversary").model_fields
    assert fields["name"].default == name
    assert not [
        key
        for key, field in fields.items()
        if key != "name" and not (field.description or "").strip().endswith(".")
    ]


def test_safegen_plus_passes_its_adversary_to_safegen():
    assert (
        make_edit("safegen-plus", text="none", adversary="adv-unlearn").build_safegen().adversary
        == AdvUnlearn()
    )


def test_the_command_line_sets_an_adversary_and_its_settings():
    said = read_settings(
        "esd", "mini", ["adversary=adv-unlearn", "adversary.steps=5", "adversary.rule=sign"]
    )
    assert make_edit("esd", **said).adversary == AdvUnlearn(steps=5, rule="sign")
    assert make_edit(
        "esd", **read_settings("esd", "mini", ['adversary={"name":"closed-form","ridge":1}'])
    ).adversary == ReceAdversary(ridge=1)
    with pytest.raises(
        ConfigError,
        match=r"--set adversary.steps: 'adversary' has no settings of its own. Choose one first",
    ):
        read_settings("esd", "mini", ["adversary.steps=5"])


# ------------------------------------------------------------ refusals


REFUSED = {
    "adversary: the radius of one step must be from 0 \\(none\\) to 2, got -0.1": -0.1,
    "to 2, got 2.5": 2.5,
    "to 2, got nan": float("nan"),
    "must be a number, one of adv-unlearn, closed-form, inversion, none, one-step, or": True,
    "or a table with such a name, got {'steps': 3}": {"steps": 3},
    "no adversary named 'adv-unlern'. Did you mean 'adv-unlearn'": "adv-unlern",
    "adversary 'adv-unlearn': no setting named 'step_size'": {
        "name": "adv-unlearn",
        "step_size": 1,
    },
    "steps must be greater than or equal to 1, got 0": {"name": "adv-unlearn", "steps": 0},
    "step must be greater than 0": {"name": "adv-unlearn", "step": 0},
    "radius must be greater than 0": {"name": "one-step", "radius": 0},
    "ridge must be greater than 0": {"name": "closed-form", "ridge": 0},
    "rule must be 'adam' or 'sign', got 'sgd'": {"name": "adv-unlearn", "rule": "sgd"},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
@pytest.mark.parametrize("method", ["esd", "safegen", "safegen-plus"])
def test_an_invalid_adversary_raises_one_line(method, words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit(method, adversary=REFUSED[words])
    assert "\n" not in str(caught.value)


def test_closed_form_without_trained_keys_and_values_raises(tiny_model, triplets):
    for rank in (None, 2):
        edit = make_edit("safegen", adversary="closed-form", rank=rank, training=BRIEF)
        with pytest.raises(
            ConfigError, match="adversary closed-form needs trained projections of text"
        ):
            edit.apply(tiny_model, triplets)


def test_a_prefix_without_room_for_the_text_raises(tiny_model):
    longest = tiny_model.encode_text([""]).hidden.shape[1] - 2
    build_adversary(AdvUnlearn(tokens=longest), tiny_model, ())
    with pytest.raises(
        ConfigError, match=f"adversary.tokens must be below {longest + 1} on this model"
    ):
        build_adversary(AdvUnlearn(tokens=longest + 1), tiny_model, ())


def test_a_word_without_room_for_both_ends_of_a_text_raises(tiny_model):
    longest = tiny_model.encode_text([""]).hidden.shape[1] - 2
    build_adversary(InversionAdversary(num_vectors=longest), tiny_model, ())
    with pytest.raises(ConfigError, match=f"adversary.num_vectors must be at most {longest}"):
        build_adversary(InversionAdversary(num_vectors=longest + 1), tiny_model, ())


def test_no_adversary_is_false():
    assert not tables.resolve(tables.ADVERSARIES, "none", "adversary")()
    assert build_adversary(0.0, None, ()) is None
    assert FastGradient(radius=0.25)


def test_adv_unlearn_searches_for_the_original_prediction_without_a_teacher(
    make_model, triplets, monkeypatch
):
    """`--preset paper --set adversary=adv-unlearn` has a target without the original model."""
    model, asked = make_model(), []
    edit = SafeGen.preset("paper", adversary={"name": "adv-unlearn", "steps": 1})
    names = select_parameters(model.denoiser, "attn1")
    objective = SafeGenObjective(edit, model, triplets, names)
    monkeypatch.setattr(
        objective,
        "attack",
        lambda net, x, t, text, *, want, before: asked.append((x, t, text, before)) or text,
    )
    objective.training_step(model.denoiser, 0, torch.Generator().manual_seed(0), (0, 1))
    ((x, t, text, before),) = asked
    with torch.no_grad():
        assert_close(before, predict(make_model().denoiser, x, t, text), rtol=1e-4, atol=1e-5)
