"""The relearning attack from end to end at tiny size: stacks, figures, patches and resume."""

from __future__ import annotations

import json
import shutil

import pytest

from safegen.attacks.finetune import FineTuneConfig, FineTuneDataset
from safegen.attacks.relearn import RelearnConfig, load_dataset, relearn
from safegen.core.concept import load_concept
from safegen.core.errors import ConfigError, FileError
from safegen.core.generation import GenerationConfig
from safegen.edits.uce import UCE
from safegen.evaluation.report.page import NUMBERS, PAGE
from safegen.evaluation.run.folder import PATCHES, SCORES, Run
from safegen.evaluation.verify import verify
from safegen.metrics.paired import mcnemar
from safegen.patches.arithmetic import merge
from safegen.patches.patch import Patch, PatchOverlapWarning
from safegen.stack import Stack
from safegen.stack_loader import StackLoader

SKULLS = load_concept("skulls")
CONFIG = RelearnConfig(
    data="concept",
    finetune=FineTuneConfig(updates=(1, 2), rank=2, batch=2, lr=1e-2, precision="fp32"),
    modular=True,
    prompts=2,
    roles=("explicit", "benign"),
    generation=GenerationConfig(num_inference_steps=2),
)
STACKS = ["base", "edited"] + [
    f"{name}-{n}"
    for names in (("finetuned",), ("control",), ("modular",))
    for name in names
    for n in (1, 2)
]


def skulls(images):
    return [("", "skulls")] * len(images)


@pytest.fixture(scope="module")
def loader():
    return StackLoader()


@pytest.fixture(scope="module")
def dataset(triplets):
    return FineTuneDataset.from_triplets(triplets, "unsafe", skulls)


@pytest.fixture(scope="module")
def edited(loader, tmp_path_factory):
    path = tmp_path_factory.mktemp("edit") / "uce.safetensors"
    UCE(erase=("skulls",)).apply(loader.model("mini")[0]).save(path)
    return Stack(name="mine", model="mini", patches=(path,))


@pytest.fixture(scope="module")
def done(edited, dataset, loader, tmp_path_factory):
    """Return a finished attack."""
    out = tmp_path_factory.mktemp("relearn") / "out"
    return relearn(edited, SKULLS, dataset, CONFIG, out, loader=loader)


