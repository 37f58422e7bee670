"""Model cards: they say what was done, what was measured and what was not, and take no figures of another patch."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from safegen.core.errors import ConfigError, FileError
from safegen.evaluation.report.model_card import (
    CardSubject,
    beside,
    card,
    read_figures,
    write_with_card,
)
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.metadata import PatchMetadata
from safegen.models.loading import load
from safegen.patches.patch import Patch
from safegen.workflows.export import save_patch

SAID = {
    "method": "uce",
    "settings": {"erase": ["a skull", "x|`y"], "strength": 1.0},
    "base": "b" * 64,
    "model": "mini",
    "seconds": 1.5,
}
SUBJECT = CardSubject("patch", "p.safetensors", "mini", "b" * 64, [("c" * 64, SAID)])


def rate(hits, n, **more):
    return {"value": hits / n, "low": 0.0, "high": 1.0, "hits": hits, "n": n, "unjudged": 0} | more


def test_words_that_are_debiased_are_not_called_erased():
    said = SAID | {"settings": {"erase": ["a doctor"], "debias": {"a woman": 0.3}}}
    text = card(CardSubject("patch", "p.safetensors", "mini", "b" * 64, [("c" * 64, said)]))
    assert "Nothing was erased: `a doctor` leans toward `a woman` by 0.3." in text
    assert "Erased words" not in text


@pytest.fixture
def demo(tmp_path):
    """A demo's figures of the patch."""
    rows = {
        "role": "explicit",
        "base": {"concept": rate(24, 24)},
        "edited": {"concept": rate(1, 20, unjudged=4)},
        "removal": rate(19, 20),
    }
    calm = {
        "role": "neighbour",
        "base": {"concept": rate(0, 8), "subject": rate(8, 8), "shown": rate(8, 8)},
        "edited": {"concept": rate(0, 8), "subject": rate(4, 8), "shown": rate(6, 8)},
    }
    facts = {
        "patch_hash": "c" * 64,
        "concept": {"name": "skulls"},
        "judge": "mini:1",
        "lists": {"mini:skulls": rows, "mini:ghosts": calm},
    }
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "summary.json").write_text(
        json.dumps(
            facts | {"settings": {"generation": {"num_inference_steps": 25}, "seeds": [1, 2]}}
        )
    )
    return folder


def test_it_says_what_was_done_and_that_nothing_was_measured():
    text = card(SUBJECT)
    for words in (
        "# p.safetensors",
        "`mini`",
        "b" * 64,
        "c" * 64,
        '"strength": 1.0',
        "| seconds it took | `1.5` |",
        "**Not measured.**",
    ):
        assert words in text, words
    assert "Erased words: `a skull`, `x\\|'y`." in text
    for words in (
        "Nothing here says that the model is safe",
        "## Licence\n\nUnknown",
        "safegen patch info p.safetensors",
        "safegen verify run",
    ):
        assert words in text, words


def test_figures_come_with_their_n_interval_and_what_was_not_judged(demo):
    text = card(SUBJECT, [demo])
    assert (
        "| mini:skulls (explicit) | 100.0 % (0.0 to 100.0; n = 24) | 5.0 % (0.0 to 100.0; n = 20, 4 unjudged) | 95.0 %"
        in text
    )
    harm = [line.split(" | ")[-2:] for line in text.splitlines() if line.startswith("| mini:")]
    assert harm[0] == ["", " |"]  # the demo says nothing of it
    assert harm[1] == [
        "100.0 % (0.0 to 100.0; n = 8)",
        "75.0 % (0.0 to 100.0; n = 8) |",
    ]  # ghosts, not the object
    assert "judge `mini:1`, 25 steps, seeds 1, 2" in text
    assert "Not measured" not in text


def test_figures_go_into_the_header_of_the_file_too(demo, tmp_path):
    """A patch that leaves its card behind still says what was measured."""
    patch = Patch({"w": torch.ones(2)}, PatchMetadata(**SAID))
    facts = json.loads((demo / "summary.json").read_text())
    (demo / "summary.json").write_text(json.dumps(facts | {"patch_hash": patch.hash}))
    save_patch(patch, tmp_path / "p.safetensors", metrics=[demo])
    found = Patch.load(tmp_path / "p.safetensors")
    (figures,) = found.metadata.metrics
    assert figures["lists"]["mini:skulls (explicit)"] == {
        "removal": rate(19, 20),
        "base": {"concept": rate(24, 24)},
        "this": {"concept": rate(1, 20, unjudged=4)},
    }
    assert "skulls, judge `mini:1`, 25 steps" in figures["about"]
    assert (found.hash, {k: v for k, v in found.metadata.to_json().items() if k != "metrics"}) == (
        patch.hash,
        SAID,
    )


def test_figures_of_another_patch_are_refused(demo):
    with pytest.raises(
        ConfigError,
        match=r"has figures of patch cccccccccccc, and this card is of patch dddddddddddd",
    ):
        read_figures(demo, ["d" * 64])


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"patch_hash": 3}', '{"stacks": {}}', '{"sides": []}']
)
def test_what_holds_no_figures_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(FileError, match=r"has no figures: neither a demo's summary.json") as caught:
        read_figures(tmp_path, [])
    (tmp_path / "x.json").write_text(text)
    with pytest.raises((FileError, ConfigError)) as caught:
        read_figures(tmp_path / "x.json", [])
    assert "\n" not in str(caught.value)


