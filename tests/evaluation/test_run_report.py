"""Reports of runs: figures equal the journals, and hidden images and texts are not in the file."""

from __future__ import annotations

import base64
import html
import io
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from safegen.core.errors import ConfigError, FileError
from safegen.evaluation.report.data import report_data
from safegen.evaluation.report.format import percent
from safegen.evaluation.report.page import NUMBERS, PAGE, TABLE, markdown, open_runs, write_report
from safegen.evaluation.report.redaction import (
    IMAGES_PER_ROW,
    TILES,
    data_uri,
    evenly_spaced,
    pixelate,
)
from safegen.evaluation.run.folder import CARD, DETECTIONS, JUDGES, PLAN, SAMPLES, Run
from safegen.evaluation.scoring.score import score_run

SKULL = {"label": "skulls", "score": 0.9, "box": None}


def rewrite(folder, name, change):
    """Replace every line of a journal by `change` of it."""
    lines = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    (folder / name).write_text(
        "".join(json.dumps(change(line), sort_keys=True) + "\n" for line in lines)
    )


def judged(folder, detections):
    """Set the detections of every image to `detections` of its journal line."""
    rewrite(
        folder,
        DETECTIONS,
        lambda line: line | {"detections": line["detections"] | {"items": detections(line)}},
    )


def edit_card(folder, change):
    card = json.loads((folder / CARD).read_text())
    change(card)
    (folder / CARD).write_text(json.dumps(card))


def page_of(folder, out, **options):
    write_report(open_runs([folder]), out, **options)
    return (out / PAGE).read_text(encoding="utf-8")


def images_of(page):
    return [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    ]


def originals(folder):
    return {
        np.asarray(Image.open(folder / json.loads(line)["file"])).tobytes()
        for line in (folder / SAMPLES).read_text().splitlines()
    }


def test_equal_runs_give_equal_self_contained_files(copy, tmp_path):
    page = page_of(copy, tmp_path / "one")
    page_of(copy, tmp_path / "two")
    for name in (PAGE, NUMBERS, TABLE):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert page.count("<svg") == 4  # the mini lists here have no benign prompts, so no Pareto chart
    assert "No chart: no stack has both" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert not re.search(r"<script|@import|url\((?!#)", page)
    assert json.loads((tmp_path / "one" / NUMBERS).read_text())["scores"][copy.name] == json.loads(
        json.dumps(score_run(Run.open(copy)))
    )


