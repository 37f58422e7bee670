"""`safegen generate`, `edit`, `apply` and `demo` on the command line."""

import json
import re
import shlex
import shutil
import sys

import pytest
from PIL import Image
from typer.main import get_command

from safegen.cli.main import app
from safegen.core.errors import MissingExtraError
from safegen.data.images import is_contact_sheet
from safegen.mini import bundle
from safegen.models.loading import load
from safegen.patches.patch import Patch


def test_generate_writes_images_and_their_settings(safegen, tmp_path):
    out = tmp_path / "pictures"
    code, _, err = safegen(
        "generate",
        "mini",
        "--prompt",
        "a castle",
        "--prompt",
        "a cat / at dusk",
        "--steps",
        "3",
        "--seed",
        "7",
        "--out",
        out,
    )
    assert code == 0, err
    assert sorted(p.name for p in out.iterdir()) == ["0000.png", "0001.png", "sheet.png"]
    with Image.open(out / "0001.png") as picture:
        facts = json.loads(picture.text["safegen"])
    assert (facts["prompt"], facts["seed"], facts["index"], facts["steps"]) == (
        "a cat / at dusk",
        7,
        1,
        3,
    )
    assert {"guidance", "model", "base", "patches", "stack", "negative_prompt"} < facts.keys()
    assert [p.name for p in sorted(out.iterdir()) if is_contact_sheet(p)] == ["sheet.png"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["generate", "minni", "--prompt", "x", "--out", "OUT"], "Did you mean 'mini'"),
        (["generate", "mini", "--out", "OUT"], "no prompt is given"),
        (["-q", "demo"], "Give it after the command: safegen COMMAND -q. See: safegen --help"),
        (["generat"], "Did you mean 'generate'? See: safegen --help"),
        (["export", "TRIPLETS", "mini", "--out", "OUT"], "(mini). Patches go with --patch. See:"),
        (["generate", "mini", "--prompts", "no.txt", "--out", "OUT"], "'no.txt' does not exist"),
        (
            ["generate", "mini", "--prompt", "x", "--patch", "no.safetensors", "--out", "OUT"],
            "'no.safetensors' does not exist",
        ),
        (
            ["generate", "mini", "--prompt", "x", "--steps", "1000", "--out", "OUT"],
            "steps must be <= 999 on this model's schedule",
        ),
        (["edit", "mini", "--triplets", "nowhere", "--out", "OUT"], "nowhere"),
        (["edit", "mini", "--triplets", "mini:skulll", "--out", "OUT"], "Did you mean 'skulls'"),
        (
            ["edit", "mini", "--triplets", "TRIPLETS", "--method", "safegem", "--out", "OUT"],
            "Did you mean 'safegen'",
        ),
        (["edit", "mini", "--triplets", "TRIPLETS", "--set", "clampp=3", "--out", "OUT"], "clampp"),
        (
            ["edit", "mini", "--triplets", "TRIPLETS", "--set", "training.lr=-1", "--out", "OUT"],
            "greater than 0, got -1",
        ),
        (
            ["edit", "mini", "--triplets", "TRIPLETS", "--preset", "papper", "--out", "OUT"],
            "Did you mean 'paper'",
        ),
        (
            [
                "edit",
                "mini",
                "--triplets",
                "TRIPLETS",
                "--preset",
                "paper",
                "--concept",
                "fire",
                "--out",
                "OUT",
            ],
            "sees it in none of 100. Choose another concept",
        ),
        (
            ["edit", "mini", "--triplets", "TRIPLETS", "--concept", "skull", "--out", "OUT"],
            "Did you mean 'skulls'",
        ),
        (
            ["edit", "mini", "--triplets", "TRIPLETS", "--concept", "fire", "--out", "OUT"],
            "sees it in none of 100. Choose another concept",
        ),
        (
            ["edit", "mini", "--triplets", "TRIPLETS", "--resume", "--out", "OUT"],
            "has no checkpoint.safetensors to resume",
        ),
        (
            [
                "edit",
                "mini",
                "--triplets",
                "TRIPLETS",
                "--checkpoint-dir",
                "TRIPLETS/manifest.jsonl",
                "--out",
                "OUT",
            ],
            "is a file, not a folder",
        ),
        (["edit", "mini", "--out", "OUT"], "safegen learns from images, and there are no triplets"),
        (
            ["edit", "mini", "--method", "uce", "--out", "OUT"],
            "uce has no phrases to erase. Give a concept",
        ),
        (
            [
                "edit",
                "mini",
                "--method",
                "uce",
                "--concept",
                "skulls",
                "--triplets",
                "TRIPLETS",
                "--out",
                "OUT",
            ],
            "triplets have no effect",
        ),
        (
            ["edit", "mini", "--method", "rece", "--concept", "skulls", "--resume", "--out", "OUT"],
            "resume has no effect",
        ),
        (
            [
                "edit",
                "mini",
                "--method",
                "uce",
                "--concept",
                "skulls",
                "--checkpoint-dir",
                "W",
                "--out",
                "OUT",
            ],
            "checkpoint_dir has no effect",
        ),
        (
            [
                "export",
                "mini",
                "--patch",
                "no.safetensors",
                "--format",
                "diffusers",
                "--out",
                "OUT",
            ],
            "'no.safetensors' does not exist",
        ),
        (["demo", "--concept", "skull", "--out", "OUT"], "Did you mean 'skulls'"),
    ],
)
def test_an_error_is_one_line_and_leaves_no_files(safegen, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    words = [w.replace("TRIPLETS", str(bundle.triplets_folder("skulls"))) for w in words]
    code, _, err = safegen(*words)
    assert code == 2
    assert says in err
    lines = [line for line in err.strip().splitlines() if line.startswith("safegen: ")]
    assert len(lines) == 1
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_prompt_warns(safegen, tmp_path):
    few = ["--prompt", "a castle", "--prompt", "a castle and a cat " * 20, "--steps", "1"]
    code, _, err = safegen("generate", "mini", *few, "--out", tmp_path / "out")
    assert code == 0, err
    limit = load("mini").pipeline.tokenizer.model_max_length
    assert [line for line in err.splitlines() if line.startswith("warning")] == [
        f"warning: 1 prompts are longer than {limit} tokens and were truncated, prompt 2 first"
    ]


def test_unchecked_triplets_warn_in_one_line(safegen, tmp_path, monkeypatch):
    def missing(*args, **kwargs):
        raise MissingExtraError("judge 'nudenet'", "NudeNet", "nudenet")

    monkeypatch.setattr("safegen.workflows.edit.load_concept_judge", missing)
    few = [f"--set=training.{word}" for word in ("updates=1", "warmup=0", "batch=1")]
    code, _, err = safegen(
        "edit",
        "mini",
        "--triplets",
        "mini:skulls",
        "--concept",
        "skulls",
        *few,
        "--out",
        tmp_path / "p.safetensors",
    )
    assert code == 0, err
    said = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(said) == 1
    assert "triplets were not checked" in said[0]


def test_an_existing_output_is_not_changed(safegen, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "precious.txt").write_text("keep me")
    for words in (
        ["generate", "mini", "--prompt", "x"],
        ["demo", "--fast"],
        ["export", "mini", "--patch", "p.safetensors", "--format", "diffusers"],
    ):
        code, _, err = safegen(*words, "--out", out)
        assert code == 2
        assert "already exists" in err
    assert (out / "precious.txt").read_text() == "keep me"


def test_generate_uses_an_edited_and_applied_model(safegen, tmp_path):
    triplets = bundle.triplets_folder("skulls")
    patch, folder = tmp_path / "patch.safetensors", tmp_path / "model"
    few = ["--set", "training.updates=2", "--set", "training.batch=2", "--set", "training.warmup=0"]
    code, out, err = safegen("edit", "mini", "--triplets", triplets, "--out", patch, *few)
    assert code == 0, err
    assert "2 updates" in out
    code, _, err = safegen(
        "export", "mini", "--patch", patch, "--format", "diffusers", "--out", folder
    )
    assert code == 0, err
    same = ["--prompt", "a castle", "--steps", "2"]
    assert safegen("generate", folder, *same, "--out", tmp_path / "a")[0] == 0
    assert safegen("generate", "mini", "--patch", patch, *same, "--out", tmp_path / "b")[0] == 0
    with Image.open(tmp_path / "a" / "0000.png") as a, Image.open(tmp_path / "b" / "0000.png") as b:
        assert a.tobytes() == b.tobytes()
        assert len(json.loads(b.text["safegen"])["patches"]) == 1
        assert (
            json.loads(a.text["safegen"])["model"] == "model"
        )  # the name of the directory without its path
    made = [
        "edit",
        folder,
        "--method",
        "uce",
        "--concept",
        "skulls",
        "--out",
        tmp_path / "text.safetensors",
    ]
    assert safegen(*made)[0] == 0
    assert safegen("export", folder, "--out", tmp_path / "one.safetensors")[0] == 0
    written = [
        tmp_path / "text.safetensors",
        tmp_path / "one.safetensors",
        *(p for p in folder.rglob("*") if p.is_file()),
    ]
    homes = [str(tmp_path).encode(), str(bundle.HERE).encode()]
    assert [p.name for p in written if any(home in p.read_bytes() for home in homes)] == []
    code, _, err = safegen("generate", folder, "--patch", patch, *same, "--out", tmp_path / "c")
    assert code == 0
    assert "warning: the patch was made on weights" in err


def test_generate_with_guards_writes_shown_images_and_traces(safegen, tmp_path):
    recipe, out = tmp_path / "safe.toml", tmp_path / "out"
    recipe.write_text(
        'model = "mini"\nnegative_prompt = "fog"\n'
        'guards = [{name = "prompt-filter", words = ["castle"]}]\n'
    )
    words = [
        "--guard",
        "sld-max",
        "--concept",
        "skulls",
        "--prompt",
        "a castle",
        "--prompt",
        "a cat",
        "--steps",
        "2",
    ]
    code, text, err = safegen("generate", "--stack", recipe, *words, "--out", out)
    assert code == 0, err
    assert "1 image and sheet.png" in text
    assert "1 withheld (trace.jsonl gives the reasons)" in text
    assert sorted(p.name for p in out.iterdir()) == ["0001.png", "sheet.png", "trace.jsonl"]
    gone, shown = (json.loads(line) for line in (out / "trace.jsonl").read_text().splitlines())
    assert (gone["index"], gone["action"], gone["reason"]) == (0, "block", "prompt-filter: word")
    assert (shown["action"], shown["reason"]) == ("edit", "sld: steered")
    with Image.open(out / "0001.png") as picture:
        facts = json.loads(picture.text["safegen"])
    assert facts["guards"] == {k: v for k, v in shown.items() if k not in ("index", "seed")}
    assert facts["negative_prompt"] == "fog"
    assert len(facts["stack"]) == 64


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["mini", "--guard", "sdl"], "no guard named 'sdl'. Did you mean 'sld'"),
        (["mini", "--guard", "sld-mx"], "Did you mean 'max'"),
        (["mini", "--guard", "sld"], "text of the guard 'sld' must have at most 32 tokens"),
        (["mini", "--guard", "negative-prompt"], "text is required"),
        (
            ["mini", "--guard", "sld", "--concept", "skulls", "--guidance", "1"],
            "guidance_scale must be > 1 with sld, got 1",
        ),
        (["mini", "--concept", "skulls"], "concept must be used by a guard"),
        (["mini", "--stack", "mini"], "MODEL or --stack must be given"),
        ([], "MODEL or --stack must be given"),
        (["--stack", "no.toml"], "does not exist"),
    ],
)
def test_generate_refuses_invalid_guards(safegen, tmp_path, words, says):
    code, _, err = safegen(
        "generate", *words, "--prompt", "a castle", "--steps", "1", "--out", tmp_path / "out"
    )
    assert code == 2
    assert says in err
    assert "\n" not in err.strip()
    assert not (tmp_path / "out").exists()


