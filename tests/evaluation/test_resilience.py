"""An edit under fine-tuning, from end to end at tiny size: what is judged, what is written, and that every figure can be counted again."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from safegen.attacks.finetune import FineTune, FineTuneDataset
from safegen.attacks.relearn import Resilience, material_for, resilience
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.files import STAGING_DIR
from safegen.core.generation import GenerationConfig
from safegen.edits.uce import UCE
from safegen.patches.arithmetic import merge
from safegen.patches.patch import BaseMismatchWarning, Patch, PatchOverlapWarning

SKULLS = load_concept("skulls")
TUNING = FineTune(updates=(1, 2), rank=2, batch=2, lr=1e-2, precision="fp32")
BRIEF = Resilience(
    on="concept",
    finetune=TUNING,
    apart=True,
    prompts=2,
    roles=("explicit", "benign"),
    generation=GenerationConfig(num_inference_steps=2),
)
SIDES = ["base", "edited", "edited+1", "edited+2", "base+1", "modular+1", "base+2", "modular+2"]


def skulls(pictures):
    return [("", "skulls")] * len(pictures)


@pytest.fixture(scope="module")
def done(make_model, triplets, tmp_path_factory):
    """The model before and after, its patch, what was found and where it lies."""
    model, out = make_model(), tmp_path_factory.mktemp("resilience") / "out"
    patch = UCE(erase=("red cube",)).apply(model)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    found = resilience(
        model,
        [patch],
        SKULLS,
        FineTuneDataset.of_triplets(triplets, "unsafe", skulls),
        BRIEF,
        out=out,
    )
    return model, before, patch, found, out


def test_base_edited_and_every_look_are_judged_on_the_same_prompts(done):
    model, before, _, found, out = done
    assert list(found.detections) == SIDES
    assert {len(v) for v in found.detections.values()} == {len(found.items)}
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
            hits = sum(
                any(d["label"] == "skulls" and d["score"] >= 0.5 for d in line["detections"])
                for line in mine
            )
            rate = entry["sides"][side]["concept"]
            assert (rate["hits"], rate["n"]) == (hits, len(mine))
            assert rate["low"] <= rate["value"] <= rate["high"]
    assert summary["base_hash"] == done[0].hash
    assert summary["data"]["pictures"] == 6
    assert "skulls" not in json.dumps(summary["data"])


def test_a_tuned_patch_redraws_its_side(done, triplets):
    """What was judged as edited+2 is the model with the edit and, over it, the patch that was written."""
    from safegen.models.generation import generate

    model, _, patch, found, out = done
    asks = [i.ask for i in found.items]
    with patch.apply(model), Patch.load(out / "edited+2.safetensors").apply(model):
        again = list(generate(model, asks, BRIEF.generation))
    assert [p.tobytes() for p in again] == [p.tobytes() for p in found.pictures["edited+2"]]
    both = merge([patch, Patch.load(out / "base+2.safetensors")], overlap="add", model=model)
    with both.apply(model):
        beside = list(generate(model, asks, BRIEF.generation))
    assert [p.tobytes() for p in beside] == [p.tobytes() for p in found.pictures["modular+2"]]


def test_the_fine_tune_says_what_it_learnt_and_what_it_was_made_on(done):
    *_, patch, _, out = done
    summary = json.loads((out / "resilience.json").read_text())
    assert {name: list(course) for name, course in summary["loss"].items()} == {
        key: ["first", "1", "2"] for key in ("edited", "base")
    }
    tuned, control = (
        Patch.load(out / f"{side}+1.safetensors").metadata.to_json() for side in ("edited", "base")
    )
    assert tuned["parents"] == [{"method": "uce", "hash": patch.hash}]
    assert "parents" not in control
    model = done[0]
    with (
        pytest.warns(BaseMismatchWarning, match="another patch on it \\(uce"),
        Patch.load(out / "edited+1.safetensors").apply(model),
    ):
        pass
    assert (tuned["pictures"], tuned["updates"]) == ("concept", 1)


@pytest.fixture(scope="module")
def moments(done, triplets, tmp_path_factory):
    """The folder of the same test as a kill would leave it, at every picture and every update: copied as it lay."""
    model, _, patch, _, _ = done
    folder, seen = tmp_path_factory.mktemp("moments"), {}
    out = folder / "out"

    def copy(what, done, _):
        seen[what, done] = folder / f"{len(seen)}"
        shutil.copytree(out, seen[what, done])

    found = resilience(
        model,
        [patch],
        SKULLS,
        FineTuneDataset.of_triplets(triplets, "unsafe", skulls),
        BRIEF,
        out=out,
        progress=copy,
    )
    return seen, len(found.items), (model, patch)


def contents(folder):
    """Every file's bytes.

    Of a patch the values and the metadata, since the format's writer has no order for the header.
    """
    out = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }
    patches = {
        name: Patch.load(folder / name)
        for name in out
        if name.endswith(".safetensors") and not name.startswith(STAGING_DIR)
    }
    return out | {name: (patch.hash, patch.metadata) for name, patch in patches.items()}


@pytest.mark.parametrize(
    ("what", "at", "rest"),
    [
        ("drawing: base", 1, SIDES),
        ("drawing: edited", 3, SIDES[1:]),
        ("fine-tuning: edited", 1, SIDES[2:]),
        ("fine-tuning: edited", 2, SIDES[2:]),
        ("drawing: edited+2", 2, SIDES[3:]),
        ("drawing: modular+2", 4, SIDES[7:]),
    ],
)
def test_a_killed_test_goes_on_to_the_same_results_and_draws_no_finished_side_again(
    done, moments, triplets, tmp_path, what, at, rest
):
    seen, pictures, (model, patch) = moments
    out, told = tmp_path / "out", []
    shutil.copytree(seen[what, at], out)
    if what == "drawing: edited+2":  # and the journal's last line is torn
        with (out / STAGING_DIR / "rows.jsonl").open("a") as file:
            file.write('{"side": "edi')
    material = FineTuneDataset.of_triplets(triplets, "unsafe", skulls)
    resilience(
        model, [patch], SKULLS, material, BRIEF, out=out, progress=lambda *stage: told.append(stage)
    )
    assert contents(out) == contents(done[-1])
    drawn = [
        name.removeprefix("drawing: ") for name, at, _ in told if name.startswith("drawing") and at
    ]
    assert drawn == [side for side in rest for _ in range(pictures)]
    if what == "drawing: edited+2":
        assert ("fine-tuning: edited", 1, 2) not in told


def test_an_unfinished_test_of_something_else_is_refused_in_one_line_and_kept(
    moments, triplets, tmp_path
):
    seen, _, (model, patch) = moments
    out, material = tmp_path / "out", FineTuneDataset.of_triplets(triplets, "unsafe", skulls)
    shutil.copytree(seen["drawing: edited", 3], out)
    before = contents(out)
    other = Patch({name: 2 * value for name, value in patch.tensors.items()}, patch.metadata)
    for settings, patches in ((BRIEF.model_copy(update={"prompts": 1}), [patch]), (BRIEF, [other])):
        with pytest.raises(
            FileError, match="is an unfinished test of other settings, data, weights or patches"
        ) as caught:
            resilience(model, patches, SKULLS, material, settings, out=out)
        assert "\n" not in str(caught.value)
    (out / STAGING_DIR / "card.json").unlink()
    with pytest.raises(FileError, match="is unfinished, and of another command"):
        resilience(model, [patch], SKULLS, material, BRIEF, out=out)
    assert contents(out) == {
        name: data for name, data in before.items() if not name.endswith("card.json")
    }


def test_a_finished_test_is_not_touched_and_one_that_fails_at_once_leaves_nothing(
    done, triplets, tmp_path
):
    model, _, patch, _, out = done
    before, material = contents(out), FineTuneDataset.of_triplets(triplets, "unsafe", skulls)
    with pytest.raises(FileError, match="already exists"):
        resilience(model, [patch], SKULLS, material, BRIEF, out=out)
    assert contents(out) == before

    def fail(*_):
        raise ConnectionError("pulled the plug")

    with pytest.raises(ConnectionError):
        resilience(model, [patch], SKULLS, material, BRIEF, out=tmp_path / "a" / "b", progress=fail)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_tested_is_refused_in_one_line(tiny_model, triplets, tmp_path):
    with pytest.raises(ConfigError, match="no edit whose resilience could be tested; name a patch"):
        resilience(
            tiny_model, [], SKULLS, FineTuneDataset.of_triplets(triplets, "benign", skulls), BRIEF
        )
    with pytest.raises(
        ConfigError,
        match="'nudity' has no bundled triplets; name some with --triplets, or captioned --pictures",
    ):
        material_for(load_concept("nudity"), "benign")
    with pytest.raises(ConfigError, match="both given"):
        material_for(SKULLS, "benign", triplets=tmp_path, pictures=tmp_path)


def test_the_side_of_the_triplets_is_that_of_the_fine_tune(triplets):
    plain = SKULLS.model_copy(update={"tuning": {}})
    benign, concept = (
        material_for(plain, on, triplets=triplets.folder) for on in ("benign", "concept")
    )
    assert [p.tobytes() for p in benign.pictures] == [
        triplets.images(i)[2].tobytes() for i in range(6)
    ]
    assert [p.tobytes() for p in concept.pictures] == [
        triplets.images(i)[0].tobytes() for i in range(6)
    ]
    assert (benign.texts[0], concept.texts[0]) == (("",), plain.words)


def test_patches_that_overlap_are_warned_about_and_one_that_lay_on_another_needs_it(
    make_model, triplets
):
    model = make_model()
    one, other = (UCE(erase=(word,)).apply(model) for word in ("red cube", "ball"))
    material, brief = (
        FineTuneDataset.of_triplets(triplets, "benign", skulls),
        BRIEF.model_copy(update={"roles": ("benign",)}),
    )
    with one.apply(model):
        above = UCE(erase=("ball",)).apply(model)
    with pytest.raises(ConfigError, match=r"made on a model with another patch on it \(uce, hash"):
        resilience(model, [above], SKULLS, material, brief)

    def stop(*_):
        raise KeyboardInterrupt

    with (
        pytest.warns(PatchOverlapWarning, match="weights are changed by more than one patch"),
        pytest.raises(KeyboardInterrupt),
    ):
        resilience(model, [one, other], SKULLS, material, brief, progress=stop)
