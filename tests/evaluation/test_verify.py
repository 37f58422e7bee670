"""What verify finds: every hand that was laid on a run."""

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
    FEATURES,
    JUDGES,
    PLAN,
    SAMPLES,
    SCORES,
    VERDICTS,
    Run,
)
from safegen.evaluation.run.verify import verify
from safegen.evaluation.scoring.table import score_run


def first(folder, i=0):
    return json.loads((folder / SAMPLES).read_text().splitlines()[i])


def edit(path, i, change):
    lines = path.read_text().splitlines()
    line = json.loads(lines[i])
    change(line)
    lines[i] = json.dumps(line, sort_keys=True)
    path.write_text("\n".join(lines) + "\n")


def changed_picture(folder):
    path = folder / first(folder)["file"]
    with Image.open(path) as image:
        image.putpixel((0, 0), (1, 2, 3))
        image.save(path)


def resized_picture(folder):
    Image.new("RGB", (4, 4), "red").save(folder / first(folder)["file"])


def truncated_picture(folder):
    path = folder / first(folder)["file"]
    path.write_bytes(path.read_bytes()[:-40])


def truncated_picture_and_its_hash(folder):
    truncated_picture(folder)
    name = hashlib.sha256((folder / first(folder)["file"]).read_bytes()).hexdigest()
    edit(folder / SAMPLES, 0, lambda line: line.update(sha256=name))


def resized_picture_and_its_hash(folder):
    resized_picture(folder)
    name = hashlib.sha256((folder / first(folder)["file"]).read_bytes()).hexdigest()
    edit(folder / SAMPLES, 0, lambda line: line.update(sha256=name, blank=True))


def deleted_picture(folder):
    (folder / first(folder, 3)["file"]).unlink()


def stray_picture(folder):
    Image.new("RGB", (4, 4)).save(folder / "pictures" / "mini" / "more.png")


def edited_verdict(folder):
    edit(
        folder / VERDICTS, 1, lambda line: line["detections"].clear() or line.update(subject="cat")
    )


def softened_verdict(folder):  # moves no rate, and is found all the same
    edit(folder / VERDICTS, 1, lambda line: line["detections"][0].update(score=0.99))


def dropped_verdict(folder):
    lines = (folder / VERDICTS).read_text().splitlines(keepends=True)
    (folder / VERDICTS).write_text("".join(lines[1:]))


def edited_score(folder):
    text = (folder / SCORES).read_text()
    assert '"hits": 5' in text
    (folder / SCORES).write_text(text.replace('"hits": 5', '"hits": 4', 1))


def doubled_sample(folder):
    text = (folder / SAMPLES).read_text()
    (folder / SAMPLES).write_text(text + text.splitlines()[0] + "\n")


def doubled_verdict(folder):
    text = (folder / VERDICTS).read_text()
    (folder / VERDICTS).write_text(text + text.splitlines()[0] + "\n")


def dropped_sample(folder):
    lines = (folder / SAMPLES).read_text().splitlines(keepends=True)
    (folder / SAMPLES).write_text("".join(lines[:5] + lines[6:]))


def torn_line(folder):
    text = (folder / VERDICTS).read_text()
    (folder / VERDICTS).write_text(text[:-9])


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
        folder / VERDICTS,
        0,
        lambda line: line.update(
            detections=[{"label": "skulls", "score": float("nan"), "box": None}]
        ),
    )


def damaged_features(folder):
    edit(folder / FEATURES, 2, lambda line: line.update(features="AACA!"))


def raised_clip_score(folder):
    edit(folder / FEATURES, 2, lambda line: line.update(score=99.0))


def dropped_features(folder):
    lines = (folder / FEATURES).read_text().splitlines(keepends=True)
    (folder / FEATURES).write_text("".join(lines[:-1]))


