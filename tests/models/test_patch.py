"""A patch is saved, put on and taken off exactly, and refused where it does not fit."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from safegen.core.errors import FileError, PatchError
from safegen.edits.uce import UCE
from safegen.models.model import load
from safegen.models.selectors import select_parameters
from safegen.patches.arithmetic import merge
from safegen.patches.patch import FORMAT, BaseMismatchWarning, Patch


@pytest.fixture(scope="module")
def patch(tiny_model):
    g, own = torch.Generator().manual_seed(0), dict(tiny_model.denoiser.named_parameters())
    tensors = {
        n: torch.randn(own[n].shape, generator=g)
        for n in select_parameters(tiny_model.denoiser, "attn1")
    }
    return Patch(
        tensors,
        {"method": "random", "base": tiny_model.hash, "settings": {"größe": 1.5, "none": None}},
    )


def state_of(model):
    return {k: v.detach().clone() for k, v in model.denoiser.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


# ------------------------------------------------------------ files


def test_a_patch_comes_back_from_its_file(patch, tmp_path):
    patch.save(tmp_path / "deep" / "p.safetensors")
    found = Patch.load(tmp_path / "deep" / "p.safetensors")
    same(dict(found.tensors), dict(patch.tensors))
    assert found.provenance == patch.provenance
    assert found.hash == patch.hash
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.safetensors"]


def test_a_patch_is_a_plain_safetensors_file(patch, tmp_path):
    patch.save(tmp_path / "p.safetensors")
    same(load_file(tmp_path / "p.safetensors"), dict(patch.tensors))


def test_the_hash_is_of_names_and_values_in_any_order(patch):
    tensors = dict(patch.tensors)
    assert Patch(dict(reversed(tensors.items()))).hash == patch.hash
    first = next(iter(tensors))
    assert Patch(tensors | {first: tensors[first] + 1}).hash != patch.hash
    assert Patch({("x" + k if k == first else k): v for k, v in tensors.items()}).hash != patch.hash


def test_an_output_that_exists_is_kept(patch, tmp_path):
    out = tmp_path / "p.safetensors"
    out.write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        patch.save(out)
    assert out.read_text() == "mine"
    with pytest.raises(FileError, match="is a folder"):
        patch.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_an_output_that_cannot_be_written_is_refused_in_one_line(patch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(FileError, match="cannot be written") as caught:
        patch.save(tmp_path / "file" / "p.safetensors")
    assert "\n" not in str(caught.value)


def _cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def _resave(path, change, header=None):
    tensors = load_file(path)
    change(tensors)
    save_file(
        tensors,
        path,
        metadata=header if header is not None else {"format": FORMAT, "provenance": "{}"},
    )


def _nan(value):
    def change(tensors):
        next(iter(tensors.values())).view(-1)[3] = value

    return change


def _says(text):
    return {"format": FORMAT, "provenance": text}


def _nothing(tensors):
    pass


DAMAGE = {
    "missing": (lambda p: p.unlink(), "does not exist"),
    "truncated": (_cut, "not a readable safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
    "a pickle": (lambda p: torch.save({"w": torch.zeros(1)}, p), "not a readable safetensors file"),
    "other safetensors": (
        lambda p: _resave(p, _nothing, {"format": "pt"}),
        "is not a safegen patch",
    ),
    "safetensors without a header": (lambda p: _resave(p, _nothing, {}), "is not a safegen patch"),
    "NaN": (lambda p: _resave(p, _nan(float("nan"))), "NaN or infinite"),
    "infinite": (lambda p: _resave(p, _nan(float("inf"))), "NaN or infinite"),
    "no tensors": (lambda p: _resave(p, dict.clear), "is a safegen patch of nothing"),
    "no provenance": (lambda p: _resave(p, _nothing, {"format": FORMAT}), "provenance"),
    "provenance no object": (
        lambda p: _resave(p, _nothing, _says("[]")),
        "provenance cannot be used",
    ),
    "provenance null": (lambda p: _resave(p, _nothing, _says("null")), "provenance cannot be used"),
    "a base that is a number": (
        lambda p: _resave(p, _nothing, _says('{"base": 3}')),
        r"provenance cannot be used \(base",
    ),
    "under no list": (
        lambda p: _resave(p, _nothing, _says('{"under": 3}')),
        r"provenance cannot be used \(under",
    ),
    "under without a hash": (
        lambda p: _resave(p, _nothing, _says('{"under": [{"method": "uce"}]}')),
        r"cannot be used \(under.0.hash",
    ),
    "parts without a hash": (
        lambda p: _resave(p, _nothing, _says('{"parts": [{}]}')),
        r"provenance cannot be used \(parts.0.hash",
    ),
    "provenance cut off": (
        lambda p: _resave(p, _nothing, {"format": FORMAT, "provenance": '{"method": '}),
        "provenance",
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_file_that_is_no_good_patch_is_refused_in_one_line(patch, tmp_path, damage):
    spoil, words = DAMAGE[damage]
    path = tmp_path / "p.safetensors"
    patch.save(path)
    spoil(path)
    with pytest.raises(FileError, match=words) as caught:
        Patch.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_could_not_be_read_again_is_not_written(patch, tmp_path, value):
    name = next(iter(patch.tensors))
    with pytest.raises(
        PatchError, match=f"is not written: the patch has NaN or infinite values in {name}"
    ):
        Patch(dict(patch.tensors) | {name: torch.full_like(patch.tensors[name], value)}).save(
            tmp_path / "p.safetensors"
        )
    with pytest.raises(PatchError, match="is not written: the patch changes nothing"):
        Patch({}).save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ on and off


def test_undo_gives_the_model_back_bit_for_bit(make_model, patch):
    model = make_model()
    before = state_of(model)
    applied = patch.apply(model)
    after = state_of(model)
    assert {k for k, v in before.items() if not torch.equal(v, after[k])} == set(patch.tensors)
    assert all(torch.equal(after[k], v) for k, v in patch.tensors.items())
    applied.undo()
    same(state_of(model), before)


def test_a_with_block_takes_the_patch_off_also_when_it_fails(make_model, patch):
    model, during = make_model(), {}

    def fail_under_the_patch():
        with patch.apply(model):
            during.update(state_of(model))
            raise ConnectionError("pulled the plug")

    before = state_of(model)
    with pytest.raises(ConnectionError):
        fail_under_the_patch()
    assert all(torch.equal(during[k], v) for k, v in patch.tensors.items())
    same(state_of(model), before)


def test_patches_come_off_in_the_reverse_order(make_model, patch):
    model = make_model()
    before = state_of(model)
    first, second = (
        patch.apply(model),
        Patch({k: v + 1 for k, v in patch.tensors.items()}).apply(model),
    )
    second.undo()
    assert all(torch.equal(state_of(model)[k], v) for k, v in patch.tensors.items())
    first.undo()
    same(state_of(model), before)


def test_patches_come_off_in_any_order_and_each_once(make_model, patch):
    """What is under a patch when it comes off is what was there without it, not what lay under it when it was put on."""
    model = make_model()
    before = state_of(model)
    higher = Patch({k: v + 1 for k, v in patch.tensors.items()})
    first, second, third = (
        patch.apply(model),
        higher.apply(model),
        Patch({k: v + 2 for k, v in patch.tensors.items()}).apply(model),
    )
    second.undo()
    second.undo()
    first.undo()
    assert all(torch.equal(state_of(model)[k], v + 2) for k, v in patch.tensors.items())
    assert [one.patch for one in model.applied] == [third.patch]
    third.undo()
    same(state_of(model), before)
    with patch.apply(model) as again:
        again.undo()
        on = state_of(model)
        other = higher.apply(model)
    assert all(torch.equal(state_of(model)[k], v) for k, v in higher.tensors.items())
    other.undo()
    same(state_of(model), on)
    assert model.patches == []


def test_a_patch_that_fails_half_way_leaves_the_model_as_it_was(make_model, patch, monkeypatch):
    model, copied = make_model(), []
    before, copy_ = state_of(model), torch.Tensor.copy_

    def out_of_memory(self, *args, **more):
        copied.append(self)
        if len(copied) == 3:
            raise MemoryError("no room for the third")
        return copy_(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "copy_", out_of_memory)
    with pytest.raises(MemoryError):
        patch.apply(model)
    same(state_of(model), before)
    assert model.patches == []


@pytest.mark.parametrize(("value", "dtype"), [(1e5, torch.float16), (float("nan"), torch.float32)])
def test_values_that_the_model_cannot_hold_are_refused_and_change_nothing(make_model, value, dtype):
    model = make_model()
    model.pipeline.to(dtype)
    before, name = state_of(model), select_parameters(model.denoiser, "attn1")[0]
    wild = Patch({name: torch.full(before[name].shape, value)})
    with pytest.raises(PatchError, match=f"not finite as {str(dtype).removeprefix('torch.')}"):
        wild.apply(model)
    same(state_of(model), before)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_patch_knows_its_base_in_fewer_bits_and_no_other_model(tiny_folder, make_model, dtype):
    """`load --dtype fp16` is what users of a graphics card do: nothing to warn of."""
    made = UCE(erase=("red cube",)).apply(load(str(tiny_folder)))
    same, other = load(str(tiny_folder), dtype=dtype), make_model(9)
    assert made.provenance["base_rounded"][dtype] == same.hash
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.apply(same).undo()
        merge([made, made], overlap="last").check_compatible(same)
    other.pipeline.to({"fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    with pytest.warns(
        BaseMismatchWarning, match=r"has [0-9a-f]{12}: it puts"
    ):  # and no word of the type, which explains nothing here
        made.apply(other)


def test_a_base_that_has_patches_on_it_is_not_rounded_for_itself(make_model, patch):
    model = make_model()
    with patch.apply(model):
        assert model.rounded == {}
    assert model.rounded == make_model().rounded != {}
    with patch.apply(model):
        assert model.rounded == make_model().rounded


def test_a_model_of_another_type_is_not_taken_for_another_fine_tune_without_a_word(
    make_model, patch
):
    model = make_model()
    model.pipeline.to(torch.bfloat16)
    with pytest.warns(BaseMismatchWarning, match=r"loaded as bfloat16, which alone changes that"):
        patch.apply(model)


def test_the_models_hash_is_that_of_its_base_also_under_a_patch(make_model, patch):
    model = make_model()
    base = model.hash
    patch.apply(model)
    assert model.hash == base
    patch.apply(model)  # the same base: no warning, and warnings are errors


def test_a_patch_with_a_wrong_shape_is_refused_and_changes_nothing(make_model, patch):
    model = make_model()
    before, last = state_of(model), list(patch.tensors)[-1]
    with pytest.raises(PatchError, match="in the patch and") as caught:
        Patch(dict(patch.tensors) | {last: torch.zeros(3, 5)}).apply(model)
    assert last in str(caught.value)
    assert "(3, 5)" in str(caught.value)
    same(state_of(model), before)


def test_a_patch_with_a_strange_name_is_refused_and_changes_nothing(make_model, patch):
    model = make_model()
    before = state_of(model)
    with pytest.raises(PatchError, match=r"it has no weight transformer.w"):
        Patch(dict(patch.tensors) | {"transformer.w": torch.zeros(3)}).apply(model)
    same(state_of(model), before)


def test_a_wider_model_refuses_the_patch(make_model, patch):
    with pytest.raises(PatchError, match="does not fit the model 'wide'"):
        patch.apply(make_model(name="wide", channels=24))


def test_another_base_of_the_same_shape_is_warned_about(make_model, patch):
    model = make_model(5)
    with pytest.warns(BaseMismatchWarning, match="measure the result") as caught:
        applied = patch.apply(model)
    assert len(caught) == 1
    assert all(torch.equal(model.denoiser.get_parameter(k), v) for k, v in patch.tensors.items())
    applied.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Patch(patch.tensors).apply(model)  # a patch that does not say what it was made on


def test_provenance_is_plain_json(patch):
    assert json.loads(json.dumps(dict(patch.provenance))) == patch.provenance


def test_a_patch_of_another_family_is_refused_though_every_shape_fits(make_model, patch):
    """Self-attention of SD 1.x and 2.x has equal shapes and unequal heads."""
    model, other = make_model(), make_model()
    other.denoiser.register_to_config(attention_head_dim=(4, 4))
    made = Patch(patch.tensors, dict(patch.provenance) | {"family": model.family})
    made.apply(model).undo()
    before = state_of(other)
    with pytest.raises(
        PatchError,
        match=r"it was made for another family \(UNet2DConditionModel, heads \[2, 2\], text 32\)",
    ):
        made.apply(other)
    same(state_of(other), before)


def test_one_number_of_heads_means_every_level(make_model):
    model = make_model()
    said = model.family
    model.denoiser.register_to_config(attention_head_dim=(2, 2))
    assert model.family == said
