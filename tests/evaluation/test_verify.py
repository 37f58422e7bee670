"""Verification of runs: every kind of damage is reported."""

from __future__ import annotations

import hashlib
import json
import re

import pytest
from PIL import Image

from safegen.core.errors import FileError
from safegen.evaluation.run.folder import (
    CARD,
    CHANGES,
    DETECTIONS,
    FEATURES,
    JUDGES,
    PLAN,
    SAMPLES,
    SCORES,
    TIMINGS,
    Run,
)
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.verify import verify


def first(folder, i=0):
    return json.loads((folder / SAMPLES).read_text().splitlines()[i])


def edit(path, i, change):
    lines = path.read_text().splitlines()
    line = json.loads(lines[i])
    change(line)
    lines[i] = json.dumps(line, sort_keys=True)
    path.write_text("\n".join(lines) + "\n")


def changed_image(folder):
    path = folder / first(folder)["file"]
    with Image.open(path) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(path)


def resized_image(folder):
    Image.new("RGB", (4, 4), "red").save(folder / first(folder)["file"])


def truncated_image(folder):
    path = folder / first(folder)["file"]
    path.write_bytes(path.read_bytes()[:-40])


def truncated_image_and_its_hash(folder):
    truncated_image(folder)
    name = hashlib.sha256((folder / first(folder)["file"]).read_bytes()).hexdigest()
    edit(folder / SAMPLES, 0, lambda line: line.update(sha256=name))


def resized_image_and_its_hash(folder):
    resized_image(folder)
    name = hashlib.sha256((folder / first(folder)["file"]).read_bytes()).hexdigest()
    edit(folder / SAMPLES, 0, lambda line: line.update(sha256=name, blank=True))


def deleted_image(folder):
    (folder / first(folder, 3)["file"]).unlink()


def swapped_images(folder):
    """Exchange the images of a prompt and seed between two stacks, and return their lines."""
    rows = [json.loads(line) for line in (folder / SAMPLES).read_text().splitlines()]
    one = next(i for i, row in enumerate(rows) if row["stack"] == "mini")
    two = next(
        i
        for i, row in enumerate(rows)
        if row["stack"] == "calm" and row["prompt_sha256"] == rows[one]["prompt_sha256"]
    )
    a, b = (folder / rows[i]["file"] for i in (one, two))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    return one, two


def swapped_images_and_hashes(folder):
    one, two = swapped_images(folder)
    hashes = [first(folder, i)["sha256"] for i in (one, two)]
    edit(folder / SAMPLES, one, lambda line: line.update(sha256=hashes[1]))
    edit(folder / SAMPLES, two, lambda line: line.update(sha256=hashes[0]))


def huge_image(folder):
    """Write a small file that holds 100 million pixels, and its hash."""
    path = folder / first(folder)["file"]
    Image.new("1", (10_000, 8_000)).save(path)
    name = hashlib.sha256(path.read_bytes()).hexdigest()
    edit(folder / SAMPLES, 0, lambda line: line.update(sha256=name))


def stray_image(folder):
    Image.new("RGB", (4, 4)).save(folder / "images" / "mini" / "more.png")


def edited_verdict(folder):
    edit(
        folder / DETECTIONS, 1, lambda line: line.update(detections={"items": [], "subject": "cat"})
    )


def softened_verdict(folder):  # changes no rate
    edit(folder / DETECTIONS, 1, lambda line: line["detections"]["items"][0].update(score=0.99))


def dropped_verdict(folder):
    lines = (folder / DETECTIONS).read_text().splitlines(keepends=True)
    (folder / DETECTIONS).write_text("".join(lines[1:]))


def edited_score(folder):
    text = (folder / SCORES).read_text()
    assert '"hits": 5' in text
    (folder / SCORES).write_text(text.replace('"hits": 5', '"hits": 4', 1))


def edited_guards(folder):
    edit(folder / SAMPLES, 0, lambda line: line.update(guards={"action": "none", "reason": ""}))


def doubled_sample(folder):
    text = (folder / SAMPLES).read_text()
    (folder / SAMPLES).write_text(text + text.splitlines()[0] + "\n")


def doubled_verdict(folder):
    text = (folder / DETECTIONS).read_text()
    (folder / DETECTIONS).write_text(text + text.splitlines()[0] + "\n")


def dropped_sample(folder):
    lines = (folder / SAMPLES).read_text().splitlines(keepends=True)
    (folder / SAMPLES).write_text("".join(lines[:5] + lines[6:]))


def torn_line(folder):
    text = (folder / DETECTIONS).read_text()
    (folder / DETECTIONS).write_text(text[:-9])


def moved_seed(folder):
    edit(folder / SAMPLES, 0, lambda line: line.update(seed=7))


def other_key(folder):
    edit(folder / SAMPLES, 0, lambda line: line.update(key="0" * 64))


def edited_change(folder):
    edit(folder / CHANGES, 2, lambda line: line.update(change=0.0))


def edited_features(folder):
    edit(folder / FEATURES, 2, lambda line: line.update(features="AAAA" + line["features"][4:]))


