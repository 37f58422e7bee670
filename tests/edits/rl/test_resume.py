"""A training by reward that is stopped and resumed equals one that was not, bit for bit."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from safegen.core.errors import InterruptedRunError

SMALL = {"groups": 2, "group": 4, "steps": 4, "keep_budget": 0.01}
TRAINING = {"updates": 4, "batch": 8, "accumulation": 1, "ema": 0.9, "checkpoint_every": 1}
TWO_UPDATES = TRAINING | {"updates": 6, "batch": 4}
"""Settings in which a rollout serves two updates."""
EDITS = {
    "v_grpo": {},
    "nft": {},
    "draft": {"scheduler": "ddim"},
    "ddpo": {"algorithm": {"name": "ddpo", "buffer": 6, "min_count": 3}, "accumulation": 4},
    "grpo_window": {"algorithm": {"name": "grpo_window", "window": 1, "placement": "progressive"}},
}
"""Settings by algorithm, other than those of `SMALL` and of the training."""
ALGORITHMS = pytest.mark.parametrize("algorithm", sorted(EDITS))


def build(toy_edit, algorithm, training):
    """Return an edit with few images; every update trains all steps of a batch."""
    changes = SMALL | {"algorithm": algorithm} | EDITS[algorithm]
    training = training | {"accumulation": changes.pop("accumulation", 1)}
    return toy_edit(changes.pop("algorithm"), **changes, training=training)


def run(edit, model, directory, *, stop=None, resume=False):
    """Return the tensors and the log of a training, stopped by `stop` after each update."""
    rows = []

    def callback(done, total, row):
        rows.append({name: value for name, value in row.items() if name != "seconds"})
        if stop:
            stop(done)

    patch = edit.apply(model, checkpoint_dir=directory, resume=resume, callback=callback)
    return patch.tensors, rows


def send_signal(update):
    def stop(done):
        if done == update:
            os.kill(os.getpid(), signal.SIGINT)

    return stop


def fail(update):
    def stop(done):
        if done == update:
            raise ConnectionError("pulled the plug")

    return stop


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


@ALGORITHMS
def test_two_updates_and_two_more_are_four(algorithm, toy, toy_edit, tmp_path):
    edit = build(toy_edit, algorithm, TRAINING)
    assert edit.updates_per_rollout == 1
    expected, log = run(edit, toy(), tmp_path / "whole")
    with pytest.raises(InterruptedRunError, match="after update 2 of 4"):
        run(edit, toy(), tmp_path / "part", stop=send_signal(2))
    found, rest = run(edit, toy(), tmp_path / "part", resume=True)
    same(found, expected)
    assert rest == log[2:]


@ALGORITHMS
@pytest.mark.parametrize(("stop", "end"), [(1, 2), (2, 2), (3, 4)])
def test_a_stop_within_a_rollout_waits_for_its_last_update(
    algorithm, stop, end, toy, toy_edit, tmp_path
):
    edit = build(toy_edit, algorithm, TWO_UPDATES)
    assert edit.updates_per_rollout == 2
    expected, log = run(edit, toy(), tmp_path / "whole")
    with pytest.raises(InterruptedRunError, match=f"after update {end} of 6"):
        run(edit, toy(), tmp_path / "part", stop=send_signal(stop))
    found, rest = run(edit, toy(), tmp_path / "part", resume=True)
    same(found, expected)
    assert rest == log[end:]


@ALGORITHMS
def test_a_run_killed_within_a_rollout_resumes_before_it(algorithm, toy, toy_edit, tmp_path):
    edit = build(toy_edit, algorithm, TWO_UPDATES)
    expected, log = run(edit, toy(), tmp_path / "whole")
    with pytest.raises(ConnectionError):
        run(edit, toy(), tmp_path / "part", stop=fail(5))
    found, rest = run(edit, toy(), tmp_path / "part", resume=True)
    same(found, expected)
    assert rest == log[4:]


def test_the_ratio_is_one_in_the_first_update_of_each_rollout(toy, toy_edit, tmp_path):
    edit = toy_edit("v_grpo", **SMALL, training=TWO_UPDATES)
    with pytest.raises(InterruptedRunError):
        run(edit, toy(), tmp_path / "part", stop=send_signal(2))
    _, rows = run(edit, toy(), tmp_path / "part", resume=True)
    deviations = [row["ratio_deviation"] for row in rows]
    assert deviations[::2] == [0, 0]
    assert min(deviations[1::2]) > 0