def test_a_runs_figures_are_those_of_the_stack_with_this_patch_alone(finished, patch_file):
    found = read_figures(finished, [Patch.load(patch_file).hash])
    scores = json.loads((finished / "scores.json").read_text())
    assert "stack calm" in found.about
    for (name, removal, sides), (part, row) in zip(
        found.rows, scores["stacks"]["calm"]["lists"].items(), strict=True
    ):
        assert name == f"{part} ({row['role']})"
        assert removal == row.get("removal")
        assert sides == [scores["stacks"][side]["lists"][part] for side in ("mini", "calm")]
    with pytest.raises(
        ConfigError,
        match=r"has no stack of patch dddddddddddd alone; it has mini \(mini\): none; calm \(mini\): ",
    ):
        read_figures(finished, ["d" * 64])


def test_a_model_that_holds_patches_already_takes_no_figures_of_its_plain_base(finished):
    plain, edited = (
        CardSubject("folder", "out", "mini", "b" * 64, [], within=w, by_name=bool(w))
        for w in ((), ("e" * 64,))
    )
    assert "stack mini" in plain.figures(finished).about
    assert (
        "stack mini" in edited.figures(finished).about
    )  # a run says that it drew with a model of this name
    with pytest.raises(
        ConfigError, match=r"has no stack of no patch alone on folder; it has mini \(mini\): none"
    ):
        replace(edited, model="folder").figures(finished)
    text = card(edited)
    assert f"has patches in its weights already: `{'e' * 12}`" in text
    assert "What was done to the base model before is not known" not in text


def test_a_merged_patch_names_its_parts():
    parts = [
        {"hash": "1" * 64, "metadata": SAID},
        {"hash": "2" * 64, "metadata": {"method": "safegen", "data": "e" * 64}},
    ]
    text = card(
        CardSubject("patch", "m", None, None, [("3" * 64, {"method": "merge", "parts": parts})])
    )
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### merge, patch `{'3' * 12}`",
        f"### uce, patch `{'1' * 12}`",
        f"### safegen, patch `{'2' * 12}`",
    ]
    assert "The concept was shown in pictures, not named" in text
    assert "The base weights are not named" in text


def test_a_model_without_a_patch_of_ours_is_not_called_untouched():
    text = card(CardSubject("file", "m.safetensors", "other", "b" * 64, []))
    assert "What was done to the base model before is not known" in text


def test_a_folder_has_its_card_as_readme(tmp_path):
    model = load("mini")
    save_folder(
        model, tmp_path / "m", card=card(CardSubject("folder", "m", "mini", model.hash, []))
    )
    assert (tmp_path / "m" / "README.md").read_text().startswith("---\nlibrary_name: diffusers")
    save_folder(model, tmp_path / "n")
    assert not (tmp_path / "n" / "README.md").exists()


def test_a_card_is_never_there_without_its_file(tmp_path):
    out = tmp_path / "p.safetensors"

    def fail():
        raise FileError("no room")

    with pytest.raises(FileError, match="no room"):
        write_with_card(out, "text", fail)
    assert list(tmp_path.iterdir()) == []
    beside(out).write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        write_with_card(out, "text", lambda: out.write_text("weights"))
    assert not out.exists()


def test_figures_of_the_same_patches_on_another_model_are_refused(demo):
    facts = json.loads((demo / "summary.json").read_text())
    (demo / "summary.json").write_text(json.dumps(facts | {"base_hash": "d" * 64}))
    with pytest.raises(
        ConfigError,
        match=r"figures of these patches on other weights \(dddddddddddd\) than this card's \(bbbbbbbbbbbb\)",
    ):
        card(SUBJECT, [demo])
    (demo / "summary.json").write_text(json.dumps(facts | {"base_hash": "b" * 64}))
    assert "Not measured" not in card(SUBJECT, [demo])


def test_figures_in_a_patchs_header_stand_in_its_card_and_in_that_of_its_own_model(demo):
    (figures,) = [read_figures(demo, ["c" * 64]).facts()]
    held = [("c" * 64, SAID | {"metrics": [figures]})]
    want = [line for line in card(SUBJECT, [demo]).splitlines() if line.startswith("| mini:")]
    for kind, base, told in (
        ("patch", "b", True),
        ("folder", "b", True),
        ("file", "d", False),
        ("lora", "b", False),
    ):
        text = card(CardSubject(kind, "p", "mini", base * 64, held))
        assert [line for line in text.splitlines() if line.startswith("| mini:")] == (
            want if told else []
        ), kind
        assert ("**Not measured.**" in text) is not told
    for wrong in ({"about": 1}, {"about": "x", "lists": {"a": {"removal": 1, "this": "much"}}}, 7):
        broken = [("c" * 64, SAID | {"metrics": [wrong]})]
        assert "**Not measured.**" in card(CardSubject("patch", "p", "mini", "b" * 64, broken))
    baseless = [("c" * 64, {k: v for k, v in SAID.items() if k != "base"} | {"metrics": [figures]})]
    assert "**Not measured.**" in card(
        CardSubject("folder", "p", "mini", "b" * 64, baseless)
    )  # of which model they are is not said


def test_a_fine_tune_is_called_no_removal():
    said = {
        "method": "fine-tune",
        "settings": {"updates": [100]},
        "base": "b" * 64,
        "data": "d" * 64,
    }
    text = card(CardSubject("patch", "p.safetensors", "mini", "b" * 64, [("c" * 64, said)]))
    assert "Nothing was removed: this is a fine-tune" in text
    assert "was shown in pictures" not in text
