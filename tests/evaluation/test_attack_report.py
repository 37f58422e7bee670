"""Attacks in scores, reports and verification: figures equal the records, no text gets out."""

from __future__ import annotations

import base64
import io
import json
import re

import numpy as np
import pytest
from crafted import MARK, write_attack_run, write_run, write_transfer_run
from PIL import Image
from test_escaping import HOSTILE, Tags, controls

from safegen.core.errors import ConfigError, FileError
from safegen.evaluation.report.attack_format import heat_style
from safegen.evaluation.report.attack_table import ANY, compare_attacks, union_scores
from safegen.evaluation.report.page import NUMBERS, PAGE, TABLE, open_runs, write_report
from safegen.evaluation.run.attack_records import read_attack
from safegen.evaluation.run.folder import ATTACK, PROMPTS, SCORES, SETTINGS, TRUTH, Run, write_json
from safegen.evaluation.run.truth import load_truth, own_truth, write_truth, write_truth_sheet
from safegen.evaluation.scoring.score import score_run
from safegen.evaluation.verify import verify


def report_of(folders, out, **options):
    """Return the data, and the texts of all files of a report."""
    data = write_report(open_runs(folders), out, **options)
    return data, "".join(
        (out / name).read_text(encoding="utf-8") for name in (PAGE, NUMBERS, TABLE)
    )


def section_of(folder, out, **options):
    data, _ = report_of([folder], out, **options)
    return data["attacks"][folder.name]


def row_of(section, stack):
    (row,) = [row for row in section["after"] if row["stack"] == stack]
    return row


def keys_after(folder, stack):
    """Return the keys of the images of a stack after the attack."""
    run = Run.open(folder)
    (entry,) = [e for e in run.stacks if e.name == stack]
    keys = run.keys(entry)
    return [keys[i] for i in read_attack(run).variants[0].images]


@pytest.fixture(scope="module")
def uce(tmp_path_factory):
    """Return the folder of an attack's run on an edited stack, to be read only."""
    hits = (True, True, False, None)
    return write_attack_run(tmp_path_factory.mktemp("attack") / "run", stack="uce", hits=hits)


def test_rates_before_and_after_and_cost_are_those_of_the_records(uce, tmp_path):
    section = section_of(uce, tmp_path)
    assert (section["name"], section["tier"], section["access"]) == (
        "ring_a_bell",
        "static",
        "text_encoder",
    )
    assert section["before"]["uce"]["image"]["asr"]["hits"] == 0
    assert section["before"]["uce"]["image"]["asr"]["n"] == 4
    row = row_of(section, "uce")
    assert (row["image"]["unsafe"], row["image"]["safe"], row["image"]["unjudged"]) == (2, 1, 1)
    assert row["prompt"]["asr"]["n"] == 3, "an unjudged prompt is in no rate"
    assert section["cost"] == {"denoiser": 40, "text_encoder": 16, "queries": 8, "seconds": 2.0}
    assert row["per_success"]["denoiser"] == 20
    assert section["stable"]["value"] == 0.5
    assert section["success"]["value"] == 0.5
    assert section["stopped"] == {"queries": 2}
    assert section["perplexity"] is None
    assert (section["prompts"], section["attacks"], section["left_out"]) == (4, 4, 0)
    assert [point["step"] for point in section["curve"]] == [1, 2, 3, 4]
    assert section["curve"][0]["mean"] == 2.0
    assert section["curve"][1]["mean"] == pytest.approx((2 + 3 * 1) / 4), "ended ones keep theirs"
    page = (tmp_path / PAGE).read_text()
    for words in ("Attack</h2>", "40 denoiser passes", "<b>static</b>", "not known", "found words"):
        assert words in page


def test_the_base_model_is_shown_on_the_same_prompts_without_a_cost(uce, tmp_path):
    section = section_of(uce, tmp_path)
    row = row_of(section, "mini")
    assert not row["attacked"]
    assert row["per_success"] is None


def test_scores_hold_no_seconds_and_verify_computes_them_again(uce):
    stored = json.loads((uce / SCORES).read_text())
    assert stored["attack"]["after"][0]["image"]["unsafe"] == 2
    assert "cost" not in stored["attack"]
    assert "seconds" not in json.dumps(stored["attack"])
    assert verify(Run.open(uce)) == []


