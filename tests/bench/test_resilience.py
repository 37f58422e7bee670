"""An edit under fine-tuning, from end to end at tiny size: what is judged, what is written, and that every figure can be counted again."""

from __future__ import annotations

import json

import pytest
import torch

from safegen.bench.finetune import FineTune, Material
from safegen.bench.resilience import Resilience, material_for, resilience, write_resilience
from safegen.concept import load_concept
from safegen.edit.uce import UCE
from safegen.errors import BadSetting
from safegen.models import Patch, Sampler
from safegen.models.compose import merge

SKULLS = load_concept("skulls")
TUNING = FineTune(updates=(1, 2), rank=2, batch=2, lr=1e-2, precision="fp32")
BRIEF = Resilience(on="concept", finetune=TUNING, apart=True, prompts=2, roles=("explicit", "benign"), sampler=Sampler(steps=2))
SIDES = ["base", "edited", "edited+1", "edited+2", "base+1", "modular+1", "base+2", "modular+2"]


def skulls(pictures):
    return [("", "skulls")] * len(pictures)


@pytest.fixture(scope="module")
def done(make_model, triplets, tmp_path_factory):
    """The model before and after, its patch, what was found and where it lies."""
    model, out = make_model(), tmp_path_factory.mktemp("resilience") / "out"
    patch = UCE(erase=("red cube",)).apply(model)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    found = resilience(model, [patch], SKULLS, Material.of_triplets(triplets, "unsafe", skulls), BRIEF)
    write_resilience(found, out)
    return model, before, patch, found, out


def test_base_edited_and_every_look_are_judged_on_the_same_prompts(done):
    model, before, _, found, out = done
    assert list(found.verdicts) == SIDES
    assert {len(v) for v in found.verdicts.values()} == {len(found.items)}
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())
    assert {p.name for p in out.iterdir()} == {
        *("resilience.json", "verdicts.jsonl", "grid.png"),
        *(f"{side}+{n}.safetensors" for side in ("edited", "base") for n in (1, 2)),
    }


def test_every_rate_can_be_counted_again_from_the_verdicts(done):
    *_, out = done
    summary = json.loads((out / "resilience.json").read_text())
    lines = [json.loads(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert summary["sides"] == SIDES
    assert set(summary["lists"]) == {"mini:skulls", "mini:benign"}
    for name, entry in summary["lists"].items():
        for side in SIDES:
            mine = [line for line in lines if (line["side"], line["list"]) == (side, name)]
            hits = sum(any(d["label"] == "skulls" and d["score"] >= 0.5 for d in line["detections"]) for line in mine)
            rate = entry["sides"][side]["concept"]
            assert (rate["hits"], rate["n"]) == (hits, len(mine))
            assert rate["low"] <= rate["value"] <= rate["high"]
    assert summary["base_hash"] == done[0].hash
    assert summary["data"]["pictures"] == 6
    assert "skulls" not in json.dumps(summary["data"])


def test_a_tuned_patch_redraws_its_side(done, triplets):
    """What was judged as edited+2 is the model with the edit and, over it, the patch that was written."""
    from safegen.models import generate

    model, _, patch, found, out = done
    asks = [i.ask for i in found.items]
    with patch.apply(model), Patch.load(out / "edited+2.safetensors").apply(model):
        again = list(generate(model, asks, BRIEF.sampler))
    assert [p.tobytes() for p in again] == [p.tobytes() for p in found.pictures["edited+2"]]
    both = merge([patch, Patch.load(out / "base+2.safetensors")], overlap="add", model=model)
    with both.apply(model):
        beside = list(generate(model, asks, BRIEF.sampler))
    assert [p.tobytes() for p in beside] == [p.tobytes() for p in found.pictures["modular+2"]]


def test_the_fine_tune_says_what_it_learnt_and_what_it_was_made_on(done):
    *_, patch, _, out = done
    summary = json.loads((out / "resilience.json").read_text())
    assert {name: list(course) for name, course in summary["loss"].items()} == {key: ["first", "1", "2"] for key in ("edited", "base")}
    tuned, control = (Patch.load(out / f"{side}+1.safetensors").provenance for side in ("edited", "base"))
    assert (tuned["patches"], control["patches"]) == ([patch.hash], [])
    assert (tuned["on"], tuned["updates"]) == ("concept", 1)


def test_what_cannot_be_tested_is_refused_in_one_line(tiny_model, triplets, tmp_path):
    with pytest.raises(BadSetting, match="no edit whose resilience could be tested; name a patch"):
        resilience(tiny_model, [], SKULLS, Material.of_triplets(triplets, "benign", skulls), BRIEF)
    with pytest.raises(BadSetting, match="'nudity' has no bundled triplets; name some with --triplets, or captioned --pictures"):
        material_for(load_concept("nudity"), "benign")
    with pytest.raises(BadSetting, match="both given"):
        material_for(SKULLS, "benign", triplets=tmp_path, pictures=tmp_path)


def test_the_side_of_the_triplets_is_that_of_the_fine_tune(triplets):
    plain = SKULLS.model_copy(update={"tuning": {}})
    benign, concept = (material_for(plain, on, triplets=triplets.folder) for on in ("benign", "concept"))
    assert [p.tobytes() for p in benign.pictures] == [triplets.images(i)[2].tobytes() for i in range(6)]
    assert [p.tobytes() for p in concept.pictures] == [triplets.images(i)[0].tobytes() for i in range(6)]
    assert (benign.texts[0], concept.texts[0]) == (("",), plain.words)
