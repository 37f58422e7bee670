"""Patches of text encoders, alone and with the denoiser, in every family."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from transformers import CLIPTextModel

from safegen.core.errors import ConfigError, PatchError
from safegen.models.checkpoint.diffusers_folder import save_folder
from safegen.models.checkpoint.metadata import CheckpointMetadata, ParentRef, PatchMetadata
from safegen.models.loading import load
from safegen.models.patched_weights import hash_components, pipeline_weights
from safegen.patches.arithmetic import compare, include, merge, rebase
from safegen.patches.lora import extract_lora
from safegen.patches.patch import BaseMismatchWarning, Patch
from safegen.workflows.export import export
from safegen.workflows.patch_from_model import patch_from_model
from tiny import FAMILIES, build_model

NORM = "text_encoder.text_model.final_layer_norm.weight"
TOKENS = "text_encoder.text_model.embeddings.token_embedding.weight"


def state_of(model):
    return {
        f"{name}.{key}": value.detach().clone()
        for name in model.components
        for key, value in getattr(model.pipeline, name).state_dict().items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(v, b[k]) for k, v in a.items())


def patch_of(model, *names, by=0.05):
    weights = pipeline_weights(model.pipeline)
    tensors = {name: weights[name].detach().clone() + by for name in names}
    components = hash_components(model, names)
    return Patch(
        tensors,
        PatchMetadata(method="des", base=model.hash, family=model.family, components=components),
    )


@pytest.fixture
def model(make_model):
    return make_model()


@pytest.mark.parametrize(
    "family",
    [pytest.param(f, marks=[pytest.mark.slow] * (f not in ("sdxl", "sd35"))) for f in FAMILIES],
)
def test_a_patch_of_every_component_is_undone_bit_for_bit(family):
    model = build_model(family)
    before, names = state_of(model), list(pipeline_weights(model.pipeline))
    encoders = [name for name in model.components if name.startswith("text_encoder")]
    assert {name.partition(".")[0] for name in names} >= set(encoders)
    patch = patch_of(model, *names)
    hashes, parts = (model.hash, hash_components(model, names)), model.pipeline_hash
    text = model.encode_text(["a red cube"]).hidden
    with patch.apply(model):
        assert not torch.equal(model.encode_text(["a red cube"]).hidden, text)
        assert (model.hash, hash_components(model, names)) == hashes
        assert model.pipeline_hash == parts
        with model.without_patches():
            assert same(state_of(model), before)
        assert not same(state_of(model), before)
        assert set(encoders) <= patch.layer_counts.keys()
    assert same(state_of(model), before)


def test_names_of_a_text_encoder_are_those_of_published_folders(model, tmp_path):
    from safetensors import safe_open

    export(model, tmp_path / "m", format="diffusers", card=False)
    (file,) = (tmp_path / "m" / "text_encoder").glob("*.safetensors")
    with safe_open(file, framework="pt") as handle:
        stored = {f"text_encoder.{name}" for name in list(handle.keys())}
    names = {n for n in pipeline_weights(model.pipeline) if n.startswith("text_encoder.")}
    assert names == stored


def test_a_patch_of_a_text_encoder_is_tied_to_it_and_not_to_the_denoiser(make_model, model):
    patch = patch_of(model, NORM)
    assert patch.bases == {"text_encoder": patch.metadata.components["text_encoder"]}
    other = make_model()
    with torch.no_grad():
        other.denoiser.conv_in.weight.add_(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.apply(other).undo()
    with torch.no_grad():
        pipeline_weights(other.pipeline)[TOKENS].add_(1)
    with pytest.warns(BaseMismatchWarning, match=r"on text_encoder [0-9a-f]{12}, .* Measure"):
        patch.apply(other)


def test_the_hash_of_a_text_encoder_is_that_without_patches(model):
    plain = hash_components(model, [NORM])
    first, second = patch_of(model, NORM, TOKENS), patch_of(model, NORM, by=0.1)
    one, two = first.apply(model), second.apply(model)
    assert hash_components(model, [NORM]) == plain
    one.undo()
    assert hash_components(model, [NORM]) == plain
    two.undo()
    assert hash_components(model, [NORM]) == plain


def test_rows_that_a_textual_inversion_adds_outlive_the_patch(model):
    encoder = model.pipeline.text_encoder
    before = pipeline_weights(model.pipeline)[TOKENS].detach().clone()
    applied = patch_of(model, TOKENS).apply(model)
    encoder.resize_token_embeddings(len(before) + 2, mean_resizing=False)
    applied.undo()
    after = encoder.get_input_embeddings().weight
    assert len(after) == len(before) + 2
    assert torch.equal(after[: len(before)], before)


def test_a_denoiser_alone_refuses_a_patch_of_a_text_encoder(model):
    with pytest.raises(PatchError, match=r"it has no text_encoder\. Use a pipeline that has one"):
        patch_of(model, NORM).apply(model.denoiser)


def test_a_pipeline_with_another_text_encoder_refuses_the_patch(model):
    parts = model.pipeline.components
    config = parts["text_encoder"].config
    other = StableDiffusionPipeline(**parts | {"text_encoder": CLIPTextModel(config).eval()})
    patch = patch_of(model, NORM)
    patch.apply(model.pipeline).undo()
    before = {k: v.clone() for k, v in other.text_encoder.state_dict().items()}
    with pytest.raises(PatchError, match="text_encoder of the pipeline must be that of"):
        patch.apply(other)
    assert same(dict(other.text_encoder.state_dict()), before)


@pytest.mark.parametrize("form", ["diffusers", "single-file"])
def test_an_export_holds_the_patched_text_encoder_and_its_provenance(model, tmp_path, form):
    out = tmp_path / ("m" if form == "diffusers" else "m.safetensors")
    patch = patch_of(model, NORM, "conv_in.bias")
    export(model, out, format=form, patches=[patch], dtype=None if form == "diffusers" else "fp32")
    found = load(out)
    with patch.apply(model):
        assert same(state_of(found), state_of(model))
    assert [record.hash for record in found.verified_metadata.patches] == [patch.hash]


def test_metadata_of_a_checkpoint_with_another_text_encoder_is_not_passed_on(model, tmp_path):
    export(model, tmp_path / "m", format="diffusers", patches=[patch_of(model, NORM)])
    found = load(tmp_path / "m")
    with torch.no_grad():
        pipeline_weights(found.pipeline)[NORM].add_(1)
    with pytest.warns(UserWarning, match="must match its weights"):
        assert found.verified_metadata is None


def test_a_written_encoder_is_hashed_although_its_patch_does_not_say_so(model, tmp_path):
    silent = Patch(patch_of(model, NORM).tensors, PatchMetadata(method="des"))
    with silent.apply(model):
        save_folder(model, tmp_path / "safe", metadata=CheckpointMetadata(base=model.hash))
    written = json.loads((tmp_path / "safe" / "safegen.json").read_text())
    assert written["components"].keys() == {"text_encoder"}
    assert load(str(tmp_path / "safe")).verified_metadata is not None


def test_a_patch_of_an_edited_model_holds_its_text_encoder(model, tmp_path):
    patch = patch_of(model, NORM, "conv_in.bias")
    export(model, tmp_path / "base", format="diffusers")
    export(model, tmp_path / "edited", format="diffusers", patches=[patch])
    found = patch_from_model(tmp_path / "edited", tmp_path / "base")
    assert found.hash == patch.hash
    assert found.bases == patch.bases


def test_patches_of_two_components_merge_and_include(model):
    unet, text = patch_of(model, "conv_in.bias"), patch_of(model, NORM)
    merged = merge([unet, text], model=model)
    assert merged.bases == unet.bases | text.bases
    difference = compare(unet, text)
    assert (difference["both"], difference["base"]) == (0, None)
    parents = (ParentRef(method="uce", hash=unet.hash),)
    on_top = Patch(text.tensors, text.metadata.model_copy(update={"parents": parents}))
    whole = include(unet, on_top)
    assert whole.hash == merged.hash
    assert whole.bases == merged.bases


def test_a_patch_of_a_text_encoder_is_merged_across_fine_tunes_of_the_denoiser(make_model, model):
    tuned = make_model()
    with torch.no_grad():
        tuned.denoiser.conv_in.weight.add_(1)
    unet, text = patch_of(tuned, "conv_in.bias"), patch_of(model, NORM)
    assert merge([unet, text]).metadata.base == tuned.hash
    with torch.no_grad():
        pipeline_weights(tuned.pipeline)[TOKENS].add_(1)
    with pytest.raises(PatchError, match="base text_encoder of patches to merge must be the same"):
        merge([patch_of(tuned, TOKENS), text])


def test_changes_of_a_text_encoder_add_up_and_move_to_a_fine_tune(make_model, model):
    one, two = patch_of(model, NORM, by=0.5), patch_of(model, NORM, by=0.25)
    value = pipeline_weights(model.pipeline)[NORM].detach()
    added = merge([one, two], overlap="add", model=model)
    torch.testing.assert_close(added.tensors[NORM], value + 0.75)
    target = make_model()
    with pytest.raises(ConfigError, match="must have different weights"):
        rebase(one, model, target)
    with torch.no_grad():
        pipeline_weights(target.pipeline)[NORM].mul_(2)
    moved = rebase(one, model, target)
    torch.testing.assert_close(moved.tensors[NORM], 2 * value + 0.5)
    moved.apply(target).undo()  # warnings are errors


def test_a_lora_of_a_text_encoder_is_refused_in_one_line(model):
    with pytest.raises(ConfigError, match=r"of a patch of the denoiser alone, got .* text_encoder"):
        extract_lora(patch_of(model, NORM), model, 4)


def test_a_patch_file_without_prefixes_changes_the_denoiser(model, tmp_path):
    patch = patch_of(model, "conv_in.bias")
    patch.save(tmp_path / "p.safetensors")
    assert Patch.load(tmp_path / "p.safetensors").metadata.components == {}
    assert "components" not in patch.metadata.to_json()


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_a_file_of_a_transformer_alone_gives_the_patch_of_its_weights(family, tmp_path):
    base = build_model(family)
    save_folder(base, tmp_path / "base")
    name = "transformer_blocks.0.attn.to_q.weight"
    edited = {n: value.contiguous() for n, value in base.denoiser.state_dict().items()}
    edited[name] = edited[name] * 2
    save_file(edited, tmp_path / "x.safetensors")
    patch = patch_from_model(tmp_path / "x.safetensors", tmp_path / "base")
    assert patch.names == {name}
    assert torch.equal(patch.tensors[name], edited[name])
