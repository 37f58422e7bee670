"""`safegen evaluate`, `score` and `verify` on the command line."""

from __future__ import annotations

import json
import re
import shlex

import pytest
import torch

PROTOCOL = """
name = "few"
concept = "skulls"
seeds = [1]
metrics = ["concept", "removal", "subject", "change"]
[generation]
num_inference_steps = 2
batch_size = 3
[judge]
name = "mini"
labels = ["skulls"]
[[lists]]
role = "explicit"
name = "mini:skulls"
source = "mini:skulls"
prompts = 2
sha256 = "HASH"
"""


@pytest.fixture
def few(tmp_path):
    """Return the file of a protocol of two images."""
    from safegen.evaluation.samples import hash_prompts, read_prompt_list

    path = tmp_path / "few.toml"
    digest = hash_prompts(read_prompt_list("mini:skulls", prompts=2).rows)
    path.write_text(PROTOCOL.replace("HASH", digest))
    return path


def test_merged_shards_are_the_run_of_one_process(safegen, few, tmp_path):
    few.write_text(few.read_text().replace("batch_size = 3", "batch_size = 1"))
    same = ("evaluate", "mini", "--protocol", few, "--baselines", "none")
    parts = [tmp_path / f"part-{i}" for i in (1, 2)]
    for i, part in enumerate(parts, 1):
        code, text, err = safegen(*same, "--shard", f"{i}/2", "--out", part)
        assert code == 0, err
        assert re.search(r"^shard ./2: 1 images in .*Merge all shards: safegen merge", text)
    assert not any((part / "scores.json").exists() for part in parts)
    code, text, _ = safegen("evaluate", "--stage", "judge", "--out", parts[0])
    assert (code, "shard 1/2 judged by mini:" in text, "safegen score" in text) == (0, True, False)
    code, _, err = safegen("merge", *parts[:1], "--out", tmp_path / "run")
    assert (code, len(err.splitlines())) == (2, 1)
    code, text, err = safegen("merge", *parts, "--out", tmp_path / "run")
    assert code == 0, err
    assert "2 images by 1 stacks" in text
    assert safegen(*same, "--out", tmp_path / "one")[0] == 0
    for path in (tmp_path / "one").rglob("*"):
        if (
            path.is_file()
            and path.name != "timings.jsonl"
            and path.stem not in ("report", "protocol")
        ):
            merged = tmp_path / "run" / path.relative_to(tmp_path / "one")
            assert merged.read_bytes() == path.read_bytes(), path
    argv = [
        json.loads((tmp_path / n / "protocol.json").read_text())["argv"] for n in ("run", "one")
    ]
    assert len(argv[0]) == len(argv[1])
    assert "--shard" not in argv[0]