def test_any_image_of_a_prompt_counts_where_it_is_attacked_several_times(tmp_path):
    hits = (True, False, False, False, False, False, True, False)
    folder = write_attack_run(tmp_path / "r", repeat=2, hits=hits)
    row = row_of(section_of(folder, tmp_path), "mini")
    assert (row["image"]["asr"]["hits"], row["image"]["asr"]["n"]) == (2, 8)
    assert (row["prompt"]["asr"]["hits"], row["prompt"]["asr"]["n"]) == (2, 4)
    assert row["prompt"]["n_per_prompt"] == 2


def test_each_form_of_an_attack_has_a_row_and_a_column_and_controls_stand_apart(tmp_path):
    hits = [True, False, False, False] + [True] * 4 + [False, True, False, False]
    forms = {"variants": ("strength=0.3", "strength=0.6"), "controls": ("none",)}
    folder = write_attack_run(tmp_path / "r", stack="uce", hits=hits, **forms)
    assert verify(Run.open(folder)) == []
    section = section_of(folder, tmp_path)
    rows = [row for row in section["after"] if row["stack"] == "uce"]
    assert [(r["list"], r["control"], r["prompt"]["unsafe"]) for r in rows] == [
        ("ring_a_bell strength=0.3", False, 1),
        ("ring_a_bell strength=0.6", False, 4),
        ("ring_a_bell none", True, 1),
    ]
    assert section["cost"]["denoiser"] == 80, "controls are no cost of the attack"
    assert [row["per_success"] and row["per_success"]["denoiser"] for row in rows] == [40, 10, None]
    assert "a control" in (tmp_path / PAGE).read_text()
    by_role = {
        role: scores["concept"]["n"]
        for role, scores in json.loads((tmp_path / NUMBERS).read_text())["stacks"][-1][
            "roles"
        ].items()
    }
    assert by_role == {"benign": 4, "attack": 8}, "controls are no benign prompts"
    (table,) = compare_attacks(open_runs([folder]))["groups"]
    assert [c["label"] for c in table["columns"]] == [
        "ring_a_bell strength=0.3",
        "ring_a_bell strength=0.6",
        "any static",
    ]
    change(folder / "controls.jsonl", "text 1 none", "other")
    assert any(line.startswith("controls.jsonl: line 2") for line in verify(Run.open(folder)))


def test_rates_before_are_of_the_prompts_that_the_budget_allowed(tmp_path):
    folder = write_attack_run(tmp_path / "r", prompts=5, done=3)
    section = section_of(folder, tmp_path)
    assert (section["attacks"], section["left_out"], section["prompts"]) == (3, 2, 3)
    assert section["before"]["mini"]["image"]["asr"]["n"] == 3
    assert "left out 2 of 5 attacks" in (tmp_path / PAGE).read_text()


def test_no_text_and_no_start_of_unsafe_prompts_is_in_a_report(tmp_path):
    marker = "ZQXMARKER"
    folder = write_attack_run(tmp_path / "r", unsafe=True, marker=marker, stack="uce")
    other = write_attack_run(tmp_path / "s", unsafe=True, marker=marker, settings={"k": [marker]})
    assert marker in (folder / PROMPTS).read_text()
    assert verify(Run.open(folder)) == []
    texts = [
        json.loads(line)["attacked_prompt"] for line in (folder / PROMPTS).read_text().splitlines()
    ]

    class Model:
        id = "m:0"

        def perplexities(self, texts):
            assert marker in texts[0]
            return [10.0, 20.0, 60.0, None]

    for reveal in (False, True):
        data, words = report_of(
            [folder], tmp_path / f"one{reveal}", perplexity=Model(), reveal=reveal
        )
        found = data["attacks"]["r"]["perplexity"]
        assert (found["model"], found["n"], found["median"]) == ("m:0", 3, 20.0)
        for page in (words, report_of([folder, other], tmp_path / f"two{reveal}")[1]):
            assert marker not in page
            assert not [text for text in texts if text in page]
        images = [
            Image.open(io.BytesIO(base64.b64decode(data)))
            for data in re.findall(r'src="data:image/png;base64,([^"]*)"', words)
        ]
        assert images
        for image in images:
            pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
            assert not (pixels == MARK).all(1).any(), "no picture that an attack starts from"
            assert reveal or max(image.size) == 8
    assert data["attacks"]["r"]["settings"] == {"seed": 0, "words": "(hidden)"}


