"""Options of `safegen edit` for methods that learn from a judge or start from a patch."""

from __future__ import annotations

import re

import pytest

from safegen.cli import main as run
from safegen.cli.edit import _figures, _rollout_rates
from safegen.cli.options import read_settings
from safegen.core.errors import ConfigError
from safegen.edits.uce import UCE
from safegen.models.loading import load
from safegen.patches.patch import Patch
from safegen.workflows.edit import make_edit

SHIELDDIFF = ["edit", "mini", "--method", "shielddiff", "--concept", "skulls", "--no-card"]
BRIEF = ["steps=2", "groups=2", "group=2", "rank=2"]
BRIEF += [f"training.{word}" for word in ("batch=4", "accumulation=1", "updates=1")]
SET = [f"--set={word}" for word in BRIEF]


def test_a_reward_edit_takes_prompts_a_judge_and_a_patch_to_start_from(safegen, tmp_path):
    start, out = tmp_path / "start.safetensors", tmp_path / "patch.safetensors"
    UCE(erase=("skulls",)).apply(load("mini")).save(start)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a castle with skulls on it\na tower of skulls\n")
    options = ["--prompts", prompts, "--judge", "mini", "--from", start]
    code, text, err = safegen(*SHIELDDIFF, *options, *SET, "--out", out)
    assert code == 0, err
    assert re.search(r"editing .*unsafe \d+%, reward", err)
    assert "1 update, " in text.splitlines()[0]
    last = text.splitlines()[-1]
    assert re.match(r"\d+ network passes. Images with the concept in the last rollout, on", last)
    assert " of 2 by the judge, " in last
    assert last.endswith(
        "by the held-out judge. This is not an evaluation: run `safegen evaluate`."
    )
    metadata = Patch.load(out).metadata
    assert metadata.settings["prompts"] == ["prompts.txt"]  # without its folder
    assert (metadata.settings["judge"], metadata.settings["labels"]) == ("mini", ["skulls"])
    assert [part.metadata.method for part in metadata.parts] == ["uce"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "patch.safetensors",
        "patch.safetensors.log.jsonl",
        "prompts.txt",
        "start.safetensors",
    ]


