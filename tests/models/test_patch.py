"""Patches: files, apply and undo, and errors."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from safegen.core.errors import FileError, PatchError
from safegen.edits.uce import UCE
from safegen.models.checkpoint.metadata import PATCH_FORMAT, PatchMetadata
from safegen.models.loading import load
from safegen.models.selectors import select_parameters
from safegen.patches.patch import BaseMismatchWarning, Patch


@pytest.fixture(scope="module")
def patch(tiny_model):
    g, own = torch.Generator().manual_seed(0), dict(tiny_model.denoiser.named_parameters())
    tensors = {
        n: torch.randn(own[n].shape, generator=g)
        for n in select_parameters(tiny_model.denoiser, "attn1")
    }
    return Patch(
        tensors,
        PatchMetadata(method="random", base=tiny_model.hash, settings={"größe": 1.5, "none": None}),
    )


def state_of(model):
    return {k: v.detach().clone() for k, v in model.denoiser.state_dict().items()}


def same(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) and v.dtype == b[k].dtype for k, v in a.items())


# ------------------------------------------------------------ files


def test_a_patch_round_trips_through_its_file(patch, tmp_path):
    patch.save(tmp_path / "deep" / "p.safetensors")
    found = Patch.load(tmp_path / "deep" / "p.safetensors")
    same(dict(found.tensors), dict(patch.tensors))
    assert found.metadata == patch.metadata
    assert found.hash == patch.hash
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["p.safetensors"]


def test_a_patch_is_a_plain_safetensors_file(patch, tmp_path):
    patch.save(tmp_path / "p.safetensors")
    same(load_file(tmp_path / "p.safetensors"), dict(patch.tensors))


def test_the_hash_ignores_the_order_of_tensors(patch):
    tensors = dict(patch.tensors)
    assert Patch(dict(reversed(tensors.items()))).hash == patch.hash
    first = next(iter(tensors))
    assert Patch(tensors | {first: tensors[first] + 1}).hash != patch.hash
    assert Patch({("x" + k if k == first else k): v for k, v in tensors.items()}).hash != patch.hash


def test_an_existing_output_is_not_overwritten(patch, tmp_path):
    out = tmp_path / "p.safetensors"
    out.write_text("mine")
    with pytest.raises(FileError, match="already exists"):
        patch.save(out)
    assert out.read_text() == "mine"
    with pytest.raises(FileError, match="must be a file, got a folder"):
        patch.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_an_unwritable_output_is_refused_in_one_line(patch, tmp_path):
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
        metadata=header if header is not None else {"format": PATCH_FORMAT, "metadata": "{}"},
    )


def _nan(value):
    def change(tensors):
        next(iter(tensors.values())).view(-1)[3] = value

    return change


def _metadata(text):
    return {"format": PATCH_FORMAT, "metadata": text}


def _nothing(tensors):
    pass


DAMAGE = {
    "missing": (lambda p: p.unlink(), "does not exist"),
    "truncated": (_cut, "not a readable safetensors file"),
    "empty": (lambda p: p.write_bytes(b""), "not a readable safetensors file"),
    "a pickle": (lambda p: torch.save({"w": torch.zeros(1)}, p), "not a readable safetensors file"),
    "other safetensors": (
        lambda p: _resave(p, _nothing, {"format": "pt"}),
        "must be a safegen patch",
    ),
    "safetensors without a header": (
        lambda p: _resave(p, _nothing, {}),
        "must be a safegen patch, .*, got a file that states none",
    ),
    "NaN": (lambda p: _resave(p, _nan(float("nan"))), "NaN or infinite"),
    "infinite": (lambda p: _resave(p, _nan(float("inf"))), "NaN or infinite"),
    "no tensors": (lambda p: _resave(p, dict.clear), "is a safegen patch without tensors"),
    "no metadata": (lambda p: _resave(p, _nothing, {"format": PATCH_FORMAT}), "metadata"),
    "metadata no object": (
        lambda p: _resave(p, _nothing, _metadata("[]")),
        "metadata of .*: value must be a valid dictionary",
    ),
    "metadata null": (
        lambda p: _resave(p, _nothing, _metadata("null")),
        "metadata of .*: value must be a valid dictionary",
    ),
    "a base that is a number": (
        lambda p: _resave(p, _nothing, _metadata('{"base": 3}')),
        "metadata of .*: base",
    ),
    "parents no list": (
        lambda p: _resave(p, _nothing, _metadata('{"parents": 3}')),
        "metadata of .*: parents",
    ),
    "parents without a hash": (
        lambda p: _resave(p, _nothing, _metadata('{"parents": [{"method": "uce"}]}')),
        r"metadata of .*: parents\.0\.hash",
    ),
    "parts without a hash": (
        lambda p: _resave(p, _nothing, _metadata('{"parts": [{}]}')),
        r"metadata of .*: parts\.0\.hash",
    ),
    "metadata cut off": (
        lambda p: _resave(p, _nothing, {"format": PATCH_FORMAT, "metadata": '{"method": '}),
        "metadata",
    ),
}


@pytest.mark.parametrize("damage", sorted(DAMAGE))
def test_a_damaged_patch_is_refused_in_one_line(patch, tmp_path, damage):
    spoil, words = DAMAGE[damage]
    path = tmp_path / "p.safetensors"
    patch.save(path)
    spoil(path)
    with pytest.raises(FileError, match=words) as caught:
        Patch.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_unreadable_patch_is_not_written(patch, tmp_path, value):
    name = next(iter(patch.tensors))
    with pytest.raises(
        PatchError, match=f"is not written: the patch has NaN or infinite values in {name}"
    ):
        Patch(dict(patch.tensors) | {name: torch.full_like(patch.tensors[name], value)}).save(
            tmp_path / "p.safetensors"
        )
    with pytest.raises(PatchError, match="is not written: the patch has no tensors"):
        Patch({}).save(tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------ on and off


def test_undo_restores_the_model_bit_for_bit(make_model, patch):
    model = make_model()
    before = state_of(model)
    applied = patch.apply(model)
    after = state_of(model)
    assert {k for k, v in before.items() if not torch.equal(v, after[k])} == set(patch.tensors)
    assert all(torch.equal(after[k], v) for k, v in patch.tensors.items())
    applied.undo()
    same(state_of(model), before)


def test_a_patched_network_computes_with_the_layers_and_layouts_of_its_base(make_model, patch):
    """So an image costs what one of the base costs; benchmarks/generation.py measures it."""
    model = make_model()

    def work():
        modules = [
            (type(m), len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m))
            for m in model.denoiser.modules()
        ]
        tensors = [
            (t.data_ptr(), t.stride(), t.dtype, t.requires_grad)
            for t in model.denoiser.parameters()
        ]
        return modules, tensors

    before = work()
    with patch.apply(model):
        assert work() == before
    assert work() == before


def test_the_context_manager_undoes_the_patch_on_errors(make_model, patch):
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


def test_patches_are_undone_in_reverse_order(make_model, patch):
    model = make_model()
    before = state_of(model)
    first, second = (
        patch.apply(model),
        Patch({k: v + 0.1 for k, v in patch.tensors.items()}).apply(model),
    )
    second.undo()
    assert all(torch.equal(state_of(model)[k], v) for k, v in patch.tensors.items())
    first.undo()
    same(state_of(model), before)


def test_patches_are_undone_in_any_order(make_model, patch):
    """Undoing a patch restores the values without it, even if another is applied on top."""
    model = make_model()
    before = state_of(model)
    higher = Patch({k: v + 0.1 for k, v in patch.tensors.items()})
    first, second, third = (
        patch.apply(model),
        higher.apply(model),
        Patch({k: v + 0.2 for k, v in patch.tensors.items()}).apply(model),
    )
    second.undo()
    second.undo()
    first.undo()
    assert all(torch.equal(state_of(model)[k], v + 0.2) for k, v in patch.tensors.items())
    assert model.applied_patches == [third]
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


def test_a_failed_apply_restores_the_model(make_model, patch, monkeypatch):
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
def test_values_that_overflow_the_models_dtype_are_refused(make_model, value, dtype):
    model = make_model()
    model.pipeline.to(dtype)
    before, name = state_of(model), select_parameters(model.denoiser, "attn1")[0]
    wild = Patch({name: torch.full(before[name].shape, value)})
    name_of = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    with pytest.raises(PatchError, match=f"must be finite in {name_of}"):
        wild.apply(model)
    same(state_of(model), before)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_base_loaded_in_half_precision_is_warned_about(tiny_folder, dtype):
    """Rounding changes the weights, so that the hash cannot tell the base from another model."""
    patch = UCE(erase=("red cube",)).apply(load(str(tiny_folder)))
    rounded = load(str(tiny_folder), dtype=dtype)
    with pytest.warns(
        BaseMismatchWarning, match=f"is loaded as {dtype}, which alone changes the hash"
    ):
        patch.apply(rounded).undo()
    made_on_rounded = UCE(erase=("red cube",)).apply(rounded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made_on_rounded.apply(load(str(tiny_folder), dtype=dtype))


def test_a_base_stored_as_fp16_has_one_hash_in_fp16_and_fp32(make_model, tmp_path):
    from safegen.models.checkpoint.diffusers_folder import save_folder

    model = make_model()
    model.pipeline.to(torch.float16)
    save_folder(model, tmp_path / "half")
    hashes = {load(tmp_path / "half", dtype=dtype).hash for dtype in ("fp32", "fp16")}
    assert hashes == {model.hash}
    assert load(tmp_path / "half", dtype="bf16").hash != model.hash


def test_the_hash_is_of_the_weights_without_patches(make_model, patch):
    model = make_model()
    with patch.apply(model):
        assert model.hash == make_model().hash != model.hash_denoiser()


def test_the_hash_stays_that_of_the_base(make_model, patch):
    model = make_model()
    base = model.hash
    patch.apply(model)
    assert model.hash == base
    patch.apply(model)  # warnings are errors


def test_a_patch_with_a_wrong_shape_is_refused(make_model, patch):
    model = make_model()
    before, last = state_of(model), list(patch.tensors)[-1]
    with pytest.raises(PatchError, match="in the patch and") as caught:
        Patch(dict(patch.tensors) | {last: torch.zeros(3, 5)}).apply(model)
    assert last in str(caught.value)
    assert "(3, 5)" in str(caught.value)
    same(state_of(model), before)


def test_a_patch_with_an_unknown_weight_is_refused(make_model, patch):
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
    with pytest.warns(BaseMismatchWarning, match="Measure the result") as caught:
        applied = patch.apply(model)
    assert len(caught) == 1
    assert all(torch.equal(model.denoiser.get_parameter(k), v) for k, v in patch.tensors.items())
    applied.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Patch(patch.tensors).apply(model)  # a patch without a base


def test_metadata_is_plain_json(patch):
    assert json.loads(json.dumps(patch.metadata.to_json())) == patch.metadata.to_json()


def test_a_patch_of_another_family_is_refused_even_if_shapes_fit(make_model, patch):
    """Self-attention of SD 1.x and 2.x has equal shapes and unequal heads."""
    model, other = make_model(), make_model()
    other.denoiser.register_to_config(attention_head_dim=(4, 4))
    made = Patch(patch.tensors, patch.metadata.model_copy(update={"family": model.family}))
    made.apply(model).undo()
    before = state_of(other)
    with pytest.raises(
        PatchError,
        match=r"it was made for another family \(UNet2DConditionModel, heads \[2, 2\], text 32\)",
    ):
        made.apply(other)
    same(state_of(other), before)


def test_family_expands_one_number_of_heads(make_model):
    model = make_model()
    family = model.family
    model.denoiser.register_to_config(attention_head_dim=(2, 2))
    assert model.family == family