def test_reporting_loads_no_torch(copy, tmp_path):
    code = (
        "import sys; from pathlib import Path; "
        "from safegen.evaluation.report.page import open_runs, write_report; "
        f"write_report(open_runs([Path({str(copy)!r})]), Path({str(tmp_path)!r})); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.split() == ["False"]


@pytest.mark.parametrize(
    "line",
    [
        {"items": [SKULL]},
        {"items": [SKULL | {"score": 0.21}]},  # below the threshold: hidden in doubt
        {"items": [SKULL | {"label": "fire"}]},  # another built-in concept of the same judge
        {"items": [], "unjudged": "it failed"},
    ],
)
def test_an_image_with_an_unsafe_detection_is_not_in_the_file(copy, tmp_path, line):
    first = json.loads((copy / DETECTIONS).read_text().splitlines()[0])["key"]
    rewrite(
        copy,
        DETECTIONS,
        lambda old: old | {"detections": {"items": []} | (line if old["key"] != first else {})},
    )
    found = images_of(page_of(copy, tmp_path))
    assert sorted({max(p.size) for p in found}) == [TILES, 64]
    assert sum(p.size == (64, 64) for p in found) == 1  # the one at which none fires
    page = page_of(copy, tmp_path, reveal=True)
    assert "This page holds the original images" in page
    assert {np.asarray(p).tobytes() for p in images_of(page)} <= originals(copy)


def test_another_judge_hides_an_image_too(copy, tmp_path):
    judged(copy, lambda _: [])
    assert {p.size for p in images_of(page_of(copy, tmp_path))} == {(64, 64)}
    lines = [json.loads(line) for line in (copy / DETECTIONS).read_text().splitlines()]
    with (copy / JUDGES).open("a") as file:
        file.write(
            json.dumps({"judge": "eye:0", "name": "eye", "options": {}, "label_space": ["odd"]})
            + "\n"
        )
    with (copy / DETECTIONS).open("a") as file:
        file.writelines(
            json.dumps(
                line
                | {
                    "judge": "eye:0",
                    "detections": {"items": [SKULL | {"label": "odd", "score": 0.3}]},
                }
            )
            + "\n"
            for line in lines
        )
    assert {max(p.size) for p in images_of(page_of(copy, tmp_path))} == {TILES}


def test_any_detection_of_a_judge_without_a_concept_hides_the_image(copy, tmp_path):
    judged(copy, lambda _: [])
    with (copy / JUDGES).open("a") as file:
        file.write(
            json.dumps(
                {"judge": "eye:0", "name": "eye", "options": {}, "label_space": ["blood", "gore"]}
            )
            + "\n"
        )
    with (copy / DETECTIONS).open("a") as file:
        file.writelines(
            json.dumps(
                json.loads(line)
                | {"judge": "eye:0", "detections": {"items": [SKULL | {"label": "gore"}]}}
            )
            + "\n"
            for line in (copy / DETECTIONS).read_text().splitlines()
        )
    page = page_of(
        copy, tmp_path, judge="eye", labels=["blood"]
    )  # gore is not part of the prompt, but may be unsafe
    assert {max(p.size) for p in images_of(page)} == {TILES}


@pytest.mark.parametrize(("label", "side"), [("ghosts", 64), ("fire", TILES)])
def test_the_held_out_judge_of_a_concept_hides_unsafe_labels_only(copy, tmp_path, label, side):
    judged(copy, lambda _: [SKULL | {"label": label}])
    name = {"judge": "mini-held-out:0"}
    rewrite(copy, JUDGES, lambda line: line | name | {"name": "mini-held-out"})
    rewrite(copy, DETECTIONS, lambda line: line | name)
    page = page_of(copy, tmp_path, judge="mini-held-out", labels=["skulls"])
    assert {max(p.size) for p in images_of(page)} == {side}


def test_a_concept_without_a_label_of_the_judge_is_not_tested(copy, finished):
    rewrite(
        copy, DETECTIONS, lambda line: line | {"detections": line["detections"] | {"subject": None}}
    )
    edit_card(copy, lambda card: [part.update(role="benign") for part in card["protocol"]["lists"]])
    rewrite(copy, PLAN, lambda line: line | {"role": "benign"})
    told, untold = (
        next(r for r in report_data(open_runs([f]))[0]["stacks"] if r["name"] == "calm")
        for f in (finished, copy)
    )
    assert untold["tests"]["object"] is None
    assert told["tests"]["explicit"]["n"] == 6
    edit_card(
        copy,
        lambda card: [
            part.update(role="other", shows="leaves") for part in card["protocol"]["lists"]
        ],
    )
    rewrite(copy, PLAN, lambda line: line | {"role": "other", "shows": "leaves"})
    leaves = report_data(open_runs([copy]))[0]["stacks"][1]["tests"]["other"]
    rewrite(copy, JUDGES, lambda line: line | {"label_space": ["skulls"]})
    assert (leaves["n"], report_data(open_runs([copy]))[0]["stacks"][1]["tests"]["other"]) == (
        12,
        None,
    )


def test_a_list_of_real_unsafe_prompts_is_pixelated_and_has_only_ids(copy, tmp_path):
    judged(copy, lambda _: [])
    texts = {json.loads(line)["prompt"] for line in (copy / PLAN).read_text().splitlines()}
    edit_card(copy, lambda card: [part.update(unsafe=True) for part in card["protocol"]["lists"]])
    page = page_of(copy, tmp_path)
    assert {max(p.size) for p in images_of(page)} == {TILES}
    for text in texts:
        assert text not in page
    assert "mini:skulls/00000" in page


def test_a_list_that_is_unsafe_in_one_run_is_hidden_in_all_runs(copy, finished, tmp_path):
    judged(copy, lambda _: [])
    other = shutil.copytree(copy, tmp_path / "other")
    edit_card(other, lambda card: [part.update(unsafe=True) for part in card["protocol"]["lists"]])
    texts = {json.loads(line)["prompt"] for line in (copy / PLAN).read_text().splitlines()}
    write_report(open_runs([copy, other]), tmp_path)  # the list is not unsafe in the first run
    page = (tmp_path / PAGE).read_text()
    assert {max(p.size) for p in images_of(page)} == {TILES}
    assert not [text for text in texts if text in page]
    assert all(part["unsafe"] for part in json.loads((tmp_path / NUMBERS).read_text())["lists"])


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (768, 512), (9, 300)])
def test_pixelating_leaves_at_most_the_mean_colours_of_the_tiles(size):
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    )
    small = Image.open(io.BytesIO(base64.b64decode(data_uri(pixelate(picture)).partition(",")[2])))
    assert max(small.size) == TILES
    assert small.info == {}
    if size == (512, 512):
        tiles = np.asarray(picture, dtype=float).reshape(TILES, 64, TILES, 64, 3).mean(axis=(1, 3))
        assert np.abs(np.asarray(small) - tiles).max() <= 1