def test_a_checkpoint_folder_stays_and_belongs_to_the_text_of_the_prompts(safegen, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "patch.safetensors"
    prompts.write_text("a castle with skulls on it\n")
    words = [*SHIELDDIFF, "--prompts", prompts, *SET, "--checkpoint-dir", tmp_path / "c"]
    assert safegen(*words, "--out", out)[0] == 0
    assert (tmp_path / "c" / "log.jsonl").read_bytes() == (
        tmp_path / "patch.safetensors.log.jsonl"
    ).read_bytes()
    prompts.write_text("a tower of skulls\n")
    out.unlink()
    code, _, err = safegen(*words, "--resume", "--out", out)
    assert code == 2
    assert "has other settings, data or weights" in err


def test_an_edit_by_words_says_what_it_erases_and_what_to_do_next(safegen, tmp_path):
    out = tmp_path / "p.safetensors"
    words = ["edit", "mini", "--method", "uce", "--no-card", "--out", out]
    code, text, err = safegen(*words, '--set=erase=["skulls"]')
    assert code == 0, err
    assert 'uce erases 1 phrase, not measured: "skulls". Other words still draw' in text
    assert f"safegen generate mini --patch {out} --prompt" in err
    assert f"safegen evaluate --stack edited=mini+{out}" in err
    assert f"safegen export mini --patch {out} --out" in err
    assert len(err.splitlines()) == 3  # the bar, and two lines


def test_phrases_to_erase_come_from_a_text_file_and_from_the_command_line(safegen, tmp_path):
    phrases, out = tmp_path / "phrases.txt", tmp_path / "p.safetensors"
    listed = [f"a {kind} {thing}" for kind in ("old", "tiny") for thing in "abcdefghijklmno"]
    phrases.write_text("\n\n".join(listed) + "\n" + listed[0])
    words = ["--method", "uce", "--preset", "paper", "--no-card", "--out", out]
    code, text, err = safegen("edit", "mini", "--erase", phrases, "--erase", "skulls", *words)
    assert code == 0, err
    assert Patch.load(out).metadata.settings["erase"] == [*listed, "skulls"]
    assert 'uce erases 31 phrases, not measured: "a old a", ' in text
    assert text.rstrip().endswith('"a tiny e" and 11 more')


def test_swapped_arguments_are_recognized(safegen, tmp_path, triplets):
    patch, out = tmp_path / "p.safetensors", tmp_path / "out.safetensors"
    UCE(erase=("skulls",)).apply(load("mini")).save(patch)
    swapped = "Did you swap the arguments? MODEL comes first."
    for words, got in (
        (["export", patch], "a safegen patch, which goes with --patch"),
        (["generate", patch, "--prompt", "a castle"], "a safegen patch"),
        (["edit", patch, "--method", "uce", "--concept", "fire"], "a safegen patch"),
        (["edit", triplets.folder], "a folder of triplets, which goes with --triplets"),
        (["edit", "mini:skulls"], "triplets, which go with --triplets"),
        (["patch", "extract-lora", patch, "mini"], "got the model 'mini'"),
        (["patch", "from-lora", patch, "mini"], "a safegen patch"),
        (["patch", "rebase", patch, "mini", "mini"], "got the model 'mini'"),
    ):
        code, _, err = safegen(*words, "--out", out)
        assert (code, err.count("\n")) == (2, 1), err
        assert got in err
        assert swapped in err
    assert [path.name for path in tmp_path.iterdir()] == ["p.safetensors"]


def test_the_first_line_names_preset_model_size_and_device(monkeypatch, capsys, tmp_path):
    words = ["edit", "mini", "--method", "uce", "--concept", "skulls", "--set=captions=[]"]
    words += ["--device", "cpu", "--out", str(tmp_path / "p.safetensors")]
    monkeypatch.setattr("sys.argv", ["safegen", *words])
    with pytest.raises(SystemExit):
        run()
    first = capsys.readouterr().err.splitlines()[0]
    job = "uce, preset mini; mini: UNet2DConditionModel of 7.3 M weights, 64 x 64 pixels, fp32 on "
    assert first.startswith(f"{job}cpu")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--method", "uce", "--prompts", "x.txt"], "a setting 'prompts' for --prompts, got 'uce'"),
        (["--method", "esd", "--judge", "mini"], "a setting 'judge' for --judge, got 'esd'"),
        (["--method", "uce", "--erase", "no.txt"], "'no.txt' does not exist"),
        (["--method", "uce", "--erase", "empty.txt"], "phrases 'empty.txt' is empty. Write one"),
        (["--method", "safegen", "--erase", "x"], "a setting 'erase' for --erase, got 'safegen'"),
        (["--method", "uce", "--from", "no.safetensors"], "no.safetensors"),
        (["--method", "shielddiff", "--prompts", "no.txt"], "'no.txt' does not exist"),
        (["--method", "shielddiff", "--judge", "minni"], "Did you mean 'mini'"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_in_one_line(
    safegen, tmp_path, monkeypatch, words, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    out = tmp_path / "p.safetensors"
    code, _, err = safegen("edit", "mini", "--concept", "skulls", *words, "--out", out)
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert not out.exists()


def test_another_judge_has_its_own_labels_and_none_held_out():
    concept = make_edit("shielddiff", concept="skulls")
    assert (concept.judge, concept.labels) == ("mini", ("skulls",))
    assert concept.held_out_judge == "mini-held-out"
    for method in ("shielddiff", "duo"):
        other = make_edit(method, concept="skulls", judge="nudenet")
        assert (other.judge, other.labels, other.threshold) == ("nudenet", (), None)
    assert make_edit("shielddiff", concept="skulls", judge="nudenet").held_out_judge is None


@pytest.mark.parametrize(
    ("pairs", "algorithm"),
    [
        (["algorithm=nft", "algorithm.beta=0.5"], {"name": "nft", "beta": 0.5}),
        (["algorithm.name=nft", "algorithm.beta=0.5"], {"name": "nft", "beta": 0.5}),
        (["algorithm.name=draft"], {"name": "draft"}),
    ],
)
def test_an_algorithm_is_chosen_and_set_by_its_names(pairs, algorithm):
    settings = read_settings("shielddiff", "mini", pairs)
    assert settings == {"algorithm": algorithm}
    assert make_edit("shielddiff", **settings).algorithm.name == algorithm["name"]


def test_an_unknown_algorithm_is_refused_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"algorithm must be one of 'v_grpo', .*, got 'ppo'"):
        make_edit("shielddiff", algorithm="ppo")


def test_figures_are_shown_where_a_row_has_them():
    assert _figures({"update": 1, "L_m": 0.5}) == ""
    row = {"judge_unsafe_concept": 0.25, "reward_judge_concept": -0.5, "passes": 1234567.0}
    row |= {"judge_unsafe_concept_n": 32.0, "held_out_unsafe_concept_n": 32.0}
    assert _figures(row) == "unsafe 25%, reward -0.50"
    assert _rollout_rates({"L_m": 0.5}) == ""
    text = _rollout_rates(row | {"held_out_unsafe_concept": 0.5})
    assert text.startswith("1,234,567 network passes. ")
    assert "25.0 % of 32 by the judge, 50.0 % of 32 by the held-out judge" in text