def contents(folder):
    """Return the bytes of every file except timings, and hash and metadata of patches."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("timings.jsonl", PAGE, NUMBERS, "report.md")
    }
    patches = {name: Patch.load(p) for name, p in files.items() if name.endswith(".safetensors")}
    logs = {
        name: [
            {k: v for k, v in json.loads(line).items() if k != "seconds"}
            for line in path.read_text().splitlines()
        ]
        for name, path in files.items()
        if name.endswith("log.jsonl")
    }
    return (
        {name: path.read_bytes() for name, path in files.items()}
        | {name: (patch.hash, patch.metadata) for name, patch in patches.items()}
        | logs
    )


def test_every_stack_is_measured_and_the_run_verifies(done):
    scores = json.loads((done.folder / SCORES).read_text())
    assert list(scores["stacks"]) == STACKS
    assert set(scores["stacks"]["edited"]["lists"]) == {"mini:skulls", "mini:benign"}
    assert verify(done) == []
    assert {path.name for path in (done.folder / PATCHES).glob("*.safetensors")} == {
        f"{name}-{n}.safetensors" for name in ("finetuned", "control", "modular") for n in (1, 2)
    }
    assert not list((done.folder / PATCHES).rglob("checkpoint.safetensors"))
    page = (done.folder / PAGE).read_text()
    assert "Fine-tuned on 6 images" in page
    assert "Compared with the stack before the attack" in page


def test_every_attacked_stack_is_tested_against_the_edited_one(done):
    scores = json.loads((done.folder / SCORES).read_text())["stacks"]
    verdicts = {}
    keys = {entry.name: done.keys(entry) for entry in done.stacks}
    for record in done.detections_records():
        scored = any(d.label == "skulls" and d.score >= 0.5 for d in record.detections.items)
        verdicts[record.key] = scored
    for name in STACKS:
        for part in ("mini:skulls", "mini:benign"):
            at = [i for i, p in enumerate(done.samples) if p.list_name == part]
            row = scores[name]["lists"][part]
            if name in ("base", "edited"):
                assert "reference" not in row
                continue
            own, old = ([verdicts[keys[stack][i]] for i in at] for stack in (name, "edited"))
            assert row["reference"] == {"stack": "edited"} | mcnemar(own, old).to_json()


def test_patches_generate_the_images_of_their_stack(done, edited, loader):
    from safegen.evaluation.run.folder import image_file, read_image

    samples = done.samples
    edit = Patch.load(edited.patches[0])
    model, _ = loader.model("mini")
    tuned, control = (
        Patch.load(done.folder / PATCHES / f"{name}-2.safetensors")
        for name in ("finetuned", "control")
    )
    both = merge([edit, control], overlap="add", model=model)
    from contextlib import ExitStack

    from safegen.models.generation import generate

    for name, patches in (("finetuned-2", [edit, tuned]), ("modular-2", [both])):
        entry = next(e for e in done.stacks if e.name == name)
        with ExitStack() as applied:
            for patch in patches:
                applied.enter_context(patch.apply(model))
            images = list(generate(model, samples, CONFIG.generation))
        for image, key in zip(images, done.keys(entry), strict=True):
            file = done.folder / image_file(name, key)
            assert read_image(file).tobytes() == image.tobytes()


def test_a_patch_has_its_base_and_parents(done, edited):
    tuned, control = (
        Patch.load(done.folder / PATCHES / f"{name}-1.safetensors").metadata
        for name in ("finetuned", "control")
    )
    assert [p.hash for p in tuned.parents] == [Patch.load(edited.patches[0]).hash]
    assert control.parents == ()
    assert (tuned.images, tuned.updates) == ("concept", 1)


@pytest.mark.parametrize(
    ("stage", "at"),
    [("fine-tuning: edited", 1), ("fine-tuning: base", 2), ("generating: finetuned-2", 4)],
)
def test_a_killed_attack_resumes_to_the_same_results(
    done, edited, dataset, loader, tmp_path, stage, at
):
    out = tmp_path / "out"

    def stop(what, n, _):
        if (what, n) == (stage, at):
            shutil.copytree(out, tmp_path / "killed")
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError):
        relearn(edited, SKULLS, dataset, CONFIG, out, loader=loader, progress=stop)
    shutil.rmtree(out)
    shutil.move(tmp_path / "killed", out)
    relearn(edited, SKULLS, dataset, CONFIG, out, loader=loader)
    assert contents(out) == contents(done.folder)


def test_a_finished_attack_is_not_repeated(done, edited, dataset, loader):
    before, stages = contents(done.folder), []
    again = relearn(
        edited,
        SKULLS,
        dataset,
        CONFIG,
        done.folder,
        loader=loader,
        progress=lambda stage, *_: stages.append(stage),
    )
    assert contents(again.folder) == before
    assert not [stage for stage in stages if stage.startswith("fine-tuning")]


def test_a_directory_of_other_settings_is_refused_and_not_changed(
    done, edited, dataset, loader, tmp_path
):
    before = contents(done.folder)
    other = CONFIG.model_copy(update={"prompts": 1})
    with pytest.raises(FileError, match=r"was made with other settings .*config.prompts: 2 and 1"):
        relearn(edited, SKULLS, dataset, other, done.folder, loader=loader)
    assert contents(done.folder) == before
    (tmp_path / "mine").write_text("keep me")
    with pytest.raises(FileError, match="already exists"):
        relearn(edited, SKULLS, dataset, CONFIG, tmp_path, loader=loader)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_invalid_attacks_are_refused_before_anything_is_written(edited, dataset, loader, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="must have a patch, got none"):
        relearn(Stack(name="x", model="mini"), SKULLS, dataset, CONFIG, out, loader=loader)
    model, _ = loader.model("mini")
    with Patch.load(edited.patches[0]).apply(model):
        UCE(erase=("fire",)).apply(model).save(tmp_path / "above.safetensors")
    above = edited.model_copy(update={"patches": (tmp_path / "above.safetensors",)})
    with pytest.raises(ConfigError, match="modular needs every patch below the edit, got none of"):
        relearn(above, SKULLS, dataset, CONFIG, out, loader=loader)
    assert not out.exists()


def test_patches_that_overlap_are_warned_about(edited, dataset, loader, tmp_path):
    UCE(erase=("fire",)).apply(loader.model("mini")[0]).save(tmp_path / "other.safetensors")
    stack = edited.model_copy(update={"patches": (*edited.patches, tmp_path / "other.safetensors")})

    def stop(*_):
        raise RuntimeError

    with (
        pytest.warns(PatchOverlapWarning, match="weights are changed by more than one patch"),
        pytest.raises(RuntimeError),
    ):
        relearn(stack, SKULLS, dataset, CONFIG, tmp_path / "out", loader=loader, progress=stop)


def test_the_dataset_is_the_images_of_the_triplets_that_the_fine_tune_learns(triplets, tmp_path):
    plain = SKULLS.model_copy(update={"tuning": {}})
    benign, concept = (
        load_dataset(plain, data, triplets=triplets.folder) for data in ("benign", "concept")
    )
    for found, side in ((benign, 2), (concept, 0)):
        assert [p.tobytes() for p in found.images] == [
            triplets.images(i)[side].tobytes() for i in range(6)
        ]
    assert (benign.captions[0], concept.captions[0]) == (("",), plain.words)
    with pytest.raises(ConfigError, match="'nudity' has no bundled triplets"):
        load_dataset(load_concept("nudity"), "benign")
    with pytest.raises(ConfigError, match="either triplets or images, got both"):
        load_dataset(SKULLS, "benign", triplets=tmp_path, images=tmp_path)


def test_the_run_of_an_attack_is_an_ordinary_run(done):
    assert Run.open(done.folder).protocol.concept == "skulls"