def test_settings_with_paths_are_reduced_to_file_names_and_escaped(tmp_path):
    settings = {"images": "/home/somebody/pictures", "note": HOSTILE.replace("/", "")}
    folder = write_attack_run(tmp_path / "r", settings=settings)
    other = write_attack_run(tmp_path / "s", name="mma", settings=settings)
    for folders in ([folder], [folder, other]):
        _, words = report_of(folders, tmp_path / "out")
        assert "somebody" not in words
        page = (tmp_path / "out" / PAGE).read_text()
        assert [line for line in page.split("\n") if controls(line)] == []
        assert "script" not in Tags(page).opened
        assert "<script>alert(1)<script>" in Tags(page).text


# --- several runs --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid(tmp_path_factory):
    """Return runs of three attacks on the same prompts, and of one on others, to be read only."""
    out = tmp_path_factory.mktemp("grid")
    plan = {
        "ring_a_bell": (True, False, False, None),
        "mma": (False, True, False, False),
        "unlearn_diff": (True, True, False, False),
    }
    folders = [
        write_attack_run(out / f"{name}-{stack}", name=name, stack=stack, hits=hits, marker=name)
        for stack in ("mini", "uce")
        for name, hits in reversed(plan.items())
    ]
    folders.append(
        write_attack_run(out / "seeds-mini", name="seeds", list_name="mini:skulls", hits=(True,))
    )
    return folders


def test_static_columns_stand_first_and_unions_join_the_attacks(grid, tmp_path):
    data, words = report_of(grid, tmp_path)
    same, other = data["groups"]
    assert [(c["label"], c["tier"]) for c in same["columns"]] == [
        ("mma", "static"),
        ("ring_a_bell", "static"),
        ("any static", "static"),
        ("unlearn_diff", "adaptive"),
        (ANY, None),
    ]
    assert [row["stack"] for row in same["rows"]] == ["mini", "uce"]
    rates = [cell["prompt"]["asr"] for cell in same["rows"][1]["cells"]]
    assert [(r["hits"], r["n"]) for r in rates] == [(1, 4), (1, 3), (2, 3), (2, 4), (2, 3)]
    assert same["rows"][0]["cells"][2]["attacks"] == 2
    assert [c["label"] for c in other["columns"]] == ["seeds"], "other prompts are never joined"
    page = (tmp_path / PAGE).read_text()
    assert page.index(">static</th>") < page.index(">adaptive</th>")
    assert 'title="any attack on uce; 66.7 % (' in page
    assert "3 of 3 attacks" in page
    assert "66.7 % (20.8 to 93.9 %; n = 3, 1 unjudged)" in words
    assert "mini:skulls" in page


def test_fixed_prompts_stand_in_the_column_of_the_static_attack_that_found_them(grid, tmp_path):
    mma, rab, diff = (
        next(folder for folder in grid if folder.name == f"{name}-mini")
        for name in ("mma", "ring_a_bell", "unlearn_diff")
    )
    hits = [(True, False, False, False), (False, False, True, False), (False, False, False, True)]
    moved = write_transfer_run(tmp_path / "moved", [mma, rab, diff], hits)
    (table,) = compare_attacks(open_runs([mma, rab, diff, moved]))["groups"]
    assert [(c["label"], c["tier"]) for c in table["columns"]] == [
        ("mma", "static"),
        ("ring_a_bell", "static"),
        ("unlearn_diff (fixed)", "static"),
        ("any static", "static"),
        ("unlearn_diff", "adaptive"),
        (ANY, None),
    ]
    own, other = table["rows"]
    assert [row["stack"] for row in table["rows"]] == ["mini", "other"]
    assert other["before"] is None
    assert own["before"]["prompt"]["asr"]["n"] == 4
    assert other["cells"][4] is None, "it was not made against this stack"
    hit = [cell and cell["prompt"]["asr"]["hits"] for cell in other["cells"]]
    assert hit == [1, 1, 1, 3, None, 3]
    assert other["cells"][-1]["of"] == 4
    data, words = report_of([moved], tmp_path / "one")
    assert "Attacks against stacks" in words
    (table,) = data["transfers"]
    assert [row["cells"][-1]["prompt"]["asr"]["hits"] for row in table["rows"]] == [4, 3]
    assert report_of([mma, moved], tmp_path / "two")[0]["groups"]


def test_a_union_of_fewer_attacks_is_marked(grid, tmp_path):
    data, _ = report_of(grid[:5], tmp_path)
    union = data["groups"][0]["rows"][1]["cells"][-1]
    assert (union["attacks"], union["of"]) == (2, 3)
    assert "2 of 3 attacks" in (tmp_path / TABLE).read_text()
    missing = data["groups"][0]["rows"][1]["cells"]
    assert missing[1] is None


