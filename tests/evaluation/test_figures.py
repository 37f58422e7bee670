"""Metrics of a run equal the metric functions applied to the images of the run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import safegen
from safegen.core.errors import ConfigError, FileError
from safegen.evaluation.evaluate import judge_run
from safegen.evaluation.protocol_file import load_protocol
from safegen.evaluation.report.format import split_cell
from safegen.evaluation.report.page import open_runs, write_report
from safegen.evaluation.run.folder import (
    CHANGES,
    DETECTIONS,
    FEATURES,
    JUDGES,
    PLAN,
    SAMPLES,
    SCORES,
    Run,
)
from safegen.evaluation.run.records import decode_features, encode_features
from safegen.evaluation.samples import hash_prompts, read_prompt_list
from safegen.evaluation.schema import LpipsRule
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.verify import verify
from safegen.features.base import load_extractor
from safegen.metrics.clip_score import clip_scores
from safegen.metrics.distances import cmmd, kid


@pytest.fixture(scope="module")
def scores(finished):
    return json.loads((finished / SCORES).read_text())


def row(scores, stack, name="mini:skulls"):
    return scores["stacks"][stack]["lists"][name]


def files(finished, stack, name):
    lines = [json.loads(line) for line in (finished / SAMPLES).read_text().splitlines()]
    return [
        Image.open(finished / x["file"]).convert("RGB")
        for x in lines
        if (x["stack"], x["list"]) == (stack, name)
    ]


def test_clip_score_and_distances_are_those_of_the_saved_images(finished, scores):
    eye = load_extractor("mini-clip")
    texts = [p.prompt for p in Run.open(finished).samples if p.list_name == "mini:ghosts"]
    own, base = (eye.features(files(finished, stack, "mini:ghosts")) for stack in ("calm", "mini"))
    found = row(scores, "calm", "mini:ghosts")
    values, old = (clip_scores(x, eye.texts(texts)) for x in (own, base))
    assert found["clip_score"]["mean"]["value"] == pytest.approx(values.mean(), rel=1e-5)
    assert found["clip_score"]["to_base"]["value"] == pytest.approx(
        (values - old).mean(), rel=1e-3, abs=1e-4
    )
    assert found["clip_score"]["mean"]["scale"] == f"100*cos, {eye.id}"
    assert found["kid_to_base"]["value"] == pytest.approx(
        kid(own, base, reference_kind="base", paired=True).value, rel=1e-4, abs=1e-6
    )
    assert found["cmmd_to_base"]["value"] == pytest.approx(
        cmmd(own, base, reference_kind="base").value, rel=1e-4, abs=1e-6
    )
    assert (found["kid_to_base"]["n"], found["kid_to_base"]["extractor"]) == (6, eye.id)
    assert scores["weights"] == {"extractor": eye.id}
    assert "kid_to_base" not in row(
        scores, "mini", "mini:ghosts"
    )  # the base has no distance to itself
    assert "to_base" not in row(scores, "mini", "mini:ghosts")["clip_score"]


def test_metrics_of_too_few_images_are_undefined_with_a_reason(scores):
    found = row(scores, "calm")
    assert (found["fid_to_base"], found["expected_maximum"]) == (None, None)
    assert found["undefined"]["fid_to_base"].startswith("FID needs more images than features")
    assert found["undefined"]["fid_to_base"].endswith("got 6 images of 64 features. Use KID")
    assert "k must be 1 to the number of judged prompts" in found["undefined"]["expected_maximum"]


def test_a_withheld_image_is_a_failed_attack_and_shows_no_concept(scores):
    black = row(scores, "black-image")
    assert (
        black["asr"]["refused"],
        black["asr"]["asr"]["value"],
        black["asr"]["without_refusals"],
    ) == (6, 0, None)
    assert (
        black["asr_any"]["unit"],
        black["asr_any"]["refused"],
        black["asr_any"]["n_per_prompt"],
    ) == ("prompt", 3, 2)
    assert (black["coherence"]["hits"], black["coherence"]["n"]) == (0, 6)
    harmless = row(scores, "black-image", "mini:ghosts")
    assert harmless["over_censoring"]["value"] == 1
    assert "asr" not in harmless
    assert "over_censoring" not in black


def test_metrics_of_one_quantity_agree(scores):
    for stack in scores["stacks"]:
        found = row(scores, stack)
        if stack != "black-image":
            assert (
                found["asr"]["asr"]["hits"]
                == found["concept"]["hits"]
                == found["inappropriate"]["hits"]
            )
            assert found["coherence"]["hits"] == found["subject"]["hits"]
        if stack != "mini":
            assert (
                found["removal_labels"]["total"]
                == found["removal_labels"]["skulls"]
                == found["removal"]
            )
        assert found["asr_any"]["asr"]["value"] >= found["asr"]["asr"]["value"]


def test_features_and_judges_are_recorded_only_one_time(finished):
    keys = [json.loads(line)["key"] for line in (finished / FEATURES).read_text().splitlines()]
    assert len(keys) == len(set(keys)) == 48
    (judge,) = [json.loads(line) for line in (finished / JUDGES).read_text().splitlines()]
    assert judge["label_space"] == ["skulls", "fire", "ghosts", "leaves", "mosaic"]
    assert "label_space" not in (finished / DETECTIONS).read_text()


def test_encoded_features_decode_to_the_same_float32_bits():
    numbers = np.random.default_rng(0).normal(size=64).astype(np.float32)
    assert np.array_equal(decode_features(encode_features(numbers.astype(np.float64))), numbers)
    assert decode_features(encode_features(np.array([1.0, np.nan]))) is None


def test_features_of_other_weights_stop_the_run(go, copy):
    text = (copy / FEATURES).read_text()
    (copy / FEATURES).write_text(text.replace("mini-clip:", "other-clip:"))
    with pytest.raises(
        FileError, match=r"features\.jsonl is by other-clip:\w+, got the extractor mini-clip:"
    ):
        go(copy)
    (copy / FEATURES).write_text(text.replace("mini-clip:", "other-clip:", 1))
    with pytest.raises(
        FileError, match=r"features\.jsonl must be by one extractor, got mini-clip:.*, other-clip:"
    ):
        score_run(Run.open(copy))


def test_the_clip_score_of_hidden_prompts_needs_the_original_command(go, quick, finished, tmp_path):
    protocol = load_protocol(str(quick))
    hidden = protocol.model_copy(
        update={"lists": (protocol.lists[0].model_copy(update={"unsafe": True}), protocol.lists[1])}
    )
    run = go(tmp_path / "hidden", protocol=hidden, until="generate")
    with pytest.raises(
        ConfigError,
        match=r"the CLIP score needs the prompts, which this run does not keep\. Resume",
    ):
        judge_run(run)
    go(tmp_path / "hidden", protocol=hidden)
    assert (tmp_path / "hidden" / SCORES).read_bytes() == (finished / SCORES).read_bytes()


def test_lpips_uses_the_weights_of_the_protocol_and_the_card_has_no_path(go, quick, tmp_path):
    from safetensors.torch import save_file

    from safegen.features.lpips import WIDTHS, AlexTrunk, Lpips

    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(AlexTrunk().state_dict(), tmp_path / "alex.safetensors")
        heads = {f"lin{i}.model.1.weight": torch.rand(1, w, 1, 1) for i, w in enumerate(WIDTHS)}
        save_file(heads, tmp_path / "heads.safetensors")
    rule = LpipsRule(
        trunk=str(tmp_path / "alex.safetensors"), heads=str(tmp_path / "heads.safetensors")
    )
    protocol = load_protocol(str(quick))
    small = {
        "lists": protocol.lists[:1],
        "seeds": (1,),
        "metrics": ("concept", "lpips"),
        "lpips": rule,
        "features": None,
    }
    run = go(tmp_path / "run", protocol=protocol.model_copy(update=small), baselines="none")
    found = row(json.loads((run.folder / SCORES).read_text()), "calm")["lpips"]
    eye = Lpips(**rule.model_dump())
    expected = eye.distances(
        *(files(run.folder, stack, "mini:skulls") for stack in ("mini", "calm"))
    )
    assert found["value"] == pytest.approx(expected.mean(), rel=1e-5)
    assert (found["n"], found["scale"]) == (3, eye.id)
    assert "change" not in row(json.loads((run.folder / SCORES).read_text()), "calm")
    assert not (run.folder / FEATURES).exists()
    assert verify(run) == []
    card = (run.folder / "protocol.json").read_text()
    assert "alex.safetensors" in card
    assert str(tmp_path) not in card + (run.folder / CHANGES).read_text()
    assert judge_run(Run.open(run.folder)).startswith(
        "mini:"
    )  # everything is measured, so the weights are not needed
    (run.folder / CHANGES).write_text("")
    with pytest.raises(FileError, match="alex"):
        judge_run(Run.open(run.folder))


def test_judge_options_are_in_its_id_and_in_the_scores(copy):
    run = Run.open(copy)
    options = {
        "weights": "mini",
        "unsafe": ["a castle covered in skulls"],
        "safe": ["a castle", "an owl"],
    }
    seen_by = judge_run(run, name="clip", labels=["unsafe"], options=options)
    other = judge_run(run, name="clip", labels=["unsafe"], options=options | {"safe": ["a cat"]})
    assert re.fullmatch(r"clip:.*#[0-9a-f]{8}", seen_by)
    assert seen_by != other
    one, two = (score_run(run, judge=judge, labels=["unsafe"]) for judge in (seen_by, other))
    assert one["protocol"]["decides"]["judge"]["options"] == options
    assert one["protocol"]["id"] != two["protocol"]["id"]
    with pytest.raises(FileError, match="several judges 'clip' have judged"):
        score_run(run, judge="clip", labels=["unsafe"])
    assert score_run(run) == json.loads((copy / SCORES).read_text())
    assert [json.loads(line)["judge"] for line in (copy / JUDGES).read_text().splitlines()][1:] == [
        seen_by,
        other,
    ]
    assert verify(run) == []


def test_page_and_table_show_every_metric_with_its_n_or_the_reason_it_is_missing(copy, tmp_path):
    facts = write_report(open_runs([copy]), tmp_path)
    page, table = ((tmp_path / f"report.{end}").read_text() for end in ("html", "md"))
    heads = facts["metrics"]["heads"]
    assert heads[:2] == ["attack success, per image", "attack success, any of N"]
    assert {"CLIP score, 100 cos", "KID to base", "over-censored", "coherence kept"} <= set(heads)
    assert all(head in page and head in table for head in heads)
    cells = {
        (r["stack"], r["list"]): dict(zip(heads, r["cells"], strict=True))
        for r in facts["metrics"]["rows"]
    }
    assert re.fullmatch(r"\S+ \(n = 6, 6\)", cells["calm", "mini:skulls"]["KID to base"])
    assert re.fullmatch(
        r"\S+ \(\S+ to \S+; n = 6\); minus base [+-]\S+ \(\S+ to \S+\)",
        cells["calm", "mini:skulls"]["CLIP score, 100 cos"],
    )
    assert "; 6 refused" in cells["black-image", "mini:skulls"]["attack success, per image"]
    why = "FID to base, calm, mini:skulls: FID needs more images than features"
    assert why in page
    assert why in table
    assert "Other metrics" in page


def test_a_small_copy_of_the_smoke_protocol_runs_with_a_patch(go, patch_file, tmp_path):
    text = (
        Path(safegen.__file__).parent / "evaluation" / "protocols" / "mini-smoke.toml"
    ).read_text()

    def small(part):
        digest = hash_prompts(read_prompt_list(part[1], prompts=2).rows)
        return f'source = "{part[1]}"\nprompts = 2\nsha256 = "{digest}"'

    text = re.sub(r'source = "(.*)"\nprompts = \d+\nsha256 = ".*"', small, text).replace(
        "steps = 25", "steps = 2"
    )
    (tmp_path / "mini-smoke.toml").write_text(text)
    run = go(
        tmp_path / "run",
        protocol=load_protocol(str(tmp_path / "mini-smoke.toml")),
        stacks=[f"calm=mini+{patch_file}"],
    )
    facts = write_report(open_runs([run.folder]), run.folder)
    assert verify(run) == []
    assert [r["label"] for r in facts["stacks"]] == [
        "base",
        "calm",
        "negative-prompt",
        "black-image",
    ]
    page, table = ((run.folder / f"report.{end}").read_text() for end in ("html", "md"))
    assert page.count("<svg") == 6  # with the CLIP score as a second measure of use
    assert "CLIP score, benign" in table.splitlines()[2]


@pytest.fixture(scope="module")
def short_run(go, patch_file, tmp_path_factory):
    """Return a run of two rungs of the ladder and a composition list, two prompts each."""
    parts = [*load_protocol("mini-ladder").lists[::4], load_protocol("mini-composition").lists[1]]
    lists = tuple(
        part.model_copy(
            update={
                "prompts": 2,
                "sha256": hash_prompts(read_prompt_list(part.source, prompts=2).rows),
            }
        )
        for part in parts
    )
    protocol = load_protocol("mini-composition")
    config = protocol.generation.model_copy(update={"num_inference_steps": 4, "precision": "fp32"})
    protocol = protocol.model_copy(update={"lists": lists, "generation": config})
    run = go(
        tmp_path_factory.mktemp("short") / "run",
        protocol=protocol,
        stacks=[f"calm=mini+{patch_file}"],
        baselines="none",
    )
    return run, write_report(open_runs([run.folder]), run.folder)


def test_the_composition_score_is_of_lists_that_name_a_background(short_run):
    run, _ = short_run
    scores = score_run(run)["stacks"]
    assert verify(run) == []
    for stack in scores.values():
        assert "composition" not in stack["lists"]["mini:skulls-ladder-name"]
        found = stack["lists"]["mini:ghosts-composition"]["composition"]
        assert {part: found[part]["n"] for part in found} == dict.fromkeys(
            ("all", "object", "background", "attribute"), 2
        )
    detections = {r.key: r.detections for r in run.detections_records()}
    at = [i for i, s in enumerate(run.samples) if s.list_name == "mini:ghosts-composition"]
    keys = run.keys(run.stacks[0])
    right = [detections[keys[i]].background == run.samples[i].background for i in at]
    assert scores["base"]["lists"]["mini:ghosts-composition"]["composition"]["background"][
        "hits"
    ] == sum(right)


def test_a_changed_background_of_the_plan_is_a_problem_of_the_run(short_run, tmp_path):
    run, _ = short_run
    copy = shutil.copytree(run.folder, tmp_path / "copy")
    plan = copy / PLAN
    plan.write_text(plan.read_text().replace('"in a meadow"', '"at dusk"'))
    assert any("prompts of 'mini:ghosts-composition'" in line for line in verify(Run.open(copy)))


def test_the_report_has_the_ladder_and_what_is_known_of_the_judge(short_run):
    run, data = short_run
    assert [part["rung"] for part in data["lists"]] == ["name", "long", None]
    page, table = ((run.folder / f"report.{end}").read_text() for end in ("html", "md"))
    assert "<h3>Prompt ladder</h3>" in page
    assert "composed right" in page
    for text in (page, table):
        assert re.search(
            r"judge mini on 3000 drawn scenes: recall [\d.]+ % \([^)]*n = \d+\), prec", text
        )


def test_a_report_without_a_ladder_has_no_such_chart(copy):
    write_report(open_runs([copy]), copy)
    assert "Prompt ladder" not in (copy / "report.html").read_text()


@pytest.mark.parametrize(
    ("cell", "lines"),
    [
        ("–", ["–"]),
        ("62 (n = 192, 192)", ["62", "n = 192, 192"]),
        (
            "1.6 % (0.3 to 8.3 %; n = 192), 3 a prompt; 2 refused",
            ["1.6 %", "0.3 to 8.3 %", "n = 192", "3 a prompt", "2 refused"],
        ),
        (
            "67.1 (64.9 to 69.2; n = 9); minus base -20.4 (-22.5 to -18.3)",
            ["67.1", "64.9 to 69.2", "n = 9", "minus base -20.4", "-22.5 to -18.3"],
        ),
    ],
)
def test_a_cell_of_the_page_has_its_number_and_one_line_per_detail(cell, lines):
    assert split_cell(cell) == lines
