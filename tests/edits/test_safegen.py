"""SafeGen: parity with the published step, losses, and settings."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from torch.testing import assert_close

from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.data.triplets.triplets import Triplets
from safegen.edits.functional import losses
from safegen.edits.functional.targets import PaperTarget, X0Target
from safegen.edits.functional.text_search import fast_gradient_text
from safegen.edits.safegen import SafeGen, SafeGenObjective
from safegen.edits.training.config import Training, resolve_precision
from safegen.edits.training.samples import encode_triplets, preprocess
from safegen.models.families.denoisers import predict
from safegen.models.loading import load
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import edit as edit_model
from safegen.workflows.edit import make_edit

PLAIN = {"captions": (), "adversary": 0.0, "flip": False}


@pytest.fixture
def recorded(monkeypatch):
    """Samples and losses of each micro-step or validation; `train` marks training steps."""
    rows = []
    compare = SafeGenObjective.compare

    def record(self, denoiser, z_u, z_c, z_b, eps, eps_b, t, text):
        out = compare(self, denoiser, z_u, z_c, z_b, eps, eps_b, t, text)
        given = {"z_u": z_u, "z_c": z_c, "z_b": z_b, "eps": eps, "eps_b": eps_b, "t": t}
        n, train = len(z_u), torch.is_grad_enabled()
        for own in torch.arange(n).split(self.edit.training.batch if train else n):
            row = {k: v[own].detach().clone() for k, v in (given | out).items()}
            row |= {"text": text[torch.cat([own, n + own])], "train": train}
            rows.append(row)
        return out

    monkeypatch.setattr(SafeGenObjective, "compare", record)
    return rows


def state_of(net):
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


# ------------------------------------------------------------ parity


def published_run(model, rows, *, updates, accumulation, lr):
    """The released training step (train_text_to_image_adjust_sal.py) on recorded latents and noise.

    Left out: the third forward, on the censored latents, whose result the release never uses.
    """
    from diffusers import DDPMScheduler
    from diffusers.models.attention_processor import AttnProcessor
    from diffusers.training_utils import EMAModel

    unet, tokenizer = model.denoiser, model.pipeline.tokenizer
    unet.set_attn_processor(AttnProcessor())  # of the published torch: it rounds differently
    noise_scheduler = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000
    )
    for name, param in unet.named_parameters():
        param.requires_grad_("attn1" in name)
    ema_unet = EMAModel(unet.parameters(), decay=0.9999)
    optimizer = torch.optim.AdamW(
        unet.parameters(), lr=lr, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8
    )
    ids = tokenizer(
        "",
        max_length=tokenizer.model_max_length,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    ).input_ids
    with torch.no_grad():
        blank = model.pipeline.text_encoder(ids)[0]

    log, norms = [], []
    for update in range(updates):
        for row in rows[update * accumulation : (update + 1) * accumulation]:
            z_n, z_c, z_b, noise, noise_b, timesteps = (
                row[k] for k in ("z_u", "z_c", "z_b", "eps", "eps_b", "t")
            )
            encoder_hidden_states = blank.repeat(len(z_n), 1, 1)
            noisy_nude = noise_scheduler.add_noise(z_n, noise, timesteps)
            noisy_norm = noise_scheduler.add_noise(z_b, noise_b, timesteps)
            nude_pred = unet(noisy_nude, timesteps, encoder_hidden_states).sample
            norm_pred = unet(noisy_norm, timesteps, encoder_hidden_states).sample
            loss_mosaic = F.mse_loss(
                nude_pred.float(), (noise + (z_n - z_c)).float(), reduction="mean"
            )
            loss_preserve = F.mse_loss(norm_pred.float(), noise_b.float(), reduction="mean")
            loss = 0.1 * loss_mosaic + 0.9 * loss_preserve
            (loss / accumulation).backward()
            log.append((loss_mosaic.item(), loss_preserve.item()))
        norms.append(
            torch.nn.utils.clip_grad_norm_(
                [p for p in unet.parameters() if p.requires_grad], 1.0
            ).item()
        )
        optimizer.step()
        optimizer.zero_grad()
        ema_unet.step(unet.parameters())
    averaged = dict(
        zip([n for n, _ in unet.named_parameters()], ema_unet.shadow_params, strict=True)
    )
    return log, norms, averaged


@pytest.mark.parametrize(
    ("on", "updates", "batch", "accumulation", "lr"),
    [("tiny", 6, 1, 5, 1e-5), ("tiny", 6, 2, 2, 1e-4), ("mini", 3, 1, 2, 1e-4)],
)
def test_the_paper_preset_is_the_published_step(
    make_model, triplets, recorded, on, updates, batch, accumulation, lr
):
    if on == "mini":
        whole = Triplets.load("mini:skulls")
        triplets = Triplets(whole.folder, whole.rows[:4])
    ours, theirs = (load("mini") if on == "mini" else make_model() for _ in range(2))
    start, last, log = state_of(ours.denoiser), {}, []

    def watch(done, of, row):
        log.append(row)
        if done == of:
            last.update(state_of(ours.denoiser))

    training = Training(updates=updates, batch=batch, accumulation=accumulation, lr=lr)
    patch = SafeGen.preset("paper", training=training).apply(ours, triplets, callback=watch)

    terms, norms, averaged = published_run(
        theirs, recorded, updates=updates, accumulation=accumulation, lr=lr
    )
    assert len(recorded) == len(terms) == updates * accumulation
    for row, (loss_mosaic, loss_preserve) in zip(recorded, terms, strict=True):
        assert row["L_m"].mean().item() == pytest.approx(loss_mosaic, abs=1e-6)
        assert row["L_p"].mean().item() == pytest.approx(loss_preserve, abs=1e-6)
    assert [row["norm"] for row in log] == pytest.approx(norms, abs=1e-6)
    trained = [k for k in start if "attn1" in k]
    assert sorted(patch.tensors) == sorted(trained)
    for key, weight in theirs.denoiser.state_dict().items():
        if "attn1" in key:
            assert_close(last[key], weight, rtol=0, atol=1e-6)
            assert_close(patch.tensors[key], averaged[key], rtol=0, atol=1e-6)
            assert not torch.equal(
                weight, start[key]
            )  # the weights changed, so the comparison can fail
        else:
            assert torch.equal(last[key], start[key])
            assert torch.equal(weight, start[key])
            assert torch.equal(averaged[key], start[key])


def test_the_paper_preset_has_the_published_values():
    paper = SafeGen.preset("paper")
    assert paper.target == PaperTarget()
    assert paper.timesteps == (0, 1000)
    assert (paper.weight_mosaic, paper.weight_preserve) == (0.1, 0.9)
    assert not paper.teacher
    assert (paper.captions, paper.caption_share, paper.adversary, paper.flip) == (
        (),
        None,
        0.0,
        False,
    )
    assert paper.fade == 0.0
    assert paper.selector == "attn1"
    run = paper.training
    assert (run.updates, run.batch, run.accumulation, run.lr) == (1000, 1, 5, 1e-5)
    assert (run.warmup, run.decay, run.weight_decay, run.betas, run.clip, run.ema) == (
        0,
        "constant",
        1e-2,
        (0.9, 0.999),
        1.0,
        0.9999,
    )


# ------------------------------------------------------------ samples


def run(model, triplets, **changes):
    """Return the patch of a short run of the paper preset with changes."""
    training = Training(
        **({"updates": 12, "batch": 1, "accumulation": 1, "lr": 1e-4} | changes.pop("training", {}))
    )
    return SafeGen.preset("paper", **changes, training=training).apply(model, triplets)


def test_an_epoch_shows_every_triplet_once_and_epochs_differ(tiny_model, triplets, recorded):
    run(tiny_model, triplets)
    latents = encode_triplets(tiny_model, triplets, flip=False)[:, 0]
    order = [int((latents[0] - row["z_u"]).abs().amax((1, 2, 3)).argmin()) for row in recorded]
    assert sorted(order[:6]) == sorted(order[6:]) == list(range(6))
    assert order[:6] != order[6:]
    for i, row in zip(order, recorded, strict=True):
        for side, key in enumerate(("z_u", "z_c", "z_b")):
            assert torch.equal(row[key][0], latents[side, i])


def test_held_out_triplets_are_never_trained_on(tiny_model, triplets, recorded):
    patch = run(tiny_model, triplets, validation_split=0.34, training={"validate_every": 6})
    seen = {
        kind: {
            row["z_u"][i].sum().item()
            for row in recorded
            if row["train"] is kind
            for i in range(len(row["z_u"]))
        }
        for kind in (True, False)
    }
    assert (len(seen[True]), len(seen[False])) == (4, 2)
    assert not seen[True] & seen[False]
    assert patch.metadata.updates == 12


def test_timesteps_stay_in_their_range_and_a_triplet_has_one(tiny_model, triplets, recorded):
    run(tiny_model, triplets, timesteps=(100, 103), training={"batch": 6})
    assert {int(t) for row in recorded for t in row["t"]} == {100, 101, 102}
    assert all(row["t"].shape == (6,) for row in recorded)


def test_unsafe_and_benign_images_get_different_noise(tiny_model, triplets, recorded):
    run(tiny_model, triplets)
    assert all(not torch.equal(row["eps"], row["eps_b"]) for row in recorded)
    assert len({row["eps"].sum().item() for row in recorded}) == len(recorded)


def test_one_forward_pass_has_unsafe_and_benign_samples(make_model, triplets):
    model, sizes = make_model(), []
    model.denoiser.conv_in.register_forward_hook(
        lambda module, inputs, out: sizes.append(len(inputs[0]))
    )
    run(model, triplets, training={"updates": 2, "batch": 3})
    assert sizes == [6, 6]


def test_blank_text_is_the_only_condition_of_the_paper(tiny_model, triplets, recorded):
    run(tiny_model, triplets, training={"updates": 2})
    blank, _ = tiny_model.pipeline.encode_prompt("", "cpu", 1, False)
    assert all(torch.equal(text, blank[0]) for row in recorded for text in row["text"].hidden)


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_captions_have_their_share(tiny_model, triplets, recorded, tmp_path, share):
    lines = ["a red cube", "a blue ball"]
    (tmp_path / "calm.txt").write_text("\n".join(lines) + "\n\n")
    run(
        tiny_model,
        triplets,
        captions=(str(tmp_path / "calm.txt"),),
        caption_share=share,
        training={"batch": 6},
    )
    known = tiny_model.encode_text(["", *lines]).hidden
    kinds = [
        int((known - text).abs().amax((1, 2)).argmin())
        for row in recorded
        for text in row["text"].hidden
    ]
    assert len(kinds) == 12 * 12
    assert set(kinds) == ({0, 1, 2} if share < 1 else {1, 2})
    assert sum(k == 0 for k in kinds) / len(kinds) == pytest.approx(1 - share, abs=0.15)


def test_a_flip_mirrors_all_three_images(tiny_model, triplets, recorded):
    both = encode_triplets(tiny_model, triplets, flip=True)
    plain = encode_triplets(tiny_model, triplets, flip=False)
    assert torch.equal(both[:, :1], plain)
    mirrored = [[preprocess(image, 32).flip(-1) for image in triplets.images(i)] for i in range(6)]
    for side in range(3):
        assert torch.equal(
            both[side, 1], tiny_model.encode_images(torch.stack([row[side] for row in mirrored]))
        )
    run(tiny_model, triplets, flip=True)
    seen = set()
    for row in recorded:
        hits = (
            both - torch.stack([row["z_u"][0], row["z_c"][0], row["z_b"][0]])[:, None, None]
        ).abs().amax((0, 3, 4, 5)) == 0
        assert hits.sum() == 1
        seen.add(int(hits.nonzero()[0, 0]))
    assert seen == {0, 1}


def test_images_are_resized_by_the_short_side_and_center_cropped():
    wide = Image.new("RGB", (128, 64), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 96, 64))
    pixels = preprocess(wide, 32)
    assert pixels.shape == (3, 32, 32)
    assert_close(
        pixels[:, :, 2:-2], torch.tensor([-1.0, -1.0, 1.0])[:, None, None].expand(3, 32, 28)
    )
    exact = Image.effect_noise((32, 32), 90).convert("RGB")
    assert_close(
        (preprocess(exact, 32) + 1) * 127.5,
        torch.from_numpy(np.array(exact)).permute(2, 0, 1).float(),
    )


# ------------------------------------------------------------ terms


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("teacher", [True, False])
@pytest.mark.parametrize("anchor", ["noise", "teacher"])
def test_losses_equal_plain_forward_passes(make_model, triplets, prediction, teacher, anchor):
    model = make_model(prediction_type=prediction)
    settings = SafeGen(target=X0Target(anchor=anchor), teacher=teacher, **PLAIN)
    objective = SafeGenObjective(
        settings, model, triplets, select_parameters(model.denoiser, "attn1")
    )
    g = torch.Generator().manual_seed(0)
    z_u, z_c, z_b, eps, eps_b = (torch.randn(2, 4, 8, 8, generator=g) for _ in range(5))
    t, text = torch.tensor([5, 700]), model.encode_text(["", "", "", "a red cube"])
    untouched, changed = (
        make_model(prediction_type=prediction).denoiser,
        make_model(prediction_type=prediction).denoiser,
    )
    with torch.no_grad():
        for name in select_parameters(changed, "attn1"):
            changed.get_parameter(name).mul_(1.5)
        found = objective.compare(changed, z_u, z_c, z_b, eps, eps_b, t, text)
        scheduler = model.pipeline.scheduler
        abar = scheduler.alphas_cumprod[t][:, None, None, None]
        x_u, x_b = scheduler.add_noise(z_u, eps, t), scheduler.add_noise(z_b, eps_b, t)
        said = predict(untouched, x_u, t, text[:2])
        if prediction == "epsilon":
            start, ordinary = said if anchor == "teacher" else eps, eps_b
            want = start + (abar / (1 - abar)).sqrt().clamp(max=3.0) * (z_u - z_c)
        else:
            start = said if anchor == "teacher" else scheduler.get_velocity(z_u, eps, t)
            want = start + (1 - abar).rsqrt().clamp(max=3.0) * (z_u - z_c)
            ordinary = scheduler.get_velocity(z_b, eps_b, t)
        keep = predict(untouched, x_b, t, text[2:]) if teacher else ordinary
        l_m = (predict(changed, x_u, t, text[:2]) - want).pow(2).mean((1, 2, 3))
        l_p = (predict(changed, x_b, t, text[2:]) - keep).pow(2).mean((1, 2, 3))
    assert_close(found["L_m"], l_m, rtol=1e-5, atol=1e-6)
    assert_close(found["L_p"], l_p, rtol=1e-5, atol=1e-6)
    assert l_p.min() > 1e-6


def test_l_p_with_a_teacher_starts_at_zero(tiny_model, triplets):
    log = []
    settings = SafeGen(
        target=X0Target(anchor="noise"),
        teacher=True,
        **PLAIN,
        training=Training(updates=4, accumulation=1, lr=1e-3),
    )
    settings.apply(tiny_model, triplets, callback=lambda done, of, row: log.append(row))
    assert log[0]["L_p"] < 1e-10
    assert log[-1]["L_p"] > 1e-8
    assert log[0]["L_m"] > 1e-3


def test_training_lowers_the_loss(tiny_model, triplets):
    settings = SafeGen(
        target="x0",
        teacher=True,
        **PLAIN,
        timesteps=(400, 600),
        training=Training(updates=40, batch=4, accumulation=1, lr=3e-3, validate_every=20),
        validation_split=0.2,
    )
    log = []
    settings.apply(tiny_model, triplets, callback=lambda done, of, row: log.append(row))
    assert sum(row["L_m"] for row in log[-5:]) < sum(row["L_m"] for row in log[:5])


@pytest.mark.filterwarnings("ignore::safegen.workflows.edit.FewTripletsWarning")
def test_provenance(tiny_model, triplets, tmp_path):
    patch = edit_model(
        tiny_model,
        "safegen",
        triplets=triplets.folder,
        preset="paper",
        checkpoint_dir=tmp_path,
        training={"updates": 2, "accumulation": 1},
    )
    facts = patch.metadata.to_json()
    assert (facts["method"], facts["model"], facts["updates"], facts["stopped_early"]) == (
        "safegen",
        "tiny",
        2,
        False,
    )
    assert (facts["base"], facts["data"]) == (tiny_model.hash, triplets.hash)
    resolved = resolve_precision("auto", tiny_model.denoiser)
    assert SafeGen.model_validate(facts["settings"]) == make_edit(
        "safegen", "paper", training={"updates": 2, "accumulation": 1, "precision": resolved}
    )
    assert set(facts["losses"]) == {"L_m", "L_p"}
    assert (tmp_path / "checkpoint.safetensors").is_file()


def test_a_checkpoint_of_other_triplets_settings_or_model_does_not_resume(
    make_model, tiny_model, triplets, tmp_path
):
    def again(model=tiny_model, rows=triplets, **changes):
        edit = SafeGen.preset("paper", **changes, training=Training(updates=1, accumulation=1))
        return edit.apply(
            model, rows, checkpoint_dir=tmp_path, resume=(tmp_path / "log.jsonl").exists()
        )

    again()
    again()
    fewer = type(triplets)(triplets.folder, triplets.rows[:5])
    coder, noisier = (
        make_model(),
        make_model(beta_end=0.02),
    )  # the very denoiser, and other latents or another schedule
    with torch.no_grad():
        next(coder.vae.parameters()).add_(0.01)
    assert coder.hash == noisier.hash == tiny_model.hash
    for change in (
        {"rows": fewer},
        {"weight_mosaic": 0.2},
        {"model": make_model(9)},
        {"model": coder},
        {"model": noisier},
    ):
        with pytest.raises(FileError, match="other settings, data or weights"):
            again(**change)


def test_a_model_in_bf16_is_edited_under_autocast(tiny_folder, triplets):
    model = load(str(tiny_folder), dtype="bf16")
    before = state_of(model.denoiser)
    patch = run(model, triplets, training={"updates": 2, "precision": "bf16"})
    assert {v.dtype for v in patch.tensors.values()} == {torch.float32}
    after = state_of(model.denoiser)
    assert all(torch.equal(v, after[k]) and v.dtype == after[k].dtype for k, v in before.items())


@pytest.mark.parametrize(("able", "want"), [("avx512_bf16", "bf16"), ("avx2", "fp32")])
def test_auto_precision_follows_the_device_and_is_in_the_metadata(
    make_model, triplets, monkeypatch, able, want
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    auto = run(make_model(3), triplets, training={"updates": 2, "precision": "auto"})
    assert auto.metadata.settings["training"]["precision"] == want
    said = run(make_model(3), triplets, training={"updates": 2, "precision": want})
    assert all(torch.equal(v, said.tensors[k]) for k, v in auto.tensors.items())


def test_a_run_with_auto_precision_resumes_in_the_same_precision(
    make_model, triplets, monkeypatch, tmp_path
):
    edit = SafeGen(**PLAIN, training=Training(updates=2, precision="auto"))

    def again(able, **more):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
        return edit.apply(make_model(3), triplets, checkpoint_dir=tmp_path / "work", **more)

    again("avx2")
    again("avx2", resume=True)
    with pytest.raises(FileError, match="other settings, data or weights"):
        again("amx_bf16", resume=True)


def test_auto_trains_a_model_in_bf16_under_bf16(tiny_folder, triplets, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    patch = run(
        load(str(tiny_folder), dtype="bf16"), triplets, training={"updates": 1, "precision": "auto"}
    )
    assert patch.metadata.settings["training"]["precision"] == "bf16"


def test_a_model_in_bf16_cannot_be_edited_in_fp32(tiny_folder, triplets):
    model = load(str(tiny_folder), dtype="bf16")
    with pytest.raises(ConfigError, match="precision"):
        run(model, triplets, training={"updates": 1})


def test_a_faded_sample_is_between_the_unsafe_and_the_censored_image(
    tiny_model, triplets, recorded
):
    whole = encode_triplets(tiny_model, triplets, flip=False)[:, 0]
    SafeGen(fade=0.8, **PLAIN, training=Training(updates=8, batch=4, accumulation=1)).apply(
        tiny_model, triplets
    )
    left = []
    for row in recorded:
        for z_u, z_c in zip(row["z_u"], row["z_c"], strict=True):
            i = int((whole[1] - z_c).abs().sum((1, 2, 3)).argmin())
            gap = whole[0, i] - z_c
            share = float((z_u - z_c).flatten() @ gap.flatten() / gap.pow(2).sum())
            assert_close(z_u, z_c + share * gap, rtol=0, atol=1e-5)
            left.append(share)
    assert 0.2 - 1e-5 <= min(left) < 0.4  # of 32 draws from 0.2 to 1
    assert 0.8 < max(left) <= 1 + 1e-5


def test_without_fading_a_sample_is_the_unsafe_image(tiny_model, triplets, recorded):
    whole = encode_triplets(tiny_model, triplets, flip=False)[0, 0]
    SafeGen(fade=0.0, **PLAIN, training=Training(updates=2, batch=2, accumulation=1)).apply(
        tiny_model, triplets
    )
    for z_u in torch.cat([row["z_u"] for row in recorded]):
        assert (whole - z_u).abs().sum((1, 2, 3)).min() == 0


# ------------------------------------------------------------ refusals


REFUSED = {
    "No setting|no setting|Extra inputs|extra": {"target": {"name": "paper", "clamp": 3.0}},
    "target.x0.clamp must be greater than 0": {"target": {"name": "x0", "clamp": 0}},
    "target must be one of 'x0', 'paper', got 'x1'": {"target": "x1"},
    "caption_share must be greater than 0": {
        "captions": ("mini:benign-train",),
        "caption_share": 0.0,
    },
    "adversary": {"adversary": -0.1},
    "adversary_moves must be 'unsafe' or 'both'": {"adversary_moves": "benign"},
    "fade": {"fade": 1.0},
    "timesteps must be 0 <= first < last": {"timesteps": (500, 500)},
    "first < last, got": {"timesteps": (-1, 500)},
    "weight_mosaic and weight_preserve must not both be 0": {
        "weight_mosaic": 0,
        "weight_preserve": 0,
    },
    "weight_mosaic": {"weight_mosaic": -1},
    "training.lr": {"training": {"lr": -1}},
    "training.lrr": {"training": {"lrr": 1}},
    "validation_split must be less than 0.5, got 0.7": {
        "validation_split": 0.7,
        "training": {"validate_every": 1},
    },
    "teacher": {"teacher": "perhaps"},
}


@pytest.mark.parametrize("words", sorted(REFUSED))
def test_an_invalid_setting_raises_one_line(words):
    with pytest.raises(ConfigError, match=words) as caught:
        make_edit("safegen", **REFUSED[words])
    assert "\n" not in str(caught.value)
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("wrong", "near"),
    [({"weight_mosiac": 0.2}, "weight_mosaic"), ({"training": {"updats": 3}}, "updates")],
)
def test_a_misspelled_setting_suggests_the_nearest(wrong, near):
    with pytest.raises(ConfigError, match=near):
        make_edit("safegen", **wrong)


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        SafeGen().weight_mosaic = 0.7


def test_target_paper_raises_on_a_v_model(make_model, triplets):
    with pytest.raises(ConfigError, match="Use target x0"):
        run(make_model(prediction_type="v_prediction"), triplets)


def test_timesteps_beyond_the_schedule_raise(make_model, triplets):
    with pytest.raises(ConfigError, match="must end by 100 on this model, got 1000"):
        run(make_model(num_train_timesteps=100), triplets)


def test_an_empty_validation_split_raises(tiny_model, triplets):
    with pytest.raises(
        ConfigError, match=r"validation_split must hold out at least one triplet, got 0.05 of 6"
    ):
        run(tiny_model, triplets, validation_split=0.05, training={"validate_every": 1})


def test_the_default_validation_split_is_a_tenth(tiny_model, triplets, recorded):
    settings = {"updates": 2, "accumulation": 1, "validate_every": 2}
    run(tiny_model, triplets, training=settings)
    run(tiny_model, triplets, validation_split=0.1, training=settings)
    looks = [row for row in recorded if not row["train"]]
    assert len(looks) == 2 * 8  # eight samples per validation, one validation
    assert all(len(row["z_u"]) == 1 for row in looks)  # a tenth of six, rounded
    for before, after in zip(looks[:8], looks[8:], strict=True):
        assert torch.equal(before["z_u"], after["z_u"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"validation_split": 0.25, "training": {"validate_every": 5}},
        {"training": {"validate_every": 5}},
    ],
)
def test_settings_survive_json(changes):
    settings = make_edit("safegen", **changes)
    assert SafeGen.model_validate_json(settings.model_dump_json()) == settings
    assert SafeGen.model_validate(settings.model_dump()) == settings


def test_unreadable_captions_raise(tiny_model, triplets, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    for name, words in [
        ("missing.txt", "does not exist"),
        ("empty.txt", "is empty"),
        ("bytes.txt", "bytes.txt"),
    ]:
        with pytest.raises(FileError, match=words):
            run(tiny_model, triplets, captions=(str(tmp_path / name),), caption_share=0.5)
    with pytest.raises(UnknownNameError, match="Did you mean 'mini'"):
        run(tiny_model, triplets, captions=("minni:benign",), caption_share=0.5)


def test_missing_triplets_raise(tiny_model, tmp_path):
    with pytest.raises(FileError, match="does not exist"):
        edit_model(tiny_model, triplets=tmp_path / "nothing")


@pytest.mark.filterwarnings("ignore::safegen.workflows.edit.FewTripletsWarning")
@pytest.mark.parametrize("method", ["safegen", "safegen-plus"])
def test_triplets_without_the_concept_raise_one_line(tiny_model, triplets, method):
    rows = []
    for row in triplets.rows:
        digests = row.sha256.model_copy(
            update={"unsafe": row.sha256.benign, "censored": row.sha256.benign}
        )
        rows.append(
            row.model_copy(update={"unsafe": row.benign, "censored": row.benign, "sha256": digests})
        )
    harmless = Triplets(triplets.folder, tuple(rows))
    words = {"erase": ("red cube",)} if method == "safegen-plus" else {}
    with pytest.raises(
        ConfigError,
        match="triplets must show the concept, but every censored image equals its unsafe one",
    ) as caught:
        edit_model(
            tiny_model,
            method,
            triplets=harmless,
            training={"updates": 1, "batch": 1, "warmup": 0},
            **words,
        )
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------ the adversary


def test_fast_gradient_text_is_at_its_radius_and_raises_the_loss(tiny_model):
    g = torch.Generator().manual_seed(0)
    channels, side = tiny_model.denoiser.config.in_channels, tiny_model.denoiser.config.sample_size
    x, want = torch.randn(2, 3, channels, side, side, generator=g)
    t, text = torch.tensor([100, 400, 800]), tiny_model.encode_text(["a", "b", "c"]).float()
    worse = fast_gradient_text(tiny_model.denoiser, x, t, text, want, radius=0.01)
    moved = (worse.hidden - text.hidden).norm(dim=(1, 2))
    assert torch.allclose(moved, 0.01 * text.hidden.norm(dim=(1, 2)), rtol=1e-4)
    assert not worse.hidden.requires_grad

    @torch.no_grad()
    def loss(c):
        return losses.squared_error(predict(tiny_model.denoiser, x, t, c), want)

    assert (loss(worse) > loss(text)).all()
    assert all(p.grad is None for p in tiny_model.denoiser.parameters())


UNUSED_CONCEPTS = {
    "the paper trains with no captions": {"preset": "paper"},
    "no captions are wanted": {"captions": ()},
    "the captions are given": {"captions": ("mini:benign-train",)},
    "the concept has none": {"concept": load_concept("skulls").model_copy(update={"captions": ()})},
}


def test_unsafe_and_censored_images_of_different_sizes_raise(tiny_model, triplets):

    class Wide(Triplets):
        def images(self, i):
            unsafe, censored, benign = super().images(i)
            return (
                unsafe,
                censored.resize((2 * censored.width, censored.height)) if i == 3 else censored,
                benign,
            )

    wide = Wide(triplets.folder, triplets.rows)
    with pytest.raises(
        FileError,
        match=r"triplet 3: unsafe and censored image must have one size, got \d+x\d+ and \d+x\d+",
    ):
        encode_triplets(tiny_model, wide, flip=False)


def test_seconds_include_the_preparation(tiny_model, triplets, monkeypatch):
    from safegen.edits.training import samples

    plain = samples.encode_triplets
    monkeypatch.setattr(
        "safegen.edits.safegen.encode_triplets",
        lambda *args, **more: time.sleep(0.5) or plain(*args, **more),
    )
    began = time.perf_counter()
    patch = SafeGen(**PLAIN, training=Training(updates=1, accumulation=1)).apply(
        tiny_model, triplets
    )
    assert 0.5 <= patch.metadata.seconds <= time.perf_counter() - began


@pytest.mark.parametrize(
    "why",
    [
        pytest.param(why, marks=() if "paper" in why else pytest.mark.slow)
        for why in sorted(UNUSED_CONCEPTS)
    ],
)
def test_a_concept_without_effect_on_settings_still_checks_triplets(tiny_model, why):
    settings = {
        "concept": "skulls",
        "training": {"updates": 1, "batch": 1, "warmup": 0, "accumulation": 1},
    } | UNUSED_CONCEPTS[why]
    with pytest.raises(
        ConfigError, match=r"must show 'skulls', but judge 'mini' sees it in none of 100"
    ) as caught:
        edit_model(tiny_model, triplets="mini:fire", **settings)
    assert "\n" not in str(caught.value)
    alone = {k: v for k, v in settings.items() if k != "concept"}
    with_it, without = (
        edit_model(tiny_model, triplets="mini:skulls", **s) for s in (settings, alone)
    )
    assert with_it.metadata.settings == without.metadata.settings


def test_a_concept_provides_captions_with_triplets(tiny_model):
    patch = edit_model(
        tiny_model,
        triplets="mini:skulls",
        concept="skulls",
        training={"updates": 1, "batch": 1, "warmup": 0},
    )
    assert patch.metadata.settings["captions"] == list(load_concept("skulls").captions)


def test_a_concept_provides_captions_but_none_for_paper():
    assert make_edit("safegen", concept="skulls").captions == load_concept("skulls").captions != ()
    assert make_edit("safegen", "paper", concept="skulls").captions == ()