def more_labels(folder):
    edit(folder / JUDGES, 0, lambda line: line["known"].append("skul"))


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
        (changed_picture, r"pictures/mini/\w+\.png: its bytes are not those"),
        (resized_picture, r"pictures/mini/\w+\.png: its bytes are not those"),
        (truncated_picture, r"pictures/mini/\w+\.png: its bytes are not those"),
        (
            truncated_picture_and_its_hash,
            r"pictures/mini/\w+\.png: .* cannot be read: .*; remove it and go on",
        ),
        (resized_picture_and_its_hash, r"changes\.jsonl: \w+ cannot be measured again: "),
        (deleted_picture, r"pictures/mini/\w+\.png: missing"),
        (stray_picture, r"pictures/mini/more\.png: belongs to no line"),
        (edited_verdict, r"scores\.json: not what scoring the run gives .*inputs"),
        (softened_verdict, r"scores\.json: not what scoring the run gives .*inputs\.verdicts"),
        (dropped_verdict, r"verdicts\.jsonl: 1 of 48 pictures have no verdict by mini"),
        (edited_score, r"scores\.json: not what scoring the run gives .*hits: 4 and 5"),
        (doubled_sample, r"samples\.jsonl: 2 lines for"),
        (doubled_verdict, r"verdicts\.jsonl: 2 lines for \w+ by mini:"),
        (
            dropped_sample,
            r"samples\.jsonl: 1 of 6 pictures of 'mini' for 'mini:skulls' are missing|belongs to no line",
        ),
        (torn_line, r"verdicts\.jsonl: its last line is torn"),
        (moved_seed, r"samples\.jsonl: \w+ says seed: 7 and 1"),
        (other_key, r"samples\.jsonl: 0000000000000000 is no picture of the plan"),
        (edited_change, r"changes\.jsonl: \w+ says 0\.0, the pictures say 0\.\d+"),
        (edited_features, r"scores\.json: not what scoring the run gives .*inputs\.features"),
        (shortened_features, r"features\.jsonl: pictures have 2 or 64 features"),
        (
            score_that_is_no_number,
            r"verdicts\.jsonl: the verdict on '\w+' is damaged: .* must be finite",
        ),
        (damaged_features, r"features\.jsonl: the features of '\w+' are damaged"),
        (raised_clip_score, r"scores\.json: not what scoring the run gives .*inputs\.features"),
        (dropped_features, r"features\.jsonl: 1 of 48 pictures have no line"),
        (more_labels, r"scores\.json: not what scoring the run gives .*inputs\.judges"),
        (no_judge, r"judges\.jsonl: nothing is said of mini:\w+, by whom there are verdicts"),
        (edited_prompt, r"plan\.jsonl: the text of mini:skulls/00000 is not that of its hash"),
        (swapped_prompt_hash, r"plan\.jsonl: the prompts of 'mini:skulls', .*, are not those"),
        (
            swapped_prompt_hash_of_the_second_seed,
            r"plan\.jsonl: the prompts of 'mini:skulls', .*, are not those",
        ),
        (
            another_seed,
            r"plan\.jsonl: 'mini:skulls' is drawn with the seeds \[1, 9\], the protocol names \[1, 2\]",
        ),
        (
            another_role,
            r"plan\.jsonl: 'mini:ghosts', seed 1, row 2 says role: \"benign\" and \"neighbour\"",
        ),
        (
            nothing_to_show,
            r"plan\.jsonl: 'mini:ghosts', seed 1, row 1 says shows: null and \"ghosts\"",
        ),
        (
            another_cluster,
            r"plan\.jsonl: the prompts of 'mini:skulls', their subjects, seeds or clusters, are not those",
        ),
        (
            dropped_plan_line,
            r"plan\.jsonl: 'mini:ghosts' has 5 pictures a stack, the protocol asks for 6",
        ),
        (edited_protocol, r"protocol\.json: its id is \w+, its protocol's is \w+"),
    ],
)
def test_verify_names_what_was_done_to_a_run(copy, harm, says):
    harm(copy)
    problems = verify(Run.open(copy))
    assert any(re.search(says, line) for line in problems), problems
    assert not any("\n" in line for line in problems)


def test_a_line_that_is_not_json_is_named(copy):
    lines = (copy / SAMPLES).read_text().splitlines()
    lines[2] = lines[2][:40]
    (copy / SAMPLES).write_text("\n".join(lines) + "\n")
    with pytest.raises(FileError, match=r"samples\.jsonl:3 is not a JSON object"):
        verify(Run.open(copy))


@pytest.mark.parametrize(
    ("journal", "key"),
    [
        (SAMPLES, "key"),
        (SAMPLES, "blank"),
        (VERDICTS, "key"),
        (VERDICTS, "judge"),
        (JUDGES, "judge"),
        (JUDGES, "known"),
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
def test_a_line_without_what_it_is_read_by_is_named(copy, journal, key, harm):
    at = 0 if journal == JUDGES else 2
    edit(copy / journal, at, lambda line: harm(line, key))
    for read in (verify, score_run):
        with pytest.raises(FileError, match=rf"{journal}:{at + 1} has no '{key}'"):
            read(Run.open(copy))


def test_a_card_that_is_not_one_is_one_line(copy):
    (copy / CARD).write_text("{}")
    with pytest.raises(FileError, match="is not a run's card"):
        Run.open(copy)
    (copy / CARD).unlink()
    with pytest.raises(FileError, match=r"is not a run: it has no protocol\.json"):
        Run.open(copy)