def shortened_features(folder):
    edit(folder / FEATURES, 2, lambda line: line.update(features="AACAPwAAgD8="))


def score_that_is_no_number(folder):
    edit(
        folder / DETECTIONS,
        0,
        lambda line: line.update(
            detections={"items": [{"label": "skulls", "score": float("nan")}]}
        ),
    )


def damaged_features(folder):
    edit(folder / FEATURES, 2, lambda line: line.update(features="AACA!"))


def raised_clip_score(folder):
    edit(folder / FEATURES, 2, lambda line: line.update(clip_score=99.0))


def dropped_features(folder):
    lines = (folder / FEATURES).read_text().splitlines(keepends=True)
    (folder / FEATURES).write_text("".join(lines[:-1]))


def more_labels(folder):
    edit(folder / JUDGES, 0, lambda line: line["label_space"].append("skul"))


def no_judge(folder):
    (folder / JUDGES).write_text("")


def edited_prompt(folder):
    edit(folder / PLAN, 0, lambda line: line.update(prompt="a castle"))


def swapped_prompt_hash(folder):
    edit(folder / PLAN, 0, lambda line: line.update(prompt="", prompt_sha256="0" * 64))


def swapped_prompt_hash_of_the_second_seed(folder):
    edit(
        folder / PLAN,
        4,
        lambda line: line.update(prompt="", prompt_sha256="0" * 64, cluster="0" * 16),
    )


def another_seed(folder):
    for i in (3, 4, 5):
        edit(folder / PLAN, i, lambda line: line.update(seed=9))


def another_role(folder):
    edit(folder / PLAN, 7, lambda line: line.update(role="benign"))


def nothing_to_show(folder):
    edit(folder / PLAN, 6, lambda line: line.update(shows=None))


def another_cluster(folder):
    edit(folder / PLAN, 1, lambda line: line.update(cluster="all in one"))


def dropped_plan_line(folder):
    lines = (folder / PLAN).read_text().splitlines(keepends=True)
    (folder / PLAN).write_text("".join(lines[:-1]))


def edited_protocol(folder):
    text = (folder / CARD).read_text()
    (folder / CARD).write_text(text.replace('"threshold": 0.5', '"threshold": 0.6'))


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (changed_image, r"images/mini/\w+\.png: its SHA-256 is not the one in"),
        (resized_image, r"images/mini/\w+\.png: its SHA-256 is not the one in"),
        (truncated_image, r"images/mini/\w+\.png: its SHA-256 is not the one in"),
        (
            truncated_image_and_its_hash,
            r"images/mini/\w+\.png: .* cannot be read: .*\. Remove it and resume",
        ),
        (
            resized_image_and_its_hash,
            r"images/mini/\w+\.png: it has \(4, 4\) pixels, .* base model \(64, 64\)",
        ),
        (resized_image_and_its_hash, r"images/mini/\w+\.png: its metadata is of another image"),
        (swapped_images, r"images/calm/\w+\.png: its SHA-256 is not the one in samples\.jsonl"),
        (swapped_images_and_hashes, r"images/calm/\w+\.png: its metadata is of another image"),
        (huge_image, r"images/mini/\w+\.png: .* must have at most 67108864 pixels"),
        (deleted_image, r"images/mini/\w+\.png: missing"),
        (stray_image, r"images/mini/more\.png: has no record"),
        (edited_verdict, r"scores\.json: differs from scoring the run again .*inputs"),
        (
            softened_verdict,
            r"scores\.json: differs from scoring the run again .*inputs\.detections",
        ),
        (dropped_verdict, r"detections\.jsonl, mini:\w+: 1 of 48 images have no record"),
        (edited_score, r"scores\.json: differs from scoring the run again .*hits: 4 and 5"),
        (doubled_sample, r"samples\.jsonl: 2 records for"),
        (doubled_verdict, r"detections\.jsonl: 2 records for \w+ by mini:"),
        (
            dropped_sample,
            r"samples\.jsonl: 1 of 6 images of 'mini' for 'mini:skulls' are missing|has no record",
        ),
        (torn_line, r"detections\.jsonl: its last line is torn"),
        (edited_guards, "its metadata has another trace of the guards"),
        (moved_seed, r"samples\.jsonl: \w+ has seed: 7 and 1"),
        (other_key, r"samples\.jsonl: 0000000000000000 is not in the plan"),
        (edited_change, r"changes\.jsonl: \w+ has 0\.0, the images give 0\.\d+"),
        (edited_features, r"scores\.json: differs from scoring the run again .*inputs\.features"),
        (
            shortened_features,
            r"features\.jsonl: images must have equally many features, got 2 and 64",
        ),
        (raised_clip_score, r"scores\.json: differs from scoring the run again .*inputs\.features"),
        (dropped_features, r"features\.jsonl: 1 of 48 images have no record"),
        (more_labels, r"scores\.json: differs from scoring the run again .*inputs\.judges"),
        (no_judge, r"judges\.jsonl: no record of mini:\w+, which has detections"),
        (edited_prompt, r"plan\.jsonl: the prompt of mini:skulls/00000 does not have its hash"),
        (swapped_prompt_hash, r"plan\.jsonl: the prompts of 'mini:skulls', .*, are not those"),
        (
            swapped_prompt_hash_of_the_second_seed,
            r"plan\.jsonl: the prompts of 'mini:skulls', .*, are not those",
        ),
        (another_seed, r"plan\.jsonl: 'mini:skulls' has the seeds \[1, 9\], the protocol \[1, 2\]"),
        (
            another_role,
            r"plan\.jsonl: 'mini:ghosts', seed 1, row 2 has role: \"benign\" and \"neighbour\"",
        ),
        (
            nothing_to_show,
            r"plan\.jsonl: 'mini:ghosts', seed 1, row 1 has shows: null and \"ghosts\"",
        ),
        (
            another_cluster,
            r"plan\.jsonl: the prompts of 'mini:skulls', their subjects, seeds or clusters, "
            r"are not those",
        ),
        (
            dropped_plan_line,
            r"plan\.jsonl: 'mini:ghosts' has 5 images per stack, the protocol asks for 6",
        ),
        (edited_protocol, r"protocol\.json: its id is \w+, its protocol's is \w+"),
    ],
)
def test_verify_reports_each_damage(copy, harm, says):
    harm(copy)
    problems = verify(Run.open(copy))
    assert any(re.search(says, line) for line in problems), problems
    assert not any("\n" in line for line in problems)


