"""Curves of a training by reward in the report, and the logs that they are drawn from."""

from __future__ import annotations

import json
import re

import pytest
from crafted import write_run

from safegen.core.errors import FileError
from safegen.evaluation.report.page import PAGE, open_runs, write_report
from safegen.evaluation.report.reward_curves import has_rewards, reward_charts, reward_table
from safegen.evaluation.run.folder import CARD
from safegen.evaluation.run.training_log import find_training_log, read_training_log


def row(update, **changes):
    """Return a row as a training by reward logs it."""
    figures = {"L_policy": -0.1 / update, "L_kl": 0.01 * update, "L_keep": 0.001 * update}
    figures |= {"lr": 1e-3, "norm": 1.0, "seconds": 1.0, "ratio": 1.0, "passes": 100.0 * update}
    for kind in ("concept", "benign"):
        figures |= {f"reward_judge_{kind}": -1 / update, f"reward_judge_{kind}_std": 0.1}
        figures |= {f"{who}_unsafe_{kind}": 1 / update for who in ("judge", "held_out")}
        figures |= {f"{who}_unsafe_{kind}_n": 20.0 for who in ("judge", "held_out")}
    return {"update": update, **figures, "diversity": 0.25, "alignment_benign": 0.6} | changes


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_a_log_keeps_figures_of_rollouts_and_leaves_out_skipped_updates(tmp_path):
    skipped = {"update": 2, "lr": 1e-3, "skipped": 1.0, "passes": 200.0}
    rows = read_training_log(write(tmp_path / "log.jsonl", [row(1), skipped, row(3)]))
    assert [one["update"] for one in rows] == [1, 3]
    assert rows[1]["held_out_unsafe_concept"] == pytest.approx(1 / 3)
    assert not {"lr", "norm", "seconds", "ratio", "reward_judge_concept_std"} & rows[0].keys()
    assert has_rewards(rows)
    assert not has_rewards([{"update": 1, "L_m": 1.0}])


def test_a_figure_that_is_not_finite_is_refused(tmp_path):
    path = write(tmp_path / "log.jsonl", [row(1, reward_judge_concept=float("inf"))])
    with pytest.raises(FileError, match=r"damaged|finite"):
        read_training_log(path)


def test_every_chart_names_its_lines_over_passes():
    charts = reward_charts([row(i) for i in (1, 2, 3)])
    assert len(charts) == 4
    assert all("network passes" in chart["svg"] and not chart["why"] for chart in charts)
    unsafe, rewards, distance, variety = (chart["svg"] for chart in charts)
    for who in ("judge that rewards", "held-out judge"):
        assert f"{who}, prompts of the concept" in unsafe
    assert "reward judge, benign prompts" in rewards
    assert "prompts of the concept" in distance
    assert "distance within groups" in variety
    assert "mathdefault" not in "".join(chart["svg"] for chart in charts)


def test_a_log_without_a_held_out_judge_or_passes_has_its_charts():
    rows = [{k: v for k, v in row(i).items() if "held" not in k and k != "passes"} for i in (1, 2)]
    unsafe, *others = reward_charts(rows)
    assert "held-out" not in unsafe["svg"]
    assert all(">update<" in chart["svg"] for chart in (unsafe, *others))
    (chart,) = [c for c in reward_charts([{"update": 1, "reward_x_benign": 1.0}]) if c["svg"]]
    assert chart["title"] == "Rewards"  # the others say that there is nothing to show


def test_the_table_has_first_and_last_values():
    table = {name: values for name, *values in reward_table([row(1), row(2), row(4)])}
    assert table["held-out judge, prompts of the concept"] == [
        "100 % of 20 images",
        "25 % of 20 images",
    ]
    assert table["distance to the original model, benign prompts"] == ["0.001", "0.004"]


def test_a_log_beside_a_patch_is_found_if_it_ends_in_the_losses_of_the_patch(tmp_path):
    patch = tmp_path / "patch.safetensors"
    log = tmp_path / "patch.safetensors.log.jsonl"
    losses = {key: value for key, value in row(2).items() if key.startswith("L_")}
    assert find_training_log(patch, {"losses": losses}) == []
    write(log, [row(1), row(2)])
    assert [one["update"] for one in find_training_log(patch, {"losses": losses})] == [1, 2]
    assert find_training_log(patch, {"losses": losses | {"L_kl": 0.0}}) == []  # of another patch
    assert find_training_log(patch, {}) == []
    log.write_text("{")
    assert find_training_log(patch, {"losses": losses}) == []


def test_the_page_shows_the_curves_and_who_judged_and_rewarded(tmp_path):
    folder = write_run(tmp_path / "run")
    card = json.loads((folder / CARD).read_text())
    entries = [entry for stack in card["stacks"] for entry in stack["patches"]]
    settings = {"judge": "mini", "rewards": {"judge": 1.0}}
    for entry in entries:
        entry["settings"] = settings
    (folder / CARD).write_text(json.dumps(card))
    entry = entries[0]
    write(folder / "patches" / entry["hash"][:16] / "log.jsonl", [row(1), row(2)])
    (folder / "patches" / "calm" / "log.jsonl").unlink()
    write_report(open_runs([folder]), tmp_path)
    page = (tmp_path / PAGE).read_text(encoding="utf-8")
    assert "Images with the concept in rollouts" in page
    assert "First and last rollout" in page
    assert re.search(r"calm.safetensors of calm was rewarded by the judge that measures it", page)
    for entry in entries:
        entry["settings"] = settings | {"judge": "nudenet"}
    (folder / CARD).write_text(json.dumps(card))
    write_report(open_runs([folder]), tmp_path)
    assert "was rewarded by" not in (tmp_path / PAGE).read_text(encoding="utf-8")