def test_a_union_counts_prompts_that_every_attack_reached():
    one = {"a": ["safe"], "b": ["safe"], "c": ["refused"]}
    two = {"a": ["unsafe"], "c": ["refused"]}
    success = union_scores([one, two])["prompt"]
    assert (success["unsafe"], success["refused"], success["asr"]["n"]) == (1, 1, 2)
    assert union_scores([one, {"d": ["safe"]}])["prompt"] is None


@pytest.mark.parametrize("steps", [2, 3])
def test_runs_that_differ_in_generation_are_refused(grid, tmp_path, steps):
    other = write_attack_run(tmp_path / "other", name="seeds", steps=steps)
    if steps == 2:
        assert compare_attacks(open_runs([grid[0], other]))["groups"][0]["columns"]
    else:
        with pytest.raises(ConfigError, match=r"cannot be compared.*num_inference_steps: 2 and 3"):
            report_of([grid[0], other], tmp_path / "out")


def test_runs_of_one_attack_need_other_settings_and_runs_without_an_attack_stand_apart(
    grid, tmp_path
):
    again = write_attack_run(tmp_path / "again", name="mma", marker="mma")
    mma = next(folder for folder in grid if folder.name == "mma-mini")
    with pytest.raises(ConfigError, match="must have one run on a stack, got mma-mini and again"):
        report_of([mma, again], tmp_path / "out")
    changed = write_attack_run(tmp_path / "changed", name="mma", settings={"seed": 3})
    data = compare_attacks(open_runs([mma, changed]))
    assert [c["label"] for c in data["groups"][0]["columns"]] == ["mma 1", "mma 2", "any static"]
    with pytest.raises(ConfigError, match="got whole, which has none"):
        report_of([mma, write_run(tmp_path / "whole")], tmp_path / "out")


def test_heat_gets_darker_with_the_rate_and_its_text_stands_out():
    def luminance(color):
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), color, strict=True))

    shades = []
    for k in range(21):
        style = heat_style(k / 20)
        shades.append(luminance([int(c) for c in re.findall(r"\d+", style.partition(";")[0])]))
        assert style.endswith("#ffffff") == (shades[-1] < 0.4 * 255)
    assert shades == sorted(shades, reverse=True)


# --- truth ---------------------------------------------------------------------------------------


def test_truth_gives_the_errors_of_the_judge_and_a_corrected_rate(tmp_path):
    hits = (True, True, True, False, False, False, False, False)
    folder = write_attack_run(tmp_path / "r", prompts=8, hits=hits)
    assert "agreement" not in row_of(section_of(folder, tmp_path / "a"), "mini")
    keys = keys_after(folder, "mini")
    sheet = tmp_path / "truth.csv"
    answers = [True, True, False, True, False, False, False]
    rows = [
        f"images/mini/{key}.png,{str(a).lower()}" for key, a in zip(keys, answers, strict=False)
    ]
    sheet.write_text("\n".join(["image,shows", *rows, f"images/mini/{keys[7]}.png,"]) + "\n")
    truth = load_truth(sheet, [Run.open(folder)])
    assert len(truth) == 7, "images without an answer are unknown"
    found = row_of(section_of(folder, tmp_path / "b", truth=truth), "mini")["agreement"]
    assert (found["precision"]["value"], found["recall"]["value"]) == (2 / 3, 2 / 3)
    assert (found["n"], found["precision"]["n"], found["specificity"]["value"]) == (7, 3, 3 / 4)
    expected = (3 / 8 + 3 / 4 - 1) / (2 / 3 + 3 / 4 - 1)
    assert found["corrected"]["value"] == pytest.approx(expected)
    page = (tmp_path / "b" / PAGE).read_text()
    assert "precision 66.7 %" in page
    assert "corrected for these errors (Rogan-Gladen)" in page
    assert own_truth(Run.open(folder)) == {}, "a report stores nothing in the run"
    write_truth(truth, folder / TRUTH)
    scores = json.loads(json.dumps(score_run(Run.open(folder))))
    assert verify(Run.open(folder)) == [], "scores without the truth stay valid"
    write_json(folder / SCORES, scores)
    assert verify(Run.open(folder)) == []
    assert scores["stacks"]["mini"]["lists"]["ring_a_bell"]["agreement"]["n"] == 7
    (folder / TRUTH).write_text((folder / TRUTH).read_text().replace("true", "false", 1))
    assert any("agreement" in line for line in verify(Run.open(folder)))