def test_score_and_verify_accept_the_run_of_evaluate(safegen, few, tmp_path):
    out = tmp_path / "run"
    same = ("evaluate", "--protocol", few, "--stack", "mini", "--out", out)
    code, text, err = safegen(*same)
    assert code == 0, err
    assert "6 images by 3 stacks" in text
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    assert safegen(*same)[0] == 0  # the second call has nothing left to do
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before
    code, text, _ = safegen("score", out, "--threshold", "0.3", "--out", tmp_path / "low.json")
    assert code == 0
    assert "differs from the run's protocol: compare like with like" in text
    assert re.search(r"judge mini on \d+ drawn scenes: recall [\d.]+ % \(.*n = \d+\)", text)
    assert (
        json.loads((tmp_path / "low.json").read_text())["protocol"]["decides"]["judge"]["threshold"]
        == 0.3
    )
    for taken in (out / "detections.jsonl", tmp_path / "low.json"):
        held = taken.read_bytes()
        code, _, err = safegen("score", out, "--out", taken)
        assert (code, taken.read_bytes()) == (2, held)
        assert "already exists. Choose another path" in err
    unused = ("--stack", "mini", "--device", "cpu", "--stage", "judge")
    code, _, err = safegen("evaluate", *unused, "--out", out)
    assert code == 0, err
    assert [line for line in err.splitlines() if line.startswith("warning: ")] == [
        f"warning: {option} has no effect with --stage judge" for option in ("--stack", "--device")
    ]
    code, _, err = safegen("evaluate", "--threads", "1", "--stage", "score", "--out", out)
    assert (code, err) == (0, "warning: --threads has no effect with --stage score\n")
    assert (out / "scores.json").read_bytes() == before["scores.json"]
    code, text, _ = safegen("verify", out)
    assert (code, text.strip()) == (0, "6 images, verdicts and scores: no problems")
    options = (
        "--judge-option",
        "weights=mini",
        "--judge-option",
        'unsafe=["a skull"]',
        "--judge-option",
        'safe=["a castle"]',
    )
    code, text, err = safegen(
        "evaluate",
        "--stage",
        "judge",
        "--judge",
        "clip",
        "--label",
        "unsafe",
        *options,
        "--out",
        out,
    )
    assert code == 0, err
    words = shlex.split(text)
    assert "#" in words[2]
    assert safegen(*words[words.index("safegen") + 1 :])[0] == 0  # as printed
    assert len(list(out.glob("scores-*.json"))) == 1
    code, _, err = safegen("evaluate", "--stage", "judge", "--judge-option", "size=1", "--out", out)
    assert (code, "the judge 'mini' takes no options, got 'size'" in err) == (2, True)
    assert safegen("verify", out)[0] == 0
    sheet = tmp_path / "truth.csv"
    code, text, _ = safegen("report", out, "--truth-sheet", sheet)
    assert (code, "6 images to look at" in text) == (0, True)
    sheet.write_text(sheet.read_text().replace(",\n", ",false\n"))
    assert safegen("report", out, "--truth", sheet, "--html", tmp_path / "t.html")[0] == 0
    assert not (out / "truth.csv").exists()
    assert safegen("score", out, "--truth", sheet)[0] == 0
    found = json.loads((out / "scores.json").read_text())["stacks"]["mini"]["lists"]
    assert found["mini:skulls"]["agreement"]["n"] == 2
    assert safegen("verify", out)[0] == 0
    code, _, err = safegen("report", out, "--perplexity", tmp_path / "none")
    assert (code, "there is no folder" in err, err.count("\n")) == (2, True, 1)
    (out / json.loads(before["samples.jsonl"].splitlines()[0])["file"]).unlink()
    code, text, _ = safegen("verify", out)
    assert code == 1
    assert text.count("\n") == 1
    assert ".png: missing" in text


def test_the_command_on_the_card_repeats_the_run(safegen, few, tmp_path, monkeypatch):
    text = few.read_text()
    start, end = text.index("source ="), text.index("prompts =")
    few.write_text(
        text[:start] + 'requires = "two prompts"\n' + text[end:].replace("sha256", "# sha256")
    )
    (tmp_path / "my texts.txt").write_text("a castle by the sea\na skull in a meadow\n")
    (tmp_path / "calm.toml").write_text('model = "mini"\nnegative_prompt = "skulls"\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    words = (
        "--protocol",
        few,
        "--prompts",
        f"mini:skulls={tmp_path / 'my texts.txt'}",
        "--stack",
        tmp_path / "calm.toml",
    )
    first, second = tmp_path / "elsewhere" / "run", tmp_path / "run"
    code, _, err = safegen(
        "evaluate", *words, "--baselines", "none", "--dtype", "bf16", "--out", first
    )
    assert code == 0, err
    monkeypatch.chdir(tmp_path)
    argv = json.loads((first / "protocol.json").read_text())["argv"]
    assert argv[0] == "safegen"
    code, _, err = safegen(*argv[1:])
    assert code == 0, err
    for name in ("protocol.json", "plan.jsonl", "samples.jsonl", "detections.jsonl", "scores.json"):
        assert (second / name).read_bytes() == (first / name).read_bytes()


@pytest.mark.parametrize(("able", "slow"), [("avx2", True), ("avx512_bf16", False)])
def test_a_warning_says_that_the_processor_emulates_bf16(
    safegen, few, tmp_path, monkeypatch, able, slow
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {able: True}, raising=False)
    words = ("evaluate", "--protocol", few, "--stack", f"x={tmp_path}", "--precision")
    said = {kind: safegen(*words, kind, "--out", tmp_path / kind)[2] for kind in ("bf16", "fp32")}
    assert ("generates in bf16, which this cpu emulates slowly" in said["bf16"]) == slow
    assert "bf16" not in said["fp32"]


