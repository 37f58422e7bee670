"""Trainer: interruption, resume, restored networks, and the arithmetic of AdamW."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close

from safegen.core.errors import (
    ConfigError,
    DivergedError,
    FileError,
    InterruptedRunError,
    SafegenError,
    UnusedSettingWarning,
    UserError,
)
from safegen.edits.training import trainer
from safegen.edits.training.config import Training
from safegen.models.selectors import select_parameters
from safegen.workflows.edit import prepare_edit

TRUTH = torch.tensor([[1.0, -2.0, 0.5], [0.3, 0.8, -1.0]])
QUICK = Training(
    updates=6,
    batch=2,
    accumulation=2,
    lr=1e-3,
    warmup=2,
    decay="cosine",
    ema=0.9,
    validate_every=2,
    seed=7,
)
"""Settings that use every component with a state."""
CHECKPOINTED = QUICK.model_copy(update={"checkpoint_every": 3})
"""The same settings with checkpoints."""


class Denoise:
    """Denoising of random latents with the generator of the trainer."""

    weights: Mapping[str, float] = {"near": 0.7, "far": 0.3}
    fingerprint = "denoise"

    def training_step(self, denoiser, micro_step, generator, share):
        x, text = (
            torch.randn(2, 4, 8, 8, generator=generator),
            torch.randn(2, 5, 32, generator=generator),
        )
        t = torch.randint(1000, (2,), generator=generator)
        out = denoiser(x, t, text).sample
        return {
            "near": (out - x).pow(2).mean((1, 2, 3)),
            "far": (out + x + micro_step).pow(2).mean((1, 2, 3)),
        }

    def validation_loss(self, denoiser):
        return sum(
            v.mean().item()
            for v in self.training_step(
                denoiser, 0, torch.Generator().manual_seed(1), (0, 1)
            ).values()
        )


class LinearFit:
    """Fit of y = TRUTH x on rows in turn, without randomness."""

    weights: Mapping[str, float] = {"fit": 1.0}
    fingerprint = "line"

    def __init__(self, batch: int = 4, looks: tuple[float, ...] = ()) -> None:
        self.batch, self.looks = batch, iter(looks)
        self.rows = torch.randn(4, 3, generator=torch.Generator().manual_seed(3))

    def training_step(self, denoiser, micro_step, generator, share):
        x = self.rows[[(micro_step * self.batch + i) % 4 for i in range(self.batch)]]
        return {"fit": (denoiser(x) - x @ TRUTH.T).pow(2).mean(1)}

    def validation_loss(self, denoiser):
        return next(self.looks)


def train(net, names, objective, config, **options):
    """Train an objective with its fingerprint."""
    return trainer.train(
        net, names, objective, config, fingerprint=objective.fingerprint, **options
    )


@pytest.fixture
def line():
    net = nn.Linear(3, 2)
    with torch.no_grad():
        net.weight.fill_(0.1)
        net.bias.fill_(-0.2)
    return net


@pytest.fixture(scope="module")
def denoiser(make_model):
    """Return a tiny UNet for all tests, as the trainer restores it."""
    return make_model().denoiser


@pytest.fixture(scope="module")
def names(denoiser):
    return select_parameters(denoiser, "attn1")


@pytest.fixture(scope="module")
def reference(denoiser, names):
    """Return the result of an uninterrupted run."""
    return train(denoiser, names, Denoise(), QUICK)


def state_of(net):
    return {k: v.detach().clone() for k, v in net.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        assert torch.equal(value, b[key]), key


def without_time(log):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


def stop_at(update, number=signal.SIGINT):
    def callback(done, of, row):
        if done == update:
            os.kill(os.getpid(), number)

    return callback


def break_at(update):
    def callback(done, of, row):
        if done == update:
            raise ConnectionError("pulled the plug")

    return callback


# ------------------------------------------------------------ interruption and resume


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("update", [1, 4])
def test_a_run_stopped_by_a_signal_resumes_bit_for_bit(
    denoiser, names, reference, tmp_path, number, update
):
    with pytest.raises(
        InterruptedRunError, match=rf"after update {update} of 6. Resume \(--resume\) continues"
    ):
        train(
            denoiser,
            names,
            Denoise(),
            CHECKPOINTED,
            checkpoint_dir=tmp_path / "run",
            callback=stop_at(update, number),
        )
    found = train(
        denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path / "run", resume=True
    )
    same(found.tensors, reference.tensors)
    assert without_time(found.log) == without_time(reference.log)


@pytest.mark.parametrize("update", [4, 6])
def test_a_run_that_failed_after_a_checkpoint_resumes_bit_for_bit(
    denoiser, names, reference, tmp_path, update
):
    with pytest.raises(ConnectionError):
        train(
            denoiser,
            names,
            Denoise(),
            CHECKPOINTED,
            checkpoint_dir=tmp_path,
            callback=break_at(update),
        )
    found = train(denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path, resume=True)
    same(found.tensors, reference.tensors)
    assert without_time(found.log) == without_time(reference.log)


def test_a_run_can_be_stopped_at_every_update(denoiser, names, reference, tmp_path):
    for update in (1, 2, 3, 4, 5):
        with pytest.raises(InterruptedRunError):
            train(
                denoiser,
                names,
                Denoise(),
                CHECKPOINTED,
                checkpoint_dir=tmp_path,
                resume=update > 1,
                callback=stop_at(update),
            )
    same(
        train(
            denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path, resume=True
        ).tensors,
        reference.tensors,
    )


class EveryThird(Denoise):
    """Denoising that can be resumed after every third update only."""

    done, stop_reason = 0, None

    def after_update(self, row):
        self.done = int(row["update"])

    @property
    def can_checkpoint(self):
        return self.done % 3 == 0


@pytest.mark.parametrize("every", [1, 2, 5])
def test_checkpoint_and_stop_wait_until_the_objective_allows_them(
    denoiser, names, reference, tmp_path, every
):
    config = QUICK.model_copy(update={"checkpoint_every": every})
    if every < 5:  # the one of update 1 or 2 is written after update 3
        with pytest.raises(ConnectionError):
            train(
                denoiser, names, EveryThird(), config, checkpoint_dir=tmp_path, callback=break_at(5)
            )
    else:
        with pytest.raises(InterruptedRunError, match="after update 3 of 6"):
            train(
                denoiser, names, EveryThird(), config, checkpoint_dir=tmp_path, callback=stop_at(1)
            )
    rows = (tmp_path / "log.jsonl").read_text().splitlines()
    assert len(rows) == 3
    found = train(denoiser, names, EveryThird(), config, checkpoint_dir=tmp_path, resume=True)
    same(found.tensors, reference.tensors)


def test_a_stop_without_a_checkpoint_directory_does_not_wait(denoiser, names):
    with pytest.raises(InterruptedRunError, match="after update 1 of 6"):
        train(denoiser, names, EveryThird(), QUICK, callback=stop_at(1))


def test_a_finished_run_resumes_to_the_same_result(denoiser, names, reference, tmp_path):
    train(denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path)
    again = train(denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path, resume=True)
    same(again.tensors, reference.tensors)
    assert without_time(again.log) == without_time(reference.log)


def test_a_stop_during_the_last_update_has_no_effect(denoiser, names, reference):
    same(train(denoiser, names, Denoise(), QUICK, callback=stop_at(6)).tensors, reference.tensors)


def test_a_stop_without_a_checkpoint_directory_says_that_nothing_was_saved(line):
    with pytest.raises(
        InterruptedRunError, match="Nothing was saved, as there is no checkpoint directory"
    ):
        train(line, ["weight"], LinearFit(), Training(updates=3), callback=stop_at(1))


def test_signal_handlers_are_restored(line):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(InterruptedRunError):
        train(line, ["weight"], LinearFit(), Training(updates=3), callback=stop_at(1))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_loop_runs_outside_the_main_thread(line):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(train(line, ["weight"], LinearFit(), Training(updates=2)))
    )
    thread.start()
    thread.join()
    same(found[0].tensors, train(line, ["weight"], LinearFit(), Training(updates=2)).tensors)


def test_the_directory_has_the_checkpoint_and_a_log_row_per_update(denoiser, names, tmp_path):
    found = train(
        denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path / "deep" / "run"
    )
    assert {p.name for p in (tmp_path / "deep" / "run").iterdir()} == {
        "checkpoint.safetensors",
        "log.jsonl",
    }
    rows = [
        json.loads(text)
        for text in (tmp_path / "deep" / "run" / "log.jsonl").read_text().splitlines()
    ]
    assert rows == found.log
    assert [row["update"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"near", "far", "lr", "norm", "seconds"} <= row.keys() for row in rows)
    assert [row["update"] for row in rows if "validation_loss" in row] == [2, 4, 6]


@pytest.mark.parametrize(
    "change", [{"lr": 2e-3}, {"seed": 8}, {"ema": 0.5}, {"updates": 7}, {"accumulation": 1}]
)
def test_a_checkpoint_of_other_settings_does_not_resume(denoiser, names, tmp_path, change):
    with pytest.raises(InterruptedRunError):
        train(
            denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path, callback=stop_at(1)
        )
    with pytest.raises(FileError, match="other settings"):
        train(
            denoiser,
            names,
            Denoise(),
            QUICK.model_copy(update=change),
            checkpoint_dir=tmp_path,
            resume=True,
        )


def test_a_checkpoint_of_another_objective_does_not_resume(line, tmp_path):
    train(line, ["weight"], LinearFit(), Training(updates=1), checkpoint_dir=tmp_path)
    other = LinearFit()
    other.fingerprint = "another line"
    with pytest.raises(FileError, match="other settings, data or weights"):
        train(line, ["weight"], other, Training(updates=1), checkpoint_dir=tmp_path, resume=True)


def test_checkpoint_every_can_change_on_resume(denoiser, names, reference, tmp_path):
    with pytest.raises(InterruptedRunError):
        train(
            denoiser, names, Denoise(), CHECKPOINTED, checkpoint_dir=tmp_path, callback=stop_at(2)
        )
    found = train(
        denoiser,
        names,
        Denoise(),
        QUICK.model_copy(update={"checkpoint_every": 1}),
        checkpoint_dir=tmp_path,
        resume=True,
    )
    same(found.tensors, reference.tensors)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def pipe(path):
    path.unlink()
    os.mkfifo(path)


STATE = (
    '{"update": 1, "seconds": 1.0, "best_loss": null, "validations_without_gain": 0, "skipped": 0, '
    '"scaler": null}'
)


def rewrite(folder, tensors=None, **header):
    """Write a checkpoint again with other tensors or header entries; None removes one."""
    path = folder / "checkpoint.safetensors"
    with safe_open(path, framework="pt") as file:
        stated = dict(file.metadata()) | header
    found = load_file(path) | (tensors or {})
    save_file(
        {name: value for name, value in found.items() if value is not None},
        path,
        metadata={key: value for key, value in stated.items() if value is not None},
    )


DAMAGE = {
    "a truncated checkpoint": lambda f: cut(f / "checkpoint.safetensors"),
    "an empty checkpoint": lambda f: (f / "checkpoint.safetensors").write_bytes(b""),
    "another safetensors file": lambda f: save_file(
        {"w": torch.zeros(2)}, f / "checkpoint.safetensors"
    ),
    "no log": lambda f: (f / "log.jsonl").unlink(),
    "a truncated log": lambda f: cut(f / "log.jsonl"),
    "a pipe as a log": lambda f: pipe(f / "log.jsonl"),
    "a pipe as a checkpoint": lambda f: pipe(f / "checkpoint.safetensors"),
    "a log row that is a number": lambda f: (f / "log.jsonl").write_text("3\n"),
    "a log row without an update": lambda f: (f / "log.jsonl").write_text('{"fit": 1.0}\n'),
    "a log row of text": lambda f: (f / "log.jsonl").write_text('{"update": "x"}\n'),
    "a deep log": lambda f: (f / "log.jsonl").write_text("[" * 10**5),
    "no state": lambda f: rewrite(f, state=None),
    "a state that is no JSON": lambda f: rewrite(f, state="{"),
    "a deep state": lambda f: rewrite(f, state="[" * 10**5),
    "a state without its values": lambda f: rewrite(f, state="{}"),
    "a negative update": lambda f: rewrite(f, state=STATE.replace("1,", "-1,", 1)),
    "a weight of another shape": lambda f: rewrite(f, {"weight/weight": torch.zeros(1)}),
    "a weight of integers": lambda f: rewrite(f, {"weight/weight": torch.zeros(2, 3).int()}),
    "NaN in a moment": lambda f: rewrite(f, {"exp_avg/weight": torch.full((2, 3), math.nan)}),
    "no moment": lambda f: rewrite(f, {"exp_avg/weight": None}),
    "no average": lambda f: rewrite(f, {"ema/weight": None}),
    "a log of bytes": lambda f: (f / "log.jsonl").write_bytes(b"\xff\xfe\x00"),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_checkpoint_is_refused_in_one_line(line, tmp_path, damage):
    train(line, ["weight"], LinearFit(), Training(updates=1), checkpoint_dir=tmp_path)
    DAMAGE[damage](tmp_path)
    with pytest.raises(FileError) as caught:
        train(
            line, ["weight"], LinearFit(), Training(updates=1), checkpoint_dir=tmp_path, resume=True
        )
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


VALUES = {k for k in DAMAGE if k.startswith(("a weight", "NaN", "no moment", "no average"))}
"""Damage of tensors, which is found when they are read."""


@pytest.mark.parametrize("damage", sorted(DAMAGE.keys() - VALUES))
def test_a_damaged_checkpoint_is_refused_before_batches_are_prepared(line, tmp_path, damage):
    train(line, ["weight"], LinearFit(), Training(updates=1), checkpoint_dir=tmp_path)
    DAMAGE[damage](tmp_path)
    with pytest.raises(FileError) as caught:
        trainer.check_training(line, ["weight"], Training(), checkpoint_dir=tmp_path, resume=True)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileError) as earlier:  # than any triplet is read
        prepare_edit("safegen", triplets="none", checkpoint_dir=tmp_path, resume=True)
    assert str(earlier.value) == str(caught.value)


def test_resume_without_a_checkpoint_is_refused(line, tmp_path):
    with pytest.raises(FileError, match="to resume"):
        train(
            line, ["weight"], LinearFit(), Training(updates=1), checkpoint_dir=tmp_path, resume=True
        )
    with pytest.raises(ConfigError, match="resume needs the checkpoint directory"):
        train(line, ["weight"], LinearFit(), Training(updates=1), resume=True)


def test_an_unwritable_checkpoint_directory_is_refused_in_one_line(line, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="file"):
        train(line, ["weight"], LinearFit(), Training(updates=1), checkpoint_dir=tmp_path / "file")


# ------------------------------------------------------------ restored state


ENDS = {
    "finished": (None, None),
    "stopped": (InterruptedRunError, stop_at(2)),
    "broken": (ConnectionError, break_at(2)),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("end", sorted(ENDS))
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_denoiser_is_restored(make_model, names, end, training, checkpointing):
    error, callback = ENDS[end]
    net = make_model(3).denoiser.train(training)
    for i, p in enumerate(net.parameters()):
        p.requires_grad_(i % 3 == 0)
    before, flags, places = (
        state_of(net),
        [p.requires_grad for p in net.parameters()],
        [p.data_ptr() for p in net.parameters()],
    )
    settings = QUICK.model_copy(update={"gradient_checkpointing": checkpointing, "updates": 3})
    if error:
        with pytest.raises(error):
            train(net, names, Denoise(), settings, callback=callback)
    else:
        train(net, names, Denoise(), settings)
    same(state_of(net), before)
    assert [p.requires_grad for p in net.parameters()] == flags
    assert [p.data_ptr() for p in net.parameters()] == places
    assert net.training is training
    assert not net.is_gradient_checkpointing
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_restored_denoiser_predicts_the_same(make_model, names, precision):
    net = make_model(3).denoiser
    g = torch.Generator().manual_seed(0)
    x, text, t = (
        torch.randn(2, 4, 8, 8, generator=g),
        torch.randn(2, 5, 32, generator=g),
        torch.tensor([10, 900]),
    )

    def answer():
        with torch.no_grad():
            return net(x, t, text).sample

    before = answer()
    train(net, names, Denoise(), QUICK.model_copy(update={"precision": precision, "updates": 3}))
    assert torch.equal(answer(), before)
    assert "forward" not in vars(net)


def test_enabled_gradient_checkpointing_stays_enabled(make_model, names):
    net = make_model(3).denoiser
    net.enable_gradient_checkpointing()
    train(
        net,
        names,
        Denoise(),
        QUICK.model_copy(update={"gradient_checkpointing": True, "updates": 3}),
    )
    assert net.is_gradient_checkpointing


def test_only_the_selected_weights_change(denoiser, names):
    before, after = state_of(denoiser), {}
    found = train(
        denoiser,
        names,
        Denoise(),
        QUICK,
        callback=lambda done, of, row: after.update(state_of(denoiser)) if done == of else None,
    )
    assert list(found.tensors) == names
    changed = {k for k, v in before.items() if not torch.equal(v, after[k])}
    assert changed == set(names)


def test_training_neither_uses_nor_changes_the_global_random_state(denoiser, names, reference):
    with torch.random.fork_rng():
        torch.manual_seed(99)
        before = torch.get_rng_state()
        same(train(denoiser, names, Denoise(), QUICK).tensors, reference.tensors)
        assert torch.equal(torch.get_rng_state(), before)


def test_another_seed_gives_other_weights(denoiser, names, reference):
    found = train(denoiser, names, Denoise(), QUICK.model_copy(update={"seed": 8}))
    assert any(not torch.equal(v, reference.tensors[k]) for k, v in found.tensors.items())


# ------------------------------------------------------------ arithmetic


def test_an_update_is_adamw_on_the_clipped_weighted_mean(line):
    settings = Training(
        updates=8, batch=2, accumulation=2, lr=0.05, weight_decay=0.1, clip=0.5, ema=0
    )
    oracle = nn.Linear(3, 2)
    oracle.load_state_dict(line.state_dict())
    optimiser, norms = (
        torch.optim.AdamW(
            oracle.parameters(), lr=0.05, weight_decay=0.1, betas=(0.9, 0.999), eps=1e-8
        ),
        [],
    )
    rows = LinearFit().rows
    for _ in range(8):
        nn.functional.mse_loss(oracle(rows), rows @ TRUTH.T).backward()
        norms.append(float(nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)))
        optimiser.step()
        optimiser.zero_grad()
    found = train(line, ["weight", "bias"], LinearFit(batch=2), settings)
    assert_close(found.tensors["weight"], oracle.weight.detach(), rtol=0, atol=1e-6)
    assert_close(found.tensors["bias"], oracle.bias.detach(), rtol=0, atol=1e-6)
    assert [row["norm"] for row in found.log] == pytest.approx(norms, abs=1e-6)  # before clipping
    assert max(norms) > 0.5


@pytest.mark.parametrize("k", [2, 4])
def test_k_accumulated_batches_of_one_equal_one_batch_of_k(line, k):
    def run(batch, accumulation):
        return train(
            line,
            ["weight", "bias"],
            LinearFit(batch),
            Training(updates=6, batch=batch, accumulation=accumulation, lr=0.05),
        )

    small, large = run(1, k), run(k, 1)
    for name in small.tensors:
        assert_close(small.tensors[name], large.tensors[name], rtol=0, atol=1e-6)
    assert [r["fit"] for r in small.log] == pytest.approx([r["fit"] for r in large.log], abs=1e-6)


def test_warmup_changes_the_weights_and_not_only_the_log(line):
    weights = [line.weight.detach().clone()]
    settings = Training(updates=10, lr=0.01, warmup=5, accumulation=1, weight_decay=0)
    found = train(
        line,
        ["weight"],
        LinearFit(),
        settings,
        callback=lambda *_: weights.append(line.weight.detach().clone()),
    )
    assert [row["lr"] for row in found.log] == pytest.approx(
        [0.002, 0.004, 0.006, 0.008] + [0.01] * 6
    )
    first = (weights[1] - weights[0]).abs()
    assert_close(
        first, torch.full_like(first, 0.002), rtol=1e-3, atol=0
    )  # the first step of AdamW has the length of the learning rate


def test_cosine_decay_starts_at_lr_and_ends_near_zero(line):
    found = train(
        line,
        ["weight"],
        LinearFit(),
        Training(updates=50, lr=0.01, warmup=5, accumulation=1, decay="cosine"),
    )
    rates = [row["lr"] for row in found.log]
    assert rates[5] == pytest.approx(0.01)
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 <= rates[-1] < 0.01 * 0.002
    assert rates[5 + 45 // 2] == pytest.approx(0.005, rel=0.05)


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_the_weight_average_is_the_ema_of_diffusers(line, decay):
    """The decay is 0 at the first update, then min((1 + s) / (10 + s), decay)."""
    shadow, s = torch.zeros(2, 3), 0

    def follow(done, of, row):
        nonlocal shadow, s
        d = min((1 + s) / (10 + s), decay) if s else 0.0
        shadow = d * shadow + (1 - d) * line.weight.detach()
        s += 1

    found = train(
        line,
        ["weight"],
        LinearFit(),
        Training(updates=12, lr=0.05, accumulation=1, ema=decay),
        callback=follow,
    )
    assert_close(found.tensors["weight"], shadow, rtol=0, atol=1e-6)


def test_ema_without_a_ramp_has_a_constant_decay(line, tmp_path):
    shadow = line.weight.detach().clone()

    def follow(done, of, row):
        nonlocal shadow
        shadow = 0.9 * shadow + 0.1 * line.weight.detach()

    settings = Training(updates=12, lr=0.05, accumulation=1, ema=0.9, ema_ramp=False)
    found = train(line, ["weight"], LinearFit(), settings, callback=follow)
    assert_close(found.tensors["weight"], shadow, rtol=0, atol=1e-6)

    def stop(done, of, row):
        if done == 7:
            raise KeyboardInterrupt

    kept = settings.model_copy(update={"checkpoint_every": 5})
    with pytest.raises(KeyboardInterrupt):
        train(line, ["weight"], LinearFit(), kept, checkpoint_dir=tmp_path / "work", callback=stop)
    again = train(
        line, ["weight"], LinearFit(), kept, checkpoint_dir=tmp_path / "work", resume=True
    )
    assert torch.equal(again.tensors["weight"], found.tensors["weight"])
    with pytest.warns(UnusedSettingWarning, match="ema_ramp has no effect with ema 0"):
        train(line, ["weight"], LinearFit(), settings.model_copy(update={"ema": 0.0}))


def test_without_ema_the_result_is_the_last_weights(line):
    last = []
    settings = Training(updates=4, lr=0.05, accumulation=1, ema=0)
    found = train(
        line,
        ["weight"],
        LinearFit(),
        settings,
        callback=lambda *_: last.append(line.weight.detach().clone()),
    )
    assert torch.equal(found.tensors["weight"], last[-1])


def test_bf16_training_has_fp32_weights(denoiser, names, reference):
    found = train(denoiser, names, Denoise(), QUICK.model_copy(update={"precision": "bf16"}))
    assert {v.dtype for v in found.tensors.values()} == {torch.float32}
    assert all(bool(v.isfinite().all()) for v in found.tensors.values())
    assert [row["near"] for row in found.log] == pytest.approx(
        [row["near"] for row in reference.log], rel=0.05
    )
    assert any(
        not torch.equal(v, reference.tensors[k]) for k, v in found.tensors.items()
    )  # the run was not in fp32


def test_fp16_on_a_cpu_is_refused_in_one_line(denoiser, names):
    with pytest.raises(UserError, match="fp16"):
        train(denoiser, names, Denoise(), QUICK.model_copy(update={"precision": "fp16"}))


def test_precision_does_not_depend_on_the_previous_run(denoiser, names, reference):
    train(denoiser, names, Denoise(), QUICK.model_copy(update={"precision": "bf16", "updates": 3}))
    same(train(denoiser, names, Denoise(), QUICK).tensors, reference.tensors)


def test_gradient_checkpointing_recomputes_and_gives_the_same_weights(denoiser, names, reference):
    calls = {True: 0, False: 0}
    for on in calls:

        def count(*_, on=on):
            calls[on] += 1

        hook = denoiser.mid_block.resnets[1].register_forward_pre_hook(count)
        found = train(
            denoiser,
            names,
            Denoise(),
            QUICK.model_copy(update={"gradient_checkpointing": on, "validate_every": 0}),
        )
        hook.remove()
        for name, value in reference.tensors.items():
            assert_close(found.tensors[name], value, rtol=0, atol=1e-6)
    assert calls[False] == 12
    assert calls[True] == 24


# ------------------------------------------------------------ divergence and early stopping


class Nan(LinearFit):
    """L_p is nan at the third micro-step."""

    weights: Mapping[str, float] = {"L_m": 0.5, "L_p": 0.5}

    def training_step(self, denoiser, micro_step, generator, share):
        fit = super().training_step(denoiser, micro_step, generator, share)["fit"]
        return {"L_m": fit, "L_p": fit * math.nan if micro_step == 2 else fit}


def test_a_nan_loss_names_the_term_and_leaves_no_checkpoint(line, tmp_path):
    before = state_of(line)
    with pytest.raises(DivergedError, match=r"'L_p' is nan at update 3") as caught:
        train(
            line,
            ["weight"],
            Nan(),
            Training(updates=5, accumulation=1, checkpoint_every=2),
            checkpoint_dir=tmp_path / "new" / "run",
        )
    assert isinstance(caught.value, SafegenError)
    same(state_of(line), before)
    assert list(tmp_path.iterdir()) == []  # a resumed run would diverge again


class Steep(LinearFit):
    """A finite loss with an infinite slope."""

    def training_step(self, denoiser, micro_step, generator, share):
        return {"fit": (denoiser.weight - denoiser.weight.detach()).abs().sqrt().sum(1)}


def test_a_gradient_that_is_not_finite_raises(line):
    before = state_of(line)
    with pytest.raises(DivergedError, match="gradient is not finite at update 1"):
        train(line, ["weight"], Steep(), Training(updates=5))
    same(state_of(line), before)


class Constant(LinearFit):
    """A loss without a gradient."""

    def training_step(self, denoiser, micro_step, generator, share):
        return {"fit": 0.0 * denoiser.weight.sum(1)}


def test_a_weight_that_is_not_finite_after_the_last_update_raises(line):
    """The last loss is finite: weight decay alone makes the weights overflow."""
    with torch.no_grad():
        line.weight.fill_(1e10)
    before = state_of(line)
    training = Training(updates=1, accumulation=1, weight_decay=1e8, ema=0.0)
    training = training.model_copy(update={"lr": 1e22})  # beyond its bound, to overflow at once
    with pytest.raises(
        DivergedError, match=r"the new weight has values that are not finite\. Lower lr"
    ):
        train(line, ["weight"], Constant(), training)
    same(state_of(line), before)


class Breaks(LinearFit):
    """Some micro-steps have no finite loss."""

    def __init__(self, broken=()) -> None:
        super().__init__()
        self.broken = broken

    def training_step(self, denoiser, micro_step, generator, share):
        factor = math.nan if micro_step in self.broken else 1.0
        return {
            "fit": factor * super().training_step(denoiser, micro_step, generator, share)["fit"]
        }


SKIPPING = Training(updates=6, accumulation=1, lr=0.1, ema=0.5, max_skipped=2)


def test_an_update_that_is_not_finite_is_skipped_and_changes_nothing(line):
    values = [line.weight.detach().clone()]
    found = train(
        line,
        ["weight"],
        Breaks((1, 2, 4)),
        SKIPPING,
        callback=lambda *_: values.append(line.weight.detach().clone()),
    )
    changed = [not torch.equal(a, b) for a, b in pairwise(values)]
    assert changed == [True, False, False, True, False, True]
    skipped = [row for row in found.log if "skipped" in row]
    assert [row["update"] for row in skipped] == [2, 3, 5]
    assert skipped[0].keys() == {"update", "seconds", "lr", "skipped"}
    assert not found.stopped_early
    assert found.to_metadata(["fit"])["losses"]["fit"] == found.log[-1]["fit"]


def test_the_gradients_of_a_skipped_update_do_not_enter_the_next_one(line):
    """The update ends before or after its first batch has a gradient."""
    settings = SKIPPING.model_copy(update={"accumulation": 2})
    first, second = (train(line, ["weight"], Breaks((i,)), settings) for i in (2, 3))
    same(first.tensors, second.tensors)


def test_too_many_skipped_updates_end_the_training_and_the_checkpoint_stays(line, tmp_path):
    values = []
    with pytest.raises(
        DivergedError, match=r"the loss 'fit' is nan at update 5.* 2 updates before it were skipped"
    ) as error:
        train(
            line,
            ["weight"],
            Breaks((2, 3, 4)),
            SKIPPING,
            checkpoint_dir=tmp_path,
            callback=lambda *_: values.append(line.weight.detach().clone()),
        )
    assert f"The checkpoint in {tmp_path} stays" in str(error.value)
    assert torch.equal(load_file(tmp_path / "checkpoint.safetensors")["weight/weight"], values[1])
    rows = [json.loads(text) for text in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == [1, 2, 3, 4]
    again = train(
        line, ["weight"], Breaks((2, 3, 4)), SKIPPING, checkpoint_dir=tmp_path, resume=True
    )
    assert [row["update"] for row in again.log if "skipped" in row] == [3, 4, 5]
    assert len(again.log) == 6


def test_the_decay_of_the_average_does_not_count_skipped_updates_on_resume(line, tmp_path):
    settings = SKIPPING.model_copy(update={"ema": 0.9})
    whole = train(line, ["weight"], Breaks((1,)), settings)
    stop, folder = stop_at(3), {"checkpoint_dir": tmp_path}
    with pytest.raises(InterruptedRunError):
        train(line, ["weight"], Breaks((1,)), settings, callback=stop, **folder)
    part = train(line, ["weight"], Breaks((1,)), settings, resume=True, **folder)
    same(part.tensors, whole.tensors)


def test_without_skipping_a_diverged_training_leaves_no_checkpoint(line, tmp_path):
    settings = SKIPPING.model_copy(update={"max_skipped": 0, "checkpoint_every": 1})
    with pytest.raises(DivergedError, match="the loss 'fit' is nan at update 3"):
        train(line, ["weight"], Breaks((2,)), settings, checkpoint_dir=tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


class Ends(LinearFit):
    """An objective that ends the training, and remembers it in its state."""

    def __init__(self, end) -> None:
        super().__init__()
        self.end, self.state = end, {"updates": torch.zeros(1)}

    @property
    def stop_reason(self):
        return "enough is enough" if self.state["updates"] >= self.end else None

    def after_update(self, row):
        self.state["updates"] += 1
        row["seen"] = float(self.state["updates"])


def test_an_objective_ends_the_training_and_says_why(line, tmp_path):
    settings = Training(updates=6, accumulation=1, ema=0)
    found = train(line, ["weight"], Ends(2), settings, checkpoint_dir=tmp_path)
    assert [row["seen"] for row in found.log] == [1, 2]
    facts = found.to_metadata(["fit"])
    assert (facts["stopped_early"], facts["stop_reason"]) == (True, "enough is enough")
    again = train(line, ["weight"], Ends(2), settings, checkpoint_dir=tmp_path, resume=True)
    assert again.to_metadata(["fit"]) == facts
    same(again.tensors, found.tensors)
    assert "stop_reason" not in train(line, ["weight"], Ends(9), settings).to_metadata(["fit"])


def test_training_stops_early_if_validation_does_not_improve(line):
    settings = Training(updates=20, accumulation=1, validate_every=2, patience=2)
    found = train(line, ["weight"], LinearFit(looks=(3.0, 2.0, 2.5, 2.0)), settings)
    assert found.stopped_early
    assert len(found.log) == 8
    assert [row["validation_loss"] for row in found.log if "validation_loss" in row] == [
        3.0,
        2.0,
        2.5,
        2.0,
    ]


def test_a_better_validation_loss_resets_patience(line):
    settings = Training(updates=10, accumulation=1, validate_every=2, patience=2)
    found = train(line, ["weight"], LinearFit(looks=(3.0, 3.1, 2.9, 3.0, 2.8)), settings)
    assert not found.stopped_early
    assert len(found.log) == 10


def test_an_early_stop_is_final_on_resume(line, tmp_path):
    settings = Training(updates=20, accumulation=1, validate_every=2, patience=2)
    found = train(
        line, ["weight"], LinearFit(looks=(3.0, 4.0, 4.0)), settings, checkpoint_dir=tmp_path
    )
    again = train(
        line,
        ["weight"],
        LinearFit(looks=(9.0,) * 20),
        settings,
        checkpoint_dir=tmp_path,
        resume=True,
    )
    assert again.stopped_early
    assert len(again.log) == len(found.log) == 6
    same(again.tensors, found.tensors)


def test_patience_survives_resume(line, tmp_path):
    settings = Training(updates=20, accumulation=1, validate_every=2, patience=2)
    with pytest.raises(InterruptedRunError):
        train(
            line,
            ["weight"],
            LinearFit(looks=(3.0, 4.0)),
            settings,
            checkpoint_dir=tmp_path,
            callback=stop_at(5),
        )
    found = train(
        line, ["weight"], LinearFit(looks=(3.5,)), settings, checkpoint_dir=tmp_path, resume=True
    )
    assert found.stopped_early
    assert len(found.log) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"updates": 0},
        {"lr": 0},
        {"lr": -1},
        {"ema": 1.0},
        {"precision": "fp8"},
        {"clip": 0},
        {"decay": "linear"},
        {"lrr": 1},
    ],
)
def test_an_invalid_setting_raises(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        Training(**change)


class RecordsWeights(LinearFit):
    """Objective that records the weights at validation."""

    def validation_loss(self, denoiser):
        self.seen = denoiser.weight.detach().clone()
        return 0.0


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_validation_uses_the_weights_that_become_the_patch(line, ema):
    objective, last = RecordsWeights(), []
    settings = Training(updates=4, lr=0.05, accumulation=1, ema=ema, validate_every=4)
    found = train(
        line,
        ["weight"],
        objective,
        settings,
        callback=lambda *_: last.append(line.weight.detach().clone()),
    )
    assert torch.equal(objective.seen, found.tensors["weight"])
    assert torch.equal(objective.seen, last[-1]) is (ema == 0.0)
    looks = train(line, ["weight"], LinearFit(), settings.model_copy(update={"validate_every": 0}))
    assert torch.equal(
        looks.tensors["weight"], found.tensors["weight"]
    )  # validation has no effect on training


class TooLarge(LinearFit):
    """A step that asks torch for more memory than there is."""

    def training_step(self, denoiser, micro_step, generator, share):
        torch.empty(2**50)
        raise AssertionError


def test_memory_that_does_not_suffice_names_the_batch():
    net = nn.Linear(3, 2)
    with pytest.raises(ConfigError, match=r"batch must fit into memory, got 2\. Lower it"):
        trainer.train(net, ["weight"], TooLarge(), QUICK, fingerprint="x")
    assert net.weight.requires_grad
