"""Every cell of the table of file formats and families."""

from __future__ import annotations

import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

import tests.tiny
from safegen.core.errors import FileError
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.single_file_writer import save_single_file
from safegen.models.checkpoint.transformer_map import transformer_names
from safegen.models.loading import hub_patterns, load
from tests.models.families import ALONE, FILES_OF_FAMILIES, FORMATS, WHOLE


def test_the_table_has_every_family_and_format():
    assert tuple(FILES_OF_FAMILIES) == tests.tiny.FAMILIES
    assert all(tuple(row) == FORMATS for row in FILES_OF_FAMILIES.values())


@pytest.mark.parametrize("family", FILES_OF_FAMILIES)
def test_every_cell_is_true(family, tmp_path):
    row, model = FILES_OF_FAMILIES[family], tests.tiny.build_model(family)
    folder, file = tmp_path / "folder", tmp_path / "file.safetensors"
    save_folder(model, folder)
    assert (load(folder).hash == model.hash) == (row["folder"] == "")

    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    patterns = hub_patterns(names, allow_pickle=False)
    fetched = set(filter_repo_objects(names, allow_patterns=patterns))
    assert (set(names) <= fetched) == (row["hub"] == "")

    save_single_file(model, file, dtype="fp32")
    tensors = load_file(file)
    is_whole = any(name.startswith("first_stage_model.") for name in tensors)
    assert row["one file"] == ("" if is_whole else ALONE)
    assert row["transformer file"] == (WHOLE if is_whole else "")
    if not is_whole:
        weights = transformer_names(model.denoiser.state_dict())
        assert set(tensors) == set(weights.values())
        assert load(file, config=folder).hash == model.hash
    if reason := row["one file without a folder"]:
        with pytest.raises(FileError, match=reason):
            load(file)
    else:
        loaded = load(file)
        assert (loaded.hash, loaded.prediction) == (model.hash, model.prediction)