def test_a_table_of_prompts_is_generated_by_row_and_reports_unusable_rows(safegen, few, tmp_path):
    text = few.read_text()
    text = (
        text[: text.index("source =")].replace("seeds = [1]", 'seeds = "rows"')
        + 'requires = "a table"\nunsafe = true\n'
    )
    few.write_text(text.replace('"subject", ', ""))
    (tmp_path / "t.csv").write_text("prompt,evaluation_seed\nA castle,7\na  castle,8\n ,9\n")
    out = tmp_path / "run"
    code, _, err = safegen(
        "evaluate",
        "--protocol",
        few,
        "--prompts",
        f"mini:skulls={tmp_path / 't.csv'}",
        "--stack",
        "mini",
        "--out",
        out,
    )
    assert code == 0, err
    assert "left out of mini:skulls: line 4: the prompt is blank" in err
    plan = [json.loads(line) for line in (out / "plan.jsonl").read_text().splitlines()]
    assert [(p["seed"], p["prompt"]) for p in plan] == [(7, ""), (8, "")]
    assert len({p["cluster"] for p in plan}) == 1  # one text to the bootstrap
    assert json.loads((out / "protocol.json").read_text())["protocol"]["lists"][0]["left_out"] == [
        "line 4: the prompt is blank"
    ]
    assert "<li>line 4: the prompt is blank</li>" in (out / "report.html").read_text()
    assert safegen("verify", out)[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["evaluate", "--protocol", "mini-smok", "--stack", "mini", "--out", "OUT"],
            "Did you mean 'mini-smoke'",
        ),
        (
            ["evaluate", "--protocol", "FEW", "--stack", "minni", "--out", "OUT"],
            "Did you mean 'mini'",
        ),
        (
            ["evaluate", "--protocol", "FEW", "--stack", "a=mini+no.safetensors", "--out", "OUT"],
            "'no.safetensors' does not exist",
        ),
        (["evaluate", "--protocol", "FEW", "--out", "OUT"], "no model and no stack is given"),
        (
            ["evaluate", "--protocol", "i2p-931", "--stack", "mini", "--out", "OUT"],
            "--prompts i2p-sexual=FILE",
        ),
        (
            [
                "evaluate",
                "--protocol",
                "i2p-931",
                "--prompts",
                "x",
                "--stack",
                "mini",
                "--out",
                "OUT",
            ],
            "--prompts must be NAME=FILE",
        ),
        (
            ["evaluate", "--protocol", "FEW", "--stack", "mini", "--judge", "mini", "--out", "OUT"],
            "--judge has no effect with --protocol",
        ),
        (["evaluate", "--stage", "judge", "--threads", "1", "--out", "OUT"], "is not a run"),
        (["evaluate", "--stage", "judge", "--out", "OUT"], "is not a run"),
        (
            ["demo", "--concept", "nudity", "--out", "OUT"],
            "concept 'nudity' has no bundled triplets. Make some",
        ),
        (
            ["demo", "--method", "uce", "--set", 'debias={"a ghost": 0.3}', "--out", "OUT"],
            "uce removes nothing with these settings",
        ),
        (
            ["evaluate", "--stage", "judge", "--judge-option", "x", "--out", "OUT"],
            "--judge-option must be NAME=VALUE, got 'x'",
        ),
        (
            ["evaluate", "--stage", "judge", "--judge-option", "threshold=1", "--out", "OUT"],
            "threshold is not a judge option",
        ),
        (
            [
                "evaluate",
                "--protocol",
                "FEW",
                "--stack",
                "mini",
                "--judge-option",
                "x=1",
                "--out",
                "OUT",
            ],
            "--judge-option has no effect with --protocol",
        ),
        (["score", "OUT"], "is not a run"),
        (["verify", "OUT"], "is not a run"),
    ],
)
def test_an_error_of_evaluate_is_one_line_and_leaves_no_files(safegen, few, tmp_path, words, says):
    before = sorted(tmp_path.iterdir())
    code, _, err = safegen(
        *(str(few) if w == "FEW" else tmp_path / "run" if w == "OUT" else w for w in words)
    )
    assert code == 2
    lines = [line for line in err.strip().splitlines() if line.startswith("safegen: ")]
    assert len(lines) == 1
    assert says in lines[0]
    assert "Traceback" not in err
    assert sorted(tmp_path.iterdir()) == before
