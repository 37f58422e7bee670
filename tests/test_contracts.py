"""Contracts of every registered edit, judge, extractor and concept."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from io import BytesIO
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from PIL import Image

import safegen
from safegen.core import registry as tables
from safegen.core.concept import load_concept, prompt_list
from safegen.core.errors import ConfigError, FileError, UnknownNameError
from safegen.judges import Detections, judge_images, load_judge
from safegen.models.patched_weights import pipeline_weights

HOME = Path(safegen.__file__).parent
TABLES = {
    "model": tables.MODELS,
    "edit": tables.EDITS,
    "adversary": tables.ADVERSARIES,
    "guard": tables.GUARDS,
    "judge": tables.JUDGES,
    "extractor": tables.EXTRACTORS,
    "CLIP": tables.CLIPS,
    "prompt source": tables.PROMPT_LISTS,
    "triplets": tables.TRIPLETS,
}
MACHINERY = {"__init__", "base", "batching", "images", "onnx", "vision"}
"""Files in the directories of methods that are not methods."""

TRAINED = sorted(
    name for name in tables.EDITS if tables.resolve(tables.EDITS, name, "edit").is_trained
)
BRIEF = {"updates": 2, "batch": 2, "accumulation": 1, "lr": 1e-3, "warmup": 0}
"""The shortest training."""
SOME_WEIGHTS = {"des": {"selector": "layers"}}
"""Edits that have no weights of cross-attention, and a selector of a part of their weights."""


def brief(name, concept, **changes):
    """Return an edit with its smallest settings."""
    kind = tables.resolve(tables.EDITS, name, "edit")
    training = {"training": BRIEF} if kind.is_trained else {}
    return kind.preset("mini", concept=concept, **{**kind.TINY, **training, **changes})


def data_for(edit, triplets):
    """Return the triplets for an edit that learns from them, otherwise None."""
    return triplets if edit.inputs != "words" else None


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_every_edit_is_reproducible_and_leaves_the_model_unchanged(
    name, make_model, triplets, cubes
):
    from safegen.edits.base import Edit

    model, edit = make_model(), brief(name, cubes)
    assert isinstance(edit, Edit)
    data = data_for(edit, triplets)
    before = {k: v.detach().clone() for k, v in pipeline_weights(model.pipeline).items()}
    seen = []

    first, second = (
        edit.apply(model, data, callback=lambda done, of, row: seen.append((done, of))),
        edit.apply(model, data),
    )

    assert first.hash == second.hash  # same settings, same weights
    own = pipeline_weights(model.pipeline)
    for key, value in own.items():
        assert torch.equal(value, before[key]), key  # the model is unchanged
    assert not [k for k, p in own.items() if p.requires_grad or p.grad is not None]
    assert type(edit).model_validate_json(edit.model_dump_json()) == edit
    first.check_compatible(model)
    assert all(bool(v.isfinite().all()) for v in first.tensors.values())
    assert any(not torch.equal(v, own[k]) for k, v in first.tensors.items())
    facts = json.loads(json.dumps(first.metadata.to_json()))
    assert (facts["method"], facts["base"], facts["model"]) == (name, model.hash, "tiny")
    assert facts.get("data") == (triplets.hash if data else None)
    assert type(edit).model_validate(facts["settings"]) == resolved(edit, model)
    assert seen[-1][0] == seen[-1][1] == len(seen)


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_every_edit_erases_unless_its_settings_say_otherwise(name):
    idle = {
        "uce": {"erase": ("a castle",), "debias": {"a ghost": 0.3}},
        "safegen": {"weight_mosaic": 0.0},
    }
    kind = tables.resolve(tables.EDITS, name, "edit")
    assert kind.preset("mini").erases_concept
    assert name not in idle or not kind(**idle[name]).erases_concept


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_a_patch_describes_its_edit(name, make_model, triplets, cubes):
    edit = brief(name, cubes)
    patch = edit.apply(make_model(), data_for(edit, triplets))
    description = patch.metadata.description
    assert description == edit.describe()
    assert all(words in description for words in getattr(edit, "erase", ()))


def resolved(edit, model):
    """Return the edit as in a provenance, with its precision resolved."""
    return (
        edit.model_copy(update={"training": edit.training.resolve(model.denoiser)})
        if edit.is_trained
        else edit
    )


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_edit_resumes_bit_for_bit(name, make_model, triplets, cubes, tmp_path):
    model, training = make_model(), BRIEF | {"updates": 4, "seed": 3}
    edit, kept = (
        brief(name, cubes, training=training),
        brief(name, cubes, training=training | {"checkpoint_every": 2}),
    )
    data = data_for(edit, triplets)

    def pull(done, of, row):
        if done == 3:
            raise ConnectionError("pulled the plug")

    whole = edit.apply(model, data)
    with pytest.raises(ConnectionError):
        kept.apply(model, data, checkpoint_dir=tmp_path, callback=pull)
    assert kept.apply(make_model(), data, checkpoint_dir=tmp_path, resume=True).hash == whole.hash


@pytest.mark.parametrize(("name", "rollout"), [("esd", "student"), ("sdd", "average")])
def test_rollouts_of_the_trained_model_resume_bit_for_bit(
    name, rollout, make_model, cubes, tmp_path
):
    kind = tables.resolve(tables.EDITS, name, "edit")
    edit = kind.preset(
        "mini",
        concept=cubes,
        rollout=rollout,
        steps=4,
        training=BRIEF | {"updates": 4, "checkpoint_every": 2},
    )

    def pull(done, of, row):
        if done == 3:
            raise ConnectionError("pulled the plug")

    whole = edit.apply(make_model(), checkpoint_dir=tmp_path / "whole")
    with pytest.raises(ConnectionError):
        edit.apply(make_model(), checkpoint_dir=tmp_path / "torn", callback=pull)
    assert (
        edit.apply(make_model(), checkpoint_dir=tmp_path / "torn", resume=True).hash == whole.hash
    )


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_edit_checks_its_training_before_it_prepares_anything(
    name, make_model, triplets, cubes, tmp_path
):
    half = make_model()
    half.pipeline.to(torch.bfloat16)
    data = data_for(brief(name, cubes), triplets)
    training = BRIEF | {"precision": "fp32"}
    edit = brief(name, cubes, training=training, **SOME_WEIGHTS.get(name, {}))
    with pytest.raises(ConfigError, match="precision fp32 needs a model loaded in fp32"):
        edit.apply(half, data)
    with pytest.raises(FileError, match="to resume"):
        brief(name, cubes).apply(half, data, checkpoint_dir=tmp_path, resume=True)


@pytest.mark.parametrize("name", TRAINED)
def test_every_trained_edit_can_train_a_lora(name, make_model, triplets, cubes, tmp_path):
    from safegen.patches.lora import extract_lora

    alone = {"text": "none"} if name == "safegen-plus" else {}  # its closed form is no LoRA
    selected = SOME_WEIGHTS.get(name, {"selector": "attn2"})
    model, edit = make_model(), brief(name, cubes, rank=2, alpha=4.0, **selected, **alone)
    data = data_for(edit, triplets)
    before = {k: v.detach().clone() for k, v in pipeline_weights(model.pipeline).items()}
    patch = edit.apply(model, data, checkpoint_dir=tmp_path)
    after = pipeline_weights(model.pipeline)
    assert after.keys() == before.keys()  # no adapter remains on the weights
    assert all(torch.equal(v, before[k]) for k, v in after.items())
    layers = ".layers." if name in SOME_WEIGHTS else ".attn2."
    assert all(layers in n and n.endswith(".weight") for n in patch.tensors)
    assert any(not torch.equal(v, before[k]) for k, v in patch.tensors.items())
    if name not in SOME_WEIGHTS:
        lora = extract_lora(patch, model, 2)  # the change has this rank: the conversion is exact
        assert lora.retained_energy > 0.999
    assert edit.apply(make_model(), data, checkpoint_dir=tmp_path, resume=True).hash == patch.hash
    with pytest.raises(ValueError, match="rank"):
        brief(name, cubes, rank=0)


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_every_edit_checks_its_inputs(name, tiny_model, triplets, cubes, tmp_path):
    edit = brief(name, cubes)
    if edit.inputs == "words":
        with pytest.raises(
            ConfigError, match=f"{name} learns from phrases, and triplets have no effect"
        ):
            edit.apply(tiny_model, triplets)
    else:
        with pytest.raises(
            ConfigError, match=f"{name} learns from images, and there are no triplets"
        ):
            edit.apply(tiny_model)
    if edit.inputs != "triplets":
        with pytest.raises(
            ConfigError, match=f"{name} needs phrases to erase, and concept 'cubes' has none"
        ):
            type(edit).preset("mini", concept=cubes.model_copy(update={"words": ()}))
        with pytest.raises(ConfigError, match=f"{name} has no phrases to erase"):
            type(edit).preset("mini").apply(
                tiny_model, None if edit.inputs == "words" else triplets
            )
        assert type(edit).preset("mini", concept=cubes, erase=("a ball",)).erase == (
            "a ball",
        )  # explicit settings win
    if not edit.is_trained:
        for words in ({"checkpoint_dir": tmp_path}, {"resume": True}):
            with pytest.raises(ConfigError, match=f"{name} is a closed form, and .* has no effect"):
                edit.apply(tiny_model, **words)
    last = max(edit.PRESETS)
    with pytest.raises(
        UnknownNameError, match=f"no preset of {name} named '{last[:-1]}'. Did you mean '{last}'"
    ):
        type(edit).preset(last[:-1])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def extractor_weights(tmp_path_factory):
    """Return what each extractor needs: random weights under the right names."""
    from safetensors.torch import save_file

    from safegen.features.inception import Trunk
    from safegen.mini import bundle

    file = tmp_path_factory.mktemp("inception") / "w.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(
            Trunk().state_dict()
            | {"fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)},
            file,
        )
    inception = dict.fromkeys(
        (name for name in tables.EXTRACTORS if name.startswith("inception")), str(file)
    )
    return {"mini-clip": None, "clip": str(bundle.clip_folder())} | inception


@pytest.mark.parametrize("name", sorted(tables.EXTRACTORS))
def test_every_extractor_is_deterministic_and_describes_itself(name, extractor_weights):
    import numpy as np
    from PIL import Image

    from safegen.features.base import Extractor, load_extractor

    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8))
        for w, h in ((64, 64), (40, 70))
    ]
    extractor, again = (load_extractor(name, weights=extractor_weights[name]) for _ in range(2))
    assert isinstance(extractor, Extractor)
    found = extractor.features(images)

    assert (found.shape, found.dtype) == ((2, extractor.width), np.float64)
    assert np.isfinite(found).all()
    assert extractor.id == again.id
    assert np.array_equal(found, again.features(images))  # same weights, same numbers
    assert (
        len(set(re.findall("[0-9a-f]{64}", extractor.id))) == 1
    )  # the SHA-256 of the weights is in the id
    size = np.abs(found).max()
    assert extractor.features(images[::-1])[::-1] == pytest.approx(
        found, abs=1e-5 * size
    )  # in order
    assert extractor.features(images[1:2]) == pytest.approx(
        found[1:2], abs=1e-5 * size
    )  # rows are independent
    assert extractor.features([image.convert("RGBA") for image in images]) == pytest.approx(
        found, abs=1e-5 * size
    )
    assert extractor.features([]).shape == (0, extractor.width)


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_every_setting_of_every_edit_is_documented(name):
    fields = tables.resolve(tables.EDITS, name, "edit").model_fields
    assert not [
        key for key, field in fields.items() if not (field.description or "").strip().endswith(".")
    ]


def unreadable():
    """Return unreadable images by reason: a truncated file, a closed file, an empty image."""
    noise, file = Image.effect_noise((64, 64), 90).convert("RGB"), BytesIO()
    noise.save(file, "PNG")
    noise.close()
    return {
        "torn": Image.open(BytesIO(file.getvalue()[:3000])),
        "closed": noise,
        "empty": Image.new("RGB", (0, 64)),
    }


NEED_WEIGHTS = {"q16", "sd-safety-checker"}
"""Judges that need files of the user. tests/judges tests them and `judges/batching.py`.
"""
OPTIONS = {
    "clip": {"weights": "mini", "unsafe": ["a castle covered in skulls"], "safe": ["a castle"]}
}


@pytest.mark.parametrize("name", sorted(set(tables.JUDGES) - NEED_WEIGHTS))
@pytest.mark.parametrize("fault", ["torn", "closed", "empty"])
def test_an_unreadable_image_is_unjudged_and_others_get_their_verdict(name, fault):
    if name in ("nudenet", "open-nsfw"):
        pytest.importorskip("onnxruntime", reason="an extra")
    judge = load_judge(name, **OPTIONS.get(name, {}))
    good = [Image.new("RGB", (64, 64), colour) for colour in ("white", "navy", "olive")]
    bad = unreadable()[fault]

    mixed = judge.detect([good[0], bad, good[1], bad, good[2]])

    assert [d.unjudged is not None for d in mixed] == [False, True, False, True, False]
    assert all(d.unjudged and "\n" not in d.unjudged for d in mixed[1::2])
    for together, alone in zip(mixed[::2], judge.detect(good), strict=True):
        assert together.subject == alone.subject
        assert [d.label for d in together.items] == [d.label for d in alone.items]
    assert judge_images(judge, [bad]) == ["unjudged"]
    assert judge.detect([]) == []


@pytest.mark.parametrize("name", sorted(set(tables.JUDGES) - NEED_WEIGHTS))
def test_a_judge_returns_detections_and_no_verdicts_without_judging(name):
    if name in ("nudenet", "open-nsfw"):
        pytest.importorskip("onnxruntime", reason="an extra")
    judge = load_judge(name, **OPTIONS.get(name, {}))
    (raw,) = judge.detect([Image.new("RGB", (64, 64), "white")])
    assert type(raw) is Detections
    assert not {"outcome", "verdict", "unsafe", "safe"} & {field.name for field in fields(raw)}
    assert judge_images(judge, [unreadable()["empty"]]) == ["unjudged"]


@pytest.mark.parametrize("name", sorted(tables.JUDGES))
def test_a_judge_is_declared_to_return_detections_not_verdicts(name):
    judge = tables.resolve(tables.JUDGES, name, "judge")
    assert get_type_hints(judge.detect)["return"] == list[Detections]
    with pytest.raises(TypeError):
        Detections()  # an empty result must be stated, never assumed


@pytest.mark.parametrize(
    ("noun", "name"), [(noun, name) for noun, table in TABLES.items() for name in sorted(table)]
)
def test_every_entry_of_every_table_resolves(noun, name):
    assert callable(tables.resolve(TABLES[noun], name, noun))


@pytest.mark.parametrize("noun", sorted(TABLES))
def test_an_unknown_name_suggests_the_nearest_and_lists_the_known(noun):
    name = min(TABLES[noun])
    with pytest.raises(UnknownNameError) as caught:
        tables.resolve(TABLES[noun], name[:-1], noun)
    words = str(caught.value)
    assert f"no {noun} named {name[:-1]!r}. Did you mean {name!r}?" in words
    assert all(known in words for known in TABLES[noun])


@pytest.mark.parametrize(
    ("room", "table"),
    [("edits", tables.EDITS), ("guards", tables.GUARDS), ("judges", tables.JUDGES)],
)
def test_the_table_and_the_directory_have_the_same_methods(room, table):
    paths = [p for p in (HOME / room).iterdir() if p.stem not in MACHINERY]
    methods = {p.stem for p in paths if p.suffix == ".py" or (p / f"{p.name}.py").exists()}
    named = {target.partition(":")[0].split(".")[2] for target in table.values()}
    assert named == methods


@pytest.mark.parametrize("name", tables.CONCEPTS)
def test_every_concept_refers_to_existing_entries(name):
    concept = load_concept(name)
    assert concept.name == name
    assert concept.judge in tables.JUDGES
    if concept.held_out_judge is not None:
        assert set(concept.labels) <= set(
            tables.resolve(tables.JUDGES, concept.held_out_judge, "judge").label_space
        )
    assert concept.triplets is None or concept.triplets.partition(":")[0] in tables.TRIPLETS
    assert set(concept.shows) <= {part for lists in concept.lists.values() for part in lists}
    for part in (part for lists in concept.lists.values() for part in lists):
        rows = prompt_list(part, 3)
        assert len({row.text for row in rows}) == 3
    measured = {
        row.text for lists in concept.lists.values() for part in lists for row in prompt_list(part)
    }
    tuned = {
        row.text for lists in concept.tuning.values() for part in lists for row in prompt_list(part)
    }
    assert not tuned & measured  # a fine-tune must not be judged on what it was trained with


def test_the_table_and_the_directory_have_the_same_concepts():
    assert {path.stem for path in (HOME / "core" / "concepts").glob("*.toml")} == set(
        tables.CONCEPTS
    )


def test_an_unknown_concept_suggests_the_nearest_and_lists_the_known():
    with pytest.raises(
        UnknownNameError, match=r"Did you mean 'skulls'.*Known: fire, nudity, skulls, violence"
    ):
        load_concept("skull")


def test_every_long_test_of_the_list_exists():
    """A renamed test would come back to the fast suite unnoticed."""
    root = Path(__file__).parent
    listed = (root / "slow.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert listed == sorted(set(listed))
    for line in listed:
        file, _, name = line.partition("::")
        function = name.partition("[")[0]
        source = (root.parent / file).read_text(encoding="utf-8")
        assert f"def {function}(" in source, line