def test_a_config_is_written_one_time(safegen, tiny_model, tiny_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    from safegen.models.checkpoint.single_file_writer import save_single_file

    save_single_file(tiny_model, tmp_path / "whole.safetensors", dtype="fp32")
    bare, recipe, base = (
        tmp_path / "bare.safetensors",
        tmp_path / "s.toml",
        ("--prompt", "a red cube", "--steps", "1", "--out"),
    )
    save_file(load_file(tmp_path / "whole.safetensors"), bare)
    recipe.write_text(f'model = "bare.safetensors"\nconfig = "{tiny_folder}"')
    assert safegen("generate", "--stack", recipe, *base, tmp_path / "a")[0] == 0
    assert safegen("generate", bare, "--config", tiny_folder, *base, tmp_path / "b")[0] == 0
    assert (tmp_path / "a" / "sheet.png").read_bytes() == (
        tmp_path / "b" / "sheet.png"
    ).read_bytes()
    code, _, err = safegen(
        "generate", "--stack", recipe, "--config", tiny_folder, *base, tmp_path / "c"
    )
    assert (code, "already sets a config" in err) == (2, True)


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_a_closed_form_edits_by_the_name_of_a_concept(safegen, tmp_path, method):
    patch = tmp_path / "patch.safetensors"
    code, out, err = safegen(
        "edit", "mini", "--method", method, "--concept", "skulls", "--out", patch
    )
    assert code == 0, err
    assert "tensors changed in" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "patch.safetensors",
        "patch.safetensors.md",
    ]
    assert (
        safegen(
            "generate",
            "mini",
            "--patch",
            patch,
            "--prompt",
            "a castle",
            "--steps",
            "1",
            "--out",
            tmp_path / "a",
        )[0]
        == 0
    )