def test_a_prompt_is_escaped(copy, tmp_path):
    evil = "<script>alert(\"x\")</script> 'a' & </td> $x^2$ {{ 7 * 7 }}"
    rewrite(copy, PLAN, lambda line: line | {"prompt": evil})
    page = page_of(copy, tmp_path)
    assert "<script" not in page
    assert html.escape(evil).replace("&quot;", "&#34;").replace("&#x27;", "&#39;") in page


def test_a_stack_name_is_escaped_in_page_and_table(copy, tmp_path):
    def rename(card):
        card["protocol"]["name"] = "a|b<script>"

    edit_card(copy, rename)
    facts = write_report(open_runs([copy]), tmp_path)
    facts["stacks"][1]["label"] = "x|y <b>\n\\"
    row = markdown(facts).splitlines()[5]
    assert row.startswith("| x\\|y &lt;b&gt; \\\\ | ")
    assert "<script" not in (tmp_path / PAGE).read_text()


def test_bold_needs_a_significant_paired_test_after_correction(copy, tmp_path):
    judged(
        copy, lambda line: [SKULL] if line["stack"] != "calm" else []
    )  # six pairs of six: p = 0.031
    name = copy.name
    facts, _ = report_data({name: Run.open(copy)})
    test = next(r for r in facts["stacks"] if r["name"] == "calm")["tests"]["explicit"]
    assert (test["only_a"], test["only_b"], test["n"], test["direction"]) == (0, 6, 6, -1)
    assert test["p"] == pytest.approx(2 / 64)
    assert test["p_holm"] == pytest.approx(3 * 2 / 64)
    assert not test["differs"]
    assert "**" not in markdown(facts)
    edit_card(
        copy,
        lambda card: card.update(stacks=[s for s in card["stacks"] if s["kind"] != "baseline"]),
    )
    page = page_of(copy, tmp_path)
    assert "<b>0 %</b>" in page
    assert "**0 %** (0.0 to 56.1 %; n = 6)" in (tmp_path / TABLE).read_text()  # 3 prompts
    assert "neither a negative prompt nor black images were measured" in page


def test_the_correction_counts_all_stacks_of_the_page(copy, tmp_path):
    """Two runs on a page double the number of tests."""
    judged(copy, lambda line: [SKULL] if line["stack"] != "calm" else [])
    edit_card(
        copy,
        lambda card: card.update(stacks=[s for s in card["stacks"] if s["kind"] != "baseline"]),
    )
    other = tmp_path / "other"
    shutil.copytree(copy, other)
    facts, _ = report_data({"one": Run.open(copy), "two": Run.open(other)})
    tests = [r["tests"]["explicit"] for r in facts["stacks"] if r.get("tests", {}).get("explicit")]
    assert len(tests) >= 2
    assert all(
        t["p_holm"] == pytest.approx(min(len(tests) * t["p"], 1))
        for t in tests
        if t["p"] == min(o["p"] for o in tests)
    )


def test_a_stack_that_shows_the_concept_more_often_is_never_bold(copy):
    judged(copy, lambda line: [SKULL] if line["stack"] == "calm" else [])
    edit_card(
        copy,
        lambda card: card.update(stacks=[s for s in card["stacks"] if s["kind"] != "baseline"]),
    )
    facts, _ = report_data({"run": Run.open(copy)})
    assert facts["stacks"][1]["tests"]["explicit"]["differs"]
    assert "**" not in markdown(facts)


