"""Trainings that several processes share: equal to those of one, and all end together."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from safegen.core import processes
from safegen.core.errors import (
    ConfigError,
    DivergedError,
    InterruptedRunError,
    SafegenError,
    UnusedSettingWarning,
)
from safegen.core.registry import EDITS, resolve
from safegen.data.triplets.triplets import Triplets
from safegen.edits.training.checkpoint import CHECKPOINT_FILE, LOG_FILE, check_resumable
from safegen.edits.training.config import Training
from safegen.edits.training.trainer import train
from tests.processes import run_processes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks")

TOLERANCE = 2e-3
"""Largest distance of the change of two and of one process, relative to that change, in fp32.

A batch of another size is summed in another order. Adam divides a gradient by its own size, so that
rounding is seen where a gradient is near zero.
"""
HALF_TOLERANCE = 0.5
"""The same in bf16, where the gradients of the first update differ by about 0.2 %.

It says that bf16 runs, not that results are equal.
"""
BRIEF = {"updates": 3, "batch": 3, "accumulation": 2, "lr": 1e-3, "warmup": 0, "ema": 0.9}
BRIEF |= {"clip": 0.1, "precision": "fp32"}
"""Three updates of three samples, which two processes share as two and one."""


class LinearFit:
    """Fit of a linear layer to random rows, of which each process has its share."""

    weights: Mapping[str, float] = {"near": 0.7, "far": 0.3}
    fails: Mapping[tuple[int, int], Exception] = {}
    """Exceptions by rank and step."""

    def training_step(self, denoiser, micro_step, generator, share):
        if error := self.fails.get((share[0], micro_step)):
            raise error
        x = torch.randn(5, 3, generator=generator)[share[0] :: share[1]]
        out = denoiser(x)
        return {
            "near": (out - x.sum(1, keepdim=True)).pow(2).mean(1),
            "far": (out + x[:, :1]).abs().mean(1),
        }

    def validation_loss(self, denoiser):
        return float(denoiser(torch.ones(1, 3)).pow(2)) + processes.process_share()[0]


FIT = Training(updates=6, batch=5, accumulation=2, lr=1e-2, ema=0.5)


def fit(objective=None, config=FIT, **options):
    """Train a linear layer and return its result."""
    net = nn.Linear(3, 1)
    with torch.no_grad():
        net.weight.fill_(0.1)
        net.bias.fill_(-0.2)
    options |= {"fingerprint": "fit"}
    with processes.shared_job():
        return train(net, ["weight", "bias"], objective or LinearFit(), config, **options)


def failing(rank, step, error):
    """Return an objective that raises in one process at one step."""
    objective = LinearFit()
    objective.fails = {(rank, step): error}
    return objective


def without_time(log):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in log]


def check_equal(many, one):
    """Check that processes have equal bits, and differ from one process by rounding only."""
    for other in many[1:]:
        assert all(torch.equal(other.tensors[name], v) for name, v in many[0].tensors.items())
        assert without_time(other.log) == without_time(many[0].log)
    assert len(many[0].log) == len(one.log)
    for row, expected in zip(without_time(many[0].log), without_time(one.log), strict=True):
        assert row == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for name, value in one.tensors.items():
        assert_close(many[0].tensors[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_processes_share_a_training_and_give_that_of_one(count):
    check_equal(run_processes(count, lambda rank: fit()), fit())


def test_validation_is_that_of_the_first_process_and_all_stop_at_once():
    config = FIT.model_copy(update={"validate_every": 1, "patience": 2, "lr": 1e-6, "ema": 0.0})
    many, one = run_processes(2, lambda rank: fit(config=config)), fit(config=config)
    check_equal(many, one)
    assert [result.stopped_early for result in many] == [one.stopped_early] * 2


def test_a_callback_of_any_process_ends_the_training_of_all():
    def job(rank):
        return fit(callback=lambda done, total, row: rank == 1 and done == 2)

    results = run_processes(2, job)
    assert [len(result.log) for result in results] == [2, 2]
    assert all(result.stopped_early for result in results)


@pytest.mark.parametrize(
    "count", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)]
)
def test_a_signal_at_one_process_stops_all_and_any_number_resumes(tmp_path, count):
    def stop(rank):
        def callback(done, total, row):
            if rank == 1 and done == 3:
                os.kill(os.getpid(), signal.SIGTERM)

        return fit(checkpoint_dir=tmp_path, callback=callback)

    stopped = run_processes(2, stop)
    assert [type(error) for error in stopped] == [InterruptedRunError] * 2
    assert len({str(error) for error in stopped}) == 1
    state, rows = check_resumable(tmp_path)
    assert (state.update, state.processes, len(rows)) == (3, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CHECKPOINT_FILE, LOG_FILE]

    def resume(rank):
        return fit(checkpoint_dir=tmp_path, resume=True)

    results = run_processes(count, resume) if count > 1 else [resume(0)]
    whole = run_processes(2, lambda rank: fit())
    if count == 2:
        assert torch.equal(results[0].tensors["weight"], whole[0].tensors["weight"])
    check_equal(results, fit())


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (ConfigError("batch must fit"), ConfigError, "batch must fit"),
        (DivergedError("the images"), DivergedError, "the images"),
        (KeyError("x"), SafegenError, "process 1 failed: KeyError: 'x'"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_an_error_of_one_process_is_raised_on_all(tmp_path, error, kind, message):
    results = run_processes(
        2, lambda rank: fit(failing(1, 3, error), checkpoint_dir=tmp_path / "run")
    )
    assert (type(results[0]), str(results[0])) == (kind, message)
    assert (type(results[1]), str(results[1])) == (type(error), str(error))


def test_a_lack_of_memory_of_one_process_names_the_way_out_on_all():
    error = RuntimeError("CUDA out of memory")
    results = run_processes(2, lambda rank: fit(failing(1, 3, error)))
    assert [type(result) for result in results] == [ConfigError] * 2
    assert {str(result).partition(",")[0] for result in results} == {"batch must fit into memory"}


def test_an_update_that_one_process_skips_is_skipped_by_all():
    config = FIT.model_copy(update={"max_skipped": 1})
    error = DivergedError("the images of a rollout are not finite")
    many = run_processes(2, lambda rank: fit(failing(1, 3, error), config))
    check_equal(many, fit(failing(0, 3, error), config))
    assert ["skipped" in row for row in many[0].log] == [False, True, False, False, False, False]


def test_a_share_that_is_not_finite_is_skipped_by_all():
    class Overflow(LinearFit):
        def training_step(self, denoiser, micro_step, generator, share):
            terms = super().training_step(denoiser, micro_step, generator, share)
            factor = float("inf") if micro_step == 2 and 2 % share[1] == share[0] else 1.0
            return {name: value * factor for name, value in terms.items()}

    config = FIT.model_copy(update={"max_skipped": 1})
    many, one = (run_processes(2, lambda rank: fit(Overflow(), config)), fit(Overflow(), config))
    assert "skipped" in one.log[1]
    check_equal(many, one)
    stopped = run_processes(2, lambda rank: fit(Overflow()))
    assert [type(error) for error in stopped] == [DivergedError] * 2
    assert str(stopped[0]) == str(stopped[1])


def test_a_process_that_is_killed_ends_the_others_in_one_line():
    def job(rank):
        return fit(callback=lambda done, *_: rank == 1 and os.kill(os.getpid(), signal.SIGKILL))

    lost, nothing = run_processes(2, job)
    assert nothing is None
    assert "a process of this job ended" in str(lost)
    assert "\n" not in str(lost)


def test_processes_with_a_job_each_train_alone():
    def job(rank):
        net = nn.Linear(3, 1)
        torch.nn.init.ones_(net.weight)
        torch.nn.init.zeros_(net.bias)
        updates = FIT.model_copy(update={"updates": 1 + rank})
        result = train(net, ["weight"], LinearFit(), updates, fingerprint="fit")
        return len(result.log), torch.distributed.is_initialized()

    assert run_processes(2, job) == [(1, False), (2, False)]


def test_what_cannot_be_shared_is_refused_in_one_line():
    small = FIT.model_copy(update={"batch": 1})
    for result in run_processes(2, lambda rank: fit(config=small)):
        assert "training.batch must be at least 2, the number of processes" in str(result)
    others = run_processes(2, lambda rank: fit(config=FIT.model_copy(update={"seed": rank})))
    for result in others:
        assert str(result).startswith("settings, data and weights must be equal on all 2")
        assert "process 1" in str(result)


def test_one_process_of_accelerate_where_several_were_asked_for_is_warned_of(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.warns(UnusedSettingWarning, match="num_processes has no effect .* torchrun"):
        fit()


@pytest.mark.parametrize(("rank", "chosen"), [(0, [0]), (1, [])])
def test_more_processes_than_devices_can_share_a_job_on_the_cpu(monkeypatch, rank, chosen):
    for name, value in {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": 2,
        "MASTER_PORT": 1,
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    found = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _: None)
    processes.join_processes()
    assert found == chosen


def test_rows_of_all_processes_are_put_in_their_places():
    values = torch.arange(10.0).view(5, 2)
    values[1, 0] = float("nan")

    def job(rank):
        rows = torch.arange(5)[rank::2]
        with processes.shared_job():
            found = [processes.gather_rows(v[rows], rows, 5) for v in (values, values[:, 1] > 4)]
            return *found, processes.gather_objects(rank), processes.sum_values([rank, 0.1])

    for floats, flags, ranks, sums in run_processes(2, job):
        assert_close(floats, values, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(flags, values[:, 1] > 4)
        assert (ranks, sums) == ([0, 1], [1.0, 0.2])


def changes_of(edit, model, triplets):
    """Return the new values of an edit less the old ones, in one vector, and the log."""
    rows = []
    with processes.shared_job():
        patch = edit.apply(
            model,
            triplets if edit.inputs != "words" else None,
            callback=lambda done, total, row: rows.append(row),
        )
    old = dict(edit.network(model).named_parameters())
    names = sorted(patch.tensors)
    changes = [(patch.tensors[n] - old[n].detach()).flatten().double() for n in names]
    return torch.cat(changes), without_time(rows)


def check_edit(edit, model, triplets, *, count=2, tolerance=TOLERANCE):
    """Check the losses and the gradient of the first update, and all changes of the weights."""
    many = run_processes(count, lambda rank: changes_of(edit, model, triplets))
    for result in many:
        assert isinstance(result, tuple), result
        assert torch.equal(result[0], many[0][0])
        assert result[1] == many[0][1]
    (changes, log), (expected, expected_log) = many[0], changes_of(edit, model, triplets)
    exact = 1e-4 if tolerance == TOLERANCE else 1e-2
    assert log[0] == pytest.approx(expected_log[0], rel=exact, abs=1e-6)
    assert float(expected.norm()) > 0
    assert float((changes - expected).norm() / expected.norm()) < tolerance


@pytest.fixture(scope="module")
def small(cubes, tmp_path_factory):
    """Return a function that builds an edit with its smallest settings and few updates."""
    lines = tmp_path_factory.mktemp("captions") / "calm.txt"
    lines.write_text("a blue ball\na green cone\n")

    def build(name, *, training=None, **changes):
        kind = resolve(EDITS, name, "edit")
        captions = {"captions": (str(lines),)} if "captions" in kind.model_fields else {}
        settings = {**kind.TINY, **captions, "training": BRIEF | (training or {}), **changes}
        return kind.preset("mini", concept=cubes, **settings)

    return build


@pytest.fixture(scope="module")
def few(triplets):
    return Triplets(triplets.folder, triplets.rows[:4])


def test_two_processes_give_the_safegen_of_one(small, few, make_model):
    brief = {"updates": 2, "accumulation": 1}
    check_edit(small("safegen", training=brief), make_model(), few)


ROLLOUTS = {"groups": 2, "group": 4, "training": {"batch": 3, "accumulation": 3}}
"""Rollouts of eight images in batches of three, three and two."""
STEPS = {**ROLLOUTS, "training": {"batch": 3, "accumulation": 6}}
"""The same where two steps of every image are trained."""
VARIANTS = [
    ("safegen", {}),
    ("safegen", {"rank": 2}),
    ("safegen", {"adversary": {"name": "inversion", "steps": 1}, "selector": "attn2"}),
    ("safegen", {"adversary": {"name": "closed-form"}, "selector": "attn2"}),
    ("safegen", {"adversary": {"name": "adv-unlearn", "steps": 2}}),
    ("safegen", {"training": {"gradient_checkpointing": True}}),
    ("safegen", {"training": {"precision": "bf16"}}),
    ("safegen", {"validation_split": 0.4, "training": {"validate_every": 1}}),
    ("safegen-plus", {}),
    ("esd", {"weight_retain": 1.0}),
    ("esd", {"rollout": "base"}),
    ("sdd", {"rollout": "base"}),
    ("sdd", {"weight_anchor": 1.0}),
    ("duo", {}),
    ("duo", {"loss_type": "kto"}),
    ("concept_ablation", {"separate_prior": True}),
    ("des", {}),
    *(("shielddiff", {**ROLLOUTS, "algorithm": name}) for name in ("nft", "v_grpo")),
    ("shielddiff", {**ROLLOUTS, "rewards": {"anchor": 1.0}}),
    ("shielddiff", {"algorithm": "grpo_window", "steps": 6, **STEPS}),
    ("shielddiff", {"algorithm": "ddpo", **STEPS}),
    ("shielddiff", {"algorithm": "draft", **ROLLOUTS}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "changes"), VARIANTS)
def test_two_processes_give_the_edit_of_one(name, changes, small, few, make_model):
    edit = small(name, **changes)
    is_half = edit.training.precision == "bf16"
    check_edit(edit, make_model(), few, tolerance=HALF_TOLERANCE if is_half else TOLERANCE)


@pytest.mark.slow
def test_three_processes_need_three_images_in_every_batch(small, few, make_model):
    edit, model = small("shielddiff", **ROLLOUTS), make_model()
    for error in run_processes(3, lambda rank: changes_of(edit, model, few)):
        assert isinstance(error, ConfigError)
        assert str(error).startswith("training.batch must leave at least 3 images, one for each")
