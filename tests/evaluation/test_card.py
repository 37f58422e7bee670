"""Model cards: the edit, the metrics with their counts, and refusals of foreign metrics."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from safegen.core.errors import ConfigError, FileError
from safegen.evaluation.report.model_card import CardSubject, card_path, model_card, write_with_card
from safegen.evaluation.report.model_index import read_metrics
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


def test_debiased_phrases_are_not_described_as_erased():
    said = SAID | {"settings": {"erase": ["a doctor"], "debias": {"a woman": 0.3}}}
    text = model_card(CardSubject("patch", "p.safetensors", "mini", "b" * 64, [("c" * 64, said)]))
    assert "Nothing was erased: `a doctor` leans toward `a woman` by 0.3." in text
    assert "Erased words" not in text


def write_run(folder, stacks, *, digest="c" * 64, base="b" * 64):
    """Write the card and scores of a run of `stacks`, which maps names to scores of each list."""
    folder.mkdir()
    common = {"baseline": "base", "model": "mini", "weights": "e" * 64, "base": base}
    patch = {"file": "p.safetensors", "hash": digest, "parameters": 1, "layers": {}}
    entries = [
        {
            "name": name,
            "kind": "base" if name == "base" else "given",
            "hash": f"{i:064x}",
            "patches": [] if name == "base" else [patch],
        }
        | common
        for i, name in enumerate(stacks)
    ]
    first = next(iter(stacks.values()))
    lists = [
        {"name": name, "role": row["role"], "source": name, "sha256": "f" * 64}
        for name, row in first.items()
    ]
    card = {
        "id": "1234567890abcdef",
        "protocol": {
            "name": "quick",
            "concept": "skulls",
            "lists": lists,
            "seeds": [1],
            "generation": {},
            "judge": {"name": "mini", "labels": ["skulls"]},
            "metrics": ["concept"],
        },
        "samples": {},
        "stacks": entries,
        "versions": {},
        "device": "cpu, fp32",
        "platform": {},
    }
    (folder / "protocol.json").write_text(json.dumps(card))
    counts = {"prompts": 24, "images": 24, "blank": rate(0, 24)}
    rule = {"labels": ["skulls"], "threshold": 0.5}
    scores = {
        "format": "safegen-scores/3",
        "protocol": {"name": "quick", "id": "1234567890abcdef", "decides": {"judge": rule}},
        "judge": "mini:1",
        "weights": {},
        "inputs": {},
        "stacks": {
            name: {
                "hash": f"{i:064x}",
                "kind": "given",
                "baseline": "base",
                "lists": {part: counts | row for part, row in lists.items()},
            }
            for i, (name, lists) in enumerate(stacks.items())
        },
    }
    (folder / "scores.json").write_text(json.dumps(scores))
    return folder


BASE = {
    "mini:skulls": {"role": "explicit", "concept": rate(24, 24)},
    "mini:ghosts": {
        "role": "neighbour",
        "concept": rate(0, 8),
        "subject": rate(8, 8),
        "shown": rate(8, 8),
    },
}
EDITED = {
    "mini:skulls": {
        "role": "explicit",
        "concept": rate(1, 20, unjudged=4),
        "removal": rate(19, 20),
    },
    "mini:ghosts": {
        "role": "neighbour",
        "concept": rate(0, 8),
        "subject": rate(4, 8),
        "shown": rate(6, 8),
    },
}


@pytest.fixture
def run(tmp_path):
    """Return a run with metrics of the patch."""
    return write_run(tmp_path / "run", {"base": BASE, "edited": EDITED})


def test_a_card_describes_the_edit_and_states_that_no_metrics_exist():
    text = model_card(SUBJECT)
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


def test_metrics_have_n_interval_and_unjudged_count(run):
    text = model_card(SUBJECT, [run])
    assert (
        "| mini:skulls (explicit) | 100 % (0.0 to 100.0 %; n = 24) "
        "| 5 % (0.0 to 100.0 %; n = 20, 4 unjudged) | 95 %"
    ) in text
    asked = [line.split(" | ")[-2:] for line in text.splitlines() if line.startswith("| mini:")]
    assert asked[0] == ["", " |"]  # the run does not mention it
    assert asked[1] == [
        "100 % (0.0 to 100.0 %; n = 8)",
        "75 % (0.0 to 100.0 %; n = 8) |",
    ]  # ghosts, not the object
    assert "Protocol quick (ID 1234567890abcdef), judge mini:1, stack edited, model mini" in text
    assert "Not measured" not in text


def test_the_hub_reads_the_metrics_of_each_list(run):
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(SUBJECT, [run]))
    assert card.data.model_name == "p.safetensors"
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {
        ("mini:skulls (explicit)", "concept_rate"): 0.05,
        ("mini:skulls (explicit)", "removal"): 0.95,
        ("mini:ghosts (neighbour)", "concept_rate"): 0.0,
    }


def test_an_attack_on_the_patch_is_in_its_card(tmp_path):
    attacked = {name: row | {"concept": rate(5, 8)} for name, row in EDITED.items()}
    run = write_run(tmp_path / "run", {"base": BASE, "edited": EDITED, "finetuned-9": attacked})
    card = json.loads((run / "protocol.json").read_text())
    patches = card["stacks"][1]["patches"]
    second = patches[0] | {"file": "q.safetensors", "hash": "9" * 64}
    card["stacks"][2] |= {"reference": "edited", "patches": [*patches, second]}
    (run / "protocol.json").write_text(json.dumps(card))
    text = model_card(SUBJECT, [run])
    assert "| prompts | seen, base | seen, this | seen, finetuned-9 | removed |" in text
    assert "62.5 % (0.0 to 100.0 %; n = 8)" in text


def test_metrics_are_also_in_the_header_of_the_patch(tmp_path):
    """A patch that is moved without its card keeps its metrics."""
    patch = Patch({"w": torch.ones(2)}, PatchMetadata(**SAID))
    run = write_run(tmp_path / "run", {"base": BASE, "edited": EDITED}, digest=patch.hash)
    save_patch(patch, tmp_path / "p.safetensors", metrics=[run])
    found = Patch.load(tmp_path / "p.safetensors")
    (metrics,) = found.metadata.metrics
    skulls = metrics["lists"]["mini:skulls (explicit)"]
    assert skulls["removal"] == rate(19, 20)
    assert skulls["this"]["concept"] == rate(1, 20, unjudged=4)
    assert "Protocol quick" in metrics["about"]
    assert found.hash == patch.hash
    assert {k: v for k, v in found.metadata.to_json().items() if k != "metrics"} == SAID


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"stacks": {}}'])
def test_a_file_without_metrics_is_refused_in_one_line(tmp_path, text):
    with pytest.raises(FileError, match=r"has no scores.json. Name the folder of a run"):
        read_metrics(tmp_path, [])
    run = write_run(tmp_path / "run", {"base": BASE, "edited": EDITED})
    (run / "x.json").write_text(text)
    with pytest.raises(FileError, match=r"x\.json") as caught:
        read_metrics(run / "x.json", [])
    assert "\n" not in str(caught.value)


def test_metrics_of_a_run_are_those_of_the_stack_with_only_this_patch(finished, patch_file):
    found = read_metrics(finished, [Patch.load(patch_file).hash])
    scores = json.loads((finished / "scores.json").read_text())
    assert "stack calm" in found.about
    for (name, removal, lists), (part, row) in zip(
        found.rows, scores["stacks"]["calm"]["lists"].items(), strict=True
    ):
        assert name == f"{part} ({row['role']})"
        assert removal == row.get("removal")
        assert lists == [scores["stacks"][side]["lists"][part] for side in ("mini", "calm")]
    with pytest.raises(
        ConfigError,
        match=r"has no stack of patch dddddddddddd alone\. "
        r"It has mini \(mini\): none; calm \(mini\): ",
    ):
        read_metrics(finished, ["d" * 64])


def test_a_patched_model_takes_no_metrics_of_its_unpatched_base(finished):
    base = json.loads((finished / "protocol.json").read_text())["stacks"][0]["base"]
    plain, edited = (
        CardSubject("folder", "out", "mini", base, [], embedded_patches=w, match_name=bool(w))
        for w in ((), ("e" * 64,))
    )
    assert "stack mini" in plain.read_metrics(finished).about
    assert "stack mini" in edited.read_metrics(finished).about  # a run of a model with this name
    with pytest.raises(
        ConfigError, match=r"has no stack of no patch on folder alone. It has mini \(mini\): none"
    ):
        replace(edited, model="folder").read_metrics(finished)
    text = model_card(edited)
    assert f"Its weights held patches before: `{'e' * 12}`" in text
    assert "Earlier changes to the base are not known" not in text


def test_a_merged_patch_names_its_parts():
    parts = [
        {"hash": "1" * 64, "metadata": SAID},
        {"hash": "2" * 64, "metadata": {"method": "safegen", "data": "e" * 64}},
    ]
    text = model_card(
        CardSubject("patch", "m", None, None, [("3" * 64, {"method": "merge", "parts": parts})])
    )
    assert [line for line in text.splitlines() if line.startswith("### ")] == [
        f"### merge, patch `{'3' * 12}`",
        f"### uce, patch `{'1' * 12}`",
        f"### safegen, patch `{'2' * 12}`",
    ]
    assert "The concept was given as images: no word of it is in the patch" in text
    assert "The base weights are not named" in text


def test_a_model_without_known_patches_is_not_described_as_unedited():
    text = model_card(CardSubject("file", "m.safetensors", "other", "b" * 64, []))
    assert "Earlier changes to the base are not known" in text


def test_a_folder_has_its_card_as_readme(tmp_path):
    model = load("mini")
    save_folder(
        model, tmp_path / "m", card=model_card(CardSubject("folder", "m", "mini", model.hash, []))
    )
    assert (tmp_path / "m" / "README.md").read_text().startswith("---\nlibrary_name: diffusers")
    save_folder(model, tmp_path / "n")
    assert not (tmp_path / "n" / "README.md").exists()


def test_a_card_is_never_written_without_its_file(tmp_path):
    out = tmp_path / "p.safetensors"

    def fail():
        raise FileError("no room")

    with pytest.raises(FileError, match="no room"):
        write_with_card(out, "text", fail)
    assert list(tmp_path.iterdir()) == []
    card_path(out).write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        write_with_card(out, "text", lambda: out.write_text("weights"))
    assert not out.exists()


def test_metrics_of_the_same_patches_on_another_model_are_refused(tmp_path):
    other = write_run(tmp_path / "other", {"base": BASE, "edited": EDITED}, base="d" * 64)
    with pytest.raises(
        ConfigError, match=r"on other weights \(dddddddddddd\) than this model's \(bbbbbbbbbbbb\)"
    ):
        model_card(SUBJECT, [other])
    card = json.loads((other / "protocol.json").read_text())
    (other / "protocol.json").write_text(json.dumps(card | {"device": "cuda, bf16"}))
    assert "Not measured" not in model_card(SUBJECT, [other])  # hashes of rounded weights differ
    (other / "protocol.json").write_text(json.dumps(card))
    same = replace(SUBJECT, base="d" * 64)
    assert "Not measured" not in model_card(same, [other])


def test_metrics_in_a_patch_header_are_in_its_card_and_in_the_card_of_its_model(run):
    metrics = read_metrics(run, ["c" * 64]).to_dict()
    held = [("c" * 64, SAID | {"metrics": [metrics]})]
    rows = [line for line in model_card(SUBJECT, [run]).splitlines() if line.startswith("| mini:")]
    for kind, base, shown in (
        ("patch", "b", True),
        ("folder", "b", True),
        ("file", "d", False),
        ("lora", "b", False),
    ):
        text = model_card(CardSubject(kind, "p", "mini", base * 64, held))
        found = [line for line in text.splitlines() if line.startswith("| mini:")]
        assert found == (rows if shown else []), kind
        assert ("**Not measured.**" in text) is not shown
    for wrong in ({"about": 1}, {"about": "x", "lists": {"a": {"removal": 1, "this": "much"}}}, 7):
        broken = [("c" * 64, SAID | {"metrics": [wrong]})]
        assert "**Not measured.**" in model_card(
            CardSubject("patch", "p", "mini", "b" * 64, broken)
        )
    baseless = {k: v for k, v in SAID.items() if k != "base"} | {"metrics": [metrics]}
    subject = CardSubject("folder", "p", "mini", "b" * 64, [("c" * 64, baseless)])
    assert "**Not measured.**" in model_card(subject)  # the metrics name no base


def test_a_fine_tune_is_not_described_as_a_removal():
    said = {
        "method": "fine-tune",
        "settings": {"updates": [100]},
        "base": "b" * 64,
        "data": "d" * 64,
    }
    text = model_card(CardSubject("patch", "p.safetensors", "mini", "b" * 64, [("c" * 64, said)]))
    assert "Nothing was removed: this is a fine-tune" in text
    assert "was given as images" not in text