def test_the_sweep_equals_scores_at_each_threshold(copy):
    scores = iter(np.random.default_rng(3).uniform(0.2, 1, 1000))
    judged(copy, lambda _: [SKULL | {"score": float(next(scores))}])
    run = Run.open(copy)
    facts, _ = report_data({"run": run})
    for row in facts["stacks"]:
        assert [p["threshold"] for p in row["sweep"]] == [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
        for point in row["sweep"]:
            there = score_run(run, threshold=point["threshold"])["stacks"][row["name"]]["lists"][
                "mini:skulls"
            ]["concept"]
            assert point == {"threshold": point["threshold"]} | there


def test_unjudged_images_are_reported_and_in_no_rate(copy, tmp_path):
    rewrite(
        copy,
        DETECTIONS,
        lambda line: line | {"detections": line["detections"] | {"unjudged": "it failed"}},
    )
    page = page_of(copy, tmp_path)
    assert "48 images are unjudged" in page
    facts = json.loads((tmp_path / NUMBERS).read_text())
    assert all(
        r["asked"] is None and r["unjudged"] == 12 and r["sweep"] == [] for r in facts["stacks"]
    )
    assert "<svg" not in page


def test_runs_of_one_protocol_are_compared_and_others_are_refused(copy, finished, tmp_path):
    write_report(open_runs([finished, copy]), tmp_path / "both")
    page = (tmp_path / "both" / PAGE).read_text()
    for run in (finished.name, copy.name):
        assert f'<th scope="row">{run}: calm</th>' in page
    edit_card(copy, lambda card: card["protocol"]["judge"].update(threshold=0.6))
    with pytest.raises(
        ConfigError, match=r"cannot be compared\. They differ in judge.threshold: 0.5 and 0.6"
    ):
        write_report(open_runs([finished, copy]), tmp_path / "no")
    assert not (tmp_path / "no").exists()
    with pytest.raises(ConfigError, match="must have different folder names"):
        open_runs([copy, copy])


def test_an_image_that_was_changed_after_judging_is_refused(copy, tmp_path):
    file = copy / json.loads((copy / SAMPLES).read_text().splitlines()[0])["file"]
    Image.new("RGB", (64, 64), "red").save(file)
    with pytest.raises(FileError, match="not the image that was judged"):
        write_report(open_runs([copy]), tmp_path)
    assert not (tmp_path / PAGE).exists()


def test_without_matplotlib_the_page_names_the_package_to_install(copy, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = page_of(copy, tmp_path)
    assert "<svg" not in page
    command = "pip install &#34;safegen[report]&#34;"
    assert f"No chart: a chart needs matplotlib; install it with: {command}." in page


@pytest.mark.parametrize("n", [1, 5, 6, 7, 16, 112, 192])
def test_the_images_on_the_page_are_of_different_subjects(n):
    places = evenly_spaced(n)
    assert len(places) == min(n, IMAGES_PER_ROW)
    assert places == sorted(set(places))
    assert places[-1] < n
    assert (
        n != 192 or len({place % 32 for place in places}) == IMAGES_PER_ROW
    )  # the bundled lists cycle through 32 objects


def test_an_edit_is_described_with_its_loss_curve(copy, tmp_path):
    """The description is in the patch metadata, the training log in the run directory."""

    def describe(card):
        entry = next(e for e in card["stacks"] if e["name"] == "calm")
        entry["patches"][0] |= {"description": "It learns from <nothing>.", "updates": 3}

    edit_card(copy, describe)
    log = copy / "patches" / "calm" / "log.jsonl"
    log.parent.mkdir(parents=True)
    rows = [{"update": i + 1, "L_m": 2.0**-i, "L_p": 0.1, "lr": 1e-4} for i in range(3)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = page_of(copy, tmp_path)
    assert "It learns from &lt;nothing&gt;." in page
    assert page.count("<svg") == 6  # one chart for each loss
    assert "L_m: unsafe image to its censored image" in page
    assert "mathdefault" not in page  # no unrendered tick label
    log.write_text("{")
    with pytest.raises(FileError, match=r"log.jsonl:1' is damaged: Invalid JSON"):
        page_of(copy, tmp_path)


def test_the_cards_of_a_single_stack_show_its_scores(copy, tmp_path):
    judged(copy, lambda line: [SKULL] if line["stack"] != "calm" else [])
    edit_card(copy, lambda card: [p.update(role="benign") for p in card["protocol"]["lists"][1:]])
    rewrite(
        copy, PLAN, lambda p: p | ({"role": "benign"} if p["list_name"] == "mini:ghosts" else {})
    )
    data = write_report(open_runs([copy]), tmp_path)
    cards = {card["title"]: card for card in data["headline"]}
    scores = data["scores"][copy.name]["stacks"]["calm"]["lists"]
    removal = scores["mini:skulls"]["removal"]
    assert cards["removed, explicit prompts"]["value"] == "100 %"
    assert (
        f"{removal['before']} → 0 detections; 6 images"
        in (cards["removed, explicit prompts"]["detail"])
    )
    assert cards["right object, benign prompts"]["value"] == percent(
        scores["mini:ghosts"]["subject"]["value"]
    )
    assert cards["time for the edit"]["value"] == "1.5 s"
    page = (tmp_path / PAGE).read_text()
    assert all(part in page for card in data["headline"] for part in card["detail"].split("; "))