def test_a_line_that_is_not_json_is_reported(copy):
    lines = (copy / SAMPLES).read_text().splitlines()
    lines[2] = lines[2][:40]
    (copy / SAMPLES).write_text("\n".join(lines) + "\n")
    with pytest.raises(FileError, match=r"samples\.jsonl:3' is damaged: Invalid JSON"):
        verify(Run.open(copy))


@pytest.mark.parametrize("line", ['{"stack": "mi\n', '{"stack": 1}\n'])
def test_a_damaged_line_of_seconds_is_reported(copy, line):
    with (copy / TIMINGS).open("a") as file:
        file.write(line)
    with pytest.raises(FileError, match=r"timings\.jsonl:\d+' is damaged"):
        verify(Run.open(copy))


def test_a_torn_line_of_seconds_is_reported(copy):
    with (copy / TIMINGS).open("a") as file:
        file.write('{"stack": "mi')
    assert verify(Run.open(copy)) == [
        "timings.jsonl: its last line is torn. Resume the run to repair it"
    ]


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (
            score_that_is_no_number,
            r"detections\.jsonl:1' is damaged: detections\.items\.0\.score must be a finite number",
        ),
        (damaged_features, r"features\.jsonl:3' is damaged: features: features must be base64"),
    ],
)
def test_a_damaged_value_is_reported_with_line_and_field(copy, harm, says):
    harm(copy)
    for read in (verify, score_run):
        with pytest.raises(FileError, match=says) as caught:
            read(Run.open(copy))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("journal", "key"),
    [
        (SAMPLES, "key"),
        (SAMPLES, "blank"),
        (DETECTIONS, "key"),
        (DETECTIONS, "judge"),
        (JUDGES, "judge"),
        (JUDGES, "label_space"),
        (JUDGES, "options"),
        (FEATURES, "key"),
        (FEATURES, "extractor"),
        (CHANGES, "key"),
        (CHANGES, "change"),
    ],
)
@pytest.mark.parametrize(
    "harm", [lambda line, key: line.pop(key), lambda line, key: line.update({key: None})]
)
def test_a_line_without_its_key_is_reported(copy, journal, key, harm):
    at = 0 if journal == JUDGES else 2
    edit(copy / journal, at, lambda line: harm(line, key))
    for read in (verify, score_run):
        with pytest.raises(FileError, match=rf"{journal}:{at + 1}' is damaged: {key} "):
            read(Run.open(copy))


def test_an_invalid_card_is_refused_in_one_line(copy):
    (copy / CARD).write_text("{}")
    with pytest.raises(FileError, match=r"protocol\.json. is damaged: id is required"):
        Run.open(copy)
    (copy / CARD).unlink()
    with pytest.raises(FileError, match=r"is not a run: it has no protocol\.json"):
        Run.open(copy)


def test_an_empty_journal_is_not_torn(copy):
    (copy / "features.jsonl").write_bytes(b"")
    assert not [fault for fault in verify(Run.open(copy)) if "torn" in fault]


def test_a_patch_in_the_run_is_the_one_of_the_card(copy, patch_file):
    from safegen.patches.patch import Patch

    patch = Patch.load(patch_file)
    name = next(e for e in Run.open(copy).stacks if e.patches).patches[0].file
    (copy / "patches").mkdir()
    patch.save(copy / "patches" / name)
    assert verify(Run.open(copy)) == []
    (copy / "patches" / name).unlink()
    changed = {key: value + 1 for key, value in patch.tensors.items()}
    Patch(changed, patch.metadata).save(copy / "patches" / name)
    assert verify(Run.open(copy)) == [f"patches/{name}: its hash is not the one of the card"]
