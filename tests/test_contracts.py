"""What every entry of every table keeps, those to come included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import safegen
from safegen import tables
from safegen.concept import load_concept, prompt_list
from safegen.errors import UnknownName

HOME = Path(safegen.__file__).parent
TABLES = {
    "model": tables.MODELS,
    "edit": tables.EDITS,
    "judge": tables.JUDGES,
    "CLIP": tables.CLIPS,
    "prompt source": tables.PROMPT_LISTS,
    "triplets": tables.TRIPLETS,
}
NOT_METHODS = {"edit": {"__init__", "base", "loop", "losses"}, "judge": {"__init__", "base", "batch", "onnx", "vision"}}


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_every_edit_keeps_its_promises(name, make_model, triplets):
    from safegen.edit.base import Edit

    model = make_model()
    edit = tables.resolve(tables.EDITS, name, "edit").preset("default", training={"updates": 2, "batch": 2, "accumulation": 1, "lr": 1e-3})
    assert isinstance(edit, Edit)
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}

    first, second = edit.apply(model, triplets), edit.apply(model, triplets)

    assert first.hash == second.hash  # same settings, same weights
    for key, value in model.denoiser.state_dict().items():
        assert torch.equal(value, before[key]), key  # the model is untouched
    assert type(edit).model_validate_json(edit.model_dump_json()) == edit
    first.fits(model)
    own = dict(model.denoiser.named_parameters())
    assert all(bool(v.isfinite().all()) for v in first.tensors.values())
    assert any(not torch.equal(v, own[k]) for k, v in first.tensors.items())
    facts = json.loads(json.dumps(first.provenance))
    assert (facts["method"], facts["base"], facts["data"]) == (name, model.hash, triplets.hash)
    assert type(edit).model_validate(facts["settings"]) == edit


@pytest.mark.parametrize("name", sorted(tables.EDITS))
def test_every_setting_of_every_edit_has_a_sentence(name):
    fields = tables.resolve(tables.EDITS, name, "edit").model_fields
    assert not [key for key, field in fields.items() if not (field.description or "").strip().endswith(".")]


@pytest.mark.parametrize(("noun", "name"), [(noun, name) for noun, table in TABLES.items() for name in sorted(table)])
def test_every_entry_of_every_table_resolves(noun, name):
    assert callable(tables.resolve(TABLES[noun], name, noun))


@pytest.mark.parametrize("noun", sorted(TABLES))
def test_an_unknown_name_comes_with_the_known_and_the_nearest(noun):
    name = min(TABLES[noun])
    with pytest.raises(UnknownName) as caught:
        tables.resolve(TABLES[noun], name[:-1], noun)
    words = str(caught.value)
    assert f"no {noun} named {name[:-1]!r}. Did you mean {name!r}?" in words
    assert all(known in words for known in TABLES[noun])


@pytest.mark.parametrize(("room", "table"), [("edit", tables.EDITS), ("judge", tables.JUDGES)])
def test_the_table_and_the_folder_name_the_same_methods(room, table):
    files = {path.stem for path in (HOME / room).glob("*.py")} - NOT_METHODS[room]
    assert {target.partition(":")[0] for target in table.values()} == {f"safegen.{room}.{file}" for file in files}


@pytest.mark.parametrize("name", tables.CONCEPTS)
def test_every_concept_names_things_that_exist(name):
    concept = load_concept(name)
    assert concept.name == name
    assert concept.judge in tables.JUDGES
    assert (concept.triplets or "").partition(":")[0] in tables.TRIPLETS
    assert set(concept.shows) <= {part for lists in concept.lists.values() for part in lists}
    for part in (part for lists in concept.lists.values() for part in lists):
        rows = prompt_list(part, 3)
        assert len({row.text for row in rows}) == 3


def test_the_table_and_the_folder_name_the_same_concepts():
    assert {path.stem for path in (HOME / "concepts").glob("*.toml")} == set(tables.CONCEPTS)


def test_an_unknown_concept_comes_with_the_known_and_the_nearest():
    with pytest.raises(UnknownName, match=r"Did you mean 'skulls'.*Known: fire, skulls"):
        load_concept("skull")