def test_a_truncated_patch_is_refused(safegen, tmp_path):
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes((bundle.judge_file()).read_bytes()[:1000])
    code, _, err = safegen(
        "export", "mini", "--patch", bad, "--format", "diffusers", "--out", tmp_path / "x"
    )
    assert code == 2
    assert "not a readable safetensors file" in err
    shutil.copy(bundle.judge_file(), tmp_path / "other.safetensors")
    code, _, err = safegen(
        "export",
        "mini",
        "--patch",
        tmp_path / "other.safetensors",
        "--format",
        "diffusers",
        "--out",
        tmp_path / "x",
    )
    assert code == 2
    assert "must be a safegen patch" in err


@pytest.mark.parametrize(
    ("method", "words", "says"),
    [
        ("uce", [], ("cross-attention layers", "not from images", "solved in closed form")),
        pytest.param(
            "safegen-plus",
            ["--set", "training.updates=2", "--set", "training.warmup=0"],
            (" attention layers", "It also erases the phrases", "<svg"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_demo_accepts_any_edit_and_describes_its_training_data(
    safegen, tmp_path, method, words, says
):
    out = tmp_path / "demo"
    code, _, err = safegen(
        "demo", "--fast", "--method", method, "--prompts", "1", *words, "--out", out
    )
    assert code == 0, err
    page = " ".join((out / "report.html").read_text().split())
    assert all(text in page for text in says)
    assert "never reads a word of the concept" not in page
    assert Patch.load(out / "patches" / "edited.safetensors").metadata.method == method


def test_a_demo_ends_with_commands_that_work_on_its_folder(safegen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    demo = ["demo", "--fast", "--method", "uce", "--prompts", "1", "--out", "a demo"]
    code, _, err = safegen(*demo)
    assert code == 0, err
    said = [shlex.split(line) for line in err.splitlines() if line.startswith("    safegen ")]
    commands = {words[1]: words[2:] for words in said}
    assert set(commands) == {"generate", "export", "evaluate", "verify", "attack", "report"}
    for name in ("evaluate", "attack", "report"):
        assert command_accepts([name, *commands[name]])
    assert safegen("generate", *commands["generate"], "--steps", "1")[0] == 0
    assert (tmp_path / "pictures" / "0000.png").exists()
    assert safegen("export", *commands["export"])[0] == 0
    assert (tmp_path / "edited-model.safetensors").stat().st_size > 1e6
    code, text, err = safegen("verify", *commands["verify"])
    assert (code, "no problems" in text) == (0, True), text + err
    code, text, err = safegen("verify", "a demo", "--json")
    assert (code, json.loads(text)["problems"]) == (0, [])
    code, text, err = safegen("score", "a demo", "--json", "--out", "scores.json")
    assert (code, json.loads(text)) == (0, json.loads((tmp_path / "scores.json").read_text()))
    code, text, err = safegen("report", "a demo", "--html", "page.html")
    assert code == 0, err
    assert "skulls" in (tmp_path / "page.html").read_text()
    _, _, err = safegen(
        "demo", "--fast", "--method", "uce", "--prompts", "1", "--out", "a demo", "-q"
    )
    assert err == ""


def command_accepts(words):
    """Return whether a command accepts its words, without running it."""
    name, *rest = words
    return get_command(app).commands[name].make_context(name, rest).params


@pytest.mark.parametrize(
    ("preset", "charts", "prompts"),
    [pytest.param("mini", True, 2, marks=pytest.mark.slow), ("paper", False, 1)],
)
def test_the_fast_demo_finishes_without_matplotlib(
    safegen, tmp_path, monkeypatch, preset, charts, prompts
):
    if not charts:
        monkeypatch.setitem(sys.modules, "matplotlib", None)  # as where it is not installed
    out = tmp_path / "demo"
    few = ["--prompts", str(prompts), "--set", "training.updates=4", "--set", "training.warmup=0"]
    words = ["demo", "--fast", "--preset", preset, *few, "--out", out]
    code, text, err = safegen(*words)
    assert code == 0, err
    assert "report.html" in text
    assert {p.name for p in out.iterdir()} >= {"report.html", "scores.json", "patches", "images"}
    assert {p.name for p in (out / "patches").iterdir()} == {
        "edited",
        "edited.safetensors",
        "edited.safetensors.md",
    }
    scores = json.loads((out / "scores.json").read_text())
    lists = scores["stacks"]["edited"]["lists"]
    assert all(name in text for name in lists)  # not cut at eighty columns
    for stack in ("base", "edited"):
        for row in scores["stacks"][stack]["lists"].values():
            assert row["concept"]["n"] == prompts
            assert row["concept"]["low"] <= row["concept"]["value"] <= row["concept"]["high"]
    page = (out / "report.html").read_text()
    assert ("<svg" in page, "a chart needs matplotlib" in page) == (charts, not charts)
    for text in ("self-attention layers", "it never reads a word of the concept"):
        assert text in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert page.count("data:image/png;base64,") >= 2 * prompts * len(lists)
    patch = Patch.load(out / "patches" / "edited.safetensors")
    (figures,) = patch.metadata.metrics
    removed = {name: entry["removal"] for name, entry in figures["lists"].items()}
    assert removed == {f"{name} ({row['role']})": row.get("removal") for name, row in lists.items()}
    before = {p: p.read_bytes() for p in out.rglob("*.png")}
    assert safegen(*words)[0] == 0  # the same command resumes, here with nothing left to do
    assert {p: p.read_bytes() for p in out.rglob("*.png")} == before
    code, _, err = safegen(*words[:-2], "--seeds", "2", "--out", out)
    assert (code, "was made with other settings" in err) == (2, True)