def test_a_rate_without_truth_of_both_kinds_is_not_corrected(uce, tmp_path):
    truth = {keys_after(uce, "uce")[0]: True}
    found = row_of(section_of(uce, tmp_path, truth=truth), "uce")["agreement"]
    assert found["corrected"] is None
    assert "needs the truth of images" in found["undefined"]
    assert "corrected rate undefined" in (tmp_path / PAGE).read_text()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "must have the columns image and shows"),
        ("image,answer\n", "must have the columns image and shows"),
        ("image,shows\nabc.png,true\n", "row 2 must have an image's key or file"),
        ("key,shows\n" + "0" * 64 + ",perhaps\n", "and true or false, got '000"),
        ("key,shows\n" + "0" * 64 + ",true\n" + "0" * 64 + ",false\n", "another answer"),
        ("key,shows\n" + "0" * 64 + ",true\n", "answers about images of these runs alone"),
        ("key,shows\n" + "0" * 64 + ",\n", "got no answer"),
        ('key,shows\n"0', "is not CSV"),
    ],
)
def test_a_file_of_truth_that_is_not_understood_is_refused(uce, tmp_path, text, says):
    path = tmp_path / "truth.csv"
    path.write_text(text)
    with pytest.raises((ConfigError, FileError), match=says) as caught:
        load_truth(path, [Run.open(uce)])
    assert "\n" not in str(caught.value)


def test_a_sheet_has_a_random_sample_of_the_images_after_the_attack_without_answers(uce, tmp_path):
    run = Run.open(uce)
    assert write_truth_sheet(run, tmp_path / "all.csv") == 8
    assert write_truth_sheet(run, tmp_path / "a.csv", images=5, seed=1) == 5
    assert write_truth_sheet(run, tmp_path / "b.csv", images=5, seed=2) == 5
    first, second = ((tmp_path / name).read_text() for name in ("a.csv", "b.csv"))
    assert first != second
    head, *rows = first.splitlines()
    assert head == "image,shows"
    after = {key for stack in ("mini", "uce") for key in keys_after(uce, stack)}
    for row in rows:
        file, _, answer = row.partition(",")
        assert answer == ""
        assert (uce / file).is_file()
        assert (uce / file).stem in after
    filled = "\n".join([head, *(f"{row}true" for row in rows)])
    (tmp_path / "filled.csv").write_text(filled)
    assert len(load_truth(tmp_path / "filled.csv", [run])) == 5
    with pytest.raises(FileError):
        write_truth_sheet(run, tmp_path / "a.csv")


# --- verification --------------------------------------------------------------------------------


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def append(path, text):
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: change(f / PROMPTS, "found text 1", "other"), r"line 2 and attack.jsonl differ"),
        (lambda f: change(f / ATTACK, "found text 1", "other"), r"differ in prompt"),
        (lambda f: change(f / PROMPTS, "found text 1", "other"), r"not those of the protocol's"),
        (lambda f: change(f / ATTACK, '"strength":0.5', '"strength":0.25'), r"differ in start"),
        (lambda f: change(f / ATTACK, '"seed":', '"guidance_scale":2.0,"seed":'), "guidance_scale"),
        (lambda f: Image.new("RGB", (16, 16)).save(f / "attack" / "a.png"), "has changed since"),
        (lambda f: (f / "attack" / "a-mask.png").unlink(), "does not exist"),
        (lambda f: (f / PROMPTS).unlink(), r"^prompts.jsonl: "),
        (
            lambda f: change(f / SETTINGS, '"num_inference_steps": 2', '"num_inference_steps": 9'),
            r"its protocol is not the card's .*num_inference_steps: 9 and 2",
        ),
        (lambda f: append(f / ATTACK, "{"), "torn"),
        (
            lambda f: append(f / ATTACK, (f / ATTACK).read_text().splitlines()[0] + "\n"),
            "2 records for",
        ),
    ],
)
def test_damage_of_an_attack_is_reported_without_its_texts(tmp_path, damage, says):
    folder = write_attack_run(tmp_path / "r")
    damage(folder)
    faults = verify(Run.open(folder))
    assert any(re.search(says, fault) for fault in faults), faults
    assert not [fault for fault in faults if "found text" in fault or "\n" in fault]


def test_a_record_of_no_attacked_sample_is_refused(tmp_path):
    folder = write_attack_run(tmp_path / "r")
    change(folder / ATTACK, "mini:benign/00001", "mini:benign/00099")
    with pytest.raises(FileError, match="records of the attacked samples alone"):
        verify(Run.open(folder))
